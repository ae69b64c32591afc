"""Randomized range finder: sketch, QR, power iterations, posterior error estimate, adaptive rank."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from orthlin import _backend as be
from orthlin import _checks as check
from orthlin import sketch as sk
from orthlin._scaling import in_range, scaled, times, unit_scale
from orthlin._signs import NONZEROS, sparse_sampler
from orthlin.errors import DeviceError, NonFiniteError, ShapeError
from orthlin.qr import thin_qr

Array = Any
_SAFE = 8  # exponents of a test matrix that is taken as it is

__all__ = ["adaptive_range_finder", "randomized_range_finder"]


@be.own_settings
def randomized_range_finder(
    A: Array,
    rank: int,
    /,
    *,
    n_oversamples: int = 10,
    n_iter: int = 0,
    normalizer: str = "qr",
    sketch: str = "gaussian",
    test_matrix: Array | None = None,
    rng: Any = None,
) -> Array:
    r"""Orthonormal basis Q of the range of :math:`(A A^H)^q A \Omega`, which nearly holds the range of A.

    Parameters
    ----------
    A : array, shape (..., m, n)
        Real or complex matrices, any number of leading dimensions.
    rank : int
        Target rank r, 0 <= r <= min(m, n).
    n_oversamples : int
        Columns p drawn beyond r; r + p is cut to min(m, n).
    n_iter : int
        Number q of power iterations.
    normalizer : {"qr", "none"}
        Whether every product of a power iteration is orthonormalized.  Without, directions smaller than
        eps^(1/(2q+1)) times the largest are lost.
    sketch : {"gaussian", "sparse_sign", "columns"}
        How Omega is drawn, see :mod:`orthlin.sketch`; "columns" takes columns of A and is safe only if they
        share its energy evenly.
    test_matrix : array, shape (n, w) or (..., n, w), optional
        Omega itself, r <= w <= min(m, n).  It takes the place of `sketch`, `rng` and `n_oversamples`.
    rng : None, int, SeedSequence, Generator or key
        Source of random numbers, see :mod:`orthlin.sketch`.  A stack shares one draw.

    Returns
    -------
    array, shape (..., m, w)
        Orthonormal columns, w = min(r + n_oversamples, m, n), or the width of `test_matrix`.

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, DeviceError, OptionError, RngError
        If an argument is not as described.
    RankError
        If `rank` or a count is not an integer in its range.
    NonFiniteError
        If a host array holds NaN or infinity.  On devices the result is all NaN.

    Notes
    -----
    For a Gaussian Omega, p >= 2 and q = 0 the expected Frobenius error is at most
    :math:`(1 + r/(p-1))^{1/2} (\sum_{j>r} \sigma_j^2)^{1/2}`; :mod:`orthlin.metrics` has this and other bounds.
    Cost: 2 m n w (2q + 1) flops and 2q + 1 QR factorizations of 4 m w^2 (n w^2) flops.
    The least is 2 m n w flops with a basis of 3 m w^2, and m n numbers read; here 8 m n are moved on devices, as A is
    copied to unit scale.

    References
    ----------
    Halko, Martinsson and Tropp, Finding structure with randomness, SIAM Review 53 (2011), algorithm 4.4.

    Examples
    --------
    >>> import numpy as np
    >>> import orthlin
    >>> rng = np.random.default_rng(0)
    >>> A = rng.standard_normal((60, 4)) @ rng.standard_normal((4, 80))
    >>> Q = orthlin.randomized_range_finder(A, 4, n_oversamples=2, rng=rng)
    >>> Q.shape, bool(np.allclose(Q @ (Q.T @ A), A))
    ((60, 6), True)
    """
    xp = check.matrix(A, "A")
    width = sketch_width(xp, A, rank, n_oversamples, test_matrix, "rank")
    check.count(n_iter, "n_iter")
    check.option(normalizer, "normalizer", ("qr", "none"))
    check.option(sketch, "sketch", sk.KINDS)
    X, _ = unit_scale(xp, be.working(xp, A), "A")
    Y = powered(xp, X, None, sampler(xp, X, width, sketch, test_matrix, rng)(X, None), n_iter, normalizer)
    return be.convert(xp, thin_qr(xp, Y)[0], A.dtype)


def sketch_width(xp: Any, A: Array, rank: Any, n_oversamples: Any, test_matrix: Array | None, name: str) -> int:
    """Check rank, oversampling and test matrix; return the number of columns of the sketch."""
    rank = check.rank(rank, name, A.shape)
    width = min(rank + check.count(n_oversamples, "n_oversamples"), *A.shape[-2:])
    if test_matrix is None:
        return int(width)
    check.companion(xp, test_matrix, "test_matrix", A, "the matrix")
    n, given = test_matrix.shape[-2:]
    if n != A.shape[-1] or not rank <= given <= min(A.shape[-2:]):
        raise ShapeError(
            f"test_matrix: expected shape ({A.shape[-1]}, w) with {rank} <= w <= {min(A.shape[-2:])} "
            f"for a matrix of shape {tuple(A.shape)}, got {tuple(test_matrix.shape)}"
        )
    if not _broadcasts(test_matrix.shape[:-2], A.shape[:-2]):
        raise ShapeError(
            f"test_matrix: leading dimensions {tuple(test_matrix.shape[:-2])} do not broadcast "
            f"to those of the matrix, {tuple(A.shape[:-2])}"
        )
    return int(given)


def _broadcasts(given: tuple[int, ...], target: tuple[int, ...]) -> bool:
    return len(given) <= len(target) and all(g in (1, t) for g, t in zip(given[::-1], target[::-1], strict=False))


def powered(
    xp: Any, X: Array, s: Array | None, Y: Array, n_iter: int, normalizer: str = "qr", precision: str = "highest"
) -> Array:
    """(A A^H)^q Y for A = s X."""
    product = partial(be.large_product, xp, precision=precision)
    for _ in range(n_iter):
        if normalizer == "qr":
            Z = product(be.adjoint(xp, times(thin_qr(xp, Y)[0], s)), X)
            Y = product(X, times(thin_qr(xp, be.adjoint(xp, Z))[0], s))
        else:
            Y = X @ (be.adjoint(xp, X) @ unit_scale(xp, Y, "A")[0])
    return Y


def sampler(
    xp: Any, X: Array, width: int, kind: str, test_matrix: Array | None, rng: Any, precision: str = "highest"
) -> Callable[[Array, Array | None], Array]:
    """A Omega as a function of X and s, A = s X, for a test matrix given or drawn here, one for a whole stack."""
    n = X.shape[-1]
    if test_matrix is not None:
        omega = times(*in_range(xp, test_matrix, "test_matrix", keep=_SAFE, subnormal=False))
    elif kind == "gaussian":
        omega = sk.gaussian(n, width, like=X, rng=rng)
    elif kind == "columns":
        chosen = sk.columns(n, width, like=X, rng=rng)
        return lambda X, s: scaled(xp, be.working(xp, xp.take(X, chosen, axis=-1)), s)
    elif be.is_host(X):
        return sparse_sampler(xp, X, width, rng)
    else:
        omega = sk.sparse_sign(n, width, like=X, rng=rng, nonzeros=NONZEROS)
    return lambda X, s: be.large_product(xp, X, times(omega, s), precision=precision)


@be.own_settings
def adaptive_range_finder(
    A: Array,
    /,
    *,
    tol: float,
    block_size: int = 16,
    max_rank: int | None = None,
    failure_probability: float = 1e-10,
    rng: Any = None,
) -> Array:
    r"""Orthonormal Q with :math:`\|A - Q Q^H A\|_2 \le` `tol`, its width found on the way.

    Blocks of Gaussian columns are appended to the basis until a block of fresh probes
    :math:`\omega_i` shows that the rest is small:
    :math:`\|B\|_2 \le 10 \sqrt{2/\pi} \max_i \|B \omega_i\|_2` fails with probability at most
    :math:`10^{-b}` for b probes.

    Parameters
    ----------
    A : array, shape (m, n)
        One real or complex matrix.
    tol : float
        Bound of the spectral norm of the remainder, in the units of A.
    block_size : int
        Columns appended at a time; the last block of probes is not appended.
    max_rank : int, optional
        Widest basis to return, min(m, n) by default.  Where it is reached the remainder may exceed `tol`.
    failure_probability : float
        Probability, over all tests of one call, that a bound is missed.
    rng : None, int, SeedSequence, Generator or key
        Source of random numbers, see :mod:`orthlin.sketch`.

    Returns
    -------
    array, shape (m, w)
        Orthonormal columns; w depends on the values of A, so on devices this routine synchronises twice
        a block, and it cannot be traced by ``jax.jit`` or ``torch.compile``.

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, DeviceError, OptionError, RankError, RngError
        If an argument is not as described.
    NonFiniteError
        If A holds NaN or infinity.

    Notes
    -----
    Cost: 4 m n w + O(m w^2) flops, and A read once a block of at least `block_size` columns; the least is 2 m n w
    flops and one reading.  A `tol` below eps ||A|| ends with a basis of the whole range.

    References
    ----------
    Halko, Martinsson and Tropp (2011), lemma 4.1 and algorithm 4.2, in blocks.

    Examples
    --------
    >>> import numpy as np
    >>> import orthlin
    >>> rng = np.random.default_rng(0)
    >>> A = rng.standard_normal((100, 5)) @ rng.standard_normal((5, 80))
    >>> orthlin.adaptive_range_finder(A, tol=1e-8, block_size=5, rng=rng).shape
    (100, 5)
    """
    xp = check.matrix(A, "A")
    if A.ndim != 2:
        raise ShapeError(f"A: expected one matrix of shape (m, n), got {tuple(A.shape)}; loop over a stack")
    if str(be.device(A)) == "meta":
        raise DeviceError(
            "A: has no values on the meta device, which the width depends on; use randomized_range_finder"
        )
    tol = check.positive(tol, "tol")
    limit = min(A.shape) if max_rank is None else check.rank(max_rank, "max_rank", A.shape)
    block = check.count(block_size, "block_size", low=1)
    failure = check.positive(failure_probability, "failure_probability", below=1.0)
    X, e = unit_scale(xp, be.working(xp, A), "A")
    n_tests = math.ceil(min(A.shape) / block) + 1
    probes = max(block, math.ceil(math.log10(n_tests / failure)))
    fraction, exponent = math.frexp(tol)
    scaled_tol = math.ldexp(fraction, min(exponent - int(e[0, 0]), 1023))
    bound = scaled_tol / (10 * math.sqrt(2 / math.pi))
    source = be.random_source(rng, X)
    Q = X[:, :0]
    while Q.shape[1] < limit:
        Y = X @ _normal(xp, source, (X.shape[1], probes), X)
        Y = Y - Q @ (be.adjoint(xp, Q) @ Y)
        largest = be.scalar(xp.max(xp.linalg.vector_norm(Y, axis=0)))
        if math.isnan(largest):
            raise NonFiniteError("A: holds NaN or infinity; remove or replace them first")
        if largest <= bound:
            break
        Q = _extended(xp, Q, Y[:, : min(block, limit - Q.shape[1])])
    return be.convert(xp, Q, A.dtype)


def _extended(xp: Any, Q: Array, Y: Array) -> Array:
    """Orthonormal basis of the ranges of Q and Y; its first columns are those of Q, up to sign.

    Projecting twice is enough, unless some direction of Y is rounding noise and may lie in the range of Q.
    """
    Y, _ = thin_qr(xp, unit_scale(xp, Y, "A")[0])
    Z, R = thin_qr(xp, Y - Q @ (be.adjoint(xp, Q) @ Y))
    if be.scalar(xp.min(xp.abs(xp.linalg.diagonal(R)))) < 0.5:
        return thin_qr(xp, xp.concat([Q, Y], axis=1))[0]
    return xp.concat([Q, Z], axis=1)


def _normal(xp: Any, source: be.Source, shape: tuple[int, int], x: Array) -> Array:
    omega = source.normal(shape)
    if be.is_complex(xp, x):
        omega = (omega + 1j * source.normal(shape)) * math.sqrt(0.5)
    return be.transfer(xp, omega, x)
