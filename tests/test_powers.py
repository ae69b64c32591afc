"""Exact powers of two on every library: the exponent of a matrix, and scaling by it."""

import math

import jax
import numpy as np
import pytest
import torch

from orthlin import _backend as be

REAL = ("float32", "float64")
COMPLEX = {"float32": "complex64", "float64": "complex128"}


def edges(dtype):
    """Zero, every power of two of `dtype` down to the smallest subnormal number, its neighbours, the largest number."""
    info = np.finfo(dtype)
    low = round(math.log2(float(info.smallest_subnormal)))
    powers = np.ldexp(np.ones(1, dtype), np.arange(low, info.maxexp)).astype(dtype)
    below = np.nextafter(powers, np.zeros(1, dtype))
    above = np.nextafter(powers, np.full(1, np.inf, dtype))
    return np.unique(np.concatenate([powers, below, above, [info.max]]).astype(dtype))


def exponents(xp, A):
    """As numbers of the dtype of `A`, which is what travels."""

    def compute(x):
        space = be.namespace(x)
        return space.astype(space.asarray(be.max_exponent(space, x)), x.dtype)

    return xp.call(compute, A).real[..., 0, 0]


@pytest.mark.parametrize("dtype", REAL)
def test_the_exponent_is_exact_at_every_power_of_two_and_beside_it(xp, dtype):
    values = edges(dtype)
    signs = np.where(np.arange(len(values)) % 2, 1, -1).astype(dtype)
    for x in (signs * values, -signs * values):
        np.testing.assert_array_equal(exponents(xp, x.reshape(-1, 1, 1)), np.frexp(values)[1])


@pytest.mark.parametrize("dtype", REAL)
def test_the_exponent_is_that_of_the_largest_part_of_any_entry(xp, dtype):
    values = edges(dtype)
    A = np.zeros((len(values), 2, 2), COMPLEX[dtype])
    A[:, 1, 0] = values[0]
    A[::2, 0, 1].real, A[1::2, 0, 1].imag = -values[::2], values[1::2]
    np.testing.assert_array_equal(exponents(xp, A), np.frexp(values)[1])


@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX.values()])
def test_the_exponent_marks_every_matrix_with_a_bad_value(xp, dtype):
    bad = [np.nan, np.inf, -np.inf] + [complex(1, x) for x in (np.nan, np.inf)] * (np.dtype(dtype).kind == "c")
    A = np.full((len(bad) + 1, 2, 2), 3, dtype)
    A[1:, 1, 0] = bad
    np.testing.assert_array_equal(exponents(xp, A), [2] + [be.NOT_FINITE] * len(bad))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.astype("float16"),
        lambda x: torch.from_numpy(x).half(),
        lambda x: torch.from_numpy(x).bfloat16(),
        lambda x: jax.numpy.asarray(x, "float16"),
        lambda x: jax.numpy.asarray(x, "bfloat16"),
    ],
    ids=["numpy", "torch-half", "torch-bfloat16", "jax-half", "jax-bfloat16"],
)
def test_the_exponent_of_half_precision_is_exact(make):
    e = np.arange(-14, 16)
    x = make(np.ldexp(np.float32(1), e).reshape(-1, 1, 1))
    np.testing.assert_array_equal(np.asarray(be.max_exponent(be.namespace(x), x)).ravel(), e + 1)
    info = be.namespace(x).finfo(x.dtype)
    tiny = make(np.array([[float(info.smallest_normal) * float(info.eps)]], "float32"))
    expected = round(math.log2(float(info.smallest_normal) * float(info.eps))) + 1
    assert int(be.max_exponent(be.namespace(x), tiny)[0, 0]) == expected


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 0), (0, 2, 2)])
def test_the_exponent_of_an_empty_matrix_is_zero(shape):
    e = be.max_exponent(np, np.ones(shape))
    assert e.shape == (*shape[:-2], 1, 1)
    assert not e.any()


@pytest.mark.parametrize("dtype", REAL)
def test_scaling_is_exact_by_every_power_and_keeps_signs(xp, dtype):
    info = np.finfo(dtype)
    e = np.arange(info.minexp + info.machep - 1, info.maxexp + 1).astype(dtype)
    sub = info.smallest_subnormal
    below = np.nextafter(info.tiny, np.zeros((), dtype))
    values = np.array([0.75, -0.5, 2 / 3, info.tiny, -info.tiny, sub, -5 * sub, below, 0, -0.0], dtype)
    x = np.broadcast_to(values, (len(e), 1, len(values))).copy()

    def scale(x, e):
        space = be.namespace(x)
        return be.ldexp(space, x, space.astype(e, space.int32))

    got = xp.call(scale, x, e.reshape(-1, 1, 1))
    expected = np.ldexp(x, e.astype(int).reshape(-1, 1, 1))
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(expected))


@pytest.mark.parametrize("dtype", REAL)
def test_scaling_treats_both_parts_of_a_complex_number_alike(xp, dtype):
    tiny = np.finfo(dtype).smallest_subnormal
    x = np.array([[[1.5 - 2j, complex(3 * tiny, -1)], [0, complex(0.5, tiny)]]], COMPLEX[dtype])

    def scale(x):
        space = be.namespace(x)
        return be.ldexp(space, x, space.full((1, 1, 1), 60, dtype=space.int32, device=be.device(x)))

    np.testing.assert_array_equal(xp.call(scale, x), x * 2.0**60)
