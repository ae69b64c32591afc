"""Calls, flops and passes over the matrix on the device path, by the recorder that tests/calls.json comes from.

Nothing is computed: the tensors are fakes on a device that no machine has.
"""

import math
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import orthlin

M, N, RANK = 1024, 4096, 128
WIDE, TALL, OMEGA, SQUARE = (M, N), (N, M), (N, RANK), (M, M)


class Routine(NamedTuple):
    """A routine, the shapes that it is counted at, and the least flops and passes over the matrix at these."""

    function: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    flops: int
    passes: int


def least(m: int, n: int, r: int) -> dict[str, tuple[int, int]]:
    """The least flops and passes over a matrix, m <= n: each product once, what is symmetric by half.

    Passes are its bytes, read by every product that needs the one before, or written.  A basis is a Gram matrix and a
    product with the inverse of its factor; so is a polar factor, and H is a product more.
    """
    product = 2 * m * n * r
    return {
        "lowrank_orth": (3 * product, 3),
        "lowrank_orth_factors": (2 * product, 2),
        "randomized_range_finder": (product + 3 * m * r * r, 1),
        "orthogonalize": (3 * m * m * n, 3),
        "polar": (4 * m * m * n, 4),
        "matrix_sign": (2 * m**3, 2),
        "qr": (3 * m * m * n, 3),
    }


def _routines() -> dict[str, Routine]:
    known = least(M, N, RANK)

    def made(of: str, function: Callable[..., Any], *shapes: tuple[int, ...], **options: Any) -> Routine:
        return Routine(lambda *given: function(*given, **options), shapes, *known[of])

    def lowrank(G: Any, omega: Any, **options: Any) -> Any:
        return orthlin.lowrank_orth(G, RANK, test_matrix=omega, **options)

    return {
        "lowrank_orth": made("lowrank_orth", lowrank, WIDE, OMEGA),
        "lowrank_orth tol=0.01": made("lowrank_orth", lowrank, WIDE, OMEGA, tol=0.01),
        "lowrank_orth tol=0.1": made("lowrank_orth", lowrank, WIDE, OMEGA, tol=0.1),
        "lowrank_orth_factors": made(
            "lowrank_orth_factors", lambda G, O: orthlin.lowrank_orth_factors(G, RANK, test_matrix=O), WIDE, OMEGA
        ),
        "randomized_range_finder": made(
            "randomized_range_finder",
            lambda A, O: orthlin.randomized_range_finder(A, RANK, test_matrix=O),
            WIDE,
            OMEGA,
        ),
        "orthogonalize": made("orthogonalize", orthlin.orthogonalize, WIDE),
        "orthogonalize tol=0.2": made("orthogonalize", orthlin.orthogonalize, WIDE, tol=0.2),
        "orthogonalize tol=0.01": made("orthogonalize", orthlin.orthogonalize, WIDE, tol=0.01),
        "polar": made("polar", orthlin.polar, WIDE),
        "matrix_sign": made("matrix_sign", orthlin.matrix_sign, SQUARE),
        "qr": made("qr", orthlin.qr, TALL),
        "qr cholesky2": made("qr", orthlin.qr, TALL, method="cholesky2"),
    }


SIZED = _routines()
COUNTED = [
    *(name for name in SIZED if name != "orthogonalize tol=0.01"),
    "steppers.muon tail",
    "LowRankMuon",
    "Muon",
    "gpt2 LowRankMuon",
    "gpt2 LowRankMuon rank=64",
    "gpt2 Muon",
]


def routines() -> Any:
    """The module of the tests that has every routine on fake tensors."""
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

    function, shapes = SIZED[name][:2]
    counter = FlopCounterMode(display=False, custom_mapping=_factorizations())

    def prepare(empty: Any) -> Callable[[], Any]:
        run = made.of(function, *shapes)(empty)

        def counting() -> Any:
            with counter:
                return run()

        return counting

    recorder = made.fakedevice.record(prepare)
    return counter.get_total_flops(), recorder.passes(4 * math.prod(shapes[0]))


class _Counted:
    version = "1"
    param_names = ["routine"]

    def setup(self, _: str) -> None:
        if find_spec("torch") is None:
            raise NotImplementedError("torch is not here")


class Calls(_Counted):
    params = COUNTED

    def track_calls(self, name: str) -> int:
        return len(routines().measure(name))

    track_calls.unit = "calls"


class Arithmetic(_Counted):
    """Flops, and passes over large matrices (bytes over those of the matrix), in units of the least."""

    params = list(SIZED)

    def track_flops(self, name: str) -> float:
        return counted(name)[0] / SIZED[name].flops

    def track_passes(self, name: str) -> float:
        return counted(name)[1] / SIZED[name].passes

    track_flops.unit = "least"
    track_passes.unit = "least"


class Compiled:
    """Passes over a matrix entry in a compiled step of a matrix, by what inductor says that its kernels read and write.

    The device path on the host; scheduled for a GPU the norms of the columns are a pass of their own as well.
    """

    version = "1"
    timeout = 600.0

    def setup(self) -> None:
        if find_spec("torch") is None:
            raise NotImplementedError("torch is not here")

    def track_passes(self) -> float:
        import torch
        from torch._inductor import config
        from torch._inductor.graph import GraphLowering

        from orthlin.torch import LowRankMuon

        weight = torch.nn.Parameter(torch.randn(512, 2048))
        weight.grad = torch.randn(512, 2048)
        step = torch.compile(LowRankMuon([weight], torch.tensor(1e-2), rank=16).step)
        counts: list[int] = []
        codegen = GraphLowering.codegen

        def counting(graph: Any) -> Any:
            made = codegen(graph)
            counts.extend(size for node in graph.scheduler.nodes if (size := node.get_read_write_buffers_sizes()))
            return made

        GraphLowering.codegen = counting
        try:
            with config.patch(force_disable_caches=True):
                step()
        finally:
            GraphLowering.codegen = codegen
        return sum(size for size in counts if size >= weight.nbytes) / weight.nbytes

    track_passes.unit = "passes"
