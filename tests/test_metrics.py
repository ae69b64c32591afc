import functools
import math

import jax
import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import BACKENDS
from gallery import FAMILIES, case, gram_defect, in_eps, judge_polar, judge_qr
from hypothesis import given, settings
from strategies import matrices

from orthlin import _backend, metrics
from orthlin.errors import ArrayTypeError, DTypeError, NonFiniteError, OptionError, RankError, ShapeError

BATCH = (2, 3)
EMPTY = (2, 0, 3), (0, 5), (5, 0), (0, 0), (0, 3, 3)
SIZED = {"captured", "nuclear", "range", "range2"}  # in the units of the matrix
IN_EPS = {"orthogonality", "polar", "polar_left", "qr", "hermitian", "psd"}  # the rest are fractions and ranks


def figures(A, Q, R):
    """Every array figure that a thin factorization of `A` can be asked for."""
    half = Q[..., : Q.shape[-1] // 2]
    return {
        "orthogonality": metrics.orthogonality(Q),
        "polar": metrics.polar_backward_error(A, Q, R),
        "polar_left": metrics.polar_backward_error(A.mT, Q.mT, R.mT, side="left"),
        "qr": metrics.qr_residual(A, Q, R),
        "hermitian": metrics.hermitian_defect(R),
        "psd": metrics.psd_defect(R),
        "captured": metrics.captured_nuclear_norm(A, Q),
        "fraction": metrics.captured_fraction(A, Q),
        "nuclear": metrics.nuclear_norm(A),
        "rank": metrics.numerical_rank(A),
        "stable": metrics.stable_rank(A),
        "energy": metrics.captured_energy(A, half),
        "range": metrics.range_error(A, half),
        "range2": metrics.range_error(A, half, ord=2),
    }


jitted = jax.jit(figures)


def measure(xp, *arrays):
    """The figures inside a library, as NumPy arrays, after a look at where they live and in what precision."""
    with xp.context():
        native = [xp.asarray(a) for a in arrays]
        measured = (jitted if xp.jit else figures)(*native)
        for name, value in measured.items():
            assert getattr(value, "device", None) == getattr(native[0], "device", None)
            assert name == "rank" or str(value.dtype).endswith("float64")
        return {name: xp.to_numpy(value) for name, value in measured.items()}


def batch(dtype):
    """Factorizations with an error, and in their midst a zero matrix and one of 1e30 everywhere."""
    real, imaginary = np.random.default_rng(0).standard_normal((2, *BATCH, 6, 4))
    A = real + 1j * imaginary if np.dtype(dtype).kind == "c" else real
    A[0, 0], A[0, 1] = 0, 1e30
    Q, R = np.linalg.qr(A)
    R[1] += np.eye(4)
    return [x.astype(dtype) for x in (A, Q, R)]


@functools.cache
def looped(dtype):
    """The figures of NumPy, one matrix after the other."""
    arrays = batch(dtype)
    return {index: figures(*(x[index] for x in arrays)) for index in np.ndindex(BATCH)}


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_every_library_gives_the_figures_of_numpy_and_a_batch_equals_a_loop(xp, dtype):
    together = measure(xp, *batch(dtype))
    for index, expected in looped(dtype).items():
        for name, value in expected.items():
            assert together[name].shape == BATCH
            # figures of zero are sums of rounding errors of float64, taken in units of eps of float32
            assert float(together[name][index]) == pytest.approx(float(value), rel=1e-6, abs=1e-6), (name, index)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_value_is_an_error_on_the_host_and_spoils_its_own_figures_on_a_device(xp, bad):
    A, Q, R = batch("float32")
    A[1, 2, 0, 1] = bad
    if xp.host:
        with pytest.raises(NonFiniteError, match=r"^A: holds NaN or infinity"):
            measure(xp, A, Q, R)
        return
    without_A = {"orthogonality", "hermitian", "psd"}
    for name, value in measure(xp, A, Q, R).items():
        if name == "rank":
            assert value[1, 2] == 0  # there is no integer NaN
        else:
            assert np.isnan(value[1, 2]) == (name not in without_A), name
        assert np.isfinite(np.delete(value.ravel(), 5)).all(), name


def test_where_there_is_no_float64_single_precision_does_not_overflow(monkeypatch):
    monkeypatch.setattr(_backend, "wide_dtype", lambda *_: None)
    for name, value in figures(*batch("float32")).items():
        assert name == "rank" or value.dtype == np.float32
        for index, expected in looped("float32").items():
            size = 1e31 if index == (0, 1) and name in SIZED else 10.0
            slack = 10 if name in IN_EPS else 1e-6 * size  # ten units of eps of float32
            assert float(value[index]) == pytest.approx(float(expected[name]), rel=1e-5, abs=slack), (name, index)


def test_figures_are_the_textbook_formulas():
    A = np.random.default_rng(0).standard_normal((90, 4, 2)) @ [1, 1j]  # long enough for a Q of small entries
    Q, sigma = np.linalg.qr(A[:, :2]).Q, np.linalg.svd(A, compute_uv=False)
    rest = A - Q @ Q.conj().T @ A
    assert float(metrics.nuclear_norm(A)) == pytest.approx(sigma.sum())
    assert float(metrics.stable_rank(A)) == pytest.approx((sigma**2).sum() / sigma[0] ** 2)
    assert float(metrics.range_error(A, Q)) == pytest.approx(np.linalg.norm(rest))
    assert float(metrics.range_error(A, Q, ord=2)) == pytest.approx(np.linalg.norm(rest, 2))
    energy = 1 - np.linalg.norm(rest) ** 2 / np.linalg.norm(A) ** 2
    assert float(metrics.captured_energy(A, Q)) == pytest.approx(energy)
    O = scipy.linalg.polar(A)[0]
    assert float(metrics.captured_nuclear_norm(A, O)) == pytest.approx(sigma.sum())
    assert float(metrics.captured_fraction(A, O)) == pytest.approx(1.0)
    assert float(metrics.captured_fraction(A, 1j * O)) == pytest.approx(0.0, abs=1e-12)
    assert [int(metrics.numerical_rank(A, rtol=sigma[1] / sigma[0] * x)) for x in (0.999, 1.001)] == [2, 1]
    assert [int(metrics.numerical_rank(np.eye(2, 9) * [[1], [x * 2.0**-52]])) for x in (8, 10)] == [1, 2]


@pytest.mark.parametrize("dtype", ["float32", "complex128"])
@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (32, 96)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_ruler_agrees_with_the_judges(family, shape, dtype):
    A = case(family, shape, dtype).A
    slack = 1e-6 if dtype == "float32" else 0.5  # both round in float64, which for complex128 is what they measure
    close = functools.partial(pytest.approx, rel=1e-6, abs=slack)
    for side in ("right", "left"):
        U, H = scipy.linalg.polar(A, side=side)
        judged = judge_polar(A, U, H if side == "right" else H.conj().T, side)  # it takes A^H = U^H H^H
        assert float(metrics.polar_backward_error(A, U, H, side=side)) == close(judged["backward"])
        assert float(metrics.hermitian_defect(H)) == close(judged["hermitian"])
        assert float(metrics.psd_defect(H)) == close(judged["psd"])
        defect = {"orthogonality": gram_defect(U.astype(complex))}
        assert {"orthogonality": float(metrics.orthogonality(U))} == close(in_eps(defect, A))
    Q, R = np.linalg.qr(A)
    assert float(metrics.qr_residual(A, Q, R)) == close(judge_qr(A, Q, R)["backward"])


def test_a_wrong_sign_is_found_by_the_psd_defect_alone():
    U, H = np.diag([1.0, -1.0]), np.diag([2.0, -1.0])
    A = np.diag([2.0, 1.0])
    assert float(metrics.orthogonality(U)) == float(metrics.polar_backward_error(A, U, H)) == 0
    assert float(metrics.psd_defect(H)) == 0.5 / np.finfo(float).eps


@pytest.mark.parametrize("exponent", [-1074, -1020, -60, 0, 60, 1015])
def test_figures_do_not_see_powers_of_two(exponent):
    A = np.random.default_rng(0).integers(-7, 8, (5, 3)).astype(float)
    B = np.ldexp(A, exponent)
    Q = np.linalg.qr(A).Q
    for relative in (metrics.captured_energy, metrics.captured_fraction):
        assert float(relative(A, Q)) == float(relative(B, Q))
    for relative in (metrics.stable_rank, metrics.numerical_rank):
        assert float(relative(A)) == float(relative(B))
    for value, other in (
        (metrics.nuclear_norm(A), metrics.nuclear_norm(B)),
        (metrics.range_error(A, Q[:, :1]), metrics.range_error(B, Q[:, :1])),
        (metrics.captured_nuclear_norm(A, Q), metrics.captured_nuclear_norm(B, Q)),
    ):
        assert math.ldexp(float(value), exponent) == float(other)


def test_zero_measures_zero_and_a_wrong_factor_of_zero_is_infinitely_wrong():
    assert {float(x) for name, x in looped("complex64")[0, 0].items() if name != "orthogonality"} == {0.0}
    assert float(metrics.qr_residual(np.zeros((3, 3)), np.eye(3), np.eye(3))) == math.inf


def test_factors_of_opposite_extreme_sizes_and_moduli_that_overflow_are_measured():
    huge = np.array([[1.7e308 + 1.7e308j]])
    assert float(metrics.qr_residual(huge, np.ones((1, 1)), huge)) == 0
    assert float(metrics.qr_residual(np.eye(2), np.eye(2) * 2.0**-1060, np.eye(2) * 2.0**1020)) > 1e15
    assert float(metrics.qr_residual(np.eye(2), np.eye(2) * 2.0**-1020, np.eye(2) * 2.0**1020)) == 0
    G, O = np.full((1, 1), 2.0**1023), np.array([[[2.0**-1070]], [[1.0]]])
    assert metrics.captured_nuclear_norm(G, O).tolist() == [2.0**-47, 2.0**1023]


@pytest.mark.parametrize("xp", [name for name in BACKENDS if name != "jax"], indirect=True)
def test_empty_matrices_measure_zero(xp):
    for *stack, m, n in EMPTY[: 1 if xp.jit else None]:  # JAX compiles each shape afresh
        A, R = (np.zeros((*stack, k, n), dtype=np.float32) for k in (m, n))
        for value in measure(xp, A, A, R).values():
            assert value.shape == tuple(stack)
            assert not value.any()


@pytest.mark.parametrize("name", ["numpy", "strict", "torch:cpu"])
def test_real_and_complex_or_single_and_double_arguments_mix(name):
    xp, A, Q = BACKENDS[name], batch("complex64")[0][1, 0], np.eye(6, 2, dtype="float32")
    for wide in ("float64", "complex64", "complex128"):
        mixed, same = (float(metrics.captured_energy(*map(xp.asarray, pair))) for pair in ((A, Q.astype(wide)), (A, Q)))
        assert 0 < mixed == same < 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_in_its_own_eps(dtype):
    U = torch.full((1, 1), 1 + torch.finfo(dtype).eps, dtype=dtype)
    assert float(metrics.orthogonality(U)) == pytest.approx(2, rel=0.01)


@given(matrices())
@settings(max_examples=60, deadline=None)
def test_figures_are_finite_and_in_their_range_for_any_matrix(A):
    before = A.copy()
    with np.errstate(over="ignore"):
        nuclear = metrics.nuclear_norm(A)
    stable, full = metrics.stable_rank(A), min(A.shape[-2:])
    assert np.shape(nuclear) == np.shape(stable) == A.shape[:-2]
    assert np.all(nuclear >= 0)
    assert np.all((stable >= 0) & (stable <= full * (1 + 1e-12)))
    assert np.all(metrics.numerical_rank(A) <= full)
    energy = metrics.captured_energy(A, np.eye(A.shape[-2], (A.shape[-2] + 1) // 2))
    assert np.all((energy >= 0) & (energy <= 1 + 1e-12))
    assert np.array_equal(A, before)


def test_bounds_hold_on_a_step_spectrum_and_the_frobenius_one_is_sharp():
    k, p, draws, rng = 8, 8, 300, np.random.default_rng(0)
    sigma = np.repeat([1.0, 0.05], (k, 92))
    Q = np.linalg.qr(sigma[:, None] * rng.standard_normal((draws, 100, k + p))).Q
    rest = np.diag(sigma) - Q @ (Q.swapaxes(-1, -2) * sigma)
    frobenius, spectral = (np.linalg.norm(rest, norm, axis=(-2, -1)) for norm in ("fro", 2))
    assert 0.85 <= frobenius.mean() / metrics.hmt_frobenius_bound(sigma, k, p) <= 1
    assert spectral.mean() <= metrics.hmt_spectral_bound(sigma, k, p)
    tail = metrics.hmt_tail_bound(sigma, k, p, math.e, math.sqrt(2 * p))
    assert tail.failure_probability == pytest.approx(3 * math.exp(-p))
    assert frobenius.max() <= tail.bound
    probes = np.linalg.norm(rest @ rng.standard_normal((100, 2)), axis=-2).max(axis=-1)
    assert (spectral > metrics.posterior_factor() * probes).mean() <= 0.01


def test_the_bounds_rest_on_these_moments_of_a_gaussian_pseudoinverse():
    """E ||X^+||_F^2 = k / (p - 1), and the half-p-th moment of 1 / chi^2 behind the 3 of Theorem 10.7."""
    for p in (4, 5, 15, 200):
        moment = math.lgamma(0.5) - p / 2 * math.log(2) - math.lgamma((p + 1) / 2)
        assert 0.9 <= math.exp(2 * moment / p) / (3 / (p + 1)) <= 1
    sigma = np.linalg.svd(np.random.default_rng(0).standard_normal((20000, 4, 12)), compute_uv=False)
    assert (sigma**-2).sum(axis=1).mean() == pytest.approx(4 / 7, rel=0.02)
    assert metrics.hmt_frobenius_bound([1, 1, 1, 1, 1], k=4, p=8) == pytest.approx(math.sqrt(1 + 4 / 7))


def test_the_posterior_factor_is_nearly_attained_by_a_matrix_of_rank_one():
    failure = math.erf(1 / metrics.posterior_factor() / math.sqrt(2))
    assert 0.099 <= failure <= 0.1


def test_bounds_at_the_edges():
    assert metrics.hmt_frobenius_bound([3.0, 2.0], k=2, p=2) == 0
    assert metrics.hmt_spectral_bound([], k=2, p=2) == 0
    assert metrics.hmt_frobenius_bound([1e200] * 5, k=1, p=2) == pytest.approx(2e200 * math.sqrt(2))
    assert math.isfinite(metrics.hmt_spectral_bound([1e200] * 5, k=1, p=2, n_iter=3))
    assert metrics.hmt_tail_bound([1.0], k=1, p=4, t=1, u=1).failure_probability == 1
    assert metrics.hmt_tail_bound([1.0], k=1, p=4, t=1e300, u=1e300).failure_probability == 0
    assert metrics.hmt_spectral_bound([2.0, 1.0, 1.0], k=1, p=2, n_iter=40) == pytest.approx(1, rel=0.05)


EYE, CUBE = np.eye(2), np.ones((3, 3, 3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: metrics.hmt_frobenius_bound([1.0], k=0, p=2), RankError, "k: .* at least 1, got 0"),
        (lambda: metrics.hmt_spectral_bound([1.0], k=1, p=1), RankError, "p: .* at least 2, got 1"),
        (lambda: metrics.hmt_spectral_bound([1.0], k=1.5, p=2), RankError, "k: .* integer, got 1.5"),
        (lambda: metrics.hmt_spectral_bound([1.0], k=1, p=2, n_iter=-1), RankError, "n_iter: .* at least 0, got -1"),
        (lambda: metrics.hmt_tail_bound([1.0], k=1, p=3, t=1, u=1), RankError, "p: .* at least 4, got 3"),
        (lambda: metrics.hmt_tail_bound([1.0], k=1, p=4, t=0.5, u=1), OptionError, "t: .* at least 1, got 0.5"),
        (lambda: metrics.hmt_tail_bound([1.0], k=1, p=4, t=1, u=True), OptionError, "u: .* at least 1, got True"),
        (lambda: metrics.hmt_frobenius_bound([-1.0], k=1, p=2), OptionError, "singular_values: .* 0, got -1.0"),
        (lambda: metrics.hmt_frobenius_bound([math.nan], k=1, p=2), OptionError, "singular_values: .* finite .* nan"),
        (lambda: metrics.posterior_factor(1.0), OptionError, "alpha: .* above 1, got 1.0"),
        (lambda: metrics.posterior_factor("x"), OptionError, "alpha: .* number above 1, got 'x'"),
        (lambda: metrics.numerical_rank(EYE, rtol=-0.1), OptionError, "rtol: .* at least 0, got -0.1"),
        (lambda: metrics.range_error(EYE, EYE, ord=1), OptionError, "ord: expected 'fro' or 2, got 1"),
        (lambda: metrics.polar_backward_error(EYE, EYE, EYE, side="up"), OptionError, "side: .*'left', got 'up'"),
        (lambda: metrics.nuclear_norm([[1.0]]), ArrayTypeError, "A: expected an array .*, got builtins.list"),
        (lambda: metrics.nuclear_norm(np.eye(2, dtype=int)), DTypeError, "A: expected float32.*, got int64"),
        (lambda: metrics.nuclear_norm(np.ones(3)), ShapeError, r"A: expected shape \(..., m, n\), got \(3,\)"),
        (lambda: metrics.psd_defect(np.ones((2, 3))), ShapeError, r"H: .* \(..., n, n\) with n = 2, got \(2, 3\)"),
        (lambda: metrics.captured_energy(EYE, torch.eye(2)), ArrayTypeError, "Q: .* of the library of A .* torch"),
        (lambda: metrics.captured_energy(EYE, np.eye(3)), ShapeError, r"Q: .* \(..., m, k\) with m = 2, got \(3, 3\)"),
        (lambda: metrics.qr_residual(EYE, EYE, np.ones((1, 2))), ShapeError, r"R: .* with k = 2, got \(1, 2\)"),
        (lambda: metrics.orthogonality(EYE * np.nan), NonFiniteError, "U: holds NaN or infinity"),
        (lambda: metrics.captured_energy(EYE, np.full((2, 2), np.inf)), NonFiniteError, "Q: holds NaN or infinity"),
        (lambda: metrics.range_error(CUBE[:2], CUBE), ShapeError, r"A \(2, 3, 3\), Q \(3, 3, 3\): .* broadcast"),
    ],
)
def test_errors_name_the_argument_the_value_and_what_is_accepted(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()
