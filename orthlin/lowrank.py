"""Low-rank orthogonalization: a sketched basis, and the polar factor of the block it projects to."""

from typing import Any, NamedTuple

from orthlin import _backend as be
from orthlin import _checks as check
from orthlin import sketch as sk
from orthlin._polynomial import apply, converging, rank_filter
from orthlin._scaling import KEEP, unit_scale
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


@be.own_settings
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
        Columns drawn beyond r; the projected block is cut back to its r leading singular directions, by
        a decomposition that synchronises on torch's devices, the one thing here that does.
    sketch : {"gaussian", "columns", "sparse_sign"}
        How Omega is drawn.  "columns" takes r columns of G, uniformly out of all: cheaper, and far worse where
        few columns hold the energy.
    test_matrix : array, shape (n, w) or (..., n, w), optional
        Omega itself, r <= w <= min(m, n), in place of `sketch`, `rng` and `n_oversamples`.  The adjoint of the
        previous right factor W is a warm start, worth one power iteration at no cost.
    method : {"auto", "exact", "fast"}
        "exact": two QR factorizations and the polar factor of the small triangular factor.  "fast": one
        Cholesky QR pass and the inverse square root of the r x r Gram matrix, in float64 for single precision,
        the products in the dtype of G.  With cond the larger condition number of G Omega and Q^H G its error is about
        0.1 eps cond in single precision up to cond = 1e7, and 0.1 eps cond^2 in double precision up to 1e7; beyond,
        and for a zero matrix, it gives NaN.  "auto": on the host, for single precision, "fast" with
        products in float64 where the condition number asks for it, and "exact" where that is not enough; "exact"
        for double precision and on devices.
    rng : None, int, SeedSequence, Generator or key
        Source of random numbers, see :mod:`orthlin.sketch`.  A stack shares one draw.

    Returns
    -------
    array, shape (..., m, n)
        The orthogonalized matrix, with dtype and device of `G`.  Zero gives zero (not by "fast").

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
    rounding noise: they are left at zero.  Half precision is worked on in float32 ("fast" on devices, without
    power iterations: its three large products in half precision).

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
    result = (Q @ M) @ C if G.shape[-2] <= G.shape[-1] else Q @ (M @ C)
    return be.convert(be.namespace(G), result, G.dtype)


@be.own_settings
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
    return LowRankOrth(be.convert(xp, Q, G.dtype), be.convert(xp, M @ C, G.dtype))


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
    """Q (m x r), M (r x w), C (w x n) with Q M C = msign(Q Q^H G), to be multiplied in the cheaper order."""
    xp = check.matrix(G, "G")
    width = sketch_width(xp, G, r, n_oversamples, test_matrix, "r")
    check.count(n_iter, "n_iter")
    check.option(sketch, "sketch", sk.KINDS)
    check.option(method, "method", METHODS)
    r = int(r)
    X, _ = unit_scale(xp, be.working(xp, G), "G", keep=KEEP)
    X = be.convert(xp, X, G.dtype) if method == "fast" and n_iter == 0 and not be.is_host(X) else X
    Y = powered_sketch(xp, X, width, n_iter, "qr", sketch, test_matrix, rng)
    if 0 in Y.shape:
        C = xp.zeros((*X.shape[:-2], width, X.shape[-1]), dtype=X.dtype, device=be.device(X))
        return Y[..., :r], xp.zeros((r, width), dtype=X.dtype, device=be.device(X)), C
    if method == "fast":
        return _fast(xp, X, Y, r)
    Q, C = _projected(xp, X, Y)
    return _exact(xp, Q, C, r) if method == "exact" else _auto(xp, Q, C, r)


def block_factors(xp: Any, X: Array, Y: Array) -> tuple[Array, Array, Array]:
    """Q, B and W of X in a safe range and its sketch Y: a basis of the range of Y, B = Q^H X, W = msign(B)."""
    Q, B = _projected(xp, X, Y)
    _, M, C = _auto(xp, Q, B, B.shape[-2])
    return Q, B, M @ C


def _projected(xp: Any, X: Array, Y: Array) -> tuple[Array, Array]:
    Q, _ = thin_qr(xp, Y)
    return Q, be.adjoint(xp, Q) @ X


def _auto(xp: Any, Q: Array, C: Array, r: int) -> tuple[Array, Array, Array]:
    cheap = be.is_host(C) and be.wide_dtype(xp, C) is not None
    return _by_gram(xp, Q, C, r) if cheap else _exact(xp, Q, C, r)


