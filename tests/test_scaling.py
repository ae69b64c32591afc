"""Exact scaling by powers of two, and norms that keep their digits."""

import numpy as np
import pytest

from orthlin import _backend as be
from orthlin._scaling import frobenius, unit_scale
from orthlin.errors import NonFiniteError

DTYPES = ("float32", "float64", "complex64", "complex128")
SHAPE = (5, 3, 4)  # one for all tests, because JAX compiles every new one
MANY_SHAPES = ("numpy", "strict", "strict:device1", "torch:cpu", "torch:cuda", "cupy")


def sample(dtype, exponents=0):
    """Small integers times powers of two, so that scaling loses no bit wherever they are representable."""
    parts = np.random.default_rng(0).integers(-7, 8, (2, *SHAPE)).astype(np.finfo(dtype).dtype)
    parts = np.ldexp(parts, np.reshape(exponents, (-1, 1, 1)))
    return (parts[0] + 1j * parts[1] if np.dtype(dtype).kind == "c" else parts[0]).astype(dtype)


def scale(xp, A, keep=0):
    """Scaled matrix and exponents, which travel as numbers of the dtype of the matrix."""

    def both(x):
        space = be.namespace(x)
        X, e = unit_scale(space, x, "A", keep=keep)
        return X, space.astype(space.asarray(e), x.dtype)

    X, e = xp.call(both, A)
    return X, e.real.astype(int)


def top(X):
    return np.maximum(np.abs(X.real), np.abs(X.imag)).max(axis=(-2, -1), keepdims=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_part_comes_into_the_unit_interval_and_nothing_is_lost(xp, dtype):
    info = np.finfo(dtype)
    lowest = round(np.log2(float(info.smallest_subnormal)))
    exponents = np.array([lowest, info.minexp + 4, 0, 40, info.maxexp - 3])
    A = sample(dtype, exponents)
    X, e = scale(xp, A)
    assert np.all((top(X) >= 0.5) & (top(X) < 1))
    for scaled, given in ((X.real, A.real), (X.imag, A.imag)):
        np.testing.assert_array_equal(np.ldexp(scaled, e), given)


def test_a_zero_matrix_of_a_stack_stays_zero_with_exponent_zero(xp):
    A = sample("float32")
    A[1] = 0
    X, e = scale(xp, A)
    assert not X[1].any()
    assert e[1] == 0
    assert X[[0, 2, 3, 4]].any(axis=(-2, -1)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_a_bad_value_is_an_error_on_the_host_and_spoils_its_own_matrix_elsewhere(xp, dtype, bad):
    A = sample(dtype)
    clean, _ = scale(xp, A)
    A[1, 2, 3] = bad
    if xp.host:
        with pytest.raises(NonFiniteError, match="A: holds NaN or infinity; remove"):
            scale(xp, A)
        return
    X, _ = scale(xp, A)
    assert np.isnan(X[1]).all()
    np.testing.assert_array_equal(np.delete(X, 1, 0), np.delete(clean, 1, 0))


def test_a_host_matrix_within_the_kept_range_is_returned_itself():
    A = sample("float32")
    X, e = unit_scale(np, A, "A", keep=32)
    assert X is A
    assert not e.any()
    X, e = unit_scale(np, sample("float32", [0, 0, 0, 0, 40]), "A", keep=32)
    assert X.max() < 1
    assert e.all()


@pytest.mark.parametrize("xp", MANY_SHAPES, indirect=True)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 2, 2)])
def test_an_empty_matrix_is_scaled_by_one(xp, shape):
    X, _ = scale(xp, np.zeros(shape, "float32"))
    assert X.shape == shape


@pytest.mark.parametrize("xp", MANY_SHAPES, indirect=True)
@pytest.mark.parametrize("shape", [(1, 300_000), (300_000, 1), (2, 100_000), (300, 500)])
def test_a_long_norm_in_single_precision_is_right_to_rounding(xp, shape):
    """Four eps: the sums along short sides, two roots, the result; one float32 sum is 5 to 400 eps off in torch."""
    A = np.random.default_rng(0).uniform(0.5, 1, shape).astype("float32")
    norm = xp.call(lambda x: frobenius(be.namespace(x), x), A)
    assert norm.shape == (1, 1)
    exact = np.linalg.norm(A.astype(float))
    assert abs(float(norm[0, 0]) - exact) <= 4 * np.finfo("float32").eps * exact


@pytest.mark.parametrize("dtype", ["float64", "complex64"])
def test_the_norm_of_a_stack_is_that_of_each_matrix(xp, dtype):
    A = sample(dtype)
    norm = xp.call(lambda x: frobenius(be.namespace(x), x) + 0 * x[..., :1, :1], A)
    expected = np.sqrt((np.abs(A.astype(complex)) ** 2).sum(axis=(-2, -1), keepdims=True))
    np.testing.assert_allclose(norm, expected, rtol=4 * np.finfo(dtype).eps)
