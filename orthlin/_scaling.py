"""Range-safe norms and exact scaling by powers of two."""

from typing import Any, NamedTuple

from orthlin import _backend as be
from orthlin.errors import NonFiniteError

Array = Any
_LONG = 4096


def unit_scale(xp: Any, x: Array, name: str, *, keep: int = 0) -> tuple[Array, Array]:
    """X = A 2^-e with the largest entry of X in [1/2, 1), and the integers e of shape (..., 1, 1).

    The scaling is exact, so every result computed from X is invariant under powers of two bit for bit.
    A matrix with NaN or infinity is a NonFiniteError on the host; elsewhere its X is all NaN and its e zero.
    Host matrices with all |e| <= `keep` are returned as they are, e = 0.
    """
    e = be.max_exponent(xp, x)
    if not be.is_host(x):
        bad = e == be.NOT_FINITE
        x, e = xp.where(bad, xp.nan, x), xp.where(bad, 0, e)
        return be.ldexp(xp, x, -e, toward_one=True), e
    largest = be.largest_exponent(e)
    if largest == be.NOT_FINITE:
        raise NonFiniteError(f"{name}: holds NaN or infinity; remove or replace them first")
    if largest <= keep:
        return x, 0 * e
    return be.ldexp(xp, x, -e), e


def in_range(
    xp: Any, x: Array, name: str, keep: int = be.KEEP, *, subnormal: bool = True
) -> tuple[Array, Array | None]:
    """Matrices A and a factor s, (..., 1, 1): A (s X) and (s Q)^H A are in a safe range for X and Q of unit size.

    s is a power of two, so that nothing is rounded and A itself need not be written again; NaN for matrices that
    are not finite.  Host matrices are scaled themselves where they need it, and s is None; so are those of a library
    that takes subnormal numbers for zero, unless it may (`subnormal`).
    """
    if be.is_host(x) or (subnormal and be.flushes_subnormals(x, products=True)):
        return unit_scale(xp, be.working(xp, x), name, keep=keep)[0], None
    return x, be.safe_factor(xp, x, keep)


def moderate(xp: Any, x: Array) -> bool:
    """Whether host matrices are finite, in a safe range, and not zero, for which some units take subnormal numbers."""
    e = be.max_exponent(xp, x)  # which zero has too
    return be.largest_exponent(e) <= be.KEEP and (bool(e.all()) or bool(xp.all(be.nonzero(xp, x))))


def times(x: Array, s: Array | None) -> Array:
    """A test matrix or basis times the factor of `in_range`."""
    return x if s is None else x * s


def scaled(xp: Any, x: Array, s: Array | None) -> Array:
    """The matrices of `in_range` times their factor, exact for subnormal entries too."""
    if s is None or not be.flushes_subnormals(x):
        return times(x, s)
    return xp.where(xp.isfinite(s), be.ldexp(xp, x, xp.frexp(xp.real(s))[1] - 1), xp.nan)


class Seen(NamedTuple):
    """What one pass over matrices tells: which are finite, (..., 1, 1), and how large they are, zero if not finite.

    On devices with double precision `squares` are those of the norms of the columns, (..., 1, n), which no matrix in
    single precision overflows, and `top` the largest of them, whatever it is; elsewhere `e` is the exponent to scale
    by, (..., 1, 1), None where nothing needs it.
    """

    finite: Array
    squares: Array | None
    top: Array | None
    e: Array | None


def seen(xp: Any, x: Array) -> Seen:
    """Look at matrices that may hold NaN or infinity."""
    host = be.is_host(x)
    if not host and not be.flushes_subnormals(x) and be.wide_dtype(xp, x) is not None and 0 not in x.shape:
        squares = be.column_squares(xp, x)
        top = xp.max(squares, axis=-1, keepdims=True)
        finite = top < xp.inf
        return Seen(finite, xp.where(finite, squares, xp.zeros_like(squares)), top, None)
    e = be.max_exponent(xp, x)
    if host:
        e = be.from_numbers(xp, e, x)
    finite = e != be.NOT_FINITE
    e = xp.where(finite, e, xp.zeros_like(e))
    return Seen(finite, None, None, None if host and be.largest_exponent(e) <= be.KEEP else e)


def in_sight(xp: Any, x: Array, sight: Seen) -> tuple[Array, Array | None]:
    """X = 2^-e A and a factor s, as `in_range` has them, of finite matrices that have been seen."""
    if sight.top is not None:
        return x, be.power_factor(xp, xp.sqrt(sight.top), x)
    return (x if sight.e is None else be.ldexp(xp, x, -sight.e, toward_one=True)), None


def frobenius(xp: Any, x: Array) -> Array:
    """Frobenius norm, shape (..., 1, 1), of matrices whose entries are in a safe range.

    The norm of the norms along the short side.  A long sum in float32 loses digits on some libraries (torch
    18 eps in 10^6 terms), so a long side is summed in double precision where there is one.  The derivative at
    zero is zero, which some libraries make NaN already for one row of zeros.
    """
    return be.differentiable(xp, lambda x: (_norm(xp, x),), _norm_rule, x, adjoint=_norm_adjoint)[0]


def _norm_rule(xp: Any, arrays: be.Arrays, outputs: be.Arrays, tangents: be.Arrays) -> be.Arrays:
    (x,), (norm,), (dx,) = arrays, outputs, tangents
    complex_ = be.is_complex(xp, x)
    products = xp.real(x) * xp.real(dx) + xp.imag(x) * xp.imag(dx) if complex_ else x * dx
    return (xp.sum(products, axis=(-2, -1), keepdims=True) / xp.where(norm > 0, norm, 1),)


def _norm_adjoint(xp: Any, arrays: be.Arrays, outputs: be.Arrays, cotangents: be.Arrays) -> be.Arrays:
    (x,), (norm,), (c,) = arrays, outputs, cotangents
    return (be.convert(xp, c / xp.where(norm > 0, norm, 1), x.dtype) * x,)


def _norm(xp: Any, x: Array) -> Array:
    short, long = (-2, -1) if x.shape[-2] < x.shape[-1] else (-1, -2)
    norms = xp.linalg.vector_norm(x, axis=short, keepdims=True)
    wide = be.wide_dtype(xp, norms) if x.shape[long] > _LONG else None
    if wide is None:
        return xp.linalg.vector_norm(norms, axis=long, keepdims=True)
    return be.convert(xp, xp.linalg.vector_norm(be.convert(xp, norms, wide), axis=long, keepdims=True), norms.dtype)
