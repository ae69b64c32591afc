"""Copies of matrices, whole or in parts, with gradients of their own: the step along the averaged momentum."""

from functools import cache

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from worlds import SIZE, distance, matrix, reduced, results_of, whole

from orthlin.errors import ArrayTypeError, NonFiniteError, OptionError
from orthlin.torch import LowRankMuon

WORLDS = (4, 2)
STEPS = 3
WARM = {"rank": 4, "tail": 0.0}
PAIR, N = [(37, 20), (37, 20)], 2
# A step of N matrices m x n at rank r: m r numbers in double precision, a square, whether a gradient is there, and
# moves; r n in single.
LOW = [N * 8 * (37 * 4 + 3), N * 4 * 4 * 20]


@cache
def mesh_of(world, ndim):
    """Two copies in parts.  Once: torch's caches take equal meshes for one, whose groups are not the same."""
    names = ("copies", "parts", "others")[:ndim]
    return init_device_mesh("cpu", (2, world // 2, 1)[:ndim], mesh_dim_names=names)


class Case:
    """An optimizer of parameters, the bytes of each collective of a step, and how parts lie where there are two copies.

    Those bytes are a function of the rank where parts differ.
    """

    def __init__(self, shapes, sums, cut=None, absent=False, dtype=torch.float32, **options):
        self.shapes, self.sums, self.cut, self.absent, self.dtype = shapes, sums, cut, absent, dtype
        self.options = {"lr": 0.1, **options}

    def place(self, world):
        """Group of the copies, its size, and how to cut a tensor."""
        if self.cut is None:
            return dist.group.WORLD, world, lambda x: x
        mesh = mesh_of(world, 1 + len(self.cut))
        parts = mesh[mesh.mesh_dim_names[1:]]
        return mesh["copies"].get_group(), 2, lambda x: distribute_tensor(x, parts, self.cut)

    def gradients(self, step, copies, noise=0.0, draw=0):
        """Gradients of every copy, which have not much in common; few bits of half precision, that sums be exact."""
        found = []
        for copy in range(copies):
            mine = []
            for i, shape in enumerate(self.shapes):
                seed = 100 * step + 10 * copy + i
                x = matrix(shape, 1000 + 100 * step + i) + matrix(shape, 2000 + seed)
                if self.dtype.is_complex:
                    x = x * torch.exp(1j * matrix(shape, 3000 + seed))
                g = torch.Generator().manual_seed(seed + 7 * draw)
                off = torch.randn(shape, generator=g, dtype=torch.float64)
                x = x + noise * x.abs().square().mean().sqrt() * off
                x = (16 * x).round() / 16 if self.dtype == torch.bfloat16 else x
                if self.absent and self.cut and i == 1:  # one part of one copy has a gradient
                    axis = self.cut[0].dim
                    x.narrow(axis, -(-shape[axis] // 2), shape[axis] // 2).zero_()
                there = not self.absent or i == 0 or (i == 1 and copy == 0) or (i == 2 and step == 0)
                mine.append(x.to(self.dtype) if there else None)
            found.append(mine)
        return found

    def optimizer(self, group=None, lie=lambda x: x, noise=0.0, draw=0):
        params = []
        for i, shape in enumerate(self.shapes):
            off = torch.randn(shape, generator=torch.Generator().manual_seed(i + 7 * draw), dtype=torch.float64)
            params.append(nn.Parameter(lie((matrix(shape, i) * (1 + noise * off)).to(self.dtype))))
        return params, LowRankMuon(params, replicate_group=group, **self.options)

    def run(self, copies, group=None, lie=lambda x: x, steps=range(STEPS), params=None, optimizer=None, **noise):
        """Parameters and optimizer of a copy, or of one process with the averages of all gradients."""
        if params is None:
            params, optimizer = self.optimizer(group, lie, **noise)
        for step in steps:
            every = self.gradients(step, copies, **noise)
            given = zip(*every, strict=True) if group is None else [[g] for g in every[dist.get_rank(group)]]
            for p, gs in zip(params, given, strict=True):
                there = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in gs if g is not None]
                p.grad = lie((sum(there) / (1 if group else copies)).to(p.dtype)) if there else None
                if isinstance(p.grad, DTensor) and not p.grad.to_local().any():
                    p.grad = None
            optimizer.step()
        return params, optimizer


def low(rows, columns, r, *, by_rows=True, c=1):
    """Bytes of two copies of N matrices in two parts, of which this many rows and columns are here."""
    copies = [N * 8 * (c * rows * r + 3), N * 4 * c * r * columns]
    if by_rows:
        return [copies[0], N * 8 * (c * r * r + 3), N * 4 * c * (r * r + r * columns), copies[1]]
    return [N * 8 * (c * rows * r + 2), *copies, N * 8 * c * r * r]


def owned(rows, n, other, *, warm=0, size=4):
    """Bytes of a mean of parts of rows, and of the exchange of two whole matrices, of which each process has one."""
    return [N * size * (rows * n + 2), size * (rows * n + 2), size * (other * n + 3 + warm * n)]


def halves(call, *shares):
    """Bytes by rank, of uneven parts."""
    return lambda rank: call(*(shares if rank % 2 == 0 else shares[::-1]))


ROWS, COLUMNS = (Shard(0),), (Shard(1),)
CASES = {
    "warm": Case(PAIR, LOW, **WARM),
    "paper": Case(PAIR, LOW, warm_start=False, tol=None, **WARM),
    "no momentum": Case(PAIR, [LOW[0] - 8 * N, LOW[1]], momentum=0.0, nesterov=False, **WARM),
    "no nesterov": Case(PAIR, LOW, nesterov=False, **WARM),
    "error feedback": Case(PAIR, LOW, nesterov=False, error_feedback=True, **WARM),
    "cautious": Case(PAIR, LOW, cautious=True, **WARM),
    "wide": Case([(12, 40)] * N, [N * 8 * (12 * 4 + 3), N * 4 * 4 * 40], **WARM),
    "two shapes": Case(
        [*PAIR, (12, 40)], [*LOW, 8 * (12 * 4 + 3), 4 * 4 * 40], **WARM
    ),
    "kernels": Case([(18, 4, 3, 3)], [8 * (18 * 4 + 3), 4 * 4 * 36], **WARM),
    "complex": Case(PAIR, [N * 8 * (2 * 37 * 4 + 3), 2 * LOW[1]], dtype=torch.complex64, **WARM),
    "masters": Case(PAIR, LOW, dtype=torch.bfloat16, **WARM),
    "rank that changes": Case(PAIR, None, **{**WARM, "rank": lambda step: 3 + step}),
    "way that changes": Case(PAIR, None, **{**WARM, "rank": lambda step: (4, 12, 20, 4)[step]}),
    "absent": Case([(37, 20)] * 3, [4, *(3 * x // N for x in LOW)], absent=True, nonfinite="raise", **WARM),
    "averaged: absent": Case([(37, 4)] * 3, [3 * 4 * (37 * 4 + 2)], absent=True, **WARM),
    "averaged: rank": Case([(37, 4)] * 2, [2 * 4 * (37 * 4 + 2)], **WARM),
    "averaged: half rank": Case(PAIR, [N * 4 * (37 * 20 + 2)], **{**WARM, "rank": 10}),
    "averaged: half rank, error feedback": Case(
        PAIR, [N * 4 * (37 * 20 + 2)], nesterov=False, error_feedback=True, **{**WARM, "rank": 10}
    ),
    "averaged: double": Case(PAIR, [N * 8 * (37 * 20 + 2)], dtype=torch.float64, tol=None, **WARM),
    "averaged: complex": Case([(37, 4)], [8 * 37 * 4 + 4 * 2], dtype=torch.complex64, **WARM),
    "rows": Case(PAIR, halves(lambda a, _: low(a, 20, 4), 19, 18), ROWS, **WARM),
    "rows, paper": Case(PAIR, halves(lambda a, _: low(a, 20, 4), 19, 18), ROWS, warm_start=False, tol=None, **WARM),
    "rows, error feedback": Case(
        PAIR, halves(lambda a, _: low(a, 20, 4), 19, 18), ROWS, nesterov=False, error_feedback=True, **WARM
    ),
    "rows, masters": Case(PAIR, halves(lambda a, _: low(a, 20, 4), 19, 18), ROWS, dtype=torch.bfloat16, **WARM),
    "rows, complex": Case(PAIR, halves(lambda a, _: low(a, 20, 4, c=2), 19, 18), ROWS, dtype=torch.complex64, **WARM),
    "rows, absent": Case([(37, 20)] * 3, None, ROWS, absent=True, nonfinite="raise", **WARM),
    "columns": Case(PAIR, low(37, 10, 4, by_rows=False), COLUMNS, **WARM),
    "columns, absent": Case([(37, 20)] * 3, None, COLUMNS, absent=True, **WARM),
    "both sides": Case(PAIR, None, ROWS + COLUMNS, **WARM),
    "owners: rank": Case([(37, 4)] * N, halves(lambda a, b: owned(a, 4, b), 19, 18), ROWS, **WARM),
    "owners: half rank": Case(
        PAIR, halves(lambda a, b: owned(a, 20, b, warm=10), 19, 18), ROWS, **{**WARM, "rank": 10}
    ),
    "owners: double": Case(
        PAIR, halves(lambda a, b: owned(a, 20, b, warm=4, size=8), 19, 18), ROWS, dtype=torch.float64, tol=None, **WARM
    ),
    "owners: absent": Case([(37, 4)] * 3, None, ROWS, absent=True, **WARM),
    "owners: way that changes": Case(PAIR, None, ROWS, **{**WARM, "rank": lambda step: (4, 12, 20, 4)[step]}),
    "gathered: kernels": Case([(18, 4, 3, 3)], None, COLUMNS, **WARM),
    "gathered: absent": Case([(18, 4, 3, 3)] * 3, None, COLUMNS, absent=True, **WARM),
}  # fmt: skip


def state_of(params, optimizer):
    return [
        {"p": whole(p.detach()), **{key: whole(x) for key, x in optimizer.state[p].items()}} for p in params
    ]  # fmt: skip


def run(case, world, sums, gathers):
    """Whole parameters and state of a copy after some steps, and the bytes that went, and those foretold.

    Two processes do it twice.
    """
    found = []
    group, copies, lie = case.place(world)
    for _ in range(2 if world == 2 else 1):
        params, optimizer = case.optimizer(group, lie)
        sent, plans = [], []
        for step in range(STEPS):
            sums.clear()
            gathers.clear()
            plans.append([(row.way, row.collectives, row.sent) for row in optimizer.explain().rows])
            case.run(copies, group, lie, [step], params, optimizer)
            sent.append((list(sums), list(gathers)))
        sums.clear()
        optimizer.state_dict()
        saved = list(sums)
        found.append(state_of(params, optimizer))
    momenta = [optimizer.state[p]["momentum"] for p in params if "momentum" in optimizer.state[p]]
    momenta = [x.to_local() if isinstance(x, DTensor) else x for x in momenta]
    kept = [x.numel() * x.element_size() for x in momenta]
    return {"runs": found, "sent": sent, "saved": saved, "momenta": kept, "plans": plans}


def resumed(world, folder):
    """A run that is saved on its way, and one that has loaded that."""
    case = CASES["warm"]
    params, optimizer = case.run(world, dist.group.WORLD, steps=range(2))
    saved = optimizer.state_dict()
    if dist.get_rank() == 0:
        torch.save({"optimizer": saved, "params": [p.detach() for p in params]}, f"{folder}/saved{world}")
    dist.barrier()
    case.run(world, dist.group.WORLD, steps=range(2, 4), params=params, optimizer=optimizer)
    others, other = case.optimizer(dist.group.WORLD)
    loaded = torch.load(f"{folder}/saved{world}", weights_only=True)
    for p, x in zip(others, loaded["params"], strict=True):
        p.data.copy_(x)
    other.load_state_dict(loaded["optimizer"])
    case.run(world, dist.group.WORLD, steps=range(2, 4), params=others, optimizer=other)
    return [state_of(params, optimizer), state_of(others, other)]


def odd(world, cut=None, **options):
    """What gradients do that one process alone sees not to be finite, and a rate of zero."""
    found = {}
    for nonfinite in ("skip", "raise"):
        case = Case(PAIR, None, cut, nonfinite=nonfinite, **{**WARM, **options})
        group, copies, lie = case.place(world)
        params, optimizer = case.optimizer(group, lie)
        before = [p.detach().clone() for p in params]
        for p, x in zip(params, case.gradients(0, copies)[dist.get_rank(group)], strict=True):
            p.grad = lie(x)
        if dist.get_rank() == 1:
            (params[0].grad if cut is None else params[0].grad.to_local())[3, 4] = torch.nan
        refused = False
        try:
            optimizer.step()
        except NonFiniteError:
            refused = True
        moved = [bool((whole(p.detach()) != whole(x)).any()) for p, x in zip(params, before, strict=True)]
        found[nonfinite] = refused, moved
    optimizer.param_groups[0]["lr"] = 0.0
    for p in params:
        p.grad = torch.ones_like(p) if dist.get_rank() == 1 else None
    optimizer.step()
    return found, optimizer.param_groups[0]["step"]


def refused(world):
    """Whether a mesh with the copies themselves on it is refused."""
    mesh = init_device_mesh("cpu", (world,))
    try:
        LowRankMuon([nn.Parameter(distribute_tensor(torch.ones(37, 20), mesh, ROWS))], replicate_group=mesh, **WARM)
    except ArrayTypeError as error:
        return "replicate_group" in str(error)
    return False


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 37), nn.LayerNorm(37), nn.Tanh(), nn.Linear(37, 9))


def batch(step):
    return (matrix((16, n), 10 * step + n).float() for n in (20, 9))


def train(model, optimizer, part=slice(None), noise=0.0, steps=range(STEPS), average=lambda model: None):
    for step in steps:
        x, y = batch(step)
        (model(x[part]) - y[part]).square().mean().backward()
        for p in model.parameters() if noise else ():
            off = torch.randn(p.shape, generator=torch.Generator().manual_seed(step + p.numel()))
            p.grad.add_(noise * p.grad.square().mean().sqrt() * off)
        average(model)
        optimizer.step()
        optimizer.zero_grad()
    return [whole(p.detach()) for p in model.parameters()]


def options(group=None):
    return {"lr": 0.05, "adamw": {"eps": 0.01}, "replicate_group": group, **WARM}


def under_ddp(world):
    """Training where DDP averages the gradients of everything but matrices."""
    model, rank = net(), dist.get_rank()
    matrices = [name for name, p in model.named_parameters() if p.ndim > 1]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, matrices)
    wrapped = DistributedDataParallel(model)
    optimizer = LowRankMuon(wrapped.named_parameters(), **options(init_device_mesh("cpu", (world,))))
    return train(wrapped, optimizer, slice(16 * rank // world, 16 * (rank + 1) // world))


def load(model, optimizer, where):
    """Continue from a checkpoint of torch.distributed."""
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(states, checkpoint_id=where, no_dist=not dist.is_initialized())
    set_state_dict(
        model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"]
    )  # fmt: skip


def under_hsdp(folder):
    """Training of copies in parts, where a loop averages the gradients of everything but matrices.

    The weights after a save and some steps more, and those of another that has loaded it.
    """
    mesh, rank, ends = mesh_of(4, 2), dist.get_rank(), []
    group, here = mesh["copies"].get_group(), slice(4 * rank, 4 * rank + 4)

    def average(model):
        for p in model.parameters():
            if p.ndim == 1:
                dist.all_reduce(p.grad.to_local(), dist.ReduceOp.AVG, group=group)

    for again in (False, True):
        model = net()
        for layer in (model[0], model[3], model):
            fully_shard(layer, mesh=mesh["parts"])
        optimizer = LowRankMuon(model.named_parameters(), **options(group))
        if again:
            load(model, optimizer, f"{folder}/hsdp")
        else:
            train(model, optimizer, here, steps=range(2), average=average)
            states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            dcp.save(states, checkpoint_id=f"{folder}/hsdp")
        ends.append(train(model, optimizer, here, steps=range(2, STEPS), average=average))
    return ends


ODD = {"odd": {}, "odd, averaged": {"rank": 20}}
ODD_PARTS = {"odd, rows": {"cut": ROWS}, "odd, owners": {"cut": ROWS, "rank": 20}}


def work(world, folder):
    sums, gathers = [], []
    reduced(sums, gathers)
    found = {name: run(case, world, sums, gathers) for name, case in CASES.items() if world == 4 or not case.cut}
    found |= {name: odd(world, **given) for name, given in (ODD | ODD_PARTS if world == 4 else ODD).items()}
    found |= {"hsdp": under_hsdp(folder)} if world == 4 else {}
    return found | {"resumed": resumed(world, folder), "ddp": under_ddp(world), "refused": refused(world)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("copies"))


@pytest.fixture(scope="module")
def results(folder):
    """What every process of every world has found."""
    return results_of(work, WORLDS, folder)


def condition(run, expected):
    """The most that weights change, relative to a change of all gradients."""
    return max(distance(run(noise=SIZE, draw=i), expected) for i in range(4)) / SIZE


def eps(dtype):
    return torch.finfo(dtype).eps


every = pytest.mark.parametrize(
    ("name", "world"), [(name, world) for name, case in CASES.items() for world in WORLDS if world == 4 or not case.cut]
)


@every
def test_update_is_that_of_averaged_gradients(results, name, world):
    case = CASES[name]
    copies = 2 if case.cut else world
    params, optimizer = case.run(copies)
    expected = state_of(params, optimizer)
    values = [x["p"] for x in expected]
    cond = condition(lambda **noise: [p.detach() for p in case.run(copies, **noise)[0]], values)
    for result in results[world]:
        states = result[name]["runs"][0]
        assert distance([x["p"] for x in states], values) <= 4 * eps(case.dtype) * cond
        for mine, others in zip(states, expected, strict=True):
            assert list(mine) == list(others)
            for key, value in others.items():
                assert mine[key].shape == value.shape
                assert mine[key].dtype == value.dtype
                assert distance([mine[key]], [value]) <= 4 * eps(torch.float32) * cond / case.options["lr"]


@every
def test_runs_and_copies_agree_bit_for_bit(results, name, world):
    first = results[world][0][name]["runs"][0]
    for result in results[world]:
        for states in result[name]["runs"]:
            for mine, others in zip(states, first, strict=True):
                assert all(torch.equal(mine[key], others[key]) for key in others)


@every
def test_bytes_are_those_foretold(results, name, world):
    case = CASES[name]
    for rank, result in enumerate(results[world]):
        found = result[name]
        wanted = case.sums(rank) if callable(case.sums) else case.sums
        raised = "nonfinite" in case.options
        for (sums, gathers), rows in zip(found["sent"], found["plans"], strict=True):
            assert wanted is None or sums == wanted
            assert all("gathered" in way or calls <= 2 + 2 * len(case.cut or ()) for way, calls, _ in rows)
            if any("gathered" in way for way, *_ in rows):
                flags = [4 * len(case.shapes)] + [4] * raised  # who has a gradient, of all that is gathered
            else:
                flags = [4] * raised * (1 if case.cut is None else 2)
            assert sum(size for *_, size in rows) == sum(sums) + sum(gathers) - sum(flags)
            assert sum(calls for _, calls, _ in rows) == len(sums) + len(gathers) - len(flags)
        assert found["saved"] == found["momenta"]


@pytest.mark.parametrize("world", WORLDS)
def test_a_saved_run_goes_on(results, folder, world):
    case = CASES["warm"]
    for result in results[world]:
        going_on, loaded = result["resumed"]
        for mine, others in zip(loaded, going_on, strict=True):
            assert all(torch.equal(mine[key], others[key]) for key in others)
    # on one process, without any group
    params, optimizer = case.optimizer()
    saved = torch.load(f"{folder}/saved{world}", weights_only=True)
    for p, x in zip(params, saved["params"], strict=True):
        p.data.copy_(x)
    optimizer.load_state_dict(saved["optimizer"])
    case.run(world, steps=range(2, 4), params=params, optimizer=optimizer)
    values = [x["p"] for x in results[world][0]["resumed"][0]]
    cond = condition(lambda **noise: [p.detach() for p in case.run(world, steps=range(4), **noise)[0]], values)
    assert distance([p.detach() for p in params], values) <= 4 * eps(torch.float32) * cond


@pytest.mark.parametrize("world", WORLDS)
def test_odd_gradients_are_seen_by_all(results, world):
    for result in results[world]:
        for name in ODD | ODD_PARTS if world == 4 else ODD:
            found, steps = result[name]
            assert steps == 1
            assert found == {"skip": (False, [False, True]), "raise": (True, [False, False])}
        assert result["refused"]


@pytest.mark.parametrize("world", WORLDS)
def test_training_under_ddp(results, world):
    model = net()
    expected = train(model, LowRankMuon(model.named_parameters(), **options()))

    def noisy(noise, draw):
        model = net()
        return train(model, LowRankMuon(model.named_parameters(), **options()), noise=noise * (-1) ** draw)

    # Gradients, averages of 16 rows in another order, differ by some eps of their own size before any step does.
    for result in results[world]:
        assert distance(result["ddp"], expected) <= 16 * eps(torch.float32) * condition(noisy, expected)
        assert all(map(torch.equal, result["ddp"], results[world][0]["ddp"]))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_training_of_copies_in_parts(results, folder):
    def run(noise=0.0, draw=0):
        model = net()
        return train(model, LowRankMuon(model.named_parameters(), **options()), noise=noise * (-1) ** draw)

    expected = run()
    bound = 16 * eps(torch.float32) * condition(run, expected)
    for result in results[4]:
        ends = result["hsdp"]
        assert all(map(torch.equal, *ends))
        assert all(map(torch.equal, ends[0], results[4][0]["hsdp"][0]))
        assert distance(ends[0], expected) <= bound
    model = net()
    optimizer = LowRankMuon(model.named_parameters(), **options())
    load(model, optimizer, f"{folder}/hsdp")
    assert distance(train(model, optimizer, steps=range(2, STEPS)), expected) <= bound


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


REFUSED = {
    "tail": {"tail": "auto"},
    "n_iter": {"n_iter": 1},
    "sketch": {"sketch": "columns", "warm_start": False},
    "scale": {"scale": "nuclear"},
    "diagnostics": {"diagnostics": True},
    "capturable": {"capturable": True},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_the_average_itself_is_refused_by_name(alone, name):
    p = nn.Parameter(matrix((37, 20), 0).float())
    with pytest.raises(OptionError, match=name):
        LowRankMuon([p], replicate_group=alone, **{**WARM, **REFUSED[name]})
    optimizer = LowRankMuon([p], replicate_group=alone, **WARM)
    optimizer.param_groups[0].update(REFUSED[name])
    p.grad, before = torch.ones_like(p), p.detach().clone()
    with pytest.raises(OptionError, match=name):
        optimizer.step()
    assert torch.equal(p, before)
    LowRankMuon([{"params": [p], "algorithm": "adamw"}], replicate_group=alone, **{**WARM, **REFUSED[name]})


def test_groups_and_tensors_are_of_the_right_kind(alone):
    p = nn.Parameter(matrix((37, 20), 0).float())
    mesh = init_device_mesh("cpu", (1, 1))
    for given in (1, "world", mesh):
        with pytest.raises(OptionError, match="replicate_group"):
            LowRankMuon([p], replicate_group=given, **WARM)


def test_a_world_of_one_is_one_process(alone):
    case = CASES["warm"]
    params, _ = case.run(1)
    others, _ = case.run(1, alone)
    values = [p.detach() for p in params]
    cond = condition(lambda **noise: [p.detach() for p in case.run(1, **noise)[0]], values)
    assert distance([whole(p.detach()) for p in others], values) <= 4 * eps(torch.float32) * cond
