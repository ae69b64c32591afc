"""Residuals of factorizations, and how the ruler brings matrices to unit size."""

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from orthlin import _backend as be
from orthlin import _checks as check
from orthlin._scaling import frobenius, unit_scale
from orthlin.errors import ShapeError

Array = Any

__all__ = ["hermitian_defect", "orthogonality", "polar_backward_error", "psd_defect", "qr_residual"]


@be.own_settings
def orthogonality(U: Array, /) -> Array:
    """Return ``||U^H U - I||_F / (eps sqrt(k))``, taken on the short side of length ``k``.

    Parameters
    ----------
    U : array, shape (..., m, n)
        Matrices that should have orthonormal columns (m >= n) or rows.

    Returns
    -------
    array, shape (...)
        The figure in units of eps.

    Raises
    ------
    OrthlinError
        If `U` is not as described (see the module).

    Notes
    -----
    Cost: a Gram matrix, k^2 l flops where it is made by half, else 2 k^2 l, l the long side, in double precision.

    Examples
    --------
    >>> import numpy as np
    >>> float(orthogonality(np.eye(4, 3)))
    0.0
    """
    xp, (X, e) = unit("mn", U=U)
    S = power(xp, be.gram(xp, X if X.shape[-2] < X.shape[-1] else be.adjoint(xp, X)), 2 * e)
    k = S.shape[-1]
    return figure(xp, S - be.eye_like(xp, S, k)) / (be.eps(xp, U) * math.sqrt(max(k, 1)))


@be.own_settings
def polar_backward_error(A: Array, U: Array, H: Array, /, *, side: Literal["right", "left"] = "right") -> Array:
    """Return ``||A - U H||_F / (eps ||A||_F)``, or with ``H U`` in place of ``U H`` for ``side="left"``.

    Parameters
    ----------
    A, U : array, shape (..., m, n)
        The matrices and their polar factors.
    H : array, shape (..., n, n) or (..., m, m)
        The Hermitian factors.
    side : {"right", "left"}
        On which side of `U` the factor `H` stands.

    Returns
    -------
    array, shape (...)
        The figure in units of eps.

    Raises
    ------
    OrthlinError
        If an argument is not as described (see the module).

    Notes
    -----
    Cost: a product, 2 m n^2 flops (side "left": 2 m^2 n), in double precision; the least reads A, U and H once.

    Examples
    --------
    >>> import numpy as np
    >>> float(polar_backward_error(np.diag([2.0, -3.0]), np.diag([1.0, -1.0]), np.diag([2.0, 3.0])))
    0.0
    """
    check.option(side, "side", ("right", "left"))
    return _residual("mn mk kn", A=A, U=U, H=H) if side == "right" else _residual("mn mk kn", A=A, H=H, U=U)


@be.own_settings
def qr_residual(A: Array, Q: Array, R: Array, /) -> Array:
    """Return ``||A - Q R||_F / (eps ||A||_F)``.

    Parameters
    ----------
    A, Q, R : array, shapes (..., m, n), (..., m, k) and (..., k, n)
        The matrices and their factors, of any kind.

    Returns
    -------
    array, shape (...)
        The figure in units of eps.

    Raises
    ------
    OrthlinError
        If an argument is not as described (see the module).

    Notes
    -----
    Cost: a product, 2 m k n flops, in double precision; the least reads A, Q and R once.

    Examples
    --------
    >>> import numpy as np
    >>> float(qr_residual(np.full((2, 1), 1e300), np.full((2, 1), 0.5), np.full((1, 1), 2e300)))
    0.0
    """
    return _residual("mn mk kn", A=A, Q=Q, R=R)


@be.own_settings
def hermitian_defect(H: Array, /) -> Array:
    """Return ``||H - H^H||_F / (eps ||H||_F)``.

    Parameters
    ----------
    H : array, shape (..., n, n)
        Square matrices.

    Returns
    -------
    array, shape (...)
        The figure in units of eps.

    Raises
    ------
    OrthlinError
        If `H` is not as described (see the module).

    Notes
    -----
    Cost: O(n^2) flops; the least reads H twice, here it is scaled and converted before.

    Examples
    --------
    >>> import numpy as np
    >>> float(hermitian_defect(np.asarray([[2.0, 1.0], [1.0, 2.0]])))
    0.0
    """
    xp, (X, _) = unit("nn", H=H)
    return ratio(xp, figure(xp, X - be.adjoint(xp, X)), figure(xp, X)) / be.eps(xp, H)


