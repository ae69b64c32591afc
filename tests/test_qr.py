"""QR: accurate on the whole gallery; the Cholesky ways are accurate or NaN, never silently wrong."""

import itertools

import numpy as np
import pytest
from conftest import BACKENDS
from gallery import DTYPES, SHAPES, Spec, case, cases, geometric, judge_polar, judge_qr, prescribed, within
from strategies import LAYOUTS

import orthlin
from orthlin.errors import NonFiniteError, OptionError, ShapeError
from orthlin.qr import METHODS

LIMITS = {"orthogonality": 64.0, "backward": 64.0, "triangular": 0.0}
CHOLESKY = ("cholesky2", "shifted_cholesky3")


def is_nan(Q, R):
    return bool(np.isnan(Q).all() and np.isnan(R).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["auto", "householder"])
@pytest.mark.parametrize("name", ["numpy", "torch:cpu", "strict:device1"])
def test_every_gallery_case(name, method, dtype):
    """None raised, none silently bad."""
    found = {}
    for c in cases(dtypes=(dtype,)):
        figures = judge_qr(c.A, *BACKENDS[name].call(orthlin.qr, c.A, method=method))
        if not within(figures, LIMITS):
            found[c.id] = figures
    assert found == {}


def kept(c, Q, R):
    """Whether a Cholesky way is as accurate as it says: A times an inverse leaves a residual of eps cond."""
    return within(judge_qr(c.A, Q, R), LIMITS | {"backward": max(64.0, c.kappa)})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", CHOLESKY)
@pytest.mark.parametrize("name", ["numpy", "torch:cpu"])
def test_cholesky_is_accurate_or_nan_on_the_gallery(name, method, dtype):
    """And accurate up to the condition number that its docstring states."""
    reached = 0
    for c in cases(dtypes=(dtype,), shapes=[s for s in SHAPES if s[0] >= s[1]]):
        Q, R = BACKENDS[name].call(orthlin.qr, c.A, method=method)
        good = kept(c, Q, R)
        assert good or is_nan(Q, R), c.id
        within_reach = c.full_rank and c.kappa <= reach(method, c.A)
        assert good or not within_reach, c.id
        reached += within_reach
    assert reached > 20


def reach(method, A):
    m, n = A.shape
    s = (m * n + n * (n + 1)) * np.finfo(A.dtype).eps / 2
    return 1 / (8 * np.sqrt(s)) if method == "cholesky2" else 1 / (96 * s)


@pytest.mark.parametrize("fraction", [0.2, 0.6, 0.9, 1.1, 1.3, 1.6, 1.8, 2.0, 2.2])
@pytest.mark.parametrize("method", CHOLESKY)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_cholesky_never_returns_a_basis_that_is_not_orthonormal(dtype, method, fraction):
    """Beyond its range a factor often exists by luck: condition eps^(-fraction/2), three spectra, three shapes."""
    cond = np.finfo(dtype).eps ** (-fraction / 2)
    for (m, n), seed in itertools.product(((60, 6), (60, 20), (20, 20)), range(8)):
        spec = Spec(np.random.default_rng(seed), m, n, np.dtype(dtype))
        for sigma in (geometric(spec, cond), np.r_[np.ones(n - 1), 1 / cond], np.r_[1, np.full(n - 1, 1 / cond)]):
            A = prescribed(spec, sigma)[0].astype(dtype)
            Q, R = orthlin.qr(A, method=method)
            good = within(judge_qr(A, Q, R), LIMITS)
            assert good or is_nan(Q, R)
            assert good or cond > reach(method, A)


def kahan(m, n, cosine, dtype):
    """Columns that are nearly dependent in a way no single diagonal entry shows."""
    sine = np.sqrt(1 - cosine**2)
    A = sine ** np.arange(m)[:, None] * (np.eye(m, n) - cosine * np.triu(np.ones((m, n)), 1))
    return A.astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["numpy", "torch:cpu"])
def test_auto_takes_the_cholesky_way_only_where_it_is_accurate(name, dtype):
    """Tall enough for it; every condition number from one to beyond 1/eps, graded columns, Kahan's matrices."""
    given = [kahan(300, 32, cosine, dtype) for cosine in np.linspace(0, 0.5, 26)]
    for shape, cond in itertools.product(((2000, 4), (300, 40)), 10.0 ** np.arange(0, 18, 1.5)):
        spec = Spec(np.random.default_rng(1), *shape, np.dtype(dtype))
        A = prescribed(spec, geometric(spec, cond))[0]
        for grading in (np.ones(shape[1]), np.geomspace(1, 1e-3, shape[1]), np.geomspace(1e-3, 1, shape[1])):
            given.append((A * grading).astype(dtype))
    for A in given:
        assert within(judge_qr(A, *BACKENDS[name].call(orthlin.qr, A)), LIMITS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["auto", "householder"])
