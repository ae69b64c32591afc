"""Polar factor and matrix sign: polynomial iterations driven by a schedule, and exact references."""

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from orthlin import _backend as be
from orthlin import _checks as check
from orthlin._derivatives import polar_adjoint, polar_rule, sign_adjoint, sign_rule
from orthlin._newton import newton_sign
from orthlin._polynomial import apply, apply_square, reaching
from orthlin._scaling import in_range, scaled, unit_scale
from orthlin._unitary import unitary
from orthlin.errors import OptionError
from orthlin.schedules import Schedule

Array = Any
METHODS = ("auto", "svd", "newton_schulz", "gram_newton_schulz")

__all__ = ["PolarResult", "matrix_sign", "orthogonalize", "polar"]


class PolarResult(NamedTuple):
    """Factors of the polar decomposition.

    Attributes
    ----------
    U : array, shape (..., m, n)
        The (semi-)orthogonal or unitary factor.
    H : array, shape (..., n, n) or (..., m, m)
        The Hermitian positive semidefinite factor: A = U H (side "right") or A = H U (side "left").
    """

    U: Array
    H: Array

    @property
    def P(self) -> Array:
        """The factor H under the name that SciPy's documentation gives it."""
        return self.H


@be.own_settings
def orthogonalize(
    A: Array, /, *, method: str = "auto", schedule: Schedule | None = None, tol: float | None = None
) -> Array:
    r"""Orthogonal polar factor of A, to working precision or by a polynomial schedule.

    With :math:`A = U \Sigma V^H` the factor is :math:`U V^H`, the nearest (semi-)orthogonal matrix.  A polynomial
    schedule makes it :math:`U p(\Sigma/s) V^H`, :math:`p \approx 1`, s the norm :math:`(\sum \sigma_i^4)^{1/4}`.

    Parameters
    ----------
    A : array, shape (..., m, n)
        Real or complex matrices, any number of leading dimensions.
    method : {"auto", "svd", "newton_schulz", "gram_newton_schulz"}
        Without `schedule` and `tol`: "auto" takes what is fastest at working precision, see :func:`polar`;
        "svd" is the reference; "newton_schulz" iterates to convergence with products only.
        With one of them: "newton_schulz" multiplies the m x n matrix in every step, "gram_newton_schulz"
        iterates on the Gram matrix of the short side and applies the accumulated polynomial once, starting
        afresh as often as it takes to add at most a tenth of what the schedule leaves off one (and 0.01); "auto"
        takes the one with fewer flops, the former for half precision.
    schedule : Schedule, optional
        Polynomials to apply, from :mod:`orthlin.schedules`.
    tol : float, optional
        Take the cheapest schedule that brings every singular value of at least 1e-3 s (bfloat16: 4e-3 s, the
        rest is rounding noise) within `tol` of one; smaller ones end in [0, 1 + tol].  At least 8 eps.

    Returns
    -------
    array, shape (..., m, n)
        The factor, with dtype and device of `A`.  It is the same, bit for bit, for 2^k A.  A zero matrix
        gives zero.  Without `schedule` and `tol`, singular values above the line max(m, n) eps times the largest
        become one; at or below it they carry only rounding noise and become zero (`scipy.linalg.polar` completes
        them).  By products only, so on devices, those between the line and the line/(4 k^(1/4)), k = min(m, n), end
        anywhere from 0 to 1.  eps is that of float32 for half precision, whose own eps is the line if it is higher.
        With one of them, null directions end between 0 and the schedule's band.

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, OptionError
        If an argument is not as described.
    NonFiniteError
        If a host array holds NaN or infinity.  On devices the result is all NaN.
    ScheduleError
        If the schedule is not made for singular values up to one or for the precision of `A`.

    Notes
    -----
    Half precision is worked on in float32 without a schedule, to its own precision, and by NumPy; else a
    schedule multiplies in it.  By products only, in float32 53 to 41 of them from 8 x 8 to 4096 x 4096.
    The Schatten norm makes slopes larger than in `torch.optim.Muon` and optax, which divide by the Frobenius norm.
    The derivative is that of :func:`polar`, finite where A is rank-deficient; a schedule's is that of its products.
    Cost with k = min(m, n) and l = max(m, n): a quintic step 4 k^2 l + 2 k^3 flops; the Gram form 4 k^2 l in
    all and 8 k^3 a step, and 4 k^2 l for each restart, which rounding makes necessary.
    The least is 3 k^2 l flops, a Gram matrix by half and a product, and 3 k l numbers moved.  By products only it is
    24 times the flops and 36 times the numbers at 1024 x 4096 in float32, with tol 0.2 5.2 and 11 times; on the host in
    single precision the least and an eigendecomposition, 9 k^3, in float64.

    References
    ----------
    Higham, Functions of Matrices (2008), chapter 8.  Gram form: Dao AI Lab, Gram Newton-Schulz (2026).

    Examples
    --------
    >>> import numpy as np
    >>> import orthlin
    >>> A = np.random.default_rng(0).standard_normal((4, 100))
    >>> O = orthlin.orthogonalize(A)
    >>> bool(np.allclose(O @ O.T, np.eye(4)))
    True
    >>> O = orthlin.orthogonalize(A, schedule=orthlin.schedules.muon())
    >>> bool(np.abs(np.linalg.svd(O)[1] - 1).max() < 0.35)
    True
    """
    xp = check.matrix(A, "A")
    check.option(method, "method", METHODS)
    X = scaled(xp, *in_range(xp, be.working(xp, A), "A", keep=0))
    if schedule is None and tol is None:
        return be.convert(xp, _unitary(xp, X, method, _line(xp, A, X), be.eps(xp, A)), A.dtype)
    if tol is not None:
        if schedule is not None:
            raise OptionError("tol: choose either schedule or tol, got both")
        schedule = _for_tolerance(xp, A, check.positive(tol, "tol", below=1.0))
    if not isinstance(schedule, Schedule):
        raise OptionError(f"schedule: expected an orthlin.schedules.Schedule, got {schedule!r}")
    if method == "svd":
        raise OptionError("method: 'svd' takes neither schedule nor tol; leave them out or choose 'newton_schulz'")
    dtype = X.dtype if isinstance(A, np.ndarray) else A.dtype  # NumPy is slower in float16, and rounds every term
    return be.convert(xp, apply(xp, X, schedule, method, dtype), A.dtype)


