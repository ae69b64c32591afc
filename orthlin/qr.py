"""Thin QR factorization: Householder, CholeskyQR2 and shifted CholeskyQR3."""

from typing import Any, NamedTuple

import numpy as np

from orthlin import _backend as be
from orthlin import _checks as check
from orthlin._derivatives import qr_rule
from orthlin._scaling import frobenius, unit_scale
from orthlin.errors import ShapeError

Array = Any
# A product with the inverse of a factor loses up to eps/2 times its condition number, the promise is 32 eps sqrt(r).
MILD = 64.0
_SMALL = 4096  # entries below which the overhead of the Cholesky way exceeds what it saves
_LAST_PASS = 2.0  # excess of ||R||_F ||R^-1||_F over n, its least value: no condition number above 3
METHODS = ("auto", "householder", "cholesky2", "shifted_cholesky3")

__all__ = ["QRResult", "qr"]


class QRResult(NamedTuple):
    """Factors of A = Q R.

    Attributes
    ----------
    Q : array, shape (..., m, k)
        Orthonormal columns, k = min(m, n).
    R : array, shape (..., k, n)
        Upper triangular (trapezoidal if m < n).
    """

    Q: Array
    R: Array


@be.own_settings
def qr(A: Array, /, *, method: str = "auto") -> QRResult:
    """Thin QR factorization A = Q R.

    Parameters
    ----------
    A : array, shape (..., m, n)
        Real or complex matrices, any number of leading dimensions.  Half precision is factorized in
        float32 and returned in the input dtype.
    method : {"auto", "householder", "cholesky2", "shifted_cholesky3"}
        "householder" is the array library's own factorization; it is backward stable for every matrix.
        "cholesky2" (m >= n) makes Q = A R^-1 from the Cholesky factor of A^H A, twice; it is made of
        products, which is what makes it fast for tall matrices and for stacks, and is proved accurate up to
        the condition number 1/(8 sqrt(s)) with s = (m n + n (n + 1)) eps/2.  "shifted_cholesky3" (m >= n) adds
        a first pass with a shift and reaches 1/(96 s); a rank-deficient matrix still breaks it.  Where they
        break down both give NaN, neither an exception nor columns that are not orthonormal; as A is multiplied
        with an inverse, ||A - Q R|| may reach eps cond(A) ||A||.  "auto" takes the Cholesky way for tall host
        matrices, in float64 for single precision, where the measured condition number proves it accurate, and
        Householder for the rest and on devices.

    Returns
    -------
    QRResult
        Named tuple (Q, R) with shapes (..., m, k) and (..., k, n), k = min(m, n), dtype and device of `A`.
        The diagonal of R is real and not negative by every method and on every library, so for full column rank
        the factors are unique; `numpy.linalg.qr`, `torch.linalg.qr` and `jax.numpy.linalg.qr` leave it any sign.

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, OptionError
        If `A` or `method` is not as described.
    NonFiniteError
        If a host array holds NaN or infinity.  On devices the result is all NaN.

    Notes
    -----
    The derivative is that of the factors whose diagonal of R keeps its signs; it exists where the leading min(m, n)
    columns have full rank.  Elsewhere directions whose diagonal entry is rounding noise are left out.
    Cost for m >= n: Householder 4 m n^2 - 4/3 n^3 flops, CholeskyQR2 4 m n^2, shifted CholeskyQR3 6 m n^2.
    The least is 3 m n^2, a Gram matrix by half and a product, and 3 m n numbers moved.  On devices Householder moves
    about 13 m n at 4096 x 1024, copies brought to scale and to R's signs among them, CholeskyQR2 25 m n.

    References
    ----------
    Yamamoto, Nakatsukasa, Yanagisawa and Fukaya, Roundoff error analysis of the CholeskyQR2 algorithm,
    ETNA 44 (2015).  Fukaya, Kannan, Nakatsukasa, Yamamoto and Yanagisawa, Shifted Cholesky QR for computing
    the QR factorization of ill-conditioned matrices, SIAM J. Sci. Comput. 42 (2020).

    Examples
    --------
    >>> import numpy as np
    >>> import orthlin
    >>> A = np.random.default_rng(0).standard_normal((50, 3))
    >>> Q, R = orthlin.qr(A)
    >>> bool(np.allclose(Q @ R, A)), bool(np.allclose(Q.T @ Q, np.eye(3)))
    (True, True)
    """
    xp = check.matrix(A, "A")
    check.option(method, "method", METHODS)
    if method.endswith(("2", "3")) and A.shape[-2] < A.shape[-1]:
        raise ShapeError(f"A: method {method!r} needs m >= n, got shape {tuple(A.shape)}; use 'householder'")
    X, e = unit_scale(xp, be.working(xp, A), "A")
    Q, R = thin_qr(xp, X, method)
    return QRResult(be.convert(xp, Q, A.dtype), be.convert(xp, be.ldexp(xp, R, e), A.dtype))


