"""Newton's iteration for the matrix sign."""

from math import log2
from typing import Any

import numpy as np

from orthlin import _backend as be
from orthlin._scaling import frobenius
from orthlin.errors import SingularError

Array = Any
_DEVICE_STEPS = 24
_LOST = 4.0  # a step must exceed so many times its rounding error


def newton_sign(xp: Any, X: Array, F: Array | None = None) -> tuple[Array, ...]:
    """Sign of unit-scaled X; NaN where a step loses all digits, as it does next to the imaginary axis.

    With F also the upper right block of sign([[X, F], [0, -X]]), which is linear in F (Roberts 1980); then the
    spectrum of X lies in the right half-plane.

    A step X <- (mu X + X^-1/mu)/2 has terms of norm root = (||X|| ||X^-1||)^(1/2) and the rounding error
    eps root^3.  Matrices that have converged stay as they are, so a batch equals a loop.
    """
    if 0 in X.shape:
        return (X,) if F is None else (X, F)
    host = be.is_host(X)
    # a step doubles angles with the imaginary axis: more steps would only make a sign out of rounding errors
    steps = int(-0.75 * log2(be.eps(xp, X)))
    norm = be.numbers(frobenius(xp, X))
    rows = ((),) * (steps if host else min(steps, _DEVICE_STEPS))
    X, _, _, done, F = be.repeat(xp, _newton_step, (X, norm, norm, norm < 0, F), rows, _settled)
    if host and not (done | np.isnan(norm)).all():
        raise SingularError(
            "A: has an eigenvalue on the imaginary axis to working precision, so it has no sign; "
            "add a multiple of the identity first to split the spectrum elsewhere"
        )
    X = be.select(xp, done, X, xp.nan)
    return (X,) if F is None else (X, be.select(xp, done, F, xp.nan))


def _newton_step(xp: Any, state: tuple[Any, ...], _: Any, **__: bool) -> tuple[Any, ...]:
    X, norm, _, done, F = state
    eps, inverse, of_norms = be.eps(xp, X), be.inv(xp, X), be.namespace(norm)
    largest = be.numbers(xp.max(xp.abs(inverse), axis=(-2, -1), keepdims=True))
    inverse = be.select(xp, eps * norm * largest < 1, inverse, xp.nan)  # else its norm might overflow
    root = of_norms.sqrt(norm * be.numbers(frobenius(xp, inverse)))
    mu = be.convert(xp, be.from_numbers(xp, root / norm, X), X.dtype)
    new = (mu * X + inverse / mu) / 2
    size = be.numbers(frobenius(xp, new))
    new = be.select(xp, done | (size > _LOST * eps * root**3), new, xp.nan)
    change = be.numbers(frobenius(xp, new - X))
    if F is not None:
        F = be.select(xp, done, F, (mu * F + inverse @ F @ inverse / mu) / 2)
    X, norm = be.select(xp, done, X, new), of_norms.where(done, norm, size)
    done = done | (change <= eps**0.5 + eps * root**3)  # what is left is the square of the change, or rounding
    return X, norm, change, done, F


def _settled(_: Any, state: tuple[Any, ...]) -> bool:
    _, _, change, done, _ = state
    return bool((done | np.isnan(change)).all())
