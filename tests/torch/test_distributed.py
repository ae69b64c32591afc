"""Sharded parameters: processes with parts of matrices make the update of one process."""

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import units
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from worlds import SIZE, distance, matrix, reduced, results_of, whole

from orthlin.errors import NonFiniteError
from orthlin.torch import MSGD, LowRankMSGD, LowRankMuon, MatrixView, Muon
from orthlin.torch.optim import PAPER

WORLDS = (4, 2)
STEPS = 3
ROWS = (Shard(0),)
WARM = {"rank": 4, "warm_start": True, "tail": "auto"}
SECOND, SIXTH = {**WARM, "rank": 2}, {**WARM, "rank": 6}
FEEDBACK = {**WARM, "nesterov": False, "error_feedback": True}


class Case:
    """An optimizer of parameters, how these lie on a mesh, and the bytes of each collective of a step."""

    def __init__(self, shapes, sums, placements=ROWS, mesh=None, view=None, make=LowRankMuon, **options):
        self.shapes, self.sums, self.placements, self.mesh = shapes, sums, placements, mesh
        self.view, self.make, self.dtype = view, make, options.pop("dtype", torch.float32)
        self.absent, self.units = options.pop("absent", None), options.pop("units", False)
        self.options = {"lr": 0.1, **options}

    def tensors(self, seed, noise=0.0, draw=0):
        made = []
        for i, shape in enumerate(self.shapes):
            x = matrix(shape, seed + i)
            if self.dtype.is_complex:
                x = x * torch.exp(1j * matrix(shape, seed + i + 7))
            off = torch.randn(shape, generator=torch.Generator().manual_seed(seed + i + 7 * draw), dtype=torch.float64)
            made.append((x + noise * x.abs().square().mean().sqrt() * off).to(self.dtype))
        return made

    def optimizer(self, params):
        return self.make([{"params": params, **({} if self.view is None else {"view": self.view})}], **self.options)

    def gradient(self, g, i, step, lie):
        """Gradient, absent of the second parameter where it is zero, of the third everywhere but at first."""
        if self.absent is None or i == 0:
            return lie(g)
        if i == 2 and step > 0:
            return None
        if i == 1:
            g.narrow(self.absent, 0, -(-g.shape[self.absent] // 2)).zero_()
        g = lie(g)
        return None if isinstance(g, DTensor) and not g.to_local().any() else g

    def run(self, lie=lambda x: x, record=contextlib.nullcontext, **noise):
        """Parameters after some steps, and their optimizer."""
        with units.feigned() if self.units else contextlib.nullcontext():
            return self.stepped(lie, record, **noise)

    def stepped(self, lie, record, **noise):
        params = [nn.Parameter(lie(x)) for x in self.tensors(0, **noise)]
        optimizer = self.optimizer(params)
        for step in range(STEPS):
            for i, (p, g) in enumerate(zip(params, self.tensors(100 * step + 50, **noise), strict=True)):
                p.grad = self.gradient(g, i, step, lie)
            with record(optimizer):
                optimizer.step()
        return params, optimizer


PAIR, WIDE, TALL = [(37, 20), (37, 20)], [(12, 40), (12, 40)], [(30, 20), (30, 20)]
N = len(PAIR)
# A step of N matrices m x n at rank r, rows cut: r^2 + n numbers in double precision, n only for a tail, and whether a
# gradient is there and moves; r^2 + r n in single.  Columns cut: m r, and r^2, in double precision.
BY_ROWS = [N * 8 * (16 + 20 + 2), N * 4 * (16 + 80)]
BY_COLUMNS = [N * 8 * (12 * 4 + 2), N * 8 * 16]
BY_BOTH = [N * 8 * (18 * 4 + 2), N * 8 * (16 + 10 + 2), N * 4 * (16 + 40), N * 8 * 16]  # halves of 36 x 20


def owned(*shapes, size=4, side=0, flags=2, warm=0, more=1):
    """Bytes that a process sends in a step, by rank and world: parts to owners, and back, with two and three flags.

    A warm start of some rows rides with columns both ways; of rows that are cut all get it whole.
    """

    def sums(rank, world):
        found, at = [], 0
        for shape, count in shapes:
            cut = shape[side]
            share, other = -(-cut // world), shape[1 - side] + side * warm
            length = [max(0, min(cut - i * share, share)) * other for i in range(world)]
            owners = [(at + i) % world for i in range(count)]
            at += count
            found.append(size * sum(length[rank] + flags for owner in owners if owner != rank))
            notes = flags + more + (1 - side) * warm * shape[1]
            found.append(size * owners.count(rank) * sum(length[i] + notes for i in range(world) if i != rank))
        return found

    return sums


# What is gathered: whether there is a gradient, of all parameters on a side of the mesh.
GATHERED = [N * 4]
IN_FIRST = MatrixView(transposed=True)
CASES = {
    "paper": Case(PAIR, [N * 8 * (16 + 1 + 2), BY_ROWS[1]], rank=4, **PAPER),
    "warm, tail": Case(PAIR, BY_ROWS, **WARM),
    "replicated and cut": Case(PAIR, BY_ROWS, (Replicate(), Shard(0)), (2, 2), **WARM),
    "columns": Case(WIDE, [N * 8 * (12 * 2 + 2), N * 8 * 4], [Shard(1)], rank=2, tail="auto", warm_start=False),
    "columns, warm, tail": Case(WIDE, BY_COLUMNS, [Shard(1)], **WARM),
    "in first": Case(
        [(20, 37)] * N, [N * 8 * (37 * 2 + 2), N * 8 * 4], view=IN_FIRST, **SECOND
    ),
    "both sides": Case(
        [(36, 20)] * N, BY_BOTH, (Shard(0), Shard(1)), (2, 2), **WARM
    ),
    "parts without rows": Case(
        [(5, 20)] * N, [N * 8 * (4 + 20 + 2), N * 4 * (4 + 40)], **{**FEEDBACK, "rank": 2}
    ),
    "columns, parts without": Case(
        [(20, 5)] * N, [N * 8 * (20 * 2 + 2), N * 8 * 4], [Shard(1)], **{**FEEDBACK, "rank": 2}
    ),
    "two shapes": Case([*PAIR[:1], *TALL, *PAIR[1:]], 2 * BY_ROWS, **WARM),
    "same parts of two shapes": Case([(37, 20), (40, 20)], 2 * [x // 2 for x in BY_ROWS], **WARM),
    "nothing moves without a momentum": Case(
        PAIR, [N * 8 * (16 + 1 + 1), BY_ROWS[1]], make=LowRankMSGD, rank=4
    ),
    "blocks beside the cut": Case(
        [(20, 36)], [3 * 8 * (12 * 2 + 2), 3 * 8 * 4], view=MatrixView(transposed=True, splits=3), **SECOND
    ),
    "kernels": Case([(18, 4, 3, 3)], [8 * (4 + 36 + 2), 4 * (4 + 72)], **SECOND),
    "masters": Case(PAIR, BY_ROWS, dtype=torch.bfloat16, weight_decay=0.1, **WARM),
    "complex": Case(PAIR, [N * 8 * (32 + 20 + 2), 2 * BY_ROWS[1]], dtype=torch.complex64, **WARM),
    "error feedback": Case(PAIR, BY_ROWS, **FEEDBACK),
    "cautious": Case(PAIR, BY_ROWS, cautious=True, weight_decay=0.1, **WARM),
    "tolerance": Case(PAIR, BY_ROWS, tol=0.01, **WARM),
    "absent": Case([(37, 20)] * 3, [4, *(3 * x // N for x in BY_ROWS)], absent=0, nonfinite="raise", **WARM),
    "absent, columns": Case([(12, 40)] * 3, [3 * x // N for x in BY_COLUMNS], [Shard(1)], absent=1, **WARM),
    "absent, both sides": Case(
        [(36, 20)] * 3, [3 * x // N for x in BY_BOTH], (Shard(0), Shard(1)), (2, 2), absent=0, **WARM
    ),
    "absent, one of both sides": Case(
        [(36, 20)] * 3, [3 * x // N for x in BY_BOTH], (Shard(0), Shard(1)), (2, 2), absent=1, **WARM
    ),
    "absent, error feedback": Case(
        [(37, 20)] * 3, [3 * x // N for x in BY_ROWS], absent=0, **FEEDBACK
    ),
    "owners": Case(PAIR, owned(((37, 20), N)), make=Muon, weight_decay=0.1),
    "owners, many": Case([(37, 20)] * 5, owned(((37, 20), 5)), make=Muon),
    "owners, columns": Case(WIDE, owned(((12, 40), N), side=1), [Shard(1)], make=Muon),
    "owners, replicated and cut": Case(
        PAIR, lambda rank, _: owned(((37, 20), N))(rank % 2, 2), (Replicate(), Shard(0)), (2, 2), make=Muon
    ),
    "owners, two shapes": Case([(12, 40), *PAIR, (12, 40)], None, make=Muon),
    "owners, rank": Case([(37, 4)], owned(((37, 4), 1)), **WARM),
    "owners, parts without rows": Case([(5, 20)] * N, owned(((5, 20), N)), make=Muon),
    "owners, no momentum": Case(PAIR, owned(((37, 20), N), flags=1), make=MSGD),
    "owners, double": Case(PAIR, owned(((37, 20), N), size=8, flags=1), make=MSGD, dtype=torch.float64),
    "owners, complex": Case(PAIR, owned(((37, 20), N), size=8, flags=1), make=MSGD, dtype=torch.complex64),
    "owners, masters": Case(PAIR, owned(((37, 20), N)), make=Muon, dtype=torch.bfloat16),
    "owners, absent": Case([(37, 20)] * 3, owned(((37, 20), 3)), make=Muon, absent=0),
    "owners, absent, masters": Case([(37, 20)] * 3, owned(((37, 20), 3)), make=Muon, absent=0, dtype=torch.bfloat16),
    "owners, low rank": Case(WIDE, owned(((12, 40), N), warm=6), **SIXTH),
    "owners, low rank, columns": Case(
        WIDE, owned(((12, 40), N), side=1, warm=11), [Shard(1)], **{**WARM, "rank": 11}
    ),
    "owners, cold": Case(WIDE, owned(((12, 40), N)), **{**SIXTH, "warm_start": False}),
    "owners, power iterations": Case(PAIR, owned(((37, 20), N), warm=4), n_iter=1, **WARM),
    "owners, columns of G": Case(PAIR, owned(((37, 20), N)), rank=4, warm_start=False, sketch="columns", tail=0.0),
    "owners, sparse sketch": Case(PAIR, owned(((37, 20), N)), rank=4, warm_start=False, sketch="sparse_sign"),
    "owners, nuclear": Case(WIDE, owned(((12, 40), N), side=1, warm=4, more=2), [Shard(1)], scale="nuclear", **WARM),
    "owners, full, nuclear": Case(PAIR, owned(((37, 20), N), more=2), make=Muon, scale="nuclear"),
    "owners, bfloat16": Case(PAIR, owned(((37, 20), N), more=2), make=Muon, scale="nuclear", units=True),
    "owners, low rank, double": Case(PAIR, owned(((37, 20), N), size=8, warm=4), dtype=torch.float64, **WARM),
    "owners, low rank, complex": Case(
        WIDE, owned(((12, 40), N), size=8, warm=6, more=2), dtype=torch.complex64, scale="nuclear", **SIXTH
    ),
    "owners, low rank, complex columns": Case(
        WIDE, owned(((12, 40), N), side=1, size=8, warm=4), [Shard(1)], dtype=torch.complex64, n_iter=1, **WARM
    ),
    "owners, low rank, without rows": Case([(5, 20)] * N, owned(((5, 20), N), warm=2), **SECOND),
    "owners, low rank, absent": Case([(37, 20)] * 3, owned(((37, 20), 3), warm=4), n_iter=1, absent=0, **WARM),
    "owners, low rank, absent, masters": Case(
        [(37, 20)] * 3, owned(((37, 20), 3), warm=4), n_iter=1, absent=0, dtype=torch.bfloat16, **WARM
    ),
    "replicated": Case(PAIR, [], (Replicate(),), **WARM),
    "replicated, full": Case(PAIR, [], (Replicate(),), make=Muon),
    "whole: absent": Case([(37, 20)] * 3, [3 * 4], n_iter=1, absent=0, **FEEDBACK),
    "whole: absent, masters": Case([(37, 20)] * 3, [3 * 4], n_iter=1, absent=0, dtype=torch.bfloat16, **FEEDBACK),
    "rank that changes": Case(WIDE, None, [Shard(1)], **{**WARM, "rank": lambda step: 3 + step}),
    "whole: error feedback": Case(PAIR, GATHERED, n_iter=1, **FEEDBACK),
    "whole: notes": Case(PAIR, GATHERED, diagnostics=True, **WARM),
    "whole: notes, absent": Case([(37, 20)] * 3, [3 * 4], absent=0, diagnostics=True, **WARM),
    "whole: blocks cut": Case([(36, 20)], [4], view=MatrixView(splits=3), **WARM),
    "whole: experts": Case([(3, 12, 20)], [4], view=MatrixView(batch_ndim=1), **WARM),
    "whole: kernels cut": Case([(18, 4, 3, 3)], [4], [Shard(1)], **WARM),
    "whole: cut twice": Case(PAIR, 2 * GATHERED, (Shard(0), Shard(0)), (2, 2), **WARM),
    "whole: masters": Case(PAIR, GATHERED, make=Muon, diagnostics=True, dtype=torch.bfloat16),
}  # fmt: skip


def run(case, world, sums, gathers):
    """Whole parameters and state after some steps, the bytes of sums, the number of collectives, and plans.

    Two processes do it twice.
    """
    mesh = init_device_mesh("cpu", case.mesh or (world,))
    found = []
    for _ in range(2 if world == 2 else 1):
        sums.clear()
        counts, plans = [], []

        @contextlib.contextmanager
        def record(optimizer, counts=counts, plans=plans):
            mode, before = CommDebugMode(), len(sums)
            gathers.clear()
            plan = optimizer.explain()
            with mode:
                yield
            counts.append(mode.get_total_counts())
            plans.append(([tuple(row) for row in plan.rows], sums[before:], list(gathers)))

        params, optimizer = case.run(lambda x: distribute_tensor(x, mesh, case.placements), record=record)
        state = [{key: whole(x) for key, x in optimizer.state[p].items()} for p in params]
        found.append(([whole(p.detach()) for p in params], state))
    return {"runs": found, "sums": list(sums), "collectives": counts, "plans": plans}


class Net(nn.Module):
    """Two layers and a norm."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(20, 37), nn.LayerNorm(37), nn.Linear(37, 9)
        for i, p in enumerate(self.parameters()):
            p.data.copy_(matrix(p.shape, i) if p.ndim > 1 else torch.linspace(0.5, 1, len(p)))

    def forward(self, x):
        return self.down(torch.tanh(self.norm(self.up(x))))


def net(mesh=None, noise=0.0):
    """Model and optimizer; AdamW divides by no less than 0.01, so that it is as smooth as the rest."""
    model = Net()
    for p in model.parameters():
        p.data.mul_(1 + noise * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    if mesh is not None:
        for layer in (model.up, model.down, model):
            fully_shard(layer, mesh=mesh)
    return model, LowRankMuon(model.named_parameters(), lr=0.05, weight_decay=0.1, adamw={"eps": 0.01}, **WARM)


def train(model, optimizer, steps, rank=0, world=1, noise=0.0):
    for step in steps:
        x, y = (matrix((16, n), 10 * step + n).float() for n in (20, 9))
        here = slice(16 * rank // world, 16 * (rank + 1) // world)
        (model(x[here]) - y[here]).square().mean().backward()
        for p in model.parameters() if noise else ():
            off = torch.randn(p.shape, generator=torch.Generator().manual_seed(step + p.numel()))
            p.grad.add_(noise * p.grad.square().mean().sqrt() * off)
        optimizer.step()
        optimizer.zero_grad()


def values(model, optimizer):
    """Whole parameters and state."""
    return [
        {"p": whole(p.detach()), **{key: whole(x) for key, x in optimizer.state[p].items()}} for p in model.parameters()
    ]


def states_of(model, optimizer, options=None):
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))


def load(model, optimizer, where, options=None):
    states = states_of(model, optimizer, options)
    dcp.load(states, checkpoint_id=where, no_dist=not dist.is_initialized())
    given = {"model_state_dict": states["model"], "optim_state_dict": states["optimizer"]}
    set_state_dict(model, optimizer, **given, options=options)


def resumed(folder, world):
    """Steps on a mesh from where those of the last, larger world ended: what was loaded, and where they end."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    model, optimizer = net(init_device_mesh("cpu", (world,)) if world > 1 else None)
    before = {4: None, 2: 4, 1: 2}[world]
    if before:
        load(model, optimizer, f"{folder}/checkpoint{before}")
    loaded = values(model, optimizer)
    first = {4: 0, 2: 2, 1: 4}[world]
    train(model, optimizer, range(first, first + 2), rank, world)
    dcp.save(states_of(model, optimizer), checkpoint_id=f"{folder}/checkpoint{world}", no_dist=world == 1)
    return {"loaded": loaded, "end": values(model, optimizer)}


FORMS = {
    "parts": StateDictOptions(),
    "whole": StateDictOptions(full_state_dict=True),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
}


def interrupted(folder, world):
    """Where a run ends, and others of the same world that have loaded what it saved on its way, in every form."""
    mesh, rank = init_device_mesh("cpu", (world,)), dist.get_rank()
    model, optimizer = net(mesh)
    train(model, optimizer, range(2), rank, world)
    for form, options in FORMS.items():
        dcp.save(states_of(model, optimizer, options), checkpoint_id=f"{folder}/{world}{form}")
    train(model, optimizer, range(2, 4), rank, world)
    ends = {}
    for form, options in FORMS.items():
        again, other = net(mesh, noise=0.1)
        load(again, other, f"{folder}/{world}{form}", options)
        train(again, other, range(2, 4), rank, world)
        ends[form] = values(again, other)
    return values(model, optimizer), ends


def odd_gradients(world):
    """What gradients do that are not finite, or zero, in one part only, and a rate of zero."""
    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for value in (torch.nan, 0.0):
        for nonfinite in ("skip", "raise"):
            params = [nn.Parameter(distribute_tensor(torch.zeros(37, 20), mesh, ROWS)) for _ in range(2)]
            optimizer = LowRankMuon(params, lr=0.1, nonfinite=nonfinite, **WARM)
            g = torch.zeros(37, 20)
            g[3] = matrix((37, 20), 1)[3]
            for p in params:
                p.grad = distribute_tensor(g, mesh, ROWS)
            optimizer.step()
            before = [whole(p.detach()) for p in params]
            g[36, 3] = value
            params[0].grad = distribute_tensor(g, mesh, ROWS)
            params[1].grad = distribute_tensor(torch.zeros(37, 20), mesh, ROWS)
            refused = False
            try:
                optimizer.step()
            except NonFiniteError:
                refused = True
            moved = [bool((whole(p.detach()) != x).any()) for p, x in zip(params, before, strict=True)]
            fading = [round(optimizer.state[p]["fading"].item(), 4) for p in params]
            found[str(value), nonfinite] = refused, moved, fading, int(optimizer.skipped())
    optimizer.param_groups[0]["lr"] = 0.0
    params[0].grad = distribute_tensor(torch.eye(37, 20), mesh, ROWS)
    params[1].grad = None
    if dist.get_rank() > 0:
        params[0].grad = None
    optimizer.step()
    return found, optimizer.param_groups[0]["step"]


def work(world, folder):
    sums, gathers = [], []
    reduced(sums, gathers)
    results = {name: run(case, world, sums, gathers) for name, case in CASES.items() if world == 4 or not case.mesh}
    return results | {"net": resumed(folder, world), "same": interrupted(folder, world), "odd": odd_gradients(world)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("worlds"))


@pytest.fixture(scope="module")
def results(folder):
    """What every process of every world has found."""
    return results_of(work, WORLDS, folder)


EVERY = [(name, world) for name, case in CASES.items() for world in WORLDS if world == 4 or not case.mesh]


@pytest.mark.parametrize(("name", "world"), EVERY)
def test_update_is_that_of_one_process(results, name, world):
    case = CASES[name]
    params, optimizer = case.run()
    expected = [p.detach() for p in params]
    exact = name.startswith("whole")
    # The most that weights change, relative to a change of all that goes in.
    noisy = [] if exact else [case.run(noise=SIZE, draw=i)[0] for i in range(4)]
    condition = max((distance([p.detach() for p in params], expected) / SIZE for params in noisy), default=0.0)
    for result in results[world]:
        values, states = result[name]["runs"][0]
        assert distance(values, expected) <= 4 * torch.finfo(case.dtype).eps * condition
        for mine, others in zip(states, map(optimizer.state.get, params), strict=True):
            assert list(mine) == list(others)
            for key, value in others.items():
                assert mine[key].shape == value.shape
                assert mine[key].dtype == value.dtype
                there = ~value.isnan()  # diagnostics of full directions are not
                assert torch.equal(~mine[key].isnan(), there)
                change = distance([mine[key][there]], [value[there]])
                assert change <= 4 * torch.finfo(torch.float32).eps * condition / case.options["lr"]


@pytest.mark.parametrize(("name", "world"), EVERY)
def test_runs_and_processes_agree_bit_for_bit(results, name, world):
    ((first, state),) = results[world][0][name]["runs"][:1]
    for result in results[world]:
        for values, states in result[name]["runs"]:
            assert all(map(torch.equal, values, first))
            for mine, others in zip(states, state, strict=True):
                for key, value in others.items():
                    torch.testing.assert_close(mine[key], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("name", "world"), EVERY)
def test_collectives_and_bytes_are_those_foretold(results, name, world):
    case = CASES[name]
    for rank, result in enumerate(results[world]):
        found = result[name]
        if case.sums is None:
            assert len(found["sums"]) == 2 * (1 + ("two" in name)) * STEPS
        else:
            assert found["sums"] == (case.sums(rank, world) if callable(case.sums) else case.sums) * STEPS
        if name.startswith("whole"):
            assert min(found["collectives"]) > len(case.sums)
        else:
            assert sum(found["collectives"]) == len(found["sums"])


@pytest.mark.parametrize(("name", "world"), EVERY)
def test_plans_foretell_what_goes(results, name, world):
    case = CASES[name]
    for result in results[world]:
        for rows, sums, gathers in result[name]["plans"]:
            gathered = [row for row in rows if row[2] == "gathered"]
            others = [row for row in rows if row[2] != "gathered"]
            flags = 4 * len(gathered) * len(case.mesh or (world,)) + 4 * ("nonfinite" in case.options)
            sides = sum(isinstance(placement, Shard) for placement in case.placements)
            assert all(row[3] <= 2 * sides for row in others)  # for all matrices of a shape
            assert sum(row[4] for row in others) == sum(sums) - flags
            assert sum(row[4] for row in gathered) == sum(gathers)
            assert sum(row[3] for row in gathered) == len(gathers)
            if not gathered:
                assert sum(row[3] for row in others) == len(sums) - ("nonfinite" in case.options)


@pytest.mark.parametrize("world", WORLDS)
def test_odd_gradients_are_seen_by_all(results, world):
    for result in results[world]:
        found, steps = result["odd"]
        assert steps == 3
        for nonfinite in ("skip", "raise"):
            # the second gradient has become zero, in the first only what the other parts hold is not
            assert found["0.0", nonfinite] == (False, [True, True], [1.0, 0.95], 0)
        assert found["nan", "skip"] == (False, [False, True], [1.0, 0.95], 1)
        assert found["nan", "raise"] == (True, [False, False], [1.0, 1.0], 0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("world", WORLDS)
def test_training_goes_on_bit_for_bit(results, world, form):
    for result in results[world]:
        end, ends = result["same"]
        for mine, others in zip(ends[form], end, strict=True):
            assert list(mine) == list(others)
            assert all(torch.equal(mine[key], others[key]) for key in others)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_training_goes_on_in_worlds_of_other_sizes(results, folder):
    def run(noise):
        model, optimizer = net(noise=noise)
        train(model, optimizer, range(6), noise=noise)
        return [p.detach() for p in model.parameters()]

    expected = run(0.0)
    condition = max(distance(run(noise), expected) for noise in (SIZE, -SIZE)) / SIZE
    last = resumed(folder, 1)
    # Gradients, averages of 16 rows in another order, differ by some eps of their own size before any step does.
    assert distance([x["p"] for x in last["end"]], expected) <= 16 * torch.finfo(torch.float32).eps * condition
    for world, loaded in ((4, results[2][0]["net"]["loaded"]), (2, last["loaded"])):
        for mine, others in zip(loaded, results[world][0]["net"]["end"], strict=True):
            assert list(mine) == list(others)
            assert all(torch.equal(mine[key], others[key]) for key in others)