def thin_qr(xp: Any, X: Array, method: str = "auto") -> tuple[Array, ...]:
    """QR of matrices in a safe range, with its derivative."""
    return be.differentiable(xp, lambda X: _factors(xp, X, method), qr_rule, X)


def _factors(xp: Any, X: Array, method: str) -> tuple[Array, Array]:
    """Factors by `method`; "auto": Cholesky where the condition number proves it accurate, else Householder."""
    if method == "cholesky2":
        return _cholesky_qr(xp, X, passes=2)
    if method == "shifted_cholesky3":
        return _cholesky_qr(xp, X, passes=3, shifted=True)
    m, n = X.shape[-2:]
    if method == "householder" or not be.is_host(X) or m < 2 * n or m * n < _SMALL:
        return _householder(xp, X)
    wide = be.wide_dtype(xp, X)
    Q, R, good = _two_passes(xp, X) if wide is None else _wide_pass(xp, X, wide)
    Q, R = be.choose(xp, good, lambda: (Q, R), lambda: _householder(xp, X))
    return Q, R


def _householder(xp: Any, X: Array) -> tuple[Array, Array]:
    """QR of the array library with a diagonal of R that is not negative."""
    if 0 in X.shape:
        return tuple(xp.linalg.qr(X, mode="reduced"))
    return _positive(xp, *_reflected(xp, X))


def _positive(xp: Any, Q: Array, R: Array) -> tuple[Array, Array]:
    """Q D and D^H R with the phases D of the diagonal of R, one for a zero."""
    diagonal = xp.linalg.diagonal(R)[..., None]
    if not be.is_complex(xp, R):
        phase = 1 - 2 * be.convert(xp, diagonal < 0, R.dtype)
        return Q * phase.mT, phase * R
    size = xp.abs(diagonal)
    safe = xp.where(size > 0, size, xp.ones_like(size))
    real, imag = (be.convert(xp, part / safe, R.dtype) for part in (xp.real(diagonal), xp.imag(diagonal)))
    phase = xp.where(size > 0, real + 1j * imag, xp.ones_like(real))
    phase = phase / be.convert(xp, xp.abs(phase), R.dtype)  # of a subnormal number the size was rounded
    on = xp.eye(*R.shape[-2:], dtype=xp.bool, device=be.device(R))
    return Q * phase.mT, xp.where(on, be.convert(xp, size, R.dtype), xp.conj(phase) * R)


def _reflected(xp: Any, X: Array) -> tuple[Array, Array]:
    """QR of the array library, on the host without the NaN that it makes of some singular matrices.

    What a complex64 reflector of torch (MKL) leaves of equal columns can underflow and be divided by; a
    diagonal of the size of one rounding error of X prevents that.
    """
    Q, R = xp.linalg.qr(X, mode="reduced")
    if not be.is_host(X):
        return Q, R
    m, n = X.shape[-2:]
    finite = np.isfinite(be.numbers(xp.sum(Q, axis=(-2, -1), keepdims=True)))

    def nudged() -> tuple[Array, Array]:
        size = be.eps(xp, X) / 2 * frobenius(xp, X) / min(m, n) ** 0.5
        diagonal = xp.eye(m, n, dtype=X.dtype, device=be.device(X))
        return tuple(xp.linalg.qr(X + be.convert(xp, size, X.dtype) * diagonal, mode="reduced"))

    Q, R = be.choose(xp, finite, lambda: (Q, R), nudged)
    return Q, R


