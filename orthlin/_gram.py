"""The small factors: an orthonormal basis from one Gram matrix, the inverse square root of another.

A low-rank orthogonalization is Q M C with Q = Y K and C = Q^H X.  How orthonormal its factors are depends on K and M
alone, and these on two r x r Gram matrices in double precision; what the products with X lose is a backward error.
Nothing here looks at a value, raises or waits; the number of steps follows from shapes and dtypes.
"""

from collections.abc import Callable
from itertools import count
from typing import Any

from orthlin import _backend as be
from orthlin._minimax import Odd, greedy, image_of_all
from orthlin._schedule import constant

Array = Any
_SHIFT = 64.0  # in eps of the Gram matrix: ten times its rounding errors; in float64 the square of float32's eps
_NEWTON_SCHULZ: Odd = (1.875, -1.25, 0.375)
_POLISH_STEPS = 4
_HIGH_PASS: Odd = (0.0, 2.5, -1.5)  # q(x)/x on x = t^2 of (5 t^3 - 3 t^5)/2, which goes to zero below t^2 = 2/3
_FILTER_STEPS = 8
_ROOT_TOL = 1e-2  # of the inverse root before the filter, which squares what is left in every step
_BELOW_LINE = 0.85  # where the filter divides: from the line on it needs room to send a value to one
_SAFETY = 1e-9
_LOWER = 0.1  # smallest singular value that a tolerance serves, in units of the tolerance


def basis(xp: Any, Y: Array, *, exact: bool) -> Array:
    """Orthonormal columns Q = Y K that span the range of Y, by a Cholesky factorization that cannot fail.

    With W = Y^H Y and L L^H = W + s I, K = L^-H: directions of Y below sqrt(s) are damped, and lifted again by the
    polish as far as they are more than rounding noise.  Without `exact` they stay damped.
    """
    Y = wide(xp, Y)
    W = be.gram(xp, be.adjoint(xp, Y))
    one = be.eye_like(xp, W, W.shape[-1])
    Q = Y @ damped_factor(xp, W, one)
    return Q @ polish(xp, be.gram(xp, be.adjoint(xp, Q)), one) if exact else Q


def damped_factor(xp: Any, W: Array, one: Array) -> Array:
    """K for which Y K is orthonormal but for damped directions, W = Y^H Y; see :func:`basis`."""
    shift = _SHIFT * be.eps(xp, W) * _frobenius(xp, W) + 2.0 ** -be.exponent_bound(xp, W)  # zero is factored too
    L = be.cholesky(xp, W + be.convert(xp, shift, W.dtype) * one, definite=True)
    return be.adjoint(xp, be.inv_lower(xp, L, one))


def inverse_root(xp: Any, S: Array, line: float) -> Array:
    """M with M C = msign(C) for S = C C^H, zero for singular values of C below `line` times the largest.

    With S divided by t, F = (S + tau^2)^(-1/2) has no eigenvalue that depends on noise.  x = F S F^H, which is 2/3
    where the singular value is 2^(1/2) tau, is then sent to 0 or 1 by q(x), and M <- q(x) M keeps M S M^H = x whatever
    rounding has made of F.
    """
    S, t = _normal(xp, S, _top)
    r = S.shape[-1]
    tau2 = (_BELOW_LINE * line) ** 2 / (2 * r**0.25)  # t exceeds the largest eigenvalue by up to r^(1/4)
    floor = tau2 / (1 + tau2)
    one = be.eye_like(xp, S, r)
    steps = quintics(floor**0.5 * (1 - _SAFETY), _ROOT_TOL)
    M = _coupled(xp, S / (1 + tau2) + floor * one, one, steps) / (1 + tau2) ** 0.5
    x = M @ S @ be.adjoint(xp, M)
    M, _ = be.repeat(xp, _filter_step, (M, x), (_HIGH_PASS,) * _FILTER_STEPS)
    return M / t


