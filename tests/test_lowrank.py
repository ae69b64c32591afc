"""Low-rank orthogonalization: accuracy on the gallery, the facts of the paper, and the contract."""

import functools

import numpy as np
import pytest
from conftest import BACKENDS
from gallery import DTYPES, FAMILIES, SHAPES, case, cases, judge_partial_isometry
from test_rangefinder import RANK, SHAPE, defect, gaussian, with_spectrum

from orthlin import lowrank_orth, lowrank_orth_factors, metrics


@pytest.fixture(params=["numpy", "torch:cpu"])
def host(request):
    return BACKENDS[request.param]


def sign(A):
    """The matrix sign by SVD in double precision, on what is above rounding."""
    U, s, Vh = np.linalg.svd(A.astype(np.result_type(A, np.float64)), full_matrices=False)
    return (U * (s > max(A.shape) * np.finfo(A.dtype).eps * s[0])) @ Vh


def captured(G, O):
    return float(np.vdot(O, G).real)


def failures(backend, cases_, ranks):
    for c in cases_:
        k = min(c.A.shape)
        for r in sorted({rank for rank in ranks(k) if rank > 0}):
            omega = gaussian(c.A.shape[1], r, dtype=c.A.dtype, seed=5)
            figures = judge_partial_isometry(backend.call(lowrank_orth, c.A, r, test_matrix=omega), c.A, omega)
            if not (figures["ok"] and figures["forward"] <= 32):
                yield c.id, r, figures


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_gallery_matrix_fails_at_any_rank(host, dtype):
    """`ok`: as many ones as the numerical rank of the block; `forward`: 32 eps times the condition number."""
    assert not list(failures(host, cases(dtypes=[dtype]), lambda k: (1, k // 8, k // 2, k)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_gallery_matrix_fails_on_a_device(dtype):
    """Where values cannot be looked at the small polar factor comes from a polynomial, not from an SVD."""
    assert not list(
        failures(BACKENDS["strict:device1"], cases(shapes=SHAPES[:-1], dtypes=[dtype]), lambda k: (k // 2, k))
    )


def test_no_gallery_matrix_fails_under_jax():
    matrices = (case(family, SHAPE, "float32") for family in FAMILIES)
    assert not list(failures(BACKENDS["jax"], matrices, lambda _: (RANK,)))


@functools.cache
def example(dtype="float64"):
    """A matrix whose blocks have condition numbers below 10, its test matrix and basis in double precision."""
    G, omega = with_spectrum(np.linspace(1, 0.5, 24), *SHAPE, dtype), gaussian(SHAPE[1], RANK, dtype=dtype)
    return G, omega, np.linalg.qr(G @ omega).Q


def test_it_is_the_sign_of_the_projected_matrix(xp):
    """Both ways to write it; 1e3 eps cover the condition of the basis, measured 5."""
    G, omega, Q = example()
    O = xp.call(lowrank_orth, G, RANK, test_matrix=omega)
    for expected in (Q @ sign(Q.T @ G), sign(Q @ (Q.T @ G))):
        assert np.linalg.norm(O - expected) <= 1e3 * np.finfo(float).eps


@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_r_singular_values_are_one_and_the_rest_zero(xp, dtype):
    G, omega, _ = example(dtype)
    sigma = np.linalg.svd(xp.call(lowrank_orth, G, RANK, test_matrix=omega).astype(complex), compute_uv=False)
    assert np.abs(sigma - (np.arange(24) < RANK)).max() <= 32 * np.finfo(dtype).eps


@pytest.mark.parametrize("options", [{}, {"n_iter": 1}])
def test_the_factors_are_orthonormal_and_multiply_to_it(xp, options):
    """Left and right: the same test matrix, hence the same result up to the rounding of one product."""
    G, omega, _ = example("float32")
    Q, W = xp.call(lowrank_orth_factors, G, RANK, test_matrix=omega, **options)
    O = xp.call(lowrank_orth, G, RANK, test_matrix=omega, **options)
    assert (Q.shape, W.shape) == ((SHAPE[0], RANK), (RANK, SHAPE[1]))
    assert max(defect(Q), defect(W.conj().T)) <= 32
    assert np.linalg.norm(Q @ W - O) <= 32 * np.finfo(np.float32).eps


@pytest.mark.parametrize("options", [{}, {"n_oversamples": 4}, {"method": "exact"}])
@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_the_inner_product_is_the_nuclear_norm_of_the_projection(host, shape, options):
    G = gaussian(*shape)
    Q, W = host.call(lowrank_orth_factors, G, 6, rng=0, **options)
    nuclear = np.linalg.svd(Q.T @ G, compute_uv=False).sum()
    assert captured(G, Q @ W) == pytest.approx(nuclear, rel=1e-12)
    assert float(metrics.captured_nuclear_norm(G, Q @ W)) == pytest.approx(nuclear, rel=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("kind", ["gaussian", "sparse_sign", "columns"])
def test_a_matrix_of_at_most_that_rank_gives_its_own_sign(host, rank, kind):
    """A square random block of order 7 has a condition number below 1e3 with these seeds; measured 200 eps."""
    G = with_spectrum(np.linspace(1, 0.5, rank), 30, 50)
    O = host.call(lowrank_orth, G, 7, sketch=kind, rng=0)
    assert np.linalg.norm(O - sign(G)) <= 1e4 * np.finfo(float).eps


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("method", ["auto", "exact"])
def test_directions_that_carry_only_rounding_noise_are_zero(host, dtype, method):
    G = with_spectrum(np.geomspace(1, 0.1, 3), 60, 50).astype(dtype)
    sigma = np.linalg.svd(host.call(lowrank_orth, G, 8, rng=0, method=method).astype(float), compute_uv=False)
    assert np.abs(sigma - (np.arange(50) < 3)).max() <= 32 * np.finfo(dtype).eps


J = np.arange(60)
SPECTRA = {"polynomial": 1 / (1 + J), "exponential": 0.9**J, "slow": (1 + J) ** -0.5}


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_one_power_iteration_recovers_most_of_what_a_sketch_misses(host, spectrum):
    """Most: more than half, in the mean of 10 draws; measured 0.84, 0.80 and 0.75."""
    G, best = with_spectrum(SPECTRA[spectrum], 60, 90), SPECTRA[spectrum][:10].sum()
    plain, once, twice = (
        np.mean([captured(G, host.call(lowrank_orth, G, 10, n_iter=q, rng=seed)) for seed in range(10)])
        for q in (0, 1, 2)
    )
    assert plain < once < twice <= best
    assert once - plain > 0.5 * (best - plain)


def test_columns_capture_far_less_of_a_coherent_matrix(host):
    """Five unit vectors hold all but a thousandth: a Gaussian sketch sees them all, ten columns of 60 one."""
    G = np.diag(np.where(J % 12 == 0, 1.0, 1e-4))
    kinds = ("columns", "gaussian")
    few, most = (
        np.mean([captured(G, host.call(lowrank_orth, G, 10, sketch=kind, rng=seed)) for seed in range(30)])
        for kind in kinds
    )
    assert few < 2
    assert most > 4.9


@pytest.mark.parametrize("shape", [(15, 11), (11, 15)])
def test_any_column_can_be_selected(host, shape):
    """300 draws of 2 out of 11 or 15: one is missed by all with a probability below 15 exp(-40)."""
    G, seen = gaussian(*shape), set()
    for seed in range(300):
        Q, _ = host.call(lowrank_orth_factors, G, 2, sketch="columns", rng=seed)
        outside = np.linalg.norm(G - Q @ (Q.T @ G), axis=0)
        inside = np.flatnonzero(outside <= 1e-12)
        assert inside.size == 2
        seen.update(inside.tolist())
    assert seen == set(range(shape[1]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (40, 40)])
def test_oversampling_is_cut_back_to_the_rank(host, dtype, shape):
    """It is the truncated SVD of the wider block."""
    G, omega = with_spectrum(0.8 ** np.arange(40), *shape, dtype=dtype), gaussian(shape[1], 16, dtype=dtype)
    figures = judge_partial_isometry(host.call(lowrank_orth, G, 6, test_matrix=omega), G, omega, r=6)
    assert figures["ok"]
    assert figures["n_ones"] == 6
    assert figures["forward"] <= 32


def test_oversampling_captures_more(host):
    G = with_spectrum(SPECTRA["slow"], 60, 90)
    plain, wider = (
        np.mean([captured(G, host.call(lowrank_orth, G, 10, n_oversamples=p, rng=seed)) for seed in range(10)])
        for p in (0, 10)
    )
    assert wider > 1.05 * plain


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_a_warm_start_is_a_power_iteration(host, dtype):
    """Both bases span G G^H G Omega; its condition number, below 1e5 here, multiplies rounding."""
    G, omega = with_spectrum(0.9 ** np.arange(40), 60, 90, dtype), gaussian(90, 8, dtype=dtype)
    W = host.call(lowrank_orth_factors, G, 8, test_matrix=omega).W
    warm = host.call(lowrank_orth, G, 8, test_matrix=W.conj().T)
    power = host.call(lowrank_orth, G, 8, test_matrix=omega, n_iter=1)
    assert np.linalg.norm(warm - power) <= 1e5 * np.finfo(dtype).eps
    assert captured(G, warm) == pytest.approx(captured(G, power), rel=1e-10)
