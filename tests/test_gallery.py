import itertools
import math

import numpy as np
import pytest
import scipy.linalg
from gallery import (
    DTYPES,
    FAMILIES,
    SHAPES,
    case,
    cases,
    judge_partial_isometry,
    judge_polar,
    judge_qr,
    ldexp,
    scaled,
    within,
)
from hypothesis import given, settings
from strategies import LAYOUTS, matrices, matrix

KEYS = [pytest.param(*key, id="-".join(key)) for key in itertools.product(FAMILIES, DTYPES)]
PARTIAL = "gaussian", "geometric_sqrt", "half_rank", "all_ones", "near_underflow", "zero"


def test_there_are_736_cases():
    assert len(FAMILIES) == 23
    assert len({(c.family, c.A.shape, c.A.dtype) for c in cases()}) == 23 * 8 * 4


@pytest.mark.parametrize(("family", "dtype"), KEYS)
def test_declarations_hold(family, dtype):
    for c in cases([family], SHAPES, [dtype]):
        assert c.A.dtype == dtype
        assert c.A.flags.c_contiguous
        assert np.isfinite(c.A).all()
        A, exponent = scaled(c.A)
        sigma, eps = np.linalg.svd(A, compute_uv=False), np.finfo(dtype).eps
        error = 16 * eps * sigma[0]
        if c.rank is not None:
            assert (sigma > max(A.shape) * eps * sigma[0]).sum() == c.rank
        if c.norm is not None:
            assert abs(math.ldexp(c.norm, -exponent) - sigma[0]) <= error
        if c.singular_values is not None:
            prescribed = np.sort(np.ldexp(c.singular_values, -exponent))[::-1]
            np.testing.assert_allclose(sigma, prescribed, rtol=0, atol=error)
            positive = prescribed[prescribed > 0]
            assert c.full_rank == (positive.size == min(A.shape))
            assert c.cond == pytest.approx(positive[0] / positive[-1] if positive.size else 1.0)
        elif c.cond is not None:
            assert c.cond == math.inf
            assert sigma[-1] <= error
        elif not c.full_rank:
            assert sigma[-1] <= error
            assert c.rank < min(A.shape)


def test_a_case_is_the_same_on_every_call_and_new_for_every_seed():
    for family in ("gaussian", "isometry", "one_tiny_element"):
        first, again, other = (case(family, (32, 32), "complex64", seed) for seed in (0, 0, 1))
        assert np.array_equal(first.A, again.A)
        assert not np.array_equal(first.A, other.A)


def test_extreme_families_are_extreme():
    info = np.finfo("float32")
    assert np.abs(case("all_subnormal", (96, 32), "float32").A).max() < info.tiny
    assert case("near_overflow", (96, 32), "float32").norm == float(2.0**126)
    assert case("near_underflow", (96, 32), "float32").norm == info.tiny / info.eps / 4


def test_complex_cases_are_not_real_in_disguise():
    for c in cases(dtypes=["complex64"], shapes=[(32, 32)]):
        assert c.family in ("all_ones", "zero", "one_tiny_element") or c.A.imag.any()


def test_scaling_is_exact_from_subnormals_to_overflow():
    A = np.array([[5e-324, -1.5e-320]])
    unit, exponent = scaled(A)
    assert np.array_equal(unit, [[2.0**-12, -3036 / 4096]])
    assert np.array_equal(ldexp(unit, exponent), A)
    huge = np.array([[1.7e308 + 1.7e308j]])
    assert np.array_equal(ldexp(*scaled(huge)), huge)
    assert scaled(np.zeros((0, 3)))[1] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_judge_passes_scipy_on_every_case(dtype):
    for number, c in enumerate(cases(dtypes=[dtype])):
        side = ("right", "left")[number % 2]
        figures = judge_polar(c.A, *scipy.linalg.polar(c.A, side=side), side)
        assert within(figures), (c.id, side, figures)
        if c.promised:
            assert figures["rank"] == min(c.A.shape), c.id


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (32, 96)])
def test_the_judge_fails_wrong_polar_factors(shape, dtype):
    A = case("geometric_1e2", shape, dtype).A
    U, H = scipy.linalg.polar(A)
    left, sigma, Vh = scipy.linalg.svd(A, full_matrices=False)
    flipped = U - 2 * np.outer(left[:, -1], Vh[-1])
    H_flipped = H - 2 * sigma[-1] * np.outer(Vh[-1].conj(), Vh[-1])
    assert exceeded(judge_polar(A, flipped, H_flipped)) == {"psd"}
    assert "backward" in exceeded(judge_polar(A, flipped, H))
    assert "orthogonality" in exceeded(judge_polar(A, U * (1 + 1e-3), H))
    assert exceeded(judge_polar(A, U, H + 1e-3 * np.tril(H, -1))) >= {"backward", "hermitian"}
    assert not within(judge_polar(A, U, H * np.nan))
    assert not within({"psd": math.nan})