def approximate_root(xp: Any, S: Array, tol: float) -> Array:
    """M for which M C has singular values within `tol` of one, S = C C^H; less below tol/10 of C's Schatten 4-norm."""
    S, t = _normal(xp, S, _frobenius)
    return _coupled(xp, S, be.eye_like(xp, S, S.shape[-1]), quintics(_LOWER * tol, tol)) / t


@constant
def quintics(lower: float, tol: float) -> tuple[Odd, ...]:
    """Fewest optimal quintics that bring [lower, 1] within `tol` of one."""
    for n in count(1):
        steps = greedy(5, lower, n, _SAFETY, 0.0)
        low, high = image_of_all(steps, lower, 1.0)
        if max(1 - low, high - 1) <= tol:
            return steps
    raise AssertionError


def _coupled(xp: Any, R: Array, one: Array, steps: tuple[Odd, ...]) -> Array:
    """Z = R^(-1/2) for Hermitian R whose eigenvalues are squares of what the steps are made for.

    The pair Y -> R^(1/2), Z with P = Z Y is the stable form (Denman and Beavers; Higham, Functions of Matrices, section
    6.4): what rounding does to Z Y is seen by the next step.
    """
    _, Z = be.repeat(xp, _coupled_step, (R, one), steps)
    return Z


def _coupled_step(xp: Any, pair: tuple[Array, Array], step: Odd, *, first: bool, last: bool) -> tuple[Array, Array]:
    Y, Z = pair
    P = Y if first else Z @ Y
    a, H = step[0], _even(xp, P, step)
    Z = H + a * Z if first else be.add_product(xp, a, Z, 1.0, H, Z)
    return Y if last else be.add_product(xp, a, Y, 1.0, Y, H), Z


def _filter_step(xp: Any, state: tuple[Array, Array], step: Odd, *, last: bool, **_: bool) -> tuple[Array, Array]:
    M, x = state
    q = _even(xp, x, step)
    return q @ M, x if last else q @ x @ q


def polish(xp: Any, W: Array, one: Array) -> Array:
    """K for which Q K is orthonormal, W = Q^H Q: every step cubes how far a singular value is from one."""
    K, _ = be.repeat(xp, _polish_step, (one, W), (_NEWTON_SCHULZ,) * _POLISH_STEPS)
    return K


def _polish_step(xp: Any, state: tuple[Array, Array], step: Odd, *, first: bool, last: bool) -> tuple[Array, Array]:
    K, W = state
    a, H = step[0], _even(xp, W, step)
    K = H + a * K if first else be.add_product(xp, a, K, 1.0, K, H)
    if last:
        return K, W
    T = be.add_product(xp, a, W, 1.0, W, H)
    return K, be.add_product(xp, a, T, 1.0, H, T)


def _even(xp: Any, P: Array, step: Odd) -> Array:
    """p(t)/t - c_0 as a polynomial in P = t^2, for a quintic p: c_1 P + c_2 P^2.

    P is Hermitian only to rounding, and P P^H in place of P^2 would undo the stability of the coupled pair.
    """
    return be.add_product(xp, step[1], P, step[2], P, P)


def wide(xp: Any, x: Array) -> Array:
    """Return `x` in double precision, where there is one."""
    return be.convert(xp, x, be.wide_dtype(xp, x) or be.working(xp, x).dtype)


def _top(xp: Any, S: Array) -> Array:
    """Bound of the largest eigenvalue of a positive semidefinite S, at most r^(1/4) too large: ||S^2||_F^(1/2)."""
    return xp.sqrt(_frobenius(xp, be.gram(xp, S)))


def _frobenius(xp: Any, S: Array) -> Array:
    return xp.linalg.matrix_norm(S, keepdims=True)


def _normal(xp: Any, S: Array, size: Callable[[Any, Array], Array]) -> tuple[Array, Array]:
    """S divided by its size, a bound of its largest eigenvalue, and the root of that bound."""
    t = size(xp, S) + 2.0 ** -be.exponent_bound(xp, S)  # zero is divided by it too
    return S / be.convert(xp, t, S.dtype), be.convert(xp, xp.sqrt(t), S.dtype)