def _for_tolerance(xp: Any, A: Array, tol: float) -> Schedule:
    unit = be.eps(xp, A) / 2
    if tol < 16 * unit:
        raise OptionError(f"tol: {A.dtype} can hold {16 * unit:.2g}, got {tol!r}; leave it out or use a wider dtype")
    schedule: Schedule = reaching(tol, unit)
    return schedule


@be.own_settings
def polar(A: Array, /, *, side: str = "right", method: str = "auto") -> PolarResult:
    """Polar decomposition A = U H (side "right") or A = H U (side "left") to working precision.

    Parameters
    ----------
    A : array, shape (..., m, n)
        Real or complex matrices, any number of leading dimensions.  Half precision is worked on in float32.
    side : {"right", "left"}
        On which side of U the Hermitian factor stands.
    method : {"auto", "svd", "newton_schulz"}
        "svd" is the reference.  "newton_schulz" is made of products only, 54 (float32) or 100 (float64) of them
        with 2 k^2 l flops each at most, k = min(m, n), l = max(m, n), and neither raises nor synchronises.
        "auto" on the host takes, for single precision, an eigendecomposition of the Gram matrix in float64
        where the condition number is below about 3e3, else the singular value decomposition; on devices, and
        for JAX, "newton_schulz".

    Returns
    -------
    PolarResult
        Named tuple (U, H), with dtype and device of `A`; ``.P`` is another name of H.  The columns (rows) of
        U are orthonormal if m >= n (m <= n).  Null directions are completed to orthonormal ones by "svd" and
        on the host; by "newton_schulz" they end with singular values between 0 and 1.  Zero gives zero, where
        `scipy.linalg.polar` gives a unitary matrix.
        H has the norm of A: it overflows where that does, and is rounded where it is subnormal (flushed by XLA).

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, OptionError
        If an argument is not as described.
    NonFiniteError
        If a host array holds NaN or infinity.  On devices the result is all NaN.

    Notes
    -----
    U has condition number 2/(s_n + s_(n-1)) for real square A, 1/s_n otherwise; H is always well conditioned.
    The derivative divides by sums of singular values alone, those above rounding noise; it takes an eigendecomposition
    of H, which synchronises on torch's devices.
    The iteration is backward stable as no step shrinks the relative size of a singular value by more than three.
    Cost: the least is 4 k^2 l flops, those of :func:`orthogonalize` and half a product for H, and 4 k l numbers moved.
    By products only it is 28 times the flops and 51 times the numbers at 1024 x 4096 in float32.

    References
    ----------
    Nakatsukasa and Higham, Backward stability of iterations for computing the polar decomposition,
    SIAM J. Matrix Anal. Appl. 33 (2012).

    Examples
    --------
    >>> import numpy as np
    >>> import orthlin
    >>> A = np.random.default_rng(0).standard_normal((5, 3))
    >>> U, H = orthlin.polar(A)
    >>> bool(np.allclose(U @ H, A)), bool(np.all(np.linalg.eigvalsh(H) > 0))
    (True, True)
    """
    xp = check.matrix(A, "A")
    check.option(side, "side", ("right", "left"))
    check.option(method, "method", METHODS[:3])
    X, e = unit_scale(xp, be.working(xp, A), "A")
    U = _unitary(xp, X, method)
    Uh = be.adjoint(xp, U)
    m, n = X.shape[-2:]
    right = m > n or (m == n and side == "right")
    H = _hermitian(xp, Uh @ X if right else X @ Uh)
    if right != (side == "right"):  # A = U H = (U H U^H) U; X U^H would be semidefinite only to first order
        H = _hermitian(xp, U @ H @ Uh if right else Uh @ H @ U)
    return PolarResult(be.convert(xp, U, A.dtype), be.convert(xp, be.ldexp(xp, H, e), A.dtype))