@pytest.mark.parametrize("name", ["numpy", "torch:cpu"])
def test_equal_rows_and_columns(name, method, dtype):
    """torch's own complex64 factorization gives NaN for most of those of order 8 and 16."""
    for n, seed, small in itertools.product((8, 16, 40), range(10), (1.0, 1e-6)):
        spec = Spec(np.random.default_rng(seed), n, n, np.dtype(dtype))
        row = spec.gaussian(1, n) * np.r_[1, np.full(n - 1, small)]
        for A in (np.tile(row, (n, 1)), np.tile(row.T, n), np.tile(row, (5 * n, 1))):
            given = A.astype(dtype)
            assert within(judge_qr(given, *BACKENDS[name].call(orthlin.qr, given, method=method)), LIMITS)
            U, H = BACKENDS[name].call(orthlin.polar, given)
            assert within(judge_polar(given, U, H))


@pytest.mark.parametrize("method", METHODS)
def test_every_library(xp, method):
    if xp.name.startswith("jax") and method == "householder":
        pytest.skip("what 'auto' is on devices")
    A = case("gaussian", (96, 32), "float32").A
    assert within(judge_qr(A, *xp.call(orthlin.qr, A, method=method)), LIMITS)


def signed(dtype):
    """Every sign and phase, and the zeros, subnormal entries and ranks for which a phase is hard to find."""
    for shape in ((1, 1), (6, 6), (9, 4), (4, 9), (300, 16)):
        spec = Spec(np.random.default_rng(2), *shape, np.dtype(dtype))
        A = spec.gaussian(*shape)
        tiny = float(spec.info.smallest_subnormal) * 3
        first, last = A.copy(), A.copy()
        first[:, 0], last[:, -1] = 0, 0
        graded = A * np.geomspace(1, 1e-30, shape[1]) if shape[1] > 1 else A
        for given in (A, -A, np.triu(A), np.tril(A), first, last, np.ones(shape) * A[0, 0], A[:, :1] * A[:1], graded):
            yield given.astype(dtype)
        yield np.zeros(shape, dtype)
        if shape != (1, 1):  # where it would be the norm of a subnormal matrix, which is rounded
            yield (np.triu(A, 1) - np.eye(*shape) * A[0, 0] / abs(A[0, 0]) * tiny).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["numpy", "torch:cpu", "strict:device1"])
def test_the_diagonal_of_R_is_real_and_not_negative_by_every_method(name, dtype):
    for A, method in itertools.product(signed(dtype), METHODS):
        if method in CHOLESKY and A.shape[0] < A.shape[1]:
            continue
        Q, R = BACKENDS[name].call(orthlin.qr, A, method=method)
        if method in CHOLESKY and is_nan(Q, R):
            continue
        diagonal = np.diagonal(R)
        assert (diagonal.imag == 0).all()
        assert (diagonal.real >= 0).all()
        assert method in CHOLESKY or within(judge_qr(A, Q, R), LIMITS), (A.shape, method)


def test_the_factors_are_the_same_by_every_method_and_on_every_library(xp):
    """Of full column rank they are unique."""
    for dtype in DTYPES[1::2] if xp.name in ("numpy", "torch:cpu") else DTYPES[-1:]:
        A = case("geometric_1e2", (96, 32), dtype).A
        expected = np.linalg.qr(A)
        phase = np.diagonal(expected.R) / abs(np.diagonal(expected.R))
        for method in METHODS if not xp.name.startswith("jax") else METHODS[:1]:
            Q, R = xp.call(orthlin.qr, A, method=method)
            np.testing.assert_allclose(Q, expected.Q * phase, rtol=0, atol=1e-12)
            np.testing.assert_allclose(R, expected.R / phase[:, None], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["numpy", "torch:cpu"])
def test_a_batch_equals_a_loop_bit_for_bit(name, method, dtype):
    """Conditions on both sides of every line, and for the methods that survive it a zero matrix."""
    spec = Spec(np.random.default_rng(0), 300, 16, np.dtype(dtype))
    A = np.stack([prescribed(spec, geometric(spec, 10.0**k))[0] for k in range(6)]).astype(dtype)
    if method in ("auto", "householder"):
        A[3] = 0
    A = A.reshape(2, 3, 300, 16)
    Q, R = BACKENDS[name].call(orthlin.qr, A, method=method)
    for i in np.ndindex(2, 3):
        one = BACKENDS[name].call(orthlin.qr, A[i], method=method)
        np.testing.assert_array_equal(Q[i], one.Q)
        np.testing.assert_array_equal(R[i], one.R)


