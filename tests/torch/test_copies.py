"""Copies of matrices with gradients of their own: two averaged products make the step along the averaged momentum."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
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


class Case:
    """An optimizer of parameters, and the bytes of each collective of a step."""

    def __init__(self, shapes, sums, absent=False, dtype=torch.float32, **options):
        self.shapes, self.sums, self.absent, self.dtype = shapes, sums, absent, dtype
        self.options = {"lr": 0.1, **options}

    def gradients(self, step, world, noise=0.0, draw=0):
        """Gradients of every copy, which have not much in common; few bits of half precision, that sums be exact."""
        found = []
        for copy in range(world):
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
                there = not self.absent or i == 0 or (i == 1 and copy == 0) or (i == 2 and step == 0)
                mine.append(x.to(self.dtype) if there else None)
            found.append(mine)
        return found

    def optimizer(self, group=None, noise=0.0, draw=0):
        params = []
        for i, shape in enumerate(self.shapes):
            off = torch.randn(shape, generator=torch.Generator().manual_seed(i + 7 * draw), dtype=torch.float64)
            params.append(nn.Parameter((matrix(shape, i) * (1 + noise * off)).to(self.dtype)))
        return params, LowRankMuon(params, replicate_group=group, **self.options)

    def run(self, world, group=None, steps=range(STEPS), params=None, optimizer=None, **noise):
        """Parameters and optimizer of a copy, or of one process with the averages of all gradients."""
        if params is None:
            params, optimizer = self.optimizer(group, **noise)
        for step in steps:
            copies = self.gradients(step, world, **noise)
            given = zip(*copies, strict=True) if group is None else [[g] for g in copies[dist.get_rank(group)]]
            for p, gs in zip(params, given, strict=True):
                there = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in gs if g is not None]
                p.grad = (sum(there) / (1 if group else world)).to(p.dtype) if there else None
            optimizer.step()
        return params, optimizer


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
    "absent": Case([(37, 20)] * 3, [4, *(3 * x // N for x in LOW)], absent=True, nonfinite="raise", **WARM),
    "whole: absent": Case([(37, 4)] * 3, [3 * 4, *[4 * 37 * 4] * 3], absent=True, **WARM),
    "whole: rank": Case([(37, 4)] * 2, [2 * 4, *[4 * 37 * 4] * 2], **WARM),
    "whole: double": Case(PAIR, [N * 4, *[8 * 37 * 20] * N], dtype=torch.float64, **WARM),
}  # fmt: skip


def state_of(params, optimizer):
    return [{"p": p.detach().clone(), **{key: x.clone() for key, x in optimizer.state[p].items()}} for p in params]


def run(case, world, sums):
    """Parameters and state of a copy after some steps, twice, and the bytes of sums."""
    found = []
    for _ in range(2):
        sums.clear()
        params, optimizer = case.run(world, dist.group.WORLD)
        steps = list(sums)
        rows = [tuple(row) for row in optimizer.explain().rows]
        optimizer.state_dict()
        found.append(state_of(params, optimizer))
    return {"runs": found, "sums": steps, "saved": sums[len(steps) :], "plan": rows}


def resumed(world, folder):
    """A run that is saved on its way, and one that has loaded that."""
    case = CASES["warm"]
    params, optimizer = case.run(world, dist.group.WORLD, range(2))
    saved = optimizer.state_dict()
    if dist.get_rank() == 0:
        torch.save({"optimizer": saved, "params": [p.detach() for p in params]}, f"{folder}/saved{world}")
    dist.barrier()
    case.run(world, dist.group.WORLD, range(2, 4), params, optimizer)
    others, other = case.optimizer(dist.group.WORLD)
    loaded = torch.load(f"{folder}/saved{world}", weights_only=True)
    for p, x in zip(others, loaded["params"], strict=True):
        p.data.copy_(x)
    other.load_state_dict(loaded["optimizer"])
    case.run(world, dist.group.WORLD, range(2, 4), others, other)
    return [state_of(params, optimizer), state_of(others, other)]


def odd(world):
    """What gradients do that one copy alone sees not to be finite, and a rate of zero."""
    found = {}
    for nonfinite in ("skip", "raise"):
        params, optimizer = Case(PAIR, LOW, nonfinite=nonfinite, **WARM).optimizer(dist.group.WORLD)
        before = [p.detach().clone() for p in params]
        for p, x in zip(params, Case(PAIR, LOW).gradients(0, world)[dist.get_rank()], strict=True):
            p.grad = x
        if dist.get_rank() == 1:
            params[0].grad[3, 4] = torch.nan
        refused = False
        try:
            optimizer.step()
        except NonFiniteError:
            refused = True
        found[nonfinite] = refused, [bool((p != x).any()) for p, x in zip(params, before, strict=True)]
    optimizer.param_groups[0]["lr"] = 0.0
    for p in params:
        p.grad = torch.ones_like(p) if dist.get_rank() == 1 else None
    optimizer.step()
    return found, optimizer.param_groups[0]["step"]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 37), nn.LayerNorm(37), nn.Tanh(), nn.Linear(37, 9))


def batch(step):
    return (matrix((16, n), 10 * step + n).float() for n in (20, 9))


def train(model, optimizer, part=slice(None), noise=0.0):
    for step in range(STEPS):
        x, y = batch(step)
        (model(x[part]) - y[part]).square().mean().backward()
        for p in model.parameters() if noise else ():
            off = torch.randn(p.shape, generator=torch.Generator().manual_seed(step + p.numel()))
            p.grad.add_(noise * p.grad.square().mean().sqrt() * off)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


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


def work(world, folder):
    sums = []
    reduced(sums)
    found = {name: run(case, world, sums) for name, case in CASES.items()}
    return found | {"resumed": resumed(world, folder), "odd": odd(world), "ddp": under_ddp(world)}


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


every = pytest.mark.parametrize(("name", "world"), [(name, world) for name in CASES for world in WORLDS])


@every
def test_update_is_that_of_averaged_gradients(results, name, world):
    case = CASES[name]
    params, optimizer = case.run(world)
    expected = state_of(params, optimizer)
    values = [x["p"] for x in expected]
    cond = condition(lambda **noise: [p.detach() for p in case.run(world, **noise)[0]], values)
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
    for result in results[world]:
        sums, saved = result[name]["sums"], result[name]["saved"]
        assert sums == case.sums * STEPS if case.sums else len(sums) == 2 * STEPS
        rows = result[name]["plan"]
        flags = 4 * sum(row[2] == "averaged" for row in rows) + 4 * ("nonfinite" in case.options)
        assert case.sums is None or sum(row[4] for row in rows) == sum(case.sums) - flags
        momenta = [x["momentum"] for x in result[name]["runs"][0] if "momentum" in x]
        assert saved == [x.numel() * x.element_size() for x in momenta]


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
    case.run(world, None, range(2, 4), params, optimizer)
    values = [x["p"] for x in results[world][0]["resumed"][0]]
    cond = condition(lambda **noise: [p.detach() for p in case.run(world, None, range(4), **noise)[0]], values)
    assert distance([p.detach() for p in params], values) <= 4 * eps(torch.float32) * cond


@pytest.mark.parametrize("world", WORLDS)
def test_odd_gradients_are_seen_by_all(results, world):
    for result in results[world]:
        found, steps = result["odd"]
        assert steps == 1
        assert found == {"skip": (False, [False, True]), "raise": (True, [False, False])}


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
    sharded = nn.Parameter(distribute_tensor(p.detach(), mesh, (Replicate(), Replicate())))
    with pytest.raises(ArrayTypeError, match="replicate_group"):
        LowRankMuon([sharded], replicate_group=alone, **WARM)


def test_a_world_of_one_is_one_process(alone):
    case = CASES["warm"]
    params, _ = case.run(1)
    others, _ = case.run(1, alone)
    values = [p.detach() for p in params]
    cond = condition(lambda **noise: [p.detach() for p in case.run(1, **noise)[0]], values)
    assert distance([whole(p.detach()) for p in others], values) <= 4 * eps(torch.float32) * cond
