"""Low-rank orthogonalization: a sketched basis, and the polar factor of the block it projects to."""

from typing import Any, NamedTuple

from orthlin import _backend as be
from orthlin import _checks as check
from orthlin import schedules
from orthlin import sketch as sk
from orthlin._polynomial import apply
from orthlin._scaling import unit_scale
from orthlin.qr import MILD, thin_qr
from orthlin.rangefinder import powered_sketch, sketch_width

Array = Any
METHODS = ("auto", "exact", "fast")

__all__ = ["LowRankOrth", "lowrank_orth", "lowrank_orth_factors"]


class LowRankOrth(NamedTuple):
    """Factors of a low-rank orthogonalization; their product is what `lowrank_orth` returns.

    Attributes
    ----------
    Q : array, shape (..., m, r)
        Orthonormal columns.
    W : array, shape (..., r, n)
        Orthonormal rows, or a partial isometry where the projected block has a rank below r.
    """

    Q: Array
    W: Array


def lowrank_orth(
    G: Array,
    r: int,
    /,
    *,
    n_iter: int = 0,
    n_oversamples: int = 0,
    sketch: str = "gaussian",
    test_matrix: Array | None = None,
    method: str = "auto",
    rng: Any = None,
) -> Array:
    r"""Orthogonalize G at rank r: :math:`Q\,\mathrm{msign}(Q^H G)`, Q a basis of the range of G Omega.

    The result is the matrix sign of the projected matrix :math:`Q Q^H G`: r singular values are one, the rest
    zero, and its inner product with G is the nuclear norm of :math:`Q^H G`.  If rank(G) <= r it is the polar
    factor of G.

    Parameters
    ----------
    G : array, shape (..., m, n)
        Real or complex matrices, any number of leading dimensions.
    r : int
        Rank, 0 <= r <= min(m, n); rank 0 gives zero.
    n_iter : int
        Power iterations on the sketch; one recovers most of what a plain sketch misses.
    n_oversamples : int
        Columns drawn beyond r; the projected block is cut back to its r leading singular directions.
    sketch : {"gaussian", "columns", "sparse_sign"}
        How Omega is drawn.  "columns" takes r columns of G, uniformly out of all: cheaper, and far worse where
        few columns hold the energy.
    test_matrix : array, shape (n, w) or (..., n, w), optional
        Omega itself, r <= w <= min(m, n), in place of `sketch`, `rng` and `n_oversamples`.  The adjoint of the
        previous right factor W is a warm start, worth one power iteration at no cost.
    method : {"auto", "exact", "fast"}
        "exact": two QR factorizations and the polar factor of the small triangular factor.  "fast": one
        Cholesky QR pass and the inverse square root of the r x r Gram matrix, in float64 for single precision,
        the products in the dtype of G; accurate while the condition numbers of G Omega and of Q^H G stay
        below 1e3 (float32), 1e7 (float64), and NaN where a Gram matrix is singular.  "auto": on the host,
        "fast" with products in float64 where the condition number asks for it, and "exact" where that is not
        enough; "exact" for double precision and on devices.
    rng : None, int, SeedSequence, Generator or key
        Source of random numbers, see :mod:`orthlin.sketch`.  A stack shares one draw.

    Returns
    -------
    array, shape (..., m, n)
        The orthogonalized matrix, with dtype and device of `G`.  Zero gives zero.

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, DeviceError, OptionError, RngError
        If an argument is not as described.
    RankError
        If `r` or a count is not an integer in its range.
    NonFiniteError
        If a host array holds NaN or infinity.  On devices the result is all NaN.

    Notes
    -----
    Directions whose singular value in the projected block is below max(m, n) eps times the largest carry only
    rounding noise: they are left at zero.  Half precision is worked on in float32 ("fast": its three large
    products in half precision).

    Cost: 6 m n r flops for sketch, projection and result, O((m + n) r^2 + r^3) for the rest, and 4 m n r for a
    power iteration.

    References
    ----------
    He, Deng and Lu, Low-rank orthogonalization for large-scale matrix optimization, arXiv 2509.11983,
    algorithm 1.

    Examples
    --------
    >>> import numpy as np
    >>> import orthlin
    >>> G = np.random.default_rng(0).standard_normal((60, 80))
    >>> O = orthlin.lowrank_orth(G, 5, rng=0)
    >>> np.round(np.linalg.svd(O)[1][:7], 6).tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    """
    Q, M, C = _triple(G, r, n_iter, n_oversamples, sketch, test_matrix, method, rng)
    left = M.dtype == C.dtype and G.shape[-2] <= G.shape[-1]  # multiply M with the smaller neighbour
    return be.namespace(G).astype((Q @ M) @ C if left else Q @ _multiply(M, C), G.dtype)