@be.own_settings
def psd_defect(H: Array, /) -> Array:
    """Return ``max(0, -lambda_min) / (eps max|lambda|)`` for the Hermitian part.

    This is what finds a polar iteration that converged to a wrong sign: such a ``U`` is perfectly
    orthogonal, and only ``H = U^H A`` has a negative eigenvalue.

    Parameters
    ----------
    H : array, shape (..., n, n)
        Square matrices.

    Returns
    -------
    array, shape (...)
        The figure in units of eps.

    Raises
    ------
    OrthlinError
        If `H` is not as described (see the module).

    Notes
    -----
    Cost: eigenvalues alone, 4/3 n^3 flops, in double precision.

    Examples
    --------
    >>> import numpy as np
    >>> float(psd_defect(np.diag([1.0, -0.5])) * 2.0**-52)
    0.5
    """
    xp, (X, _) = unit("nn", H=H)
    eigenvalues = spectrum(xp.linalg.eigvalsh, xp, (X + be.adjoint(xp, X)) * 0.5)
    largest = xp.max(xp.abs(eigenvalues), axis=-1)
    lowest = xp.min(eigenvalues, axis=-1)
    return ratio(xp, xp.maximum(-lowest, 0 * lowest), largest) / be.eps(xp, H)


def unit(form: str, /, **given: Array) -> tuple[Any, ...]:
    """Check matrices; return their namespace, and for each X and e with X 2^e the matrix in the widest precision.

    `form` has two letters a matrix, and a letter stands for one size: ``unit("mn mk", A=A, Q=Q)``.
    """
    (name, first), *others = given.items()
    xp = check.matrix(first, name)
    for other, x in others:
        check.companion(xp, x, other, first, name)
    _check_shapes(form, given)
    wide = [be.working(xp, x) for x in given.values()]
    wide = [be.convert(xp, x, be.wide_dtype(xp, x) or x.dtype) for x in wide]
    dtype = xp.result_type(*wide)
    return xp, *(unit_scale(xp, be.convert(xp, x, dtype), name) for x, name in zip(wide, given, strict=True))


def _check_shapes(form: str, given: dict[str, Array]) -> None:
    sizes: dict[str, int] = {}
    for letters, (name, x) in zip(form.split(), given.items(), strict=True):
        for letter, size in zip(letters, x.shape[-2:], strict=True):
            if sizes.setdefault(letter, size) != size:
                shape = f"(..., {', '.join(letters)}) with {letter} = {sizes[letter]}"
                raise ShapeError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")
    try:
        np.broadcast_shapes(*(tuple(x.shape[:-2]) for x in given.values()))
    except ValueError:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in given.items())
        raise ShapeError(f"{shapes}: expected leading dimensions that broadcast") from None


def power(xp: Any, x: Array, e: Array) -> Array:
    """Return x 2^e for any e: what twice the range of an exponent does not hold is infinite or zero."""
    return be.ldexp(xp, x, e if be.is_host(x) else be.clipped(xp, e, 2 * be.exponent_bound(xp, x)))


def figure(xp: Any, x: Array) -> Array:
    """Return the Frobenius norm with the shape of a figure, (...)."""
    return frobenius(xp, x)[..., 0, 0]


def ratio(xp: Any, part: Array, whole: Array) -> Array:
    """Return ``part / whole`` with ``0 / 0`` read as zero."""
    quotient = part / xp.where(whole == 0, xp.ones_like(whole), whole)
    return xp.where((whole == 0) & (part > 0), xp.inf, quotient)


def spectrum(solver: Callable[[Array], Array], xp: Any, x: Array) -> Array:
    """Return `solver(x)`; zero for an empty matrix, NaN where x is NaN, which makes some solvers raise."""
    if 0 in x.shape:
        return frobenius(xp, x)[..., 0]
    lost = xp.isnan(x[..., :1, :1])
    return xp.where(lost[..., 0], xp.nan, solver(xp.where(lost, 0.0, x)))


def _residual(form: str, **given: Array) -> Array:
    """Return ``||A - X Y||_F / (eps ||A||_F)`` of three matrices."""
    xp, (A, a), (X, x), (Y, y) = unit(form, **given)
    rest = A - power(xp, X @ Y, x + y - a)
    return ratio(xp, figure(xp, rest), figure(xp, A)) / be.eps(xp, next(iter(given.values())))