@pytest.mark.parametrize("name", ["torch:cpu"])
def test_one_breakdown_in_a_batch_leaves_the_others_alone(name):
    A = np.random.default_rng(0).standard_normal((3, 20, 4))
    A[1] = 0
    Q, R = BACKENDS[name].call(orthlin.qr, A, method="cholesky2")
    assert [is_nan(q, r) for q, r in zip(Q, R, strict=True)] == [False, True, False]


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (0, 4, 3), (2, 0, 3), (2, 3, 0)])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["numpy", "torch:cpu", "strict", "strict:device1"])
def test_empty(name, method, shape):
    if method in CHOLESKY and shape[-2] < shape[-1]:
        return
    Q, R = BACKENDS[name].call(orthlin.qr, np.zeros(shape), method=method)
    k = min(shape[-2:])
    assert (Q.shape, R.shape) == ((*shape[:-1], k), (*shape[:-2], k, shape[-1]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_every_layout_equals_the_contiguous_copy(method, layout):
    """Up to 8 eps: products of transposed operands are summed in another order."""
    A = LAYOUTS[layout](np.random.default_rng(0).standard_normal((3, 400, 4)))
    copy = np.ascontiguousarray(A)
    for given, expected in zip(orthlin.qr(A, method=method), orthlin.qr(copy, method=method), strict=True):
        np.testing.assert_allclose(given, expected, rtol=0, atol=8 * 2.0**-52 * np.abs(expected).max())
    np.testing.assert_array_equal(A, copy)


@pytest.mark.parametrize("k", [-149, -120, -40, 60, 120])
@pytest.mark.parametrize("method", METHODS)
def test_powers_of_two_change_no_bit_of_the_basis(method, k):
    A = np.random.default_rng(0).integers(-8, 9, (40, 6)).astype("float32")
    Q, R = orthlin.qr(A, method=method)
    given = orthlin.qr(np.ldexp(A, k), method=method)
    np.testing.assert_array_equal(given.Q, Q)
    np.testing.assert_array_equal(given.R, np.ldexp(R, k))


def test_half_precision_is_factorized_in_single():
    A = np.random.default_rng(0).standard_normal((400, 8)).astype("float16")
    for method in METHODS:
        Q, R = orthlin.qr(A, method=method)
        assert Q.dtype == R.dtype == A.dtype
        Q, R, eps = Q.astype(float), R.astype(float), 2.0**-10
        assert np.linalg.norm(Q.T @ Q - np.eye(8)) <= eps * np.sqrt(8)  # one rounding of Q, by eps/2
        assert np.linalg.norm(A - Q @ R) <= eps / 2 * (1 + np.sqrt(8)) * np.linalg.norm(A.astype(float))


@pytest.mark.parametrize("method", CHOLESKY)
def test_wide_matrices_are_refused_by_the_cholesky_ways(method):
    with pytest.raises(ShapeError, match=r"needs m >= n, got shape \(3, 5\); use 'householder'"):
        orthlin.qr(np.ones((3, 5)), method=method)


@pytest.mark.parametrize("method", CHOLESKY)
@pytest.mark.parametrize("A", [np.zeros((5, 3)), np.ones((5, 3)), np.eye(5, 3, 1)], ids=["zero", "ones", "column"])
def test_rank_deficiency_gives_nan_and_no_exception(xp, method, A):
    if xp.name.startswith("jax"):
        pytest.skip("each is compiled for seconds; the same code runs on strict:device1")
    assert is_nan(*xp.call(orthlin.qr, A, method=method))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["numpy", "torch:cpu", "strict:device1"])
def test_bad_values(name, method, bad):
    A, xp = np.ones((6, 3)), BACKENDS[name]
    A[4, 1] = bad
    if xp.host:
        with pytest.raises(NonFiniteError, match="A: holds NaN or infinity"):
            xp.call(orthlin.qr, A, method=method)
    else:
        assert is_nan(xp.call(orthlin.qr, A, method=method).Q, np.nan)


def test_unknown_method():
    with pytest.raises(OptionError, match="method: expected one of 'auto', 'householder'"):
        orthlin.qr(np.eye(3), method="givens")