def _two_passes(xp: Any, X: Array) -> tuple[Array, Array, Array]:
    """Q, R and whether they are accurate, by CholeskyQR2.

    Yamamoto et al., condition of Theorem 3.1; Frobenius norms in place of 2-norms are on the safe side.  The
    product X R^-1 leaves a residual of up to eps cond, which is multiplied out once more unless cond is mild.
    """
    m, n = X.shape[-2:]
    Q, R, inverse, cond = _cholesky_pass(xp, X)
    good = 64 * cond**2 * (m * n + n * (n + 1)) * be.eps(xp, X) / 2 <= 1
    (Q,) = be.choose(xp, cond <= MILD * n**0.5, lambda: (Q,), lambda: (Q + (X - Q @ R) @ inverse,))
    Q, R2, _, _ = _cholesky_pass(xp, Q)
    return Q, R2 @ R, good


def _wide_pass(xp: Any, X: Array, wide: Any) -> tuple[Array, Array, Array]:
    """Q, R and whether they are accurate, by one pass with the Gram matrix and its factor in the wider dtype.

    The Gram matrix loses eps_wide cond^2; the product X R^-1 in single precision loses eps cond, so it is
    taken in the wider dtype unless cond is mild.  cond is (||S||_F ||S^-1||_F)^(1/2) with S = R^H R: at least the
    condition number of R, and closer to it than Frobenius norms of R and R^-1 by up to n^(1/2).
    """
    S = be.gram(xp, be.convert(xp, be.adjoint(xp, X), wide))
    L = be.cholesky(xp, S)
    factor = be.adjoint(xp, be.inv_lower(xp, L))
    cond = xp.sqrt(frobenius(xp, S) * frobenius(xp, be.gram(xp, factor)))
    (Q,) = be.choose(
        xp,
        cond <= MILD * X.shape[-1] ** 0.5,
        lambda: (X @ be.convert(xp, factor, X.dtype),),
        lambda: (be.convert(xp, be.convert(xp, X, wide) @ factor, X.dtype),),
    )
    return Q, be.convert(xp, be.adjoint(xp, L), X.dtype), cond**2 <= 0.25 * be.eps(xp, X) / be.eps(xp, L)


def _cholesky_qr(xp: Any, X: Array, passes: int, *, shifted: bool = False) -> tuple[Array, Array]:
    Q, R, _, cond = _cholesky_pass(xp, X, shifted=shifted)
    for _ in range(passes - 1):
        Q, R2, _, cond = _cholesky_pass(xp, Q)
        R = R2 @ R
    # The last pass loses eps cond(Q)^2.  A factor can exist by luck beyond the range, and Q be far from orthonormal.
    good = cond <= X.shape[-1] + _LAST_PASS
    return xp.where(good, Q, xp.nan), xp.where(good, R, xp.nan)


def _cholesky_pass(xp: Any, X: Array, *, shifted: bool = False) -> tuple[Array, Array, Array, Array]:
    """Q = X R^-1, R with R^H R = X^H X + s I, R^-1, and an upper bound of the condition number of R.

    The shift s = 11 (m n + n (n+1)) u ||X||^2 is that of Fukaya et al. (2020), equation (4.4).
    """
    m, n = X.shape[-2:]
    S = be.gram(xp, be.adjoint(xp, X))
    if shifted:
        size = frobenius(xp, X) ** 2
        S = S + 11 * (m * n + n * (n + 1)) * be.eps(xp, X) / 2 * size * be.eye_like(xp, X, n)
    L, inverse, cond = _cholesky(xp, S)
    inverse = be.adjoint(xp, inverse)
    return X @ inverse, be.adjoint(xp, L), inverse, cond


def _cholesky(xp: Any, S: Array) -> tuple[Array, Array, Array]:
    """Cholesky factor, its inverse and ||L||_F ||L^-1||_F, which is at least the condition number of L."""
    L = be.cholesky(xp, S)
    inverse = be.inv_lower(xp, L)
    return L, inverse, frobenius(xp, L) * frobenius(xp, inverse)
