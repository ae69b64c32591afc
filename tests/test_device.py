"""On a device nothing waits and nothing leaves it, but for what is documented; and how many calls that takes."""

import json

import numpy as np
import pytest
import torch
from fakedevice import DEVICE, WAITS, record
from routines import (
    ALL,
    FUNCTIONS,
    GPT2,
    OPTIMIZERS,
    RANK,
    STACK,
    STEPPERS,
    TABLE,
    TALL,
    WAITING,
    WIDE,
    entry,
    measure,
    of,
)
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

import orthlin
from orthlin import _backend as be
from orthlin import schedules, sketch
from orthlin._direction import Recipe
from orthlin.torch import LowRankMuon

REAL = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)
CALLS = json.loads(TABLE.read_text())
every_name = pytest.mark.parametrize("name", ALL)


@every_name
def test_the_table_holds_the_number_of_calls_and_nothing_waits(name):
    """Where a change adds or saves a call, `python tests/routines.py` rewrites the table."""
    recorder = measure(name)
    assert recorder.faults == WAITING.get(name, frozenset())
    assert entry(name, recorder) == CALLS[name]


@pytest.mark.parametrize("dtype", [*REAL[1:], *COMPLEX], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_waits_in_any_dtype(name, dtype):
    assert measure(name, dtype).faults == WAITING.get(name, frozenset())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("name", STEPPERS)
def test_no_update_of_a_stepper_waits(name, dtype):
    assert not measure(name, dtype).faults


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_step_waits_with_master_weights(name):
    assert not measure(name, torch.bfloat16).faults


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["LowRankMuon", "Muon", "LowRankMSGD", "MSGD"])
def test_no_step_waits_in_any_dtype(name, dtype):
    assert not measure(name, dtype).faults


def test_the_table_has_nothing_else():
    assert list(CALLS) == list(ALL)
    assert set(GPT2) <= {name for name, found in CALLS.items() if "passes" in found}


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_a_schedule_runs_in_the_precision_asked_for(precision):
    made = []

    def prepare(A):
        recipe, U = Recipe(schedule=schedules.muon(), precision=precision), A(*STACK)
        return lambda: made.append(recipe.direction(be.namespace(U), U, None, 0, "w").X.dtype)

    record(prepare)
    assert made == [torch.bfloat16 if precision == "medium" else torch.float32]


def test_a_parameter_without_entries_is_stepped_along():
    def prepare(A):
        p = torch.nn.Parameter(A(0, WIDE[1]))
        p.grad = torch.empty_like(p)
        return LowRankMuon([p], lr=1e-3, rank=RANK).step

    assert not record(prepare).faults


# What is documented to wait ----------------------------------------------------------------------------------------


def test_an_adaptive_rank_is_read():
    with pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):
        record(of(orthlin.adaptive_range_finder, WIDE, tol=1e-2, rng=0))


@pytest.mark.parametrize("kind", ["gaussian", "sparse_sign", "columns"])
def test_what_numpy_draws_is_copied_to_the_device_and_nothing_else(kind):
    rng = np.random.default_rng(0)
    faults = record(of(lambda like: getattr(sketch, kind)(64, RANK, like=like, rng=rng), WIDE)).faults
    assert faults == {"_to_copy: cpu and privateuseone"}


def test_a_checkpoint_of_the_cpu_is_copied_when_it_is_loaded_and_never_again():
    kept = {}

    def prepare(A):
        params = [torch.nn.Parameter(A(*shape)) for shape in (WIDE, TALL)]
        kept["optimizer"] = optimizer = LowRankMuon(params, lr=1e-3, rank=RANK)
        for p in params:
            p.grad = torch.empty_like(p)
        saved = optimizer.state_dict()
        states = saved["state"].items()
        saved["state"] = {i: {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in s.items()} for i, s in states}
        optimizer.load_state_dict(saved)
        assert {x.device for s in optimizer.state.values() for x in s.values()} == {DEVICE}
        return optimizer.step

    assert not record(prepare).faults


# The recorder ------------------------------------------------------------------------------------------------------

WAITING_CALLS = {
    "svd": torch.linalg.svd,
    "svdvals": torch.linalg.svdvals,
    "eigh": torch.linalg.eigh,
    "eigvalsh": torch.linalg.eigvalsh,
    "inv": torch.linalg.inv,
    "solve": lambda x: torch.linalg.solve(x, x),
    "cholesky": torch.linalg.cholesky,
    "matrix_norm 2": lambda x: torch.linalg.matrix_norm(x, 2),
    "to the host": lambda x: x.cpu(),
    "from the host": lambda x: x + torch.ones(8, 8).to(x.device),
    "written from the host": lambda x: x.copy_(torch.ones(8, 8)),
    "made on the host": lambda _: torch.ones(8, 8),
}
READING_CALLS = {
    "item": lambda x: x[0, 0].item(),
    "bool": lambda x: bool((x > 0).all()),
    "float": lambda x: float(x[0, 0]),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": torch.nonzero,
    "an index of booleans": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": torch.unique,
}
NOT_WAITING = {
    "qr": torch.linalg.qr,
    "cholesky_ex": torch.linalg.cholesky_ex,
    "inv_ex": torch.linalg.inv_ex,
    "a number of the host": lambda x: x * torch.tensor(2.0),
    "a number read on the host": lambda x: x * torch.tensor(2.0).item(),
    "index": lambda x: x[torch.zeros(2, dtype=torch.int64, device=x.device)],
}


@pytest.mark.parametrize("function", WAITING_CALLS.values(), ids=WAITING_CALLS)
def test_the_recorder_sees_what_waits(function):
    assert record(of(function, (8, 8))).faults


@pytest.mark.parametrize("function", READING_CALLS.values(), ids=READING_CALLS)
def test_fake_tensors_refuse_to_be_read(function):
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        record(of(function, (8, 8)))


@pytest.mark.parametrize("function", NOT_WAITING.values(), ids=NOT_WAITING)
def test_the_recorder_lets_pass_what_does_not_wait(function):
    assert not record(of(function, (8, 8))).faults


def test_the_names_of_what_waits_are_torchs():
    assert all(hasattr(torch.ops.aten, name) for name in WAITS)


def test_traffic_is_what_is_read_and_written():
    """An update in place reads and writes; what is only written to is not read, what is small does not count."""
    size = 4 * 600 * 700
    for function, passes in (
        (lambda x, y: x + y, 3),
        (lambda x, y: x.add_(y), 3),
        (lambda x, _: x.mul_(2), 2),
        (lambda x, y: x.copy_(y), 2),
        (lambda x, y: torch.add(x, y, out=torch.empty_like(x)), 3),
        (lambda x, y: x + y[:1], 2),
        (lambda x, _: x.mT, 0),
        (lambda x, y: x @ y.mT[:, :64], 1),
        (lambda x, y: torch._foreach_add_([x, y], 1.0), 4),
    ):
        assert record(of(function, (600, 700), (600, 700))).passes(size) == passes
