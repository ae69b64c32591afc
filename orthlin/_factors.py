"""What low rank is made of: an orthonormal basis of a sketch, the block it projects to, the inverse root of the block.

With Q the basis and C = Q^H A the block, M is the inverse square root of C C^H, and Q M C = msign(Q Q^H A).  Host and
device differ in how Q and M are made, nowhere else: the host looks at condition numbers, the device takes no decision.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from orthlin import _backend as be
from orthlin._derivatives import basis_rule, polar_adjoint, polar_rule
from orthlin._gram import approximate_root, basis, inverse_root, wide
from orthlin._polynomial import apply, converging, rank_filter
from orthlin._scaling import scaled, times
from orthlin.qr import MILD, thin_qr

Array = Any
METHODS = ("auto", "exact")
# Smallest singular value of a sketch that becomes one, in eps: what is noise in it may be a direction of the block
# above the line, and at 1 was left at 0.9999 of its length.
_NOISE = 1 / 16
_APPROXIMATED = 64  # largest rank at which a tolerance saves time on the host


class Way(NamedTuple):
    """How the factors are made: rank r, tolerance, method, precision of products; see `orthlin.lowrank_orth`."""

    r: int
    tol: float | None = None
    method: str = "auto"
    precision: str = "highest"

    def serving(self, x: Array) -> "Way":
        """The same for matrices `x`: the host decomposes larger blocks faster than it approximates their roots."""
        return self._replace(tol=None) if be.is_host(x) and self.r > _APPROXIMATED else self


def block(xp: Any, X: Array, s: Array | None, Y: Array, way: Way) -> tuple[Array, Array]:
    """Q, an orthonormal basis of the range of a sketch Y of A = s X, and the block C = Q^H A."""
    if Y.shape[-2] == Y.shape[-1]:
        return Y, scaled(xp, be.working(xp, X), s)
    if 0 in Y.shape:
        Q = Y
    elif way.tol is not None:
        Q = be.convert(xp, basis(xp, _squarable(xp, Y), exact=False), Y.dtype)
    elif way.method == "auto" and _by_products(xp, Y):
        (Q,) = be.differentiable(xp, lambda Y: (be.convert(xp, basis(xp, Y, exact=True), Y.dtype),), basis_rule, Y)
    elif way.method == "auto" and _narrow(xp, Y, X.shape[-1]):
        (Q,) = be.differentiable(xp, lambda Y: (_orthonormal(xp, Y),), polar_rule, Y, adjoint=polar_adjoint)
    else:
        Q, _ = thin_qr(xp, Y)
    return Q, be.large_product(xp, be.adjoint(xp, times(Q, s)), X, precision=way.precision)


def signed(xp: Any, function: Callable[..., be.Arrays], rule: Any, Q: Array, C: Array, way: Way) -> be.Arrays:
    """`function(Q, C)`, made of the factors of Q msign(C), with one derivative for all ways; or as it is written."""
    if way.tol is not None or 0 in Q.shape or 0 in C.shape:
        return function(Q, C)
    return be.differentiable(xp, function, partial(rule, way.r), Q, C)


def rooted(xp: Any, Q: Array, C: Array, way: Way) -> tuple[Array, Array | None, Array]:
    """Q, M and C with M C = msign of the block, cut to its r leading directions: M is the inverse root of C C^H.

    M is None where the C returned is msign of the block already.
    """
    r, tol, method, _ = way
    if 0 in Q.shape or 0 in C.shape:
        return Q[..., :r], xp.zeros((r, C.shape[-2]), dtype=C.dtype, device=be.device(C)), C
    uncut = r == C.shape[-2]
    if method == "auto" and tol is not None and uncut:
        C = _squarable(xp, C)
        return Q, approximate_root(xp, be.gram(xp, wide(xp, C)), tol), C
    if method == "auto" and be.is_host(C) and be.wide_dtype(xp, C) is not None:
        return _by_gram(xp, Q, C, r)
    if method == "auto" and uncut and _by_products(xp, C):
        return Q, inverse_root(xp, be.gram(xp, wide(xp, C)), _line(xp, Q, C)), C
    if method == "auto" and uncut and _narrow(xp, Q, C.shape[-1]):
        return Q, None, apply(xp, _near_one(xp, C), rank_filter(_line(xp, Q, C)), "newton_schulz")
    return _exact(xp, Q, C, r)


def _by_products(xp: Any, x: Array) -> bool:
    """Whether Gram matrices in double precision serve `x`, products only: on devices that are fast with it."""
    return not be.is_host(x) and be.wide_dtype(xp, x, fast=True) is not None


def _narrow(xp: Any, Y: Array, n: int) -> bool:
    """Whether products in single precision alone serve a sketch Y of an m x n matrix on a device.

    From half the width on, a sketch is too ill-conditioned for what a step of the iteration rounds.
    """
    m, r = Y.shape[-2:]
    return not be.is_host(Y) and be.is_single(xp, Y) and 2 * r <= min(m, n)


def _orthonormal(xp: Any, Y: Array) -> Array:
    """Unitary factor of a sketch, a basis of its range; directions well below rounding noise are shorter."""
    eps = be.eps(xp, Y)
    return apply(xp, _near_one(xp, Y), converging(_NOISE * eps, eps), "newton_schulz")


def _near_one(xp: Any, x: Array) -> Array:
    """`x` over its largest entry, so that squares stay in range; what that rounds is a backward error.

    A power of two would round nothing and takes JAX more operations.
    """
    top = be.constant(xp.max(xp.abs(x), axis=(-2, -1), keepdims=True))
    return x / be.convert(xp, top + 2.0 ** -be.exponent_bound(xp, x), x.dtype)  # zero is divided by it too


def _squarable(xp: Any, x: Array) -> Array:
    """`x`, or where no wider precision takes its squares, `x` near one: a sketch may miss all that is large."""
    return _near_one(xp, x) if be.wide_dtype(xp, x) is None else x


def _line(xp: Any, Q: Array, C: Array) -> float:
    """Singular value, relative to the largest, below which a direction carries only rounding noise."""
    return float(max(Q.shape[-2], C.shape[-1]) * be.eps(xp, C))


def multiplied(xp: Any, M: Array | None, C: Array) -> Array:
    """M C, rounded once."""
    if M is None:
        return C
    return be.convert(xp, M @ be.convert(xp, C, M.dtype), C.dtype)


def _exact(xp: Any, Q: Array, C: Array, r: int) -> tuple[Array, Array, Array]:
    """With C = T^H V^H by a second QR factorization, Q msign(C) = Q msign(T^H) V^H."""
    Ch = be.adjoint(xp, C)
    V, T = thin_qr(xp, Ch) if Ch.shape[-2] > Ch.shape[-1] else (be.eye_like(xp, C, C.shape[-1]), Ch)
    Vh, T = be.adjoint(xp, V), be.adjoint(xp, T)
    line = _line(xp, Q, C)
    if not be.is_host(C) and r == C.shape[-2]:
        return Q, apply(xp, T * be.safe_factor(xp, T, 0), rank_filter(line), "newton_schulz"), Vh
    left, s, right = be.svd(xp, T)
    kept = s[..., None, :] > line * s[..., None, :1]
    left, right = (left * be.convert(xp, kept, C.dtype))[..., :r], right[..., :r, :]
    if r == C.shape[-2]:
        return Q, left @ right, Vh
    return Q @ left, be.eye_like(xp, C, r), right @ Vh


def _by_gram(xp: Any, Q: Array, C: Array, r: int) -> tuple[Array, Array, Array]:
    """Q (C C^H)^(-1/2) C with the Gram matrix in float64 where that is accurate, else as `_exact`."""
    s, V, M = _eigh_root(xp, be.gram(xp, be.convert(xp, C, be.wide_dtype(xp, C))), r)
    low, top = s[..., :1], s[..., -1:]
    # The Gram matrix squares the condition number: its error eps_wide cond^2 stays below eps by a factor 16.
    good = low * be.eps(xp, C) > 16 * be.eps(xp, V) * top
    # A product in single precision adds up to eps cond / 2.
    mild = top <= MILD**2 * r * low

    def single() -> tuple[Array, Array, Array]:
        return Q, be.convert(xp, M, C.dtype), C

    def double() -> tuple[Array, Array, Array]:
        return _leading(xp, Q, V), be.eye_like(xp, C, r), multiplied(xp, M, C)

    def quick() -> Any:
        return be.choose(xp, mild, single, double) if r == C.shape[-2] else double()

    return tuple(be.choose(xp, good, quick, lambda: _exact(xp, Q, C, r)))


def _leading(xp: Any, Q: Array, V: Array) -> Array:
    """Basis Q rotated to the leading directions V, as it is where V spans everything."""
    return Q if V.shape[-1] == V.shape[-2] else Q @ be.convert(xp, V, Q.dtype)


def _eigh_root(xp: Any, S: Array, r: int) -> tuple[np.ndarray, Array, Array]:
    """Leading r eigenvalues s and eigenvectors V of S, and S^(-1/2), or s^(-1/2) V^H if r is less than its order.

    The eigenvalues are NumPy's, (..., 1, r); where one is not positive, the root is not finite.
    """
    s, V = be.eigh(xp, S)
    s, V = be.numbers(s)[..., None, -r:], V[..., -r:]
    scaled = V * be.convert(xp, be.from_numbers(xp, 1 / np.sqrt(s), V), V.dtype)
    return s, V, be.adjoint(xp, scaled) if r < S.shape[-1] else scaled @ be.adjoint(xp, V)
