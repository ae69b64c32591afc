"""Calls, flops and passes over the matrix on the device path, by the recorder that tests/calls.json comes from.

Nothing is computed: the tensors are fakes on a device that no machine has.
"""

import math
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import orthlin

SHAPE, RANK = (1024, 4096), 128
M, N = SHAPE
PRODUCT = 2 * M * N * RANK
SQUARE = (1024, 1024)
# name: (in tests/routines.py, function, shapes, the least flops and passes over the matrix)
SIZED: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...], int, int]] = {
    "lowrank_orth": (lambda G, W: orthlin.lowrank_orth(G, RANK, test_matrix=W), (SHAPE, (N, RANK)), 3 * PRODUCT, 3),
    "lowrank_orth tol=0.01": (
        lambda G, W: orthlin.lowrank_orth(G, RANK, test_matrix=W, tol=0.01),
        (SHAPE, (N, RANK)),
        3 * PRODUCT,
        3,
    ),
    "lowrank_orth tol=0.1": (
        lambda G, W: orthlin.lowrank_orth(G, RANK, test_matrix=W, tol=0.1),
        (SHAPE, (N, RANK)),
        3 * PRODUCT,
        3,
    ),
    "lowrank_orth_factors": (
        lambda G, W: orthlin.lowrank_orth_factors(G, RANK, test_matrix=W),
        (SHAPE, (N, RANK)),
        2 * PRODUCT,
        2,
    ),
    "orthogonalize": (orthlin.orthogonalize, (SHAPE,), 3 * M * M * N, 3),
    "orthogonalize tol=0.2": (lambda A: orthlin.orthogonalize(A, tol=0.2), (SHAPE,), 3 * M * M * N, 3),
    "orthogonalize tol=0.1": (lambda A: orthlin.orthogonalize(A, tol=0.1), (SHAPE,), 3 * M * M * N, 3),
    "polar": (orthlin.polar, (SHAPE,), 4 * M * M * N, 4),
    "matrix_sign": (orthlin.matrix_sign, (SQUARE,), 2 * SQUARE[0] ** 3, 2),
    "qr": (orthlin.qr, (SHAPE[::-1],), 2 * M * M * N - 2 * M**3 // 3, 2),
    "qr cholesky2": (lambda A: orthlin.qr(A, method="cholesky2"), (SHAPE[::-1],), 2 * M * M * N - 2 * M**3 // 3, 2),
    "randomized_range_finder": (
        lambda A, W: orthlin.randomized_range_finder(A, RANK, test_matrix=W),
        (SHAPE, (N, RANK)),
        PRODUCT,
        1,
    ),
}
COUNTED = [
    *SIZED,
    "steppers.muon tail",
    "LowRankMuon",
    "Muon",
    "gpt2 LowRankMuon",
    "gpt2 LowRankMuon rank=64",
    "gpt2 Muon",
]


def routines() -> Any:
    """The module of the tests that has every routine on fake tensors."""
    if find_spec("torch") is None:
        raise NotImplementedError("torch is not here")
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    import routines

    return routines


def _factorizations() -> dict[Any, Callable[..., int]]:
    """Flops of what torch's own counter does not know: those of the textbook, for the last two sizes."""
    from torch import ops

    def of(weight: float) -> Callable[..., int]:
        def count(shape: Any, *_: Any, **__: Any) -> int:
            *batch, m, n = shape
            k = min(m, n)
            return int(weight * math.prod(batch) * k * k * max(m, n))

        return count

    def householder(shape: Any, *_: Any, **__: Any) -> int:
        *batch, m, n = shape
        k, long = min(m, n), max(m, n)
        return math.prod(batch) * (4 * k * k * long - 4 * k**3 // 3)

    return {
        ops.aten.linalg_qr: householder,
        ops.aten.linalg_cholesky_ex: of(1 / 3),
        ops.aten.linalg_inv_ex: of(2),
        ops.aten.linalg_solve_triangular: lambda a, b, *_, **__: math.prod(b) * a[-1],
        ops.aten._linalg_eigh: of(9),
        ops.aten._linalg_svd: of(14),
    }


def counted(name: str) -> tuple[int, float]:
    """Flops, and bytes of large matrices read and written in units of the matrix."""
    made = routines()
    from torch.utils.flop_counter import FlopCounterMode

    function, shapes, _, _ = SIZED[name]
    counter = FlopCounterMode(display=False, custom_mapping=_factorizations())

    def prepare(empty: Any) -> Callable[[], Any]:
        run = made.of(function, *shapes)(empty)

        def counting() -> Any:
            with counter:
                return run()

        return counting

    recorder = made.fakedevice.record(prepare)
    return counter.get_total_flops(), recorder.passes(4 * math.prod(shapes[0]))


class Calls:
    version = "1"
    params = COUNTED
    param_names = ["routine"]

    def track_calls(self, name: str) -> int:
        return len(routines().measure(name))

    track_calls.unit = "calls"


class Arithmetic:
    """Over the least that must be done."""

    version = "1"
    params = list(SIZED)
    param_names = ["routine"]

    def track_flops(self, name: str) -> float:
        return counted(name)[0] / SIZED[name][2]

    def track_passes(self, name: str) -> float:
        return counted(name)[1] / SIZED[name][3]

    track_flops.unit = "least"
    track_passes.unit = "least"
