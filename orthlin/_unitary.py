"""Unitary factors, by decompositions on the host and by products on devices."""

from typing import Any

import numpy as np

from orthlin import _backend as be
from orthlin._polynomial import apply, converging, separating
from orthlin._scaling import frobenius

Array = Any


def unitary(xp: Any, X: Array, method: str, line: float, eps: float) -> Array:
    """Factor of unit-scaled X, worked out tall: libraries factorize those two to three times faster.

    Singular values up to `line` times the largest become zero; by `line` 0 they are completed on the host, and on
    devices end between 0 and 1.  `eps` is to what precision.
    """
    if X.shape[-2] < X.shape[-1]:
        return be.adjoint(xp, unitary(xp, be.adjoint(xp, X), method, line, eps))
    host = be.is_host(X)
    if method not in ("auto", "svd") or (method == "auto" and not host):
        form = "newton_schulz" if method == "auto" else method
        if line:  # apply divides by up to k^(1/4) times the largest singular value
            return apply(xp, X, separating(line / X.shape[-1] ** 0.25, eps), form)
        return _aligned(xp, X, apply(xp, X, converging(eps, eps), form))
    wide = be.wide_dtype(xp, X) if method == "auto" else None
    if wide is None:
        return _svd_unitary(xp, X, line)[0]
    U, good = _eigh_unitary(xp, be.convert(xp, X, wide), be.eps(xp, X), line)
    return be.choose(xp, good, lambda: (be.convert(xp, U, X.dtype),), lambda: _svd_unitary(xp, X, line))[0]


def _svd_unitary(xp: Any, X: Array, line: float) -> tuple[Array]:
    """U V^H over the singular values above `line` times the largest; over all if `line` is 0, and zero for zero."""
    U, s, Vh = be.svd(xp, X)
    s = be.numbers(s)[..., None, :]
    top = s[..., :1]
    kept = s > line * top if line else top > 0
    if not (be.is_host(U) and kept.all()):
        U = U * be.convert(xp, be.from_numbers(xp, kept, U), U.dtype)
    return (U @ Vh,)


def _eigh_unitary(xp: Any, X: Array, eps: float, line: float) -> tuple[Array, Array]:
    """X (X^H X)^(-1/2) over the same singular values, and whether its error eps_wide cond^2 is below eps/16."""
    s, V = be.eigh(xp, be.gram(xp, be.adjoint(xp, X)))
    s = be.numbers(s)[..., None, :]
    top = s[..., -1:]
    kept = s > (line**2 * top if line else -np.inf)
    good = np.min(s, axis=-1, keepdims=True, where=kept, initial=np.inf) * eps > 16 * be.eps(xp, X) * top
    inverse = be.from_numbers(xp, np.where(kept & good, 1 / np.sqrt(s), 0), V)
    return X @ ((V * be.convert(xp, inverse, V.dtype)) @ be.adjoint(xp, V)), good


def _aligned(xp: Any, X: Array, U: Array) -> Array:
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
