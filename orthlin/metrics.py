"""The ruler: residuals, ranks, captured energy and published error bounds.

Matrix arguments have shape ``(..., m, n)`` and any real or complex floating dtype; a figure has the
batch shape ``(...)``, and batches of several arguments broadcast.  Residuals count in ``eps``, the
machine epsilon of the dtype of the first argument, while the arithmetic runs in double precision
wherever the array library and the device have it; figures come back in that precision.  Matrices are
brought to unit size by an exact power of two first, so no figure overflows or underflows before its own
value does.  The least reads every matrix once; here each is scaled and converted before, two copies more.

Arguments that are not as described raise ArrayTypeError, DTypeError, ShapeError, DeviceError or
OptionError; NaN or infinity in a host array raises NonFiniteError.  On devices it makes the figure NaN
(a rank zero), and nothing is read back to the host, though the SVD of a library may synchronize.
"""

from numbers import Real
from typing import Any, Literal

from orthlin import _backend as be
from orthlin._bounds import TailBound, hmt_frobenius_bound, hmt_spectral_bound, hmt_tail_bound, posterior_factor, real
from orthlin._residuals import (
    figure,
    hermitian_defect,
    orthogonality,
    polar_backward_error,
    power,
    psd_defect,
    qr_residual,
    ratio,
    spectrum,
    unit,
)
from orthlin.errors import OptionError

__all__ = [
    "TailBound",
    "captured_energy",
    "captured_fraction",
    "captured_nuclear_norm",
    "hermitian_defect",
    "hmt_frobenius_bound",
    "hmt_spectral_bound",
    "hmt_tail_bound",
    "nuclear_norm",
    "numerical_rank",
    "orthogonality",
    "polar_backward_error",
    "posterior_factor",
    "psd_defect",
    "qr_residual",
    "range_error",
    "stable_rank",
]

Array = Any


@be.own_settings
def nuclear_norm(A: Array, /) -> Array:
    """Return the sum of the singular values.

    Cost: singular values alone, 4 k^2 l - 4/3 k^3 flops, k = min(m, n), l = max(m, n).

    Parameters
    ----------
    A : array, shape (..., m, n)
        Matrices.

    Returns
    -------
    array, shape (...)
        The norm, in the units of `A`.

    Raises
    ------
    OrthlinError
        If `A` is not as described (see the module).

    Examples
    --------
    >>> import numpy as np
    >>> float(nuclear_norm(np.diag([3.0, -4.0])))
    7.0
    """
    xp, (X, e) = unit("mn", A=A)
    return power(xp, _nuclear(xp, X), e[..., 0, 0])


@be.own_settings
def numerical_rank(A: Array, /, *, rtol: float | None = None) -> Array:
    """Return the number of singular values above ``rtol`` times the largest.

    Cost: singular values alone, 4 k^2 l - 4/3 k^3 flops, k = min(m, n), l = max(m, n).

    Parameters
    ----------
    A : array, shape (..., m, n)
        Matrices.
    rtol : float, optional
        Not negative; ``max(m, n) eps`` by default.

    Returns
    -------
    array of integers, shape (...)
        The ranks.

    Raises
    ------
    OrthlinError
        If an argument is not as described (see the module).

    Examples
    --------
    >>> import numpy as np
    >>> int(numerical_rank(np.diag([1.0, 1e-3, 1e-20])))
    2
    """
    xp, (X, _) = unit("mn", A=A)
    line = max(A.shape[-2:]) * be.eps(xp, A) if rtol is None else real(rtol, "rtol", 0)
    sigma = _singular_values(xp, X)
    above = xp.astype(sigma > line * xp.max(sigma, axis=-1, keepdims=True), xp.int32)
    return xp.sum(above, axis=-1, dtype=xp.int32)  # count_nonzero would make int64, which a device may lack


@be.own_settings
def stable_rank(A: Array, /) -> Array:
    """Return ``||A||_F^2 / ||A||_2^2``, which is at most the rank; zero for a zero matrix.

    Cost: singular values alone, 4 k^2 l - 4/3 k^3 flops, k = min(m, n), l = max(m, n).

    Parameters
    ----------
    A : array, shape (..., m, n)
        Matrices.

    Returns
    -------
    array, shape (...)
        The figure, in [0, min(m, n)].

    Raises
    ------
    OrthlinError
        If `A` is not as described (see the module).

    Examples
    --------
    >>> import numpy as np
    >>> float(stable_rank(np.diag([2.0, 2.0, 1.0])))
    2.25
    """
    xp, (X, _) = unit("mn", A=A)
    sigma = _singular_values(xp, X)
    return ratio(xp, xp.sum(sigma**2, axis=-1), xp.max(sigma, axis=-1) ** 2)


