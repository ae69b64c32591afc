"""CuPy without a GPU: on a stand-in through which no value can be read, and what the real one does without a device."""

import array_api_compat
import fakecupy
import ml_dtypes
import numpy as np
import pytest
from fakecupy import Device, Waits

import orthlin
from orthlin import _backend as be
from orthlin import metrics, sketch, steppers

DTYPES = ("float32", "float64", "complex64", "complex128", "float16", "bfloat16")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
M, N, R = 40, 64, 8
CALLS = {
    "lowrank_orth": lambda A, W: orthlin.lowrank_orth(A, R, test_matrix=W),
    "lowrank_orth tol": lambda A, W: orthlin.lowrank_orth(A, R, test_matrix=W, tol=0.1),
    "lowrank_orth seed": lambda A, _: orthlin.lowrank_orth(A, R, rng=0),
    "lowrank_orth columns": lambda A, _: orthlin.lowrank_orth(A, R, rng=0, sketch="columns"),
    "lowrank_orth sparse_sign": lambda A, _: orthlin.lowrank_orth(A, R, rng=0, sketch="sparse_sign"),
    "lowrank_orth exact": lambda A, W: orthlin.lowrank_orth(A, R, test_matrix=W, method="exact"),
    "lowrank_orth oversampled": lambda A, _: orthlin.lowrank_orth(A, R, rng=0, n_oversamples=4),
    "lowrank_orth_factors": lambda A, W: orthlin.lowrank_orth_factors(A, R, test_matrix=W),
    "orthogonalize": lambda A, _: orthlin.orthogonalize(A),
    "orthogonalize tol": lambda A, _: orthlin.orthogonalize(A, tol=0.1),
    "polar": lambda A, _: orthlin.polar(A),
    "polar left": lambda A, _: orthlin.polar(A, side="left"),
    "polar svd": lambda A, _: orthlin.polar(A, method="svd"),
    "qr": lambda A, _: orthlin.qr(A),
    "qr cholesky2": lambda A, _: orthlin.qr(A.mT, method="cholesky2"),
    "qr shifted_cholesky3": lambda A, _: orthlin.qr(A.mT, method="shifted_cholesky3"),
    "matrix_sign": lambda A, _: orthlin.matrix_sign(A[..., :M]),
    "range finder": lambda A, W: orthlin.randomized_range_finder(A, R, test_matrix=W, n_iter=1),
    "sketch": lambda A, _: sketch.gaussian(N, R, like=A, rng=0),
    "muon": lambda A, _: steppers.muon(0.1, rank=R).update(A, steppers.muon(0.1, rank=R).init(A, "w"), A, "w")[0],
    "orthogonality": lambda A, _: metrics.orthogonality(A),
    "captured_energy": lambda A, W: metrics.captured_energy(A.mT, W),
    "range_error": lambda A, W: metrics.range_error(A.mT, W),
    "polar_backward_error": lambda A, _: metrics.polar_backward_error(A, A, A.mT @ A),
    "qr_residual": lambda A, W: metrics.qr_residual(A.mT, W, W.mT[..., :M]),
    "hermitian_defect": lambda A, _: metrics.hermitian_defect(A[..., :M]),
    "psd_defect": lambda A, _: metrics.psd_defect(A[..., :M]),
    "numerical_rank": lambda A, _: metrics.numerical_rank(A),
    "nuclear_norm": lambda A, _: metrics.nuclear_norm(A),
}


@pytest.fixture
def cupy():
    with fakecupy.standing_in() as module:
        yield module


def sample(dtype, *shape, seed=0):
    rng = np.random.default_rng(seed)
    A = rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
    return A.astype(dtype) if "complex" in str(dtype) else A.real.astype(BFLOAT16 if dtype == "bfloat16" else dtype)


