"""Low-rank orthogonalization: a sketched basis, and the polar factor of the block it projects to."""

from typing import Any, NamedTuple

from orthlin import _backend as be
from orthlin import _checks as check
from orthlin import sketch as sk
from orthlin._derivatives import dense_rule, factors_rule
from orthlin._factors import METHODS, Way, block, multiplied, rooted, signed
from orthlin._scaling import in_range, moderate, scaled
from orthlin.rangefinder import powered, sampler, sketch_width

Array = Any

__all__ = ["LowRankOrth", "lowrank_orth", "lowrank_orth_factors"]


class LowRankOrth(NamedTuple):
    """Factors of a low-rank orthogonalization; their product is what `lowrank_orth` returns.

    Attributes
    ----------
    Q : array, shape (..., m, r)
        Orthonormal columns; on devices some are shorter where the sketch has a rank below r.
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
    tol: float | None = None,
    precision: str = "highest",
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
        How Omega is drawn.  "sparse_sign" has two nonzeros a row, which on the host are added up, not multiplied;
        "columns" takes r columns of G, uniformly out of all: cheaper, and far worse where few columns hold the energy.
    test_matrix : array, shape (n, w) or (..., n, w), optional
        Omega itself, r <= w <= min(m, n), in place of `sketch`, `rng` and `n_oversamples`.  The adjoint of the
        previous right factor W is a warm start, worth one power iteration at no cost.
    method : {"auto", "exact"}
        "exact": two QR factorizations and the polar factor of the small triangular factor.  "auto": for single
        precision two r x r Gram matrices in float64, and on the host "exact" where they are not enough; where a device
        has no float64, or a slow one, products in float32 up to r = min(m, n)/2; "exact" for the rest.
    tol : float, optional
        Bring every singular value of the block :math:`Q^H G` of at least tol/10 times its Schatten 4-norm within `tol`,
        2^-50 or more, of one; smaller ones end in [0, 1 + tol].  The r x r work falls from about 80 products to 13
        (0.1) or 21 (0.01); the host, which decomposes instead, takes blocks above rank 64 to working precision.
    precision : {"highest", "high", "medium"}
        Of the large products on devices, in the words of ``torch.set_float32_matmul_precision``: float32;
        TensorFloat-32 by torch on CUDA, while no other thread computes here, and by JAX; bfloat16 where the library has
        it, and for single precision in torch on CPUs with units for it.  Where one is missing it means
        "highest".  Their rounding is a backward error: the factors stay orthonormal.
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
    rounding noise: they are left at zero.  Half precision is worked on in float32.  Where r, or the width of the test
    matrix, reaches min(m, n), nothing is sketched: it spans everything.

    The derivative divides by sums of singular values, and by gaps between the squares of kept and dropped ones.
    Cost: 6 m n r flops for sketch, projection and result, O((m + n) r^2 + r^3) for the rest, and 4 m n r for a
    power iteration.  On devices 133 calls of the library, with tol 0.01 66, with 0.1 58; none of them waits.
    The least is 6 m n r flops, and 3 m n numbers moved: G read twice, the result written.  On devices, and for power
    iterations, G is read once more, for its largest entry; the flops there are 1.22 times the least at 1024 x 4096,
    r = 128, with tol 0.1 1.12.

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
    xp, Q, C, way = _parts(G, r, n_iter, n_oversamples, sketch, test_matrix, method, tol, precision, rng)

    def dense(Q: Array, C: Array) -> tuple[Array]:
        Q, M, C = rooted(xp, Q, C, way)
        if M is not None and G.shape[-2] <= G.shape[-1] and M.dtype == C.dtype:
            left, right = Q @ M, C
        else:
            left, right = Q, multiplied(xp, M, C)
        return (be.large_product(xp, be.reduced(xp, left, precision), right, G.dtype, precision=precision),)

    return signed(xp, dense, dense_rule, Q, C, way)[0]


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
    tol: float | None = None,
    precision: str = "highest",
    rng: Any = None,
) -> LowRankOrth:
    """Orthogonalize G at rank r and return the two factors, which saves the last product.

    Parameters
    ----------
    G : array, shape (..., m, n)
        Real or complex matrices.
    r : int
        Rank, 0 <= r <= min(m, n).
    n_iter, n_oversamples, sketch, test_matrix, method, tol, precision, rng
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
    With oversampling, Q = B V with a basis B of the sketch and V^H dV = 0 for the derivative of V.
    Cost: 4 m n r flops for sketch and projection, O((m + n) r^2 + r^3) for the rest.
    The least is 4 m n r flops and 2 m n numbers read; here 3 m n, and on devices 1.33 times the flops
    at 1024 x 4096, r = 128.

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
    xp, Q, C, way = _parts(G, r, n_iter, n_oversamples, sketch, test_matrix, method, tol, precision, rng)

    def factors(Q: Array, C: Array) -> tuple[Array, Array]:
        Q, M, C = rooted(xp, Q, C, way)
        return be.convert(xp, Q, G.dtype), be.convert(xp, multiplied(xp, M, C), G.dtype)

    return LowRankOrth(*signed(xp, factors, factors_rule, Q, C, way))


def _parts(
    G: Array,
    r: Any,
    n_iter: int,
    n_oversamples: int,
    sketch: str,
    test_matrix: Array | None,
    method: str,
    tol: float | None,
    precision: str,
    rng: Any,
) -> tuple[Any, Array, Array, Way]:
    """Namespace, basis Q (m x w) of the sketch, block C (w x n) and how its inverse root is made."""
    xp = check.matrix(G, "G")
    width = sketch_width(xp, G, r, n_oversamples, test_matrix, "r")
    check.count(n_iter, "n_iter")
    check.option(sketch, "sketch", sk.KINDS)
    check.option(method, "method", METHODS)
    check.option(precision, "precision", be.PRECISIONS)
    tol = check.tolerance(tol, "tol")
    # sketch and block tell the host what a pass over G would, where nothing is spanned, repeated or used up
    again = test_matrix is not None or rng is None or isinstance(rng, int)
    first = again and be.is_host(G) and width not in G.shape[-2:] and n_iter == 0
    X, s = (be.working(xp, G), None) if first else in_range(xp, G, "G")
    X = be.reduced(xp, X, precision)
    way = Way(int(r), tol, method, precision).serving(X)
    Y = _spanning(xp, X, s, width)
    if Y is None:
        sample = sampler(xp, X, width, sketch, test_matrix, rng, precision)
        if first:
            Y = sample(X, s)
            Q, C = block(xp, X, s, Y, way) if moderate(xp, Y) else (Y, Y)
            if moderate(xp, C):
                return xp, Q, C, way
            X, s = in_range(xp, G, "G")
            X = be.reduced(xp, X, precision)
        Y = powered(xp, X, s, sample(X, s), n_iter, precision=precision)
    elif test_matrix is not None and be.is_host(X):
        in_range(xp, test_matrix, "test_matrix")  # what is not finite is an error all the same
    return xp, *block(xp, X, s, Y, way), way


def _spanning(xp: Any, X: Array, s: Array | None, width: int) -> Array | None:
    """What spans the range of A = s X, where a sketch of that width would: no test matrix can improve on it."""
    m, n = X.shape[-2:]
    if width == m:
        return xp.broadcast_to(be.eye_like(xp, be.working(xp, X[..., :0, :0]), m), (*X.shape[:-1], m))
    return scaled(xp, be.working(xp, X), s) if width == n else None
