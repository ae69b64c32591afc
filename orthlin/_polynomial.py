"""Polynomial schedules applied to matrices: the plain loop and its Gram form."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from orthlin import _backend as be
from orthlin._minimax import Odd, image_of_all
from orthlin._scaling import frobenius
from orthlin._schedule import FINEST_TOL, constant, rounding
from orthlin.errors import ScheduleError
from orthlin.schedules import Schedule, for_tolerance, stable, suppress

Array = Any
_LOWER, _SAFETY = 1e-3, 1e-3  # of the schedules that a tolerance chooses

# The Gram form starts afresh once a rounding error of the Gram matrix, which may have made an eigenvalue
# negative, has grown to this size; up to there p(x)/x changes little around zero.
GRAM_NOISE = 1e-2
_GROWN = 0.05  # distance from one at which a rank filter takes over
_QUINTIC = 3  # coefficients
_SHARP = 16  # steps of the sharpest rank filter
_APART = 4.0  # between singular values that `separating` sends to one and to zero
_SHARE = 0.1  # of what a schedule leaves off one, which the Gram form may add


def apply(xp: Any, X: Array, schedule: Schedule, form: str, dtype: Any = None) -> Array:
    """U p(S/s) V^H for unit-scaled X = U S V^H with s the Schatten 4-norm of X, computed in `dtype`.

    s is at least the 2-norm, at most m^(1/4) times it, and free: X X^H is the first product anyway.
    `form` is "newton_schulz", "gram_newton_schulz" or "auto", as in `orthogonalize`.
    """
    if 0 in X.shape:
        return X if dtype is None else be.convert(xp, X, dtype)
    if X.shape[-2] > X.shape[-1]:
        return be.adjoint(xp, apply(xp, be.adjoint(xp, X), schedule, form, dtype))
    if dtype is not None and dtype != X.dtype:
        X = be.convert(xp, _divide(xp, X, frobenius(xp, X)), dtype)  # a Gram matrix in float16 would overflow
    error = _check(xp, X, schedule)
    S = be.gram(xp, X)
    norm = _nonzero(xp, be.working(xp, frobenius(xp, S)) * (1 + 4 * be.eps(xp, X)))
    X, S = (x / be.convert(xp, size, x.dtype) for x, size in ((X, xp.sqrt(norm)), (S, norm)))
    restarts = _restarts(schedule.steps, error, gram_noise(schedule.steps, schedule.interval))
    cheaper = not be.is_half(xp, X) and _gram_flops(X, schedule, restarts) < _plain_flops(X, schedule)
    if form == "gram_newton_schulz" or (form == "auto" and cheaper):
        return _gram_form(xp, X, S, schedule, restarts)
    *steps, final = schedule.steps
    X, S = be.repeat(xp, _plain_step, (X, S), steps)
    if _ends_at_one(final):
        # p(x) = x (1 + d_1 e + d_2 e^2) with e = 1 - x^2: next to one only the error of e counts
        S, final = be.eye_like(xp, X, X.shape[-2]) - S, (1.0, -final[1] - 2 * final[2], final[2])
    return _stepped(xp, X, S, final, hermitian=True)


def _plain_step(xp: Any, state: tuple[Array, Array], step: Odd, **_: bool) -> tuple[Array, Array]:
    X = _stepped(xp, *state, step, hermitian=True)
    return X, be.gram(xp, X)


def _stepped(xp: Any, X: Array, S: Array, step: Odd, *, hermitian: bool) -> Array:
    """P(X) for the odd polynomial p whose even powers are those of S."""
    return be.add_product(xp, step[0], X, *_higher(xp, S, step[1:], hermitian=hermitian), X)


def _ends_at_one(step: Odd) -> bool:
    return len(step) == _QUINTIC and sum(step) == 1


def apply_square(xp: Any, X: Array, schedule: Schedule | None = None) -> Array:
    """P(X/||X||_F) for square X: each polynomial in X^2 in place of X X^H; to convergence without a schedule."""
    schedule = schedule or converging(be.eps(xp, X), be.eps(xp, X))
    if 0 in X.shape:
        return X
    _check(xp, X, schedule)
    X = _divide(xp, X, frobenius(xp, X) * (1 + 4 * be.eps(xp, X)))
    (X,) = be.repeat(xp, _square_step, (X,), schedule.steps)
    return X


def _square_step(xp: Any, state: tuple[Array], step: Odd, **_: bool) -> tuple[Array]:
    (X,) = state
    return (_stepped(xp, X, X @ X, step, hermitian=False),)


def _check(xp: Any, X: Array, schedule: Schedule) -> float:
    """Rounding error of a step; ScheduleError unless the schedule bears it and serves the interval [0, 1]."""
    error = be.eps(xp, X) / 2 * _cancellation(schedule.steps)
    admitted = rounding(schedule.steps, schedule.interval)
    if schedule.interval[1] < 1 or admitted < error:
        raise ScheduleError(
            f"schedule: {schedule.name!r} is made for singular values in {schedule.interval} and admits relative "
            f"rounding errors of {admitted:.1e}; here they lie in [0, 1] and {X.dtype} makes errors of "
            f"{error:.1e}; choose another, a larger safety or a wider dtype"
        )
    return float(error)


@constant
def _largest(steps: tuple[Odd, ...]) -> tuple[tuple[Odd, float, float], ...]:
    """Every step with the largest value that enters it and the largest that leaves it."""
    found, top = [], 1.0
    for step in steps:
        _, new = image_of_all((step,), 0.0, top)
        found.append((step, top, new))
        top = new
    return tuple(found)


def _terms(step: Odd, top: float, first: int = 0) -> float:
    """Sum of the magnitudes of the terms of a step from number `first` on."""
    return sum(abs(c) * top ** (2 * i + 1) for i, c in enumerate(step) if i >= first)


@constant
def _cancellation(steps: tuple[Odd, ...]) -> float:
    """How much larger than their sum, at most, are the terms of a step that `_higher` rounds one by one.

    From degree 7 on, c_2 S + c_3 S^2 + ... is rounded before it is multiplied by S and cancels with c_1 S.
    """
    worst = max([1.0, *(_terms(step, top, 2) / new for step, top, new in _largest(steps) if len(step) > 3)])
    return float(worst)


@constant
def converging(lower: float, eps: float) -> Schedule:
    """Backward stable schedule to working precision for singular values from `lower` on."""
    return stable(lower, eps / 8)


@constant
def reaching(tol: float, unit: float) -> Schedule:
    """Cheapest schedule to `tol` for singular values from 1e-3 on, with room for rounding errors of size `unit`.

    They are worst where a library does not fuse products and sums, and for the Gram form.
    """
    return for_tolerance(_LOWER, max(0.9 * tol - 8 * unit, FINEST_TOL), safety=max(_SAFETY, 4 * unit))


@constant
def separating(lower: float, tol: float) -> Schedule:
    """Schedule to `tol` of one for singular values from `lower` on, and to `tol` of zero below a quarter of that."""
    growth = stable(lower, _GROWN)
    low, high = growth(lower / _APART), growth.band[0]
    steps = next(n for n in range(1, _SHARP) if max(8 * (1 - suppress(n)(high)), suppress(n)(low)) <= tol)
    return growth.then(suppress(steps))


@constant
def rank_filter(line: float) -> Schedule:
    """Schedule that sends singular values above `line` to one and those well below to zero.

    A value that the growth leaves next to the filter's unstable fixed point moves away from it by 5/3 a step:
    sixteen steps leave one in between only if it started within 3e-4 of the point.
    """
    return stable(line, _GROWN).then(suppress(_SHARP))


def _divide(xp: Any, X: Array, norm: Array) -> Array:
    return X / be.convert(xp, _nonzero(xp, norm), X.dtype)


def _nonzero(xp: Any, norm: Array) -> Array:
    """One in place of zero; in fewer calls than a selection."""
    return norm + be.convert(xp, norm == 0, norm.dtype)


def _higher(xp: Any, S: Array, higher: Sequence[float], *, hermitian: bool) -> tuple[float, Array]:
    """Number a and matrix P with a P = c_1 S + c_2 S^2 + ... for the coefficients of order above one."""
    alpha, P = higher[-1], S
    for c in reversed(higher[:-1]):
        P = be.add_product(xp, c, S, alpha, P, S, hermitian=hermitian and P is S)
        alpha = 1.0
    return alpha, P


def _gram_form(xp: Any, X: Array, S: Array, schedule: Schedule, restarts: tuple[int, ...]) -> Array:
    """The same on the Gram matrix S = X X^H: with p(x) = x h(x^2), Q <- h(S) Q and S <- h(S) S h(S)."""
    for start, end in pairwise((0, *sorted(restarts), len(schedule.steps))):
        S = be.gram(xp, X) if start else S
        Q = be.eye_like(xp, X, X.shape[-2])
        Q, _ = be.repeat(xp, _gram_step, (Q, S), schedule.steps[start:end])
        X = Q @ X
    return X


def _gram_step(xp: Any, state: tuple[Array, Array], step: Odd, *, first: bool, last: bool) -> tuple[Array, Array]:
    Q, S = state
    Z, c = be.scaled(*_higher(xp, S, step[1:], hermitian=True)), step[0]
    Q = Z + c * Q if first else be.add_product(xp, c, Q, 1.0, Z, Q)
    if last:
        return Q, S
    T = be.add_product(xp, c, S, 1.0, Z, S)
    return Q, be.add_product(xp, c, T, 1.0, T, Z)


@constant
def _restarts(steps: tuple[Odd, ...], unit: float, limit: float) -> tuple[int, ...]:
    """Steps before which the Gram form multiplies out, so that what all its segments add stays below `limit`.

    Next to zero a step multiplies noise in S by c_0^2; S <- h(S) S h(S) adds twice the rounding of p times p.
    """
    restarts: set[int] = set()
    for segments in range(1, len(steps) + 1):
        restarts, noise = set(), unit
        for i, (step, top, new) in enumerate(_largest(steps)):
            if i and noise > limit / segments:
                restarts.add(i)
                noise = unit
            noise = noise * step[0] ** 2 + 2 * unit * _terms(step, top) * new
        if len(restarts) < segments:
            break
    return tuple(sorted(restarts))  # torch.compile looks into no set that is a constant


@constant
def gram_noise(steps: tuple[Odd, ...], interval: tuple[float, float]) -> float:
    """What the Gram form may add to p(x), in proportion to what the schedule itself promises."""
    low, high = image_of_all(steps, *interval)
    return min(_SHARE * max(1 - low, high - 1), GRAM_NOISE)


def _plain_flops(X: Array, schedule: Schedule) -> int:
    m, n = map(int, X.shape[-2:])
    return sum(4 * m**2 * n + 2 * m**3 * (len(step) - 2) for step in schedule.steps)


def _gram_flops(X: Array, schedule: Schedule, restarts: tuple[int, ...]) -> int:
    m, n = map(int, X.shape[-2:])
    segments = 1 + len(restarts)
    inside = sum(2 * m**3 * (len(step) + 1) for step in schedule.steps)
    return 4 * m**2 * n * segments + inside - 6 * m**3 * segments
