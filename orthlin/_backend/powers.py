"""Exact powers of two: the exponent of a matrix, and scaling by it."""

from functools import reduce
from math import inf
from typing import Any, NamedTuple

import array_api_compat as compat

from orthlin._backend.arrays import Array, bits, device, is_complex, is_host, namespace, working
from orthlin._backend.derivative import Arrays, constant, differentiable

_MATRIX: dict[str, Any] = {"axis": (-2, -1), "keepdims": True}
NOT_FINITE = 1 << 20  # larger than every exponent
KEEP = 32  # magnitudes of an exponent at which products and their squares are far from the limits of float32


class _Float(NamedTuple):
    """Layout of an IEEE 754 number: its integer type, fraction bits, exponent bias."""

    integer: Any
    fraction: int
    bias: int


def _layout(xp: Any, x: Array) -> _Float:
    return _Float(xp.int64, 52, 1023) if bits(xp, x) == 64 else _Float(xp.int32, 23, 127)


def exponent_bound(xp: Any, x: Array) -> int:
    """Largest e such that both 2^e and 2^-e are normal numbers of the dtype of `x`."""
    return _layout(xp, x).bias - 1


def max_exponent(xp: Any, x: Array) -> Array:
    """Integer e, shape (..., 1, 1), with 2^(e-1) <= max |x_ij| < 2^e, over real and imaginary parts.

    e = 0 for a zero or an empty matrix; e = 2^20 where x is not finite.
    """
    if 0 in x.shape:
        return xp.zeros((*x.shape[:-2], 1, 1), dtype=xp.int32, device=device(x))
    if flushes_subnormals(x):
        return _max_exponent_of_bits(xp, tuple(working(xp, p) for p in _parts(xp, constant(x))))
    top = _largest(xp, x)
    return xp.where(xp.isfinite(top), _exponent(xp, top), NOT_FINITE)


def _parts(xp: Any, x: Array) -> tuple[Array, ...]:
    return (xp.real(x), xp.imag(x)) if is_complex(xp, x) else (x,)


def _largest(xp: Any, x: Array) -> Array:
    """Largest |x_ij| over real and imaginary parts: two passes are faster for CPUs, one call for devices."""
    x = constant(x)
    if is_host(x):
        ends = [end for p in _parts(xp, x) for end in (xp.max(p, **_MATRIX), -xp.min(p, **_MATRIX))]
    else:
        ends = [xp.linalg.vector_norm(p, ord=inf, **_MATRIX) for p in _parts(xp, x)]
    return working(xp, reduce(xp.maximum, ends))


def nonzero(xp: Any, x: Array) -> Array:
    """Whether a matrix has an entry that is not zero, shape (..., 1, 1)."""
    if is_host(x) and 0 not in x.shape:
        first = xp.any(x[..., :1, :] != 0, **_MATRIX)
        if bool(xp.all(first)):  # mostly, and the rest need not be read
            return first
    found = xp.any(x != 0, **_MATRIX)
    return found | (max_exponent(xp, x) != 0) if flushes_subnormals(x) else found


def largest_exponent(xp: Any, e: Array) -> int:
    """Largest magnitude of the exponents of host matrices, 0 where there is none."""
    if 0 in e.shape:
        return 0
    return abs(int(e[0, 0])) if e.ndim == 2 else int(xp.max(xp.abs(e)))


def _exponent(xp: Any, top: Array) -> Array:
    if hasattr(xp, "frexp"):
        return xp.astype(xp.frexp(top)[1], xp.int32)
    # Standard only: a logarithm that may be off by one next to a power of two, put right by comparison.
    ones = xp.ones_like(top)
    safe = xp.where(xp.isfinite(top) & (top > 0), top, ones)
    e = xp.clip(xp.floor(xp.log2(safe)), max=_layout(xp, top).bias)
    power = 2.0**e
    e = e + xp.where(safe - power >= power, ones, 0 * ones) - xp.where(safe < power, ones, 0 * ones)
    return xp.astype(xp.where(top > 0, e + 1, 0 * ones), xp.int32)


def safe_factor(xp: Any, x: Array, spare: int = KEEP) -> Array:
    """Power of two, (..., 1, 1), that takes the largest entry of `x` next to one; NaN where `x` is not finite.

    It is cut to what is normal both ways with so many powers to spare; without any, only subnormal matrices are left
    below one.
    """
    if 0 in x.shape:
        return xp.ones((*x.shape[:-2], 1, 1), dtype=working(xp, x).dtype, device=device(x))
    kind = _layout(xp, x)
    reach = kind.bias - 1 - spare
    if compat.is_torch_array(x):  # in the bits of the number itself: a few calls for a launch each
        top = _largest(xp, x)
        field = 2 * kind.bias - 1 - (top.view(kind.integer) >> kind.fraction)
        power = (field.clamp(kind.bias - reach, kind.bias + reach) << kind.fraction).view(top.dtype)
        power = power + (top - top)  # NaN where it is not finite
    else:
        e = max_exponent(xp, x)
        bad = e == NOT_FINITE
        power = _power(xp, working(xp, x[..., :1, :1]), clipped(xp, xp.where(bad, 0, -e), reach))
        power = xp.where(bad, xp.nan, power)
    return xp.astype(power, working(xp, x).dtype, copy=False)