def lowrank_orth_factors(
    G: Array,
    r: int,
    /,
    *,
    n_iter: int = 0,
    n_oversamples: int = 0,
    sketch: str = "gaussian",
    test_matrix: Array | None = None,
    method: str = "auto",
    rng: Any = None,
) -> LowRankOrth:
    """Orthogonalize G at rank r and return the two factors, which saves the last product.

    Parameters, errors, limits and references are those of :func:`lowrank_orth`.

    Parameters
    ----------
    G : array, shape (..., m, n)
        Real or complex matrices.
    r : int
        Rank, 0 <= r <= min(m, n).
    n_iter, n_oversamples, sketch, test_matrix, method, rng
        See :func:`lowrank_orth`.

    Returns
    -------
    LowRankOrth
        Named tuple (Q, W) of shapes (..., m, r) and (..., r, n): Q @ W is ``lowrank_orth(G, r, ...)``.

    Raises
    ------
    OrthlinError
        As :func:`lowrank_orth`.

    Notes
    -----
    Cost: 4 m n r flops for sketch and projection, O((m + n) r^2 + r^3) for the rest.

    Examples
    --------
    >>> import numpy as np
    >>> import orthlin
    >>> G = np.random.default_rng(0).standard_normal((60, 80))
    >>> Q, W = orthlin.lowrank_orth_factors(G, 5, rng=0)
    >>> warm = orthlin.lowrank_orth_factors(G, 5, test_matrix=W.T)
    >>> Q.shape, warm.W.shape
    ((60, 5), (5, 80))
    """
    Q, M, C = _triple(G, r, n_iter, n_oversamples, sketch, test_matrix, method, rng)
    xp = be.namespace(G)
    return LowRankOrth(xp.astype(Q, G.dtype), xp.astype(_multiply(M, C), G.dtype))


def _triple(
    G: Array,
    r: Any,
    n_iter: int,
    n_oversamples: int,
    sketch: str,
    test_matrix: Array | None,
    method: str,
    rng: Any,
) -> tuple[Array, Array, Array]:
    """Q (m x r), M (r x w), C (w x n) with Q M C = msign(Q Q^H G); the dtype of M says how to multiply."""
    xp = check.matrix(G, "G")
    width = sketch_width(xp, G, r, n_oversamples, test_matrix, "r")
    check.count(n_iter, "n_iter")
    check.option(sketch, "sketch", sk.KINDS)
    check.option(method, "method", METHODS)
    r = int(r)
    X, _ = unit_scale(xp, be.working(xp, G), "G", keep=32)
    X = xp.astype(X, G.dtype) if method == "fast" else X
    Y = powered_sketch(xp, X, width, n_iter, "qr", sketch, test_matrix, rng)
    if 0 in Y.shape:
        return Y[..., :r], xp.zeros((r, width), dtype=X.dtype, device=be.device(X)), be.adjoint(xp, Y)
    if method == "fast":
        return _fast(xp, X, Y, r)
    Q, _ = thin_qr(xp, Y)
    C = be.adjoint(xp, Q) @ X
    if method != "auto" or not be.is_host(X) or be.wide_dtype(xp, X) is None:
        return _exact(xp, Q, C, r)
    quick, good = _gram_core(xp, Q, C, r)
    if bool(xp.all(good)):
        return quick
    return tuple(xp.where(good, a, xp.astype(b, a.dtype)) for a, b in zip(quick, _exact(xp, Q, C, r), strict=True))


def _multiply(a: Array, b: Array) -> Array:
    """A B in the wider of their dtypes, rounded to the narrower."""
    if a.dtype == b.dtype:
        return a @ b
    xp = be.namespace(a)
    narrow, wide = (x.dtype for x in sorted((a, b), key=lambda x: be.eps(xp, x), reverse=True))
    return xp.astype(xp.astype(a, wide) @ xp.astype(b, wide), narrow)


