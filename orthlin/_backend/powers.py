"""Exact powers of two: the exponent of a matrix, and scaling by it."""

from functools import reduce
from math import inf
from typing import Any, NamedTuple

import numpy as np

from orthlin._backend.arrays import (
    Array,
    bits,
    convert,
    device,
    from_numbers,
    is_complex,
    is_host,
    library,
    namespace,
    numbers,
    working,
)
from orthlin._backend.derivative import Arrays, constant, differentiable

_MATRIX: dict[str, Any] = {"axis": (-2, -1), "keepdims": True}
NOT_FINITE = 1 << 20  # larger than every exponent
_ONE: dict[int, Any] = {32: np.float32(1), 64: np.float64(1)}
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
    return 1022 if bits(xp, x) == 64 else 126


def max_exponent(xp: Any, x: Array) -> Array:
    """Integer e, shape (..., 1, 1), with 2^(e-1) <= max |x_ij| < 2^e, over real and imaginary parts.

    e = 0 for a zero or an empty matrix; e = 2^20 where x is not finite.  Of NumPy for every array of the host.
    """
    host = is_host(x)
    if 0 in x.shape:
        shape = (*x.shape[:-2], 1, 1)
        return np.zeros(shape, np.int32) if host else xp.zeros(shape, dtype=xp.int32, device=device(x))
    if flushes_subnormals(x):
        return _max_exponent_of_bits(xp, tuple(working(xp, p) for p in _parts(xp, constant(x))))
    if not host:
        top = _largest(xp, x)
        return xp.where(xp.isfinite(top), _exponent(xp, top), NOT_FINITE)
    # two passes are faster for CPUs than one over fresh memory
    ends = [(f(p, **_MATRIX), sign) for p in _parts(xp, constant(x)) for f, sign in ((xp.max, 1), (xp.min, -1))]
    top = reduce(np.maximum, [sign * numbers(working(xp, end)) for end, sign in ends])
    return np.where(np.isfinite(top), np.frexp(top)[1], NOT_FINITE)


def _parts(xp: Any, x: Array) -> tuple[Array, ...]:
    return (xp.real(x), xp.imag(x)) if is_complex(xp, x) else (x,)


def _largest(xp: Any, x: Array) -> Array:
    """Largest |x_ij| over real and imaginary parts, in as few calls as can be."""
    x = constant(x)
    if flushes_subnormals(x) and library(x) != "jax":  # the order of |x| is the order of its bits
        kind = _layout(xp, x)
        ends = [xp.max(_magnitude(p.view(kind.integer)), **_MATRIX).view(p.dtype) for p in _parts(xp, x)]
    else:
        ends = [_maximum_norm(xp, p) for p in _parts(xp, x)]
    return working(xp, reduce(xp.maximum, ends))


def _maximum_norm(xp: Any, x: Array) -> Array:
    if library(x) == "jax":  # its norm is the same in twice the operations
        return xp.max(xp.abs(x), **_MATRIX)
    return xp.linalg.vector_norm(x, ord=inf, **_MATRIX)


def nonzero(xp: Any, x: Array) -> Array:
    """Whether a matrix has an entry that is not zero, shape (..., 1, 1)."""
    if is_host(x) and 0 not in x.shape:
        first = xp.any(x[..., :1, :] != 0, **_MATRIX)
        if bool(xp.all(first)):  # mostly, and the rest need not be read
            return first
    found = xp.any(x != 0, **_MATRIX)
    return found | (max_exponent(xp, x) != 0) if flushes_subnormals(x) else found


def largest_exponent(e: Array) -> int:
    """Largest magnitude of the exponents of host matrices, 0 where there is none."""
    e = numbers(e)
    return abs(e.item()) if e.size == 1 else int(np.abs(e).max(initial=0))


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
    top = _largest(xp, x)
    return power_factor(xp, top, x, spare) + convert(xp, top - top, working(xp, x).dtype)


def power_factor(xp: Any, top: Array, x: Array, spare: int = KEEP) -> Array:
    """Power of two in the dtype of `x` that takes finite sizes `top` of its matrices next to one, as far as it may."""
    reach = _layout(xp, x).bias - 1 - spare
    if library(top):  # in the bits of the number itself: a few calls
        kind = _layout(xp, top)
        field = 2 * kind.bias - 1 - (top.view(kind.integer) >> kind.fraction)
        power = (field.clip(kind.bias - reach, kind.bias + reach) << kind.fraction).view(top.dtype)
    else:
        e = xp.where(xp.isfinite(top), -_exponent(xp, top), 0)
        power = _power(xp, top, clipped(xp, e, reach))
    return convert(xp, power, working(xp, x).dtype)


def flushes_subnormals(x: Array, *, products: bool = False) -> bool:
    """Whether the library takes subnormal numbers for zero, entry by entry or in `products` of matrices too.

    XLA does always.  CuPy compiles its own kernels so that they do in single precision; its products are cuBLAS's.
    """
    if library(x) == "cupy":
        return not products and bits(namespace(x), x) == 32
    return library(x) == "jax"


def clipped(xp: Any, e: Array, bound: int) -> Array:
    """Integers cut to [-bound, bound]; array-api-compat's `clip` reads values on CuPy."""
    limit = xp.full_like(e, bound)
    return xp.minimum(xp.maximum(e, -limit), limit)