def flushes_subnormals(x: Array, *, products: bool = False) -> bool:
    """Whether the library takes subnormal numbers for zero, entry by entry or in `products` of matrices too.

    XLA does always.  CuPy compiles its own kernels so that they do in single precision; its products are cuBLAS's.
    """
    if compat.is_cupy_array(x):
        return not products and bits(namespace(x), x) == 32
    return bool(compat.is_jax_array(x))


def clipped(xp: Any, e: Array, bound: int) -> Array:
    """Integers cut to [-bound, bound]; array-api-compat's `clip` reads values on CuPy."""
    limit = xp.full_like(e, bound)
    return xp.minimum(xp.maximum(e, -limit), limit)


def ldexp(xp: Any, x: Array, e: Array) -> Array:
    """X * 2^e, exact up to underflow, for |e| up to twice `exponent_bound`; x not of half precision."""
    if flushes_subnormals(x):
        return differentiable(xp, lambda x, e: (_ldexp_of_bits(xp, x, e),), _ldexp_rule, x, e)[0]
    bound = exponent_bound(xp, x)
    if not is_host(x) or largest_exponent(xp, e) > bound:
        return _in_two_steps(xp, x, e)
    return x * _power(xp, x, e)


def _in_two_steps(xp: Any, x: Array, e: Array) -> Array:
    bound = exponent_bound(xp, x)
    rest = e - clipped(xp, e, bound)
    return x * _power(xp, x, rest) * _power(xp, x, e - rest)


def _ldexp_rule(xp: Any, arrays: Arrays, _: Arrays, tangents: Arrays) -> Arrays:
    return (_in_two_steps(xp, tangents[0], arrays[1]),)


def _power(xp: Any, x: Array, e: Array) -> Array:
    """2^e in the dtype of `x`."""
    integer, fraction, bias = _layout(xp, x)
    real = xp.float32 if integer == xp.int32 else xp.float64
    if compat.is_torch_array(x) or compat.is_jax_array(x):
        # pow is not exact on every device: write the exponent field of the number itself
        factor = (xp.astype(e, integer) + bias << fraction).view(real)
    elif hasattr(xp, "ldexp"):
        factor = xp.ldexp(xp.asarray(1, dtype=real), e)
    else:
        factor = 2.0 ** xp.astype(e, real)
    return xp.astype(factor, x.dtype)


def _max_exponent_of_bits(xp: Any, parts: tuple[Array, ...]) -> Array:
    """The same in integers, which is exact where subnormal numbers are flushed to zero in everything else."""
    kind = _layout(xp, parts[0])
    bits = [_magnitude(_cast(p, kind.integer)) for p in parts]
    # the order of |x| is the order of its bits
    top = reduce(xp.maximum, [xp.max(b, axis=(-2, -1), keepdims=True) for b in bits])
    field = top >> kind.fraction
    subnormal = xp.frexp(xp.astype(top, parts[0].dtype))[1] + 1 - kind.bias - kind.fraction
    e = xp.where(field > 0, field + 1 - kind.bias, xp.where(top > 0, subnormal, 0))
    return xp.astype(xp.where(field > 2 * kind.bias, NOT_FINITE, e), xp.int32)


def _cast(x: Array, dtype: Any) -> Array:
    """Numbers of another dtype with the bits of `x`."""
    if not compat.is_jax_array(x):
        return x.view(dtype)
    from jax.lax import bitcast_convert_type

    return bitcast_convert_type(x, dtype)


def _complex(xp: Any, real: Array, imag: Array) -> Array:
    """Complex numbers of these parts, with which nothing is computed."""
    if not compat.is_jax_array(real):
        return xp.stack((real, imag), axis=-1).view(xp.complex64)[..., 0]
    from jax.lax import complex

    return complex(real, imag)


def _magnitude(bits: Array) -> Array:
    """Clear the sign bit of the floating-point numbers whose bits are given as signed integers."""
    return bits & ((1 << 8 * bits.dtype.itemsize - 1) - 1)


def _ldexp_of_bits(xp: Any, x: Array, e: Array) -> Array:
    """The same in integers, subnormal results included, rounded to the nearest."""
    if is_complex(xp, x):
        return _complex(xp, *(_ldexp_of_bits(xp, p, e) for p in _parts(xp, x)))
    integer, fraction, bias = _layout(xp, x)
    one = xp.asarray(1, dtype=integer)
    infinity = 2 * bias + 1 << fraction
    bits = _cast(x, integer)
    magnitude, e = _magnitude(bits), xp.astype(e, integer)
    # a subnormal number is its bits, as an integer, times 2^(1 - bias - fraction)
    subnormal = magnitude >> fraction == 0
    number = xp.where(subnormal, _cast(xp.astype(magnitude, x.dtype), integer), magnitude)
    e = xp.where(subnormal, e + 1 - bias - fraction, e)
    field = (number >> fraction) + e
    normal = xp.where(field > 2 * bias, infinity, number + (e << fraction))
    mantissa = number & (one << fraction) - 1 | one << fraction
    shift = xp.minimum(xp.maximum(1 - field, one), one * (fraction + 2))
    rounded = mantissa + (one << shift - 1) - 1 + (mantissa >> shift & 1) >> shift
    result = xp.where(field > 0, normal, rounded)
    result = xp.where((magnitude == 0) | (magnitude >= infinity), magnitude, result)
    return _cast(result | bits ^ magnitude, x.dtype)