def _exact(xp: Any, Q: Array, C: Array, r: int) -> tuple[Array, Array, Array]:
    """With C = T^H V^H by a second QR factorization, Q msign(C) = Q msign(T^H) V^H."""
    V, T = thin_qr(xp, be.adjoint(xp, C))
    T = be.adjoint(xp, T)
    line = max(Q.shape[-2], C.shape[-1]) * be.eps(xp, C)
    if not be.is_host(C) and r == C.shape[-2]:
        filtered = schedules.stable(line, 0.05).then(schedules.suppress(8))
        return Q, apply(xp, unit_scale(xp, T, "G")[0], filtered, "newton_schulz"), be.adjoint(xp, V)
    left, s, right = xp.linalg.svd(T, full_matrices=False)
    s = s[..., None, :]
    kept = xp.astype(s > line * xp.max(s, axis=-1, keepdims=True), C.dtype)
    left, right = (left * kept)[..., :r], right[..., :r, :]
    if r < C.shape[-2]:
        return Q @ left, right, be.adjoint(xp, V)
    return Q, left @ right, be.adjoint(xp, V)


def _gram_core(xp: Any, Q: Array, C: Array, r: int) -> tuple[tuple[Array, Array, Array], Array]:
    """Q (C C^H)^(-1/2) C at rank r from an eigendecomposition in float64, and where that is accurate.

    A Gram matrix squares the condition number: the error is eps_wide cond^2, held below eps with a margin.
    The product with C in single precision adds eps cond, so it is taken only where cond is mild.
    """
    wide = be.wide_dtype(xp, C)
    s, V = xp.linalg.eigh(be.gram(xp, xp.astype(C, wide)))
    s, V = s[..., None, -r:], V[..., -r:]
    low, high = s[..., :1], s[..., -1:]
    good = low * be.eps(xp, C) > 16 * be.eps(xp, s) * high
    scaled = V / xp.astype(xp.sqrt(xp.where(good, s, xp.ones_like(s))), wide)
    mild = bool(xp.all(high <= MILD**2 * r * low))
    if r < C.shape[-2]:
        Q, M = _multiply(Q, V), be.adjoint(xp, scaled)
    else:
        M = scaled @ be.adjoint(xp, V)
    return (Q, xp.astype(M, C.dtype) if mild else M, C), good


def _fast(xp: Any, X: Array, Y: Array, r: int) -> tuple[Array, Array, Array]:
    """One Cholesky QR pass, then (C C^H)^(-1/2) C; Gram matrices in float64 where there is one."""
    L, inverse = _cholesky_inverse(xp, be.adjoint(xp, Y))
    Q = Y @ xp.astype(be.adjoint(xp, inverse), Y.dtype)
    C = be.adjoint(xp, Q) @ X
    if be.is_host(X) or r < C.shape[-2]:
        s, V = xp.linalg.eigh(_wide_gram(xp, C))
        V, s = V[..., -r:], s[..., None, -r:]
        scaled = V / xp.astype(xp.sqrt(s), V.dtype)
        if r < C.shape[-2]:
            return Q @ xp.astype(V, Q.dtype), xp.astype(be.adjoint(xp, scaled), C.dtype), C
        return Q, xp.astype(scaled @ be.adjoint(xp, V), C.dtype), C
    # C = L V^H with orthonormal rows of V^H = L^-1 C, so msign(C) = msign(L) L^-1 C
    L, inverse = _cholesky_inverse(xp, C)
    sign = apply(xp, unit_scale(xp, L, "G")[0], schedules.stable(1e-4, be.eps(xp, L) / 8), "newton_schulz")
    return Q, xp.astype(sign @ inverse, C.dtype), C


def _wide_gram(xp: Any, x: Array) -> Array:
    x = be.working(xp, x)
    return be.gram(xp, xp.astype(x, be.wide_dtype(xp, x) or x.dtype))


def _cholesky_inverse(xp: Any, x: Array) -> tuple[Array, Array]:
    """Cholesky factor of X X^H and its inverse."""
    L = be.cholesky(xp, _wide_gram(xp, x))
    return L, be.inv_lower(xp, L)
