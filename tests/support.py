"""What every routine can do: the one registry that the tests check and the documentation prints.

A call takes matrices (..., 12, 5) and a test matrix (5, 2) of the same library, and uses what it needs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import orthlin
from orthlin import metrics, schedules, sketch, steppers

SHAPE, OMEGA = (12, 5), (5, 2)
ABILITIES = ("stacks", "complex", "half", "nothing waits", "jax.jit", "torch.compile", "derivative")


class Entry(NamedTuple):
    """A call, and the abilities that it lacks; every other it has."""

    call: Callable[[Any, Any], Any]
    lacks: frozenset[str] = frozenset()


def stepped(stepper: steppers.Stepper) -> Callable[[Any, Any], Any]:
    """One step of a stepper."""
    return lambda A, W: stepper.update(A, stepper.init(A, "w"), A, "w")[0]


def square(A: Any) -> Any:
    """A matrix of order 5."""
    return A[..., :5, :]


MUON = schedules.muon()
ADAPTIVE = frozenset({"stacks", "nothing waits", "jax.jit", "torch.compile"})  # its width depends on values
CONSTANT = frozenset({"derivative"})
DRAWN = frozenset({"torch.compile", "derivative"})  # a generator is made on the way
STEPPED = frozenset({"torch.compile"})
REGISTRY = {
    "lowrank_orth": Entry(lambda A, W: orthlin.lowrank_orth(A, 2, test_matrix=W)),
    "lowrank_orth_factors": Entry(lambda A, W: orthlin.lowrank_orth_factors(A, 2, test_matrix=W)),
    "orthogonalize": Entry(lambda A, W: orthlin.orthogonalize(A)),
    "orthogonalize, schedule": Entry(lambda A, W: orthlin.orthogonalize(A, schedule=MUON)),
    "polar": Entry(lambda A, W: orthlin.polar(A)),
    "matrix_sign": Entry(lambda A, W: orthlin.matrix_sign(square(A))),
    "qr": Entry(lambda A, W: orthlin.qr(A)),
    "randomized_range_finder": Entry(lambda A, W: orthlin.randomized_range_finder(A, 2, test_matrix=W)),
    "adaptive_range_finder": Entry(
        lambda A, W: orthlin.adaptive_range_finder(A, tol=1.0, block_size=2, rng=0), ADAPTIVE
    ),
    "steppers.muon": Entry(stepped(steppers.muon(0.1, rank=2)), STEPPED),
    "steppers.msgd": Entry(stepped(steppers.msgd(0.1, rank=2)), STEPPED),
    "sketch.gaussian": Entry(lambda A, W: sketch.gaussian(5, 2, like=A, rng=0), DRAWN),
    "sketch.sparse_sign": Entry(lambda A, W: sketch.sparse_sign(5, 2, like=A, rng=0), DRAWN),
    "sketch.columns": Entry(lambda A, W: sketch.columns(5, 2, like=A, rng=0), DRAWN),
    "metrics.nuclear_norm": Entry(lambda A, W: metrics.nuclear_norm(A)),
    "metrics.numerical_rank": Entry(lambda A, W: metrics.numerical_rank(A), CONSTANT),
    "metrics.stable_rank": Entry(lambda A, W: metrics.stable_rank(A)),
    "metrics.captured_nuclear_norm": Entry(lambda A, W: metrics.captured_nuclear_norm(A, A)),
    "metrics.captured_fraction": Entry(lambda A, W: metrics.captured_fraction(A, A)),
    "metrics.captured_energy": Entry(lambda A, W: metrics.captured_energy(A.mT, W)),
    "metrics.range_error": Entry(lambda A, W: metrics.range_error(A.mT, W)),
    "metrics.orthogonality": Entry(lambda A, W: metrics.orthogonality(A)),
    "metrics.polar_backward_error": Entry(lambda A, W: metrics.polar_backward_error(A, A, A.mT @ A)),
    "metrics.qr_residual": Entry(lambda A, W: metrics.qr_residual(A, A, square(A))),
    "metrics.hermitian_defect": Entry(lambda A, W: metrics.hermitian_defect(square(A))),
    "metrics.psd_defect": Entry(lambda A, W: metrics.psd_defect(A.mT @ A - 2 * W @ W.mT)),
}