@be.own_settings
def captured_nuclear_norm(G: Array, O: Array, /) -> Array:
    """Return ``Re <G, O>``, the first-order decrease that a unit step along ``-O`` promises.

    It is at most ``||O||_2`` times the nuclear norm of `G`, and reaches the nuclear norm at the polar
    factor.  For the low-rank factor with basis ``Q`` it equals the nuclear norm of ``Q^H G``.  Cost: 2 m n flops.

    Parameters
    ----------
    G, O : array, shape (..., m, n)
        Gradients and directions.

    Returns
    -------
    array, shape (...)
        The inner product, in the units of `G`.

    Raises
    ------
    OrthlinError
        If an argument is not as described (see the module).

    Examples
    --------
    >>> import numpy as np
    >>> float(captured_nuclear_norm(np.diag([3.0, -4.0]), np.diag([0.0, -1.0])))
    4.0
    """
    xp, (X, e), (Y, f) = unit("mn mn", G=G, O=O)
    return power(xp, _inner(xp, X, Y), (e + f)[..., 0, 0])


@be.own_settings
def captured_fraction(G: Array, O: Array, /) -> Array:
    """Return ``Re <G, O>`` divided by the nuclear norm of `G`; zero for a zero `G`.

    Cost: that of :func:`nuclear_norm` and 2 m n flops.

    Parameters
    ----------
    G, O : array, shape (..., m, n)
        Gradients and directions.

    Returns
    -------
    array, shape (...)
        The fraction: at most ``||O||_2``, attained at the polar factor.

    Raises
    ------
    OrthlinError
        If an argument is not as described (see the module).

    Examples
    --------
    >>> import numpy as np
    >>> float(captured_fraction(np.diag([1.0, -3.0]), np.diag([0.0, -1.0])))
    0.75
    """
    xp, (X, _), (Y, f) = unit("mn mn", G=G, O=O)
    return ratio(xp, power(xp, _inner(xp, X, Y), f[..., 0, 0]), _nuclear(xp, X))


@be.own_settings
def captured_energy(A: Array, Q: Array, /) -> Array:
    """Return ``||Q^H A||_F^2 / ||A||_F^2`` for orthonormal columns `Q`; zero for a zero `A`.

    Cost: a product, 2 m n k flops.

    Parameters
    ----------
    A, Q : array, shapes (..., m, n) and (..., m, k)
        Matrices and bases.

    Returns
    -------
    array, shape (...)
        The fraction, in [0, 1].

    Raises
    ------
    OrthlinError
        If an argument is not as described (see the module).

    Examples
    --------
    >>> import numpy as np
    >>> float(captured_energy(np.diag([1.0, 1.0]), np.eye(2, 1)))
    0.5
    """
    xp, (X, _), (Y, f) = unit("mn mk", A=A, Q=Q)
    return ratio(xp, _inner(xp, *[power(xp, be.adjoint(xp, Y) @ X, f)] * 2), _inner(xp, X, X))


@be.own_settings
def range_error(A: Array, Q: Array, /, *, ord: Literal["fro", 2] = "fro") -> Array:
    """Return ``||A - Q Q^H A||`` in the Frobenius norm, or in the 2-norm for ``ord=2``.

    Cost: two products, 4 m n k flops; for ``ord=2`` the singular values as well.

    Parameters
    ----------
    A, Q : array, shapes (..., m, n) and (..., m, k)
        Matrices and bases with orthonormal columns.
    ord : {"fro", 2}
        Which norm.

    Returns
    -------
    array, shape (...)
        The norm, in the units of `A`.

    Raises
    ------
    OrthlinError
        If an argument is not as described (see the module).

    Examples
    --------
    >>> import numpy as np
    >>> float(range_error(np.diag([1.0, 3.0, 4.0]), np.eye(3, 1)))
    5.0
    >>> float(range_error(np.diag([1.0, 3.0, 4.0]), np.eye(3, 1), ord=2))
    4.0
    """
    if not isinstance(ord, str | Real) or ord not in ("fro", 2):
        raise OptionError(f"ord: expected 'fro' or 2, got {ord!r}")
    xp, (X, e), (Y, f) = unit("mn mk", A=A, Q=Q)
    rest = X - power(xp, Y @ (be.adjoint(xp, Y) @ X), 2 * f)
    norm = figure(xp, rest) if ord == "fro" else xp.max(_singular_values(xp, rest), axis=-1)
    return power(xp, norm, e[..., 0, 0])


def _singular_values(xp: Any, X: Array) -> Array:
    return spectrum(xp.linalg.svdvals, xp, X)


def _nuclear(xp: Any, X: Array) -> Array:
    return xp.sum(_singular_values(xp, X), axis=-1)


def _inner(xp: Any, X: Array, Y: Array) -> Array:
    product = xp.real(xp.conj(X) * Y) if be.is_complex(xp, X) else X * Y
    return xp.sum(product, axis=(-2, -1))