def test_the_stand_in_is_taken_for_cupy_and_refuses_what_waits(cupy):
    x = cupy.asarray(np.eye(3))
    xp = be.namespace(x)
    assert xp.__name__ == "array_api_compat.cupy"
    assert array_api_compat.is_cupy_array(x)
    assert not be.is_host(x)
    for read in (bool, float, np.asarray, lambda x: x[x > 0], lambda x: xp.clip(x, 0 * x, 0 * x)):
        with pytest.raises(Waits):
            read(x)
    with Device(1), pytest.raises(AssertionError, match="another device"):
        x + x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_read_and_a_result_is_that_of_its_device(cupy, name, dtype):
    """On the second device of a machine, which is the current one."""
    with Device(1):
        A, W = (cupy.asarray(sample(dtype, *shape)) for shape in ((M, N), (N, R)))
        result = CALLS[name](A, W)
        for x in result if isinstance(result, tuple) else (result,):
            assert x.device == Device(1)
            assert np.isfinite(x.values.astype(complex)).all()


@pytest.mark.parametrize("name", ["lowrank_orth", "lowrank_orth seed", "orthogonalize", "polar", "qr", "muon"])
def test_the_device_of_an_array_is_entered_where_another_is_the_current_one(cupy, name):
    with Device(1):
        A, W = (cupy.asarray(sample("float32", *shape)) for shape in ((M, N), (N, R)))
    result = CALLS[name](A, W)
    for x in result if isinstance(result, tuple) else (result,):
        assert x.device == Device(1)


@pytest.mark.parametrize("shape", [(M, N), (3, M, N)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_those_of_the_device_path(cupy, dtype, shape):
    A, W = (cupy.asarray(sample(dtype, *s)) for s in (shape, (N, R)))
    eps = 2.0**-7 if dtype == "bfloat16" else np.finfo(dtype).eps
    for O, ones in ((orthlin.lowrank_orth(A, R, test_matrix=W), R), (orthlin.polar(A).U, M)):
        assert O.dtype == A.dtype
        wide = O.values.astype(np.complex128 if "complex" in dtype else float)
        assert np.abs(np.linalg.svd(wide, compute_uv=False)[..., :ones] - 1).max() <= 32 * eps * ones**0.5


BAD = {"indefinite": -np.eye(5), "singular": np.diag([1.0, 1, 0, 1, 1]), "nan": np.full((5, 5), np.nan)}


@pytest.mark.parametrize("stack", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:4])
@pytest.mark.parametrize("bad", BAD)
def test_a_factorization_that_fails_in_silence_is_nan(cupy, bad, dtype, stack):
    X = sample(dtype, 3, 5, 5)
    S = X @ X.conj().mT + np.eye(5, dtype=dtype)
    S[1] = BAD[bad]
    given = cupy.asarray(S if stack else S[1])
    xp = be.namespace(given)
    L, V = be.cholesky(xp, given).values, be.inv(xp, given).values
    if not stack:
        L, V = (np.broadcast_to(x, (3, 5, 5)) for x in (L, V))
    assert np.isnan(L[1]).all()
    assert np.isnan(V[1]).all() == (bad != "indefinite")
    for i in (0, 2) if stack else ():
        eps = np.finfo(dtype).eps
        assert np.linalg.norm(L[i] @ L[i].conj().T - S[i]) <= 32 * eps * np.linalg.norm(S[i])
        assert np.linalg.norm(V[i] @ S[i] - np.eye(5)) <= 32 * eps * np.linalg.cond(S[i])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["eigh", "svd"])
@pytest.mark.parametrize("dtype", DTYPES[:4])
def test_a_bad_matrix_spoils_no_other_of_its_stack(cupy, dtype, name, bad):
    X = sample(dtype, 3, 5, 5)
    X = X + X.conj().mT
    X[1, 2, 3] = bad
    with np.errstate(invalid="ignore"):  # a stand-in of NumPy says something
        found, alone = (getattr(be, name)(be.namespace(x), x) for x in map(cupy.asarray, (X, X[::2])))
    for part, expected in zip(found, alone, strict=True):
        assert np.isnan(part.values[1]).all()
        np.testing.assert_array_equal(part.values[::2], expected.values)


@pytest.mark.parametrize("decades", [0, 3, 6])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_factorization_of_an_ill_conditioned_matrix_has_not_failed(cupy, decades, dtype):
    decades *= 1 if dtype == "float32" else 2
    U = np.linalg.qr(sample("float64", 30, 30)).Q
    S = cupy.asarray((U * np.geomspace(1, 10.0**-decades, 30) @ U.T).astype(dtype))
    xp = be.namespace(S)
    assert np.isfinite(be.cholesky(xp, S).values).all()
    assert np.isfinite(be.inv(xp, S).values).all()