def ldexp(xp: Any, x: Array, e: Array, *, toward_one: bool = False) -> Array:
    """X * 2^e, exact up to underflow, on devices for |e| up to twice `exponent_bound`; x not of half precision.

    `toward_one` says that no finite result exceeds one: subnormal ones may then be zero.
    """
    if flushes_subnormals(x):
        return differentiable(xp, lambda x, e: (_ldexp_of_bits(xp, x, e, toward_one),), _ldexp_rule, x, e)[0]
    bound = exponent_bound(xp, x)
    if not is_host(x):
        return _in_two_steps(xp, x, e)
    e = numbers(e)
    if largest_exponent(e) <= bound:
        return x * _host_power(xp, x, e)
    near = np.clip(e, -bound, bound)
    return x * _host_power(xp, x, np.clip(e - near, -bound, bound)) * _host_power(xp, x, near)


def _host_power(xp: Any, x: Array, e: np.ndarray) -> Array:
    return convert(xp, from_numbers(xp, np.ldexp(_ONE[bits(xp, x)], e), x), x.dtype)


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
    # pow is not exact on every device: write the exponent field of the number itself
    factor = (xp.astype(e, integer) + bias << fraction).view(real) if library(x) else 2.0 ** xp.astype(e, real)
    return convert(xp, factor, x.dtype)


def _max_exponent_of_bits(xp: Any, parts: tuple[Array, ...]) -> Array:
    """The same in integers, which are exact where subnormal numbers are flushed to zero in everything else."""
    kind = _layout(xp, parts[0])
    bits = [_magnitude(_cast(p, kind.integer)) for p in parts]
    # the order of |x| is the order of its bits
    top = reduce(xp.maximum, [xp.max(b, axis=(-2, -1), keepdims=True) for b in bits])
    subnormal, number = _normal(xp, kind, top, parts[0].dtype)
    e = (number >> kind.fraction) + xp.where(subnormal, 2 - 2 * kind.bias - kind.fraction, 1 - kind.bias)
    e = xp.where(top == 0, 0, e)
    return xp.astype(xp.where(top >= _infinity(kind), NOT_FINITE, e), xp.int32)


def _cast(x: Array, dtype: Any) -> Array:
    """Numbers of another dtype with the bits of `x`."""
    if library(x) != "jax":
        return x.view(dtype)
    from jax.lax import bitcast_convert_type

    return bitcast_convert_type(x, dtype)


def _complex(xp: Any, real: Array, imag: Array) -> Array:
    """Complex numbers of these parts, with which nothing is computed."""
    if library(real) != "jax":
        return xp.stack((real, imag), axis=-1).view(xp.complex64)[..., 0]
    from jax.lax import complex

    return complex(real, imag)


def _magnitude(bits: Array) -> Array:
    """Clear the sign bit of the floating-point numbers whose bits are given as signed integers."""
    return bits & ((1 << 8 * bits.dtype.itemsize - 1) - 1)


def _infinity(kind: _Float) -> int:
    return 2 * kind.bias + 1 << kind.fraction


def _normal(xp: Any, kind: _Float, magnitude: Array, dtype: Any) -> tuple[Array, Array]:
    """Whether a magnitude, given by its bits, is subnormal, and the bits of a normal number to work with.

    A subnormal number is its bits, as an integer, times 2^(1 - bias - fraction).
    """
    subnormal = magnitude < 1 << kind.fraction
    return subnormal, xp.where(subnormal, _cast(xp.astype(magnitude, dtype), kind.integer), magnitude)


def _ldexp_of_bits(xp: Any, x: Array, e: Array, toward_one: bool) -> Array:
    """The same in integers, subnormal results included, rounded to the nearest."""
    if is_complex(xp, x):
        return _complex(xp, *(_ldexp_of_bits(xp, part, e, toward_one) for part in _parts(xp, x)))
    kind = _layout(xp, x)
    bits = _cast(x, kind.integer)
    magnitude, e = _magnitude(bits), xp.astype(e, kind.integer)
    subnormal, number = _normal(xp, kind, magnitude, x.dtype)
    e = xp.where(subnormal, e + (1 - kind.bias - kind.fraction), e)
    field = (number >> kind.fraction) + e
    result = number + (e << kind.fraction)
    if toward_one:
        result = xp.where(field > 0, result, 0)
    else:
        result = xp.where(field > 2 * kind.bias, _infinity(kind), result)
        result = xp.where(field > 0, result, _units(xp, kind, number, field, x.dtype))
        result = xp.where((magnitude == 0) | (magnitude >= _infinity(kind)), magnitude, result)
    return _cast(result | bits ^ magnitude, x.dtype)


def _units(xp: Any, kind: _Float, number: Array, field: Array, dtype: Any) -> Array:
    """A number in units of the smallest one, rounded, which are its bits where its exponent field is below one."""
    _, fraction, bias = kind
    exponent = xp.maximum(field, -fraction - 1) + (bias + fraction - 1)  # below a quarter of a unit all are alike
    units = _cast(number & (1 << fraction) - 1 | exponent << fraction, dtype)
    return xp.astype(xp.round(units), kind.integer)
