"""Every public routine and optimizer with its options, on fake tensors; as a script it rewrites the table of calls.

    python tests/routines.py [name ...]

`calls.json` holds how many calls of the library each of them makes on a device.  A launch costs microseconds whatever
is multiplied, so that these counts are what small matrices cost.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fakedevice
import torch

import orthlin
from orthlin import metrics, schedules, sketch, steppers
from orthlin.torch import MSGD, PAPER, LowRankMSGD, LowRankMuon, Muon

TABLE = Path(__file__).with_name("calls.json")
WIDE, TALL, STACK, SQUARE = (96, 160), (160, 96), (2, 96, 160), (64, 64)
RANK = 16
SVD, EIGH = frozenset({"_linalg_svd"}), frozenset({"_linalg_eigh"})
Empty = Callable[..., torch.Tensor]
Prepared = Callable[[Empty], Callable[[], Any]]


def of(function: Callable[..., Any], *shapes: tuple[int, ...], **options: Any) -> Prepared:
    """`function` of tensors of these shapes; an option given as a tuple is the shape of a tensor."""

    def prepare(A: Empty) -> Callable[[], Any]:
        given = {k: A(*v) if isinstance(v, tuple) else v for k, v in options.items()}
        return partial(function, *[A(*shape) for shape in shapes], **given)

    return prepare


def lowrank(shape: tuple[int, ...] = WIDE, **options: Any) -> Prepared:
    return of(lambda G, **o: orthlin.lowrank_orth(G, RANK, **o), shape, **options)


def ranged(**options: Any) -> Prepared:
    return of(lambda A, **o: orthlin.randomized_range_finder(A, RANK, **o), WIDE, **options)


def drawn(kind: str, rng: Any) -> Prepared:
    return of(lambda like: getattr(sketch, kind)(64, RANK, like=like, rng=rng), WIDE)


OMEGA = (WIDE[-1], RANK)
FUNCTIONS: dict[str, Prepared] = {
    "lowrank_orth": lowrank(test_matrix=OMEGA),
    "lowrank_orth tol=0.01": lowrank(test_matrix=OMEGA, tol=0.01),
    "lowrank_orth tol=0.1": lowrank(test_matrix=OMEGA, tol=0.1),
    "lowrank_orth tall": lowrank(TALL, test_matrix=(TALL[-1], RANK)),
    "lowrank_orth stack": lowrank(STACK, test_matrix=OMEGA),
    "lowrank_orth n_iter=1": lowrank(test_matrix=OMEGA, n_iter=1),
    "lowrank_orth method=exact": lowrank(test_matrix=OMEGA, method="exact"),
    "lowrank_orth precision=medium": lowrank(test_matrix=OMEGA, precision="medium"),
    "lowrank_orth rng=0": lowrank(rng=0),
    "lowrank_orth rng=None": lowrank(),
    "lowrank_orth sketch=columns": lowrank(sketch="columns", rng=0),
    "lowrank_orth sketch=sparse_sign": lowrank(sketch="sparse_sign", rng=0),
    "lowrank_orth r=k": of(lambda G: orthlin.lowrank_orth(G, WIDE[0]), WIDE),
    "lowrank_orth n_oversamples=4": lowrank(rng=0, n_oversamples=4),
    "lowrank_orth_factors": of(lambda G, O: orthlin.lowrank_orth_factors(G, RANK, test_matrix=O), WIDE, OMEGA),
    "orthogonalize": of(orthlin.orthogonalize, WIDE),
    "orthogonalize tall": of(orthlin.orthogonalize, TALL),
    "orthogonalize stack": of(orthlin.orthogonalize, STACK),
    "orthogonalize tol=0.2": of(orthlin.orthogonalize, WIDE, tol=0.2),
    "orthogonalize tol=0.1": of(orthlin.orthogonalize, WIDE, tol=0.1),
    "orthogonalize gram tol=0.2": of(orthlin.orthogonalize, WIDE, tol=0.2, method="gram_newton_schulz"),
    "orthogonalize muon": of(orthlin.orthogonalize, WIDE, schedule=schedules.muon()),
    "orthogonalize polar_express": of(orthlin.orthogonalize, WIDE, schedule=schedules.polar_express()),
    "orthogonalize method=svd": of(orthlin.orthogonalize, WIDE, method="svd"),
    "polar": of(orthlin.polar, WIDE),
    "polar side=left": of(orthlin.polar, WIDE, side="left"),
    "polar tall": of(orthlin.polar, TALL),
    "polar method=svd": of(orthlin.polar, WIDE, method="svd"),
    "qr": of(orthlin.qr, TALL),
    "qr wide": of(orthlin.qr, WIDE),
    "qr cholesky2": of(orthlin.qr, TALL, method="cholesky2"),
    "qr shifted_cholesky3": of(orthlin.qr, TALL, method="shifted_cholesky3"),
    "matrix_sign": of(orthlin.matrix_sign, SQUARE),
    "matrix_sign newton_schulz": of(orthlin.matrix_sign, SQUARE, method="newton_schulz"),
    "randomized_range_finder": ranged(test_matrix=OMEGA),
    "randomized_range_finder n_iter=2": ranged(rng=0, n_iter=2),
    "randomized_range_finder normalizer=none": ranged(rng=0, n_iter=2, normalizer="none"),
    **{f"sketch.{kind}": drawn(kind, 0) for kind in ("gaussian", "sparse_sign", "columns")},
    **{f"sketch.{kind} rng=None": drawn(kind, None) for kind in ("gaussian", "sparse_sign", "columns")},
    "metrics.nuclear_norm": of(metrics.nuclear_norm, STACK),
    "metrics.numerical_rank": of(metrics.numerical_rank, STACK),
    "metrics.stable_rank": of(metrics.stable_rank, STACK),
    "metrics.captured_nuclear_norm": of(metrics.captured_nuclear_norm, STACK, STACK),
    "metrics.captured_fraction": of(metrics.captured_fraction, STACK, STACK),
    "metrics.captured_energy": of(metrics.captured_energy, STACK, (2, 96, 8)),
    "metrics.range_error": of(metrics.range_error, STACK, (2, 96, 8)),
    "metrics.range_error ord=2": of(metrics.range_error, STACK, (2, 96, 8), ord=2),
    "metrics.orthogonality": of(metrics.orthogonality, STACK),
    "metrics.polar_backward_error": of(metrics.polar_backward_error, STACK, STACK, (2, 160, 160)),
    "metrics.qr_residual": of(metrics.qr_residual, STACK, (2, 96, 96), STACK),
    "metrics.hermitian_defect": of(metrics.hermitian_defect, SQUARE),
    "metrics.psd_defect": of(metrics.psd_defect, SQUARE),
}
WAITING = {
    **dict.fromkeys(
        (
            "lowrank_orth n_oversamples=4", "orthogonalize method=svd", "polar method=svd", "metrics.nuclear_norm",
            "metrics.numerical_rank", "metrics.stable_rank", "metrics.captured_fraction", "metrics.range_error ord=2",
        ),
        SVD,
    ),
    "metrics.psd_defect": EIGH,
}  # fmt: skip
"""Routines that are documented to wait for the device, and the calls that do."""


def updated(make: Callable[..., Any], **options: Any) -> Prepared:
    """The second of two updates of a stepper."""

    def prepare(A: Empty) -> Callable[[], Any]:
        stepper, X, G = make(0.1, **options), A(*WIDE), A(*WIDE)
        _, state = stepper.update(G, stepper.init(X, "w"), X, "w")
        return lambda: stepper.update(G, state, X, "w")

    return prepare


LOW = {
    "low rank": {"rank": RANK},
    "warm": {"rank": RANK, "warm_start": True},
    "tail": {"rank": RANK, "warm_start": True, "tail": "auto"},
    "growing": {"rank": lambda t: 8 + 4 * t, "warm_start": True},
    "n_iter=1": {"rank": RANK, "n_iter": 1},
    "columns": {"rank": RANK, "sketch": "columns"},
}
ANY = {
    "full": {},
    "schedule": {"schedule": schedules.muon()},
    "nuclear": {"rank": RANK, "scale": "nuclear"},
    "rms_rank": {"rank": RANK, "scale": "rms_rank", "weight_decay": 0.1},
    "raise": {"rank": RANK, "nonfinite": "raise"},
}
STEPPERS: dict[str, Prepared] = {
    **{f"steppers.muon {k}": updated(steppers.muon, **o) for k, o in (LOW | ANY).items()},
    **{f"steppers.msgd {k}": updated(steppers.msgd, **o) for k, o in (LOW | ANY).items()},
    "steppers.muon cautious": updated(steppers.muon, rank=RANK, cautious=True, weight_decay=0.1),
    "steppers.muon feedback": updated(steppers.muon, rank=RANK, error_feedback=True, nesterov=False),
}


def stepped(make: Callable[..., Any], **options: Any) -> Prepared:
    """A step of an optimizer whose AdamW has its state."""

    def prepare(A: Empty) -> Callable[[], Any]:
        parameters = _parameters(A, (WIDE, WIDE, (96,)))
        return _warmed(make(parameters, lr=1e-3, **options))

    return prepare


def _warmed(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """Its step, after one in which the matrices have no gradients."""
    matrices = [p for group in optimizer.param_groups for p in group["params"] if group["algorithm"] == "orthogonal"]
    for p in matrices:
        p.grad = None
    optimizer.step()
    for p in matrices:
        p.grad = torch.empty_like(p)
    return optimizer.step


def _parameters(A: Empty, shapes: Any) -> list[torch.nn.Parameter]:
    parameters = [torch.nn.Parameter(A(*shape)) for shape in shapes]
    for p in parameters:
        p.grad = torch.empty_like(p)
    return parameters


def read(A: Empty) -> Callable[[], Any]:
    optimizer = LowRankMuon(_parameters(A, (WIDE, TALL)), lr=1e-3, rank=RANK, diagnostics=True)
    return lambda: (optimizer.step(), optimizer.skipped(), optimizer.diagnostics())


def restored(kind: Callable[..., Any], **options: Any) -> Prepared:
    """The step after a state has been loaded."""

    def prepare(A: Empty) -> Callable[[], Any]:
        first, second = (kind(_parameters(A, (WIDE, (96,))), lr=1e-3, **options) for _ in range(2))
        first.step()
        second.load_state_dict(first.state_dict())
        return second.step

    return prepare


CLASSES = {
    "LowRankMuon": partial(LowRankMuon, rank=RANK),
    "Muon": Muon,
    "LowRankMSGD": partial(LowRankMSGD, rank=RANK),
    "MSGD": MSGD,
}
MUON: dict[str, dict[str, Any]] = {
    "weight_decay=0": {"weight_decay": 0.0},
    "cautious": {"cautious": True},
    "diagnostics": {"diagnostics": True},
    "nonfinite=raise": {"nonfinite": "raise"},
    "maximize": {"maximize": True},
    "nuclear": {"scale": "nuclear"},
    "master_weights=False": {"master_weights": False},
    "fused": {"adamw": {"fused": True}},
    "foreach": {"adamw": {"foreach": True}},
}
LOW_RANK_MUON: dict[str, dict[str, Any]] = {
    "paper": PAPER,
    "n_iter=1": {"n_iter": 1},
    "columns": {"sketch": "columns", **PAPER},
    "growing": {"rank": lambda t: 8 + 4 * t},
    "feedback": {"error_feedback": True, "nesterov": False},
}
OPTIMIZERS: dict[str, Prepared] = {
    **{name: stepped(kind) for name, kind in CLASSES.items()},
    **{f"{name} restored": restored(kind) for name, kind in CLASSES.items()},
    **{f"LowRankMuon {k}": stepped(LowRankMuon, **{"rank": RANK, **o}) for k, o in (MUON | LOW_RANK_MUON).items()},
    **{f"Muon {k}": stepped(Muon, **o) for k, o in MUON.items()},
    "LowRankMuon read": read,
    "Muon schedule=None": stepped(Muon, schedule=None),
}

# GPT-2 124M: the weights of its linear maps, stored (in, out), then tables and vectors
LAYER = ((768, 2304), (768, 768), (768, 3072), (3072, 768))
VECTORS = ((768,),) * 4 + ((2304,), (768,), (3072,), (768,))
MATRIX_BYTES = 4 * 12 * sum(m * n for m, n in LAYER)


def gpt2(make: Callable[..., Any], **options: Any) -> Prepared:
    """A step of an optimizer of GPT-2 124M."""

    def groups(A: Empty) -> list[dict[str, Any]]:
        attention, others = _parameters(A, LAYER[:1] * 12), _parameters(A, LAYER[1:] * 12)
        rest = _parameters(A, ((50257, 768), (1024, 768), *VECTORS * 12, (768,), (768,)))
        view = {"transposed": True, "split_axis": "out", "batch_ndim": 0}
        return [
            {"params": attention, "algorithm": "orthogonal", "view": {**view, "splits": 3}},
            {"params": others, "algorithm": "orthogonal", "view": {**view, "splits": 1}},
            {"params": rest, "algorithm": "adamw"},
        ]

    def prepare(A: Empty) -> Callable[[], Any]:
        return _warmed(make(groups(A), lr=1e-3, adamw={"fused": True}, **options))

    return prepare


GPT2: dict[str, Prepared] = {
    "gpt2 LowRankMuon": gpt2(LowRankMuon),
    "gpt2 LowRankMuon rank=64": gpt2(LowRankMuon, rank=64),
    "gpt2 LowRankMuon paper": gpt2(LowRankMuon, **PAPER),
    "gpt2 LowRankMSGD": gpt2(LowRankMSGD),
    "gpt2 Muon": gpt2(Muon),
    "gpt2 MSGD": gpt2(MSGD),
}
ALL = {**FUNCTIONS, **STEPPERS, **OPTIMIZERS, **GPT2}


def measure(name: str, dtype: torch.dtype = torch.float32) -> fakedevice.Recorder:
    """Record the calls of a routine of the table."""
    return fakedevice.record(lambda empty: ALL[name](partial(empty, dtype=dtype)))


def entry(name: str, recorder: fakedevice.Recorder) -> dict[str, float]:
    """What the table says of a routine."""
    passes = {"passes": round(recorder.passes(MATRIX_BYTES), 1)} if name in GPT2 else {}
    return {"calls": len(recorder), **passes}


if __name__ == "__main__":
    table = json.loads(TABLE.read_text()) if sys.argv[1:] else {}
    table |= {name: entry(name, measure(name)) for name in sys.argv[1:] or ALL}
    lines = [f"  {json.dumps(name)}: {json.dumps(table[name])}" for name in ALL if name in table]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
