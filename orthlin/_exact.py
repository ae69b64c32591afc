"""Unitary factors by decompositions, and the step that takes the rounding of many products out of one."""

from typing import Any

from orthlin import _backend as be
from orthlin._scaling import frobenius

Array = Any


def svd_unitary(xp: Any, X: Array, line: float) -> tuple[Array]:
    """U V^H over the singular values above `line` times the largest; over all if `line` is 0, and zero for zero."""
    U, s, Vh = be.svd(xp, X)
    s = s[..., None, :]
    top = s[..., :1]
    kept = s > line * top if line else top > 0
    return ((U * be.convert(xp, kept, U.dtype)) @ Vh,)


def eigh_unitary(xp: Any, X: Array, eps: float, line: float) -> tuple[Array, Array]:
    """X (X^H X)^(-1/2) over the same singular values, and whether its error eps_wide cond^2 is below eps/16."""
    s, V = be.eigh(xp, be.gram(xp, be.adjoint(xp, X)))
    s = s[..., None, :]
    top = xp.max(s, axis=-1, keepdims=True)
    kept = s > (line**2 * top if line else -xp.inf)
    low = xp.min(xp.where(kept, s, top), axis=-1, keepdims=True)
    good = low * eps > 16 * be.eps(xp, X) * top
    inverse = xp.where(kept & good, 1 / xp.sqrt(xp.where(kept & good, s, xp.ones_like(s))), xp.zeros_like(s))
    return X @ ((V * be.convert(xp, inverse, V.dtype)) @ be.adjoint(xp, V)), good


def aligned(xp: Any, X: Array, U: Array) -> Array:
    """U (I + w K), closer to the unitary factor of X than U, which many rounded products have turned away from it.

    U^H X = H + K, and to first order K = -(W H + H W)/2 for the rotation W of U.  Solving for W would take a
    decomposition; w K with the w that leaves the least of K needs one product, and leaves a third.  The square of
    the rotation costs orthonormality: it may be eps/16.
    """
    M = be.adjoint(xp, U) @ X
    H, K = (M + be.adjoint(xp, M)) / 2, (M - be.adjoint(xp, M)) / 2
    L = H @ K
    L = (L - be.adjoint(xp, L)) / 2
    size, square = frobenius(xp, K), frobenius(xp, L) ** 2
    inner = xp.sum(xp.real(xp.conj(K) * L) if be.is_complex(xp, X) else K * L, axis=(-2, -1), keepdims=True)
    safe = xp.where(square > 0, square, xp.ones_like(square))
    limit = be.eps(xp, X) ** 0.5 / 4 / xp.where(size > 0, size, xp.ones_like(size))
    return U + U @ (be.convert(xp, xp.minimum(inner / safe, limit), X.dtype) * K)