def test_the_judge_lets_null_directions_end_in_the_unit_interval_and_nowhere_else():
    A = case("half_rank", (32, 32), "float64").A
    left, _, Vh = np.linalg.svd(A)
    H = scipy.linalg.polar(A)[1]
    for null, passes in ((0.0, True), (0.5, True), (1.0, True), (1.01, False)):
        U = (left * np.repeat([1.0, null], 16)) @ Vh
        assert within(judge_polar(A, U, H)) is passes
    lost = (left * np.repeat([1.0, 0.0, 1.0], (15, 1, 16))) @ Vh
    assert "orthogonality" in exceeded(judge_polar(A, lost, H))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_qr_judge_passes_numpy_and_fails_a_repeated_column(dtype):
    worst = 0.0
    for c in cases(dtypes=[dtype]):
        figures = judge_qr(c.A, *np.linalg.qr(c.A))
        assert figures["triangular"] == 0, c.id
        worst = max(worst, figures["orthogonality"], figures["backward"])
    assert worst <= 64
    A = case("gaussian", (96, 32), dtype).A
    Q, R = np.linalg.qr(A)
    repeated = Q.copy()
    repeated[:, 1] = Q[:, 0]
    assert judge_qr(A, repeated, R)["orthogonality"] > 64
    assert judge_qr(A, Q, R + 1e-3)["backward"] > 64
    assert judge_qr(A, Q, np.ones_like(R))["triangular"] > 64
    assert judge_qr(A, Q, R * np.nan)["orthogonality"] == math.inf


def svd_route(G, Omega, sizes=lambda kept: kept):
    """Low-rank orthogonalization in the dtype of `G`, with `sizes` applied to its singular values."""
    unit = scaled(G)[0].astype(G.dtype)
    Q = np.linalg.qr(unit @ Omega).Q.astype(G.dtype)
    left, sigma, Vh = np.linalg.svd(Q.conj().T @ unit, full_matrices=False)
    kept = (sigma > max(G.shape) * np.finfo(G.dtype).eps * sigma[0]).astype(float)
    return ((Q @ (left * sizes(kept))) @ Vh).astype(G.dtype)


def partial_cases(dtype):
    for c in cases(PARTIAL, dtypes=[dtype]):
        columns = max(1, min(c.A.shape) // 4)
        yield c, np.random.default_rng(3).standard_normal((c.A.shape[1], columns)).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_low_rank_judge_passes_the_svd_route(dtype):
    for c, Omega in partial_cases(dtype):
        verdict = judge_partial_isometry(svd_route(c.A, Omega), c.A, Omega)
        assert verdict["ok"], (c.id, verdict)
        assert verdict["lo"] <= min(c.rank, Omega.shape[1]) if c.rank is not None else True
        assert verdict["forward"] <= 32, (c.id, verdict)
        assert verdict["captured"] == pytest.approx(1.0 if verdict["n_ones"] else 0.0, abs=1e-5)


def test_the_low_rank_judge_fails_wrong_factors():
    c, Omega = case("half_rank", (96, 32), "float32"), np.eye(32, 20, dtype="float32")
    ok = judge_partial_isometry(svd_route(c.A, Omega), c.A, Omega)
    assert (ok["ok"], ok["lo"], ok["n_ones"], ok["hi"]) == (True, 16, 16, 16)
    lifted = judge_partial_isometry(svd_route(c.A, Omega, np.ones_like), c.A, Omega)
    assert (lifted["ok"], lifted["n_ones"]) == (False, 20)
    halfway = judge_partial_isometry(svd_route(c.A, Omega, lambda s: np.maximum(s, 0.5)), c.A, Omega)
    assert (halfway["ok"], halfway["others_max"]) == (False, pytest.approx(0.5))
    flipped = svd_route(c.A, Omega, lambda s: np.where(np.arange(s.size) == 3, -s, s))
    verdict = judge_partial_isometry(flipped, c.A, Omega)
    assert verdict["ok"]
    assert verdict["forward"] > 1e3
    assert verdict["captured"] < 0.95
    assert not judge_partial_isometry(flipped * np.nan, c.A, Omega)["ok"]


def test_the_low_rank_judge_follows_power_iterations_and_truncation():
    c, rng = case("arithmetic", (96, 32), "float64"), np.random.default_rng(4)
    Omega = rng.standard_normal((32, 8))
    Y = c.A @ (c.A.conj().T @ np.linalg.qr(c.A @ Omega).Q)
    left, _, Vh = np.linalg.svd(np.linalg.qr(Y).Q.T @ c.A, full_matrices=False)
    O = np.linalg.qr(Y).Q @ left[:, :6] @ Vh[:6]
    assert judge_partial_isometry(O, c.A, Omega, r=6, n_iter=1)["forward"] <= 32
    assert judge_partial_isometry(O, c.A, Omega, r=6)["forward"] > 1e6
    assert not judge_partial_isometry(O, c.A, Omega, n_iter=1)["ok"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 5, 4), (0, 4), (2, 4, 0)])
def test_layouts_change_memory_and_not_the_matrix(shape, layout):
    A = matrix(shape, "complex64", 0)
    B = matrix(shape, "complex64", 0, layout=layout)
    assert (B.shape, B.dtype) == (A.shape, A.dtype)
    assert np.array_equal(A[:1] if layout == "broadcast" else A, B[:1] if layout == "broadcast" else B)
    if A.size:
        kept = layout in ("contiguous", "read_only")
        assert B.flags.c_contiguous == kept
        assert B.flags.writeable == (layout not in ("broadcast", "read_only"))


@given(matrices())
@settings(max_examples=200, deadline=None)
def test_drawn_matrices_are_finite_and_shaped(A):
    assert np.isfinite(A).all()
    assert A.ndim <= 4
    assert max(A.shape[-2:]) <= 40


def test_a_drawn_matrix_has_its_rank_and_scale():
    A = matrix((2, 9, 6), "complex128", 1, rank=3, exponent=-200)
    assert (np.linalg.matrix_rank(ldexp(A, 660)) == 3).all()
    assert max(abs(A.real).max(), abs(A.imag).max()) == pytest.approx(1e-200)
    assert not matrix((4, 4), "float32", 1, rank=0).any()


def exceeded(figures):
    return {name for name in figures if not within({name: figures[name]})}