@pytest.mark.parametrize("n", [8, 96, 256])
def test_a_triangular_matrix_is_inverted_at_once(cupy, n):
    """By halves it were eight factorizations and a hundred launches."""
    given = cupy.asarray(np.tril(sample("float64", n, n)) + 2 * n * np.eye(n))
    fakecupy.calls.clear()
    found = be.inv_lower(be.namespace(given), given).values
    assert fakecupy.calls.count("inv") == 1
    assert len(fakecupy.calls) <= 16
    np.testing.assert_allclose(found @ given.values, np.eye(n), atol=1e-12)


def test_a_generator_of_another_device_is_not_used_in_silence(cupy):
    like = cupy.asarray(np.eye(4))
    with Device(1):
        rng = cupy.random.default_rng(0)
    with pytest.raises(AssertionError):
        sketch.gaussian(4, 2, like=like, rng=rng)


def test_what_the_real_cupy_says_of_dtypes():
    """It needs no GPU for that."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    xp = pytest.importorskip("array_api_compat.cupy")
    for dtype, expected in {
        BFLOAT16: (False, 16, 2.0**-7),
        np.dtype("float16"): (False, 16, 2.0**-10),
        np.dtype("float32"): (False, 32, 2.0**-23),
        np.dtype("complex128"): (True, 64, 2.0**-52),
        np.dtype("int32"): None,
        np.dtype("bool"): None,
    }.items():
        assert be.kind(xp, dtype) == expected
    assert "float64" in xp.__array_namespace_info__().dtypes(device=cupy.cuda.Device(0), kind="real floating")


def subnormal(dtype, *shape):
    """Multiples of 2^-149 below 2^-126, whose products with powers of two are exact."""
    rng = np.random.default_rng(0)
    parts = np.ldexp(rng.integers(-(2**20), 2**20, (2, *shape)).astype("float32"), np.int32(-149))
    return (parts[0] + 1j * parts[1] if dtype == "complex64" else parts[0]).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_the_stand_in_flushes_as_cupy_does(cupy, dtype):
    x = cupy.asarray(subnormal(dtype, 3, 3))
    assert not any(y.values.any() for y in (x * 1, x + x, abs(x), x * 2.0**100, be.namespace(x).max(abs(x))))
    assert (x @ cupy.asarray(2.0**30 * np.eye(3, dtype=dtype))).values.any()
    assert (cupy.asarray(x.values.astype("complex128")) * 1).values.any()


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("k", [-149, -140, -127, -126, -100, 0, 100])
def test_exponents_and_scaling_are_exact_where_numbers_are_subnormal(cupy, dtype, k):
    A = np.round(8 * sample("complex128" if dtype == "complex64" else "float64", 4, 5)) * 2.0**k
    A = A.astype(dtype)
    given = cupy.asarray(A)
    xp = be.namespace(given)
    e = be.max_exponent(xp, given)
    found = int(e.values[0, 0])
    assert found == np.frexp(max(np.abs(A.real).max(), np.abs(A.imag).max()))[1]
    X = be.ldexp(xp, given, -e)
    np.testing.assert_array_equal(X.values, A.astype("complex128") * 2.0**-found)
    np.testing.assert_array_equal(be.ldexp(xp, X, e).values, A)
    assert be.safe_factor(xp, given, 0).values == 2.0 ** min(126, -found)


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("name", list(CALLS)[: list(CALLS).index("sketch")])
def test_subnormal_matrices_are_treated_as_normal_ones_are(cupy, name, dtype):
    """Factors without a scale are equal, those with that of A to one unit of subnormal numbers in each part."""
    A, W = subnormal(dtype, M, N), cupy.asarray(sample(dtype, N, R))
    small, large = (CALLS[name](cupy.asarray((A * 2.0**k).astype(dtype)), W) for k in (0, 60))
    for x, y in zip(*(r if isinstance(r, tuple) else (r,) for r in (small, large)), strict=True):
        scale = 2.0**60 if np.abs(x.values).max() < 1e-30 else 1.0
        off = np.abs(scale * x.values.astype("complex128") - y.values).max()
        assert off <= (2.0 ** (60 - 149) if scale > 1 else 0)
        assert y.values.any()
