"""What others do, in their published form."""

import math
from typing import Any

from .common import Library

MUON = (3.4445, -4.7750, 2.0315)


def muon_iteration(_: Library, G: Any) -> Any:
    """Do to a matrix what torch.optim.Muon does, with products in the dtype of G and without writing to it."""
    import torch

    a, b, c = MUON
    X = G.T if G.shape[0] > G.shape[1] else G
    X = X / X.norm().clamp(min=1e-7)
    for _i in range(5):
        A = X @ X.T
        X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.T if G.shape[0] > G.shape[1] else X


def optax_muon(_: Library, G: Any) -> Any:
    """optax's iteration, by default five steps."""
    import jax.numpy as jnp
    from optax.contrib import _muon

    return _muon.orthogonalize_via_newton_schulz(G, jnp.asarray(MUON))


def scipy_polar(_: Library, A: Any) -> Any:
    import scipy.linalg

    return scipy.linalg.polar(A)


def jax_polar(_: Library, A: Any) -> Any:
    """JAX's QDWH, which needs at least as many rows as columns."""
    import jax

    m, n = A.shape
    return jax.scipy.linalg.polar(A) if m >= n else jax.scipy.linalg.polar(A.T)[0].T


def svd_polar(lib: Library, A: Any) -> Any:
    U, _, Vh = lib.xp.linalg.svd(A, full_matrices=False)
    return U @ Vh


def svd_lowrank(_: Library, G: Any, omega: Any) -> Any:
    """torch.svd_lowrank without power iterations, which draws its own test matrix."""
    import torch

    U, _, V = torch.svd_lowrank(G, q=omega.shape[-1], niter=0)
    return U @ V.T


def randomized_cholesky_qr(lib: Library, Y: Any) -> Any:
    """Orthonormal basis as in Dion (arXiv 2504.05295, appendix): QR of a sketch of the rows, then one Cholesky pass."""
    m, r = Y.shape
    k = min(128 * math.ceil(1.25 * r / 128), m)
    S = _normal(lib, k, m, Y) / math.sqrt(k)
    R = lib.xp.linalg.qr(S @ Y)[1]
    B = _solved(lib, R, Y)
    L = lib.xp.linalg.cholesky(B.T @ B)
    return _solved(lib, L.T, B)


def dion(lib: Library, G: Any, omega: Any) -> Any:
    """Dion's direction: an orthonormal left factor, a right one whose columns have length one."""
    P = randomized_cholesky_qr(lib, G @ omega)
    R = G.T @ P
    return P @ (R / (R * R).sum(0) ** 0.5).T


def sklearn_range_finder(_: Library, A: Any, omega: Any) -> Any:
    from sklearn.utils.extmath import randomized_range_finder

    return randomized_range_finder(A, size=omega.shape[-1], n_iter=0, random_state=0)


def _normal(lib: Library, m: int, n: int, like: Any) -> Any:
    if lib.name.startswith("torch"):
        return lib.xp.randn(m, n, dtype=like.dtype, device=like.device)
    if lib.name == "jax":
        import jax

        return jax.random.normal(jax.random.key(0), (m, n), dtype=like.dtype)
    return lib.xp.random.default_rng(0).standard_normal((m, n), dtype=like.dtype)


def _solved(lib: Library, R: Any, Y: Any) -> Any:
    """Y R^-1 for an upper triangular R."""
    if lib.name.startswith("torch"):
        return lib.xp.linalg.solve_triangular(R, Y, upper=True, left=False)
    if lib.name == "jax":
        from jax.scipy.linalg import solve_triangular
    elif lib.name == "cupy":
        from cupyx.scipy.linalg import solve_triangular
    else:
        from scipy.linalg import solve_triangular
    return solve_triangular(R, Y.T, trans="T").T