@be.own_settings
def matrix_sign(A: Array, /, *, method: str = "newton", schedule: Schedule | None = None) -> Array:
    r"""Sign of square matrices without eigenvalues on the imaginary axis.

    The sign is :math:`A (A^2)^{-1/2}`: it has the eigenvectors of A, and eigenvalue +1 (-1) for those in the
    right (left) half-plane.

    Parameters
    ----------
    A : array, shape (..., n, n)
        Real or complex matrices, any number of leading dimensions.
    method : {"newton", "newton_schulz"}
        "newton" iterates X <- (mu X + (mu X)^-1)/2 with mu^2 = ||X^-1||_F/||X||_F; any spectrum.
        "newton_schulz" applies the odd polynomials of a schedule to A/||A||_F, products only; for real
        spectra, so for every Hermitian matrix; an eigenvalue zero stays zero.
    schedule : Schedule, optional
        For "newton_schulz"; the default converges for eigenvalues down to eps ||A||_F.

    Returns
    -------
    array, shape (..., n, n)
        The sign, with dtype and device of `A`.  Half precision is worked on in float32.

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, OptionError, ScheduleError
        If an argument is not as described.
    NonFiniteError
        If a host array holds NaN or infinity.  On devices the result is all NaN.
    SingularError
        "newton": if a host array is singular, or has another eigenvalue on the imaginary axis, to working
        precision, so that it has no sign; `scipy.linalg.signm` returns a matrix.  On devices the result is all NaN.

    Notes
    -----
    The derivative costs as much as the sign; for singular A it is a SingularError on the host and NaN on devices.
    A schedule of the caller is differentiated through its products.
    Cost: 2 n^3 flops a Newton step; on the host it ends at convergence, after about ten steps, on devices
    after 24 (float32: 17).  The least is one inverse, 2 n^3, and 2 n^2 numbers moved; a step on devices moves about
    29 n^2.  ||S^2 - I|| is about eps ||S||^2, the error eps times the condition number of S.

    References
    ----------
    Higham, Functions of Matrices (2008), chapter 5; Kenney and Laub, On scaling Newton's method for polar
    decomposition and the matrix sign function, SIAM J. Matrix Anal. Appl. 13 (1992).

    Examples
    --------
    >>> import numpy as np
    >>> import orthlin
    >>> A = np.asarray([[3.0, 1.0], [0.0, -2.0]])
    >>> bool(np.allclose(orthlin.matrix_sign(A), [[1.0, 0.4], [0.0, -1.0]]))
    True
    """
    xp = check.matrix(A, "A", square=True)
    check.option(method, "method", ("newton", "newton_schulz"))
    X = scaled(xp, *in_range(xp, be.working(xp, A), "A", keep=0))
    if schedule is not None:
        if method == "newton":
            raise OptionError("schedule: method 'newton' takes none; choose 'newton_schulz'")
        return be.convert(xp, apply_square(xp, X, schedule), A.dtype)
    way = partial(newton_sign, xp) if method == "newton" else lambda X: (apply_square(xp, X),)
    return be.convert(xp, be.differentiable(xp, way, sign_rule, X, adjoint=sign_adjoint)[0], A.dtype)


def _hermitian(xp: Any, H: Array) -> Array:
    return (H + be.adjoint(xp, H)) / 2


def _line(xp: Any, A: Array, X: Array) -> float:
    """Relative size up to which singular values of A, worked on as X, carry only rounding noise."""
    return float(max(max(A.shape[-2:]) * be.eps(xp, X), be.eps(xp, A)))


def _unitary(xp: Any, X: Array, method: str, line: float = 0.0, eps: float = 0.0) -> Array:
    """Factor of unit-scaled X, with its derivative.

    Singular values up to `line` times the largest become zero; by `line` 0 they are completed on the host, and on
    devices end between 0 and 1.  `eps` is to what precision, if not to that of X.
    """
    if 0 in X.shape:
        return X
    eps = eps or be.eps(xp, X)
    made = be.differentiable(xp, lambda X: (unitary(xp, X, method, line, eps),), polar_rule, X, adjoint=polar_adjoint)
    return made[0]