def _exact(xp: Any, Q: Array, C: Array, r: int) -> tuple[Array, Array, Array]:
    """With C = T^H V^H by a second QR factorization, Q msign(C) = Q msign(T^H) V^H."""
    V, T = thin_qr(xp, be.adjoint(xp, C))
    Vh, T = be.adjoint(xp, V), be.adjoint(xp, T)
    line = max(Q.shape[-2], C.shape[-1]) * be.eps(xp, C)
    if not be.is_host(C) and r == C.shape[-2]:
        return Q, apply(xp, unit_scale(xp, T, "G")[0], rank_filter(line), "newton_schulz"), Vh
    left, s, right = be.svd(xp, T)
    kept = s[..., None, :] > line * s[..., None, :1]
    left, right = (left * be.convert(xp, kept, C.dtype))[..., :r], right[..., :r, :]
    if r == C.shape[-2]:
        return Q, left @ right, Vh
    return Q @ left, be.eye_like(xp, C, r), right @ Vh


def _by_gram(xp: Any, Q: Array, C: Array, r: int) -> tuple[Array, Array, Array]:
    """Q (C C^H)^(-1/2) C with the Gram matrix in float64 where that is accurate, else as `_exact`."""
    s, V, root = _inverse_root(xp, _wide_gram(xp, C), r)
    # The Gram matrix squares the condition number: its error eps_wide cond^2 stays below eps by a factor 16.
    good = s[..., :1] * be.eps(xp, C) > 16 * be.eps(xp, s) * s[..., -1:]
    # A product in single precision adds up to eps cond / 2.
    mild = s[..., -1:] <= MILD**2 * r * s[..., :1]

    def single() -> tuple[Array, Array, Array]:
        return Q, be.convert(xp, root, C.dtype), C

    def double() -> tuple[Array, Array, Array]:
        W = be.convert(xp, root @ be.convert(xp, C, root.dtype), C.dtype)
        return _leading(xp, Q, V), be.eye_like(xp, C, r), W

    def quick() -> Any:
        return be.choose(xp, mild, single, double) if r == C.shape[-2] else double()

    return tuple(be.choose(xp, good, quick, lambda: _exact(xp, Q, C, r)))


def _fast(xp: Any, X: Array, Y: Array, r: int) -> tuple[Array, Array, Array]:
    """One Cholesky QR pass, then (C C^H)^(-1/2) C; Gram matrices in float64 where there is one."""
    _, inverse = _cholesky_inverse(xp, be.adjoint(xp, Y))
    Q = Y @ be.convert(xp, be.adjoint(xp, inverse), Y.dtype)
    C = be.adjoint(xp, Q) @ X
    if be.is_host(X) or r < C.shape[-2]:
        _, V, root = _inverse_root(xp, _wide_gram(xp, C), r)
        return _leading(xp, Q, V), be.convert(xp, root, C.dtype), C
    # C = L V^H with orthonormal rows of V^H = L^-1 C, so msign(C) = msign(L) L^-1 C
    L, inverse = _cholesky_inverse(xp, C)
    sign = apply(xp, unit_scale(xp, L, "G")[0], converging(1e-4, be.eps(xp, L)), "newton_schulz")
    return Q, be.convert(xp, sign @ inverse, C.dtype), C


def _inverse_root(xp: Any, S: Array, r: int) -> tuple[Array, Array, Array]:
    """Leading r eigenvalues s and eigenvectors V of S, and S^(-1/2), or s^(-1/2) V^H if r is less than its order."""
    s, V = be.eigh(xp, S)
    s, V = s[..., None, -r:], V[..., -r:]
    scaled = V * be.convert(xp, 1 / xp.sqrt(xp.where(s > 0, s, xp.inf)), V.dtype)
    return s, V, be.adjoint(xp, scaled) if r < S.shape[-1] else scaled @ be.adjoint(xp, V)


def _leading(xp: Any, Q: Array, V: Array) -> Array:
    """Basis Q rotated to the leading directions V, as it is where V spans everything."""
    return Q if V.shape[-1] == V.shape[-2] else Q @ be.convert(xp, V, Q.dtype)


def _wide_gram(xp: Any, x: Array) -> Array:
    x = be.working(xp, x)
    return be.gram(xp, be.convert(xp, x, be.wide_dtype(xp, x) or x.dtype))


def _cholesky_inverse(xp: Any, x: Array) -> tuple[Array, Array]:
    """Cholesky factor of X X^H and its inverse."""
    L = be.cholesky(xp, _wide_gram(xp, x))
    return L, be.inv_lower(xp, L)
