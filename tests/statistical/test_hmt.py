"""The range finder against the published error bounds, over many draws.

Halko, Martinsson and Tropp (2011) bound the mean of the error, and the error itself but for a stated
probability; `orthlin.metrics` has the formulas.  ``ORTHLIN_FULL=1`` draws 2,000 (means) and 10,000
(tails) times a spectrum and library, CI 200 times.  Seeds are fixed, so a verdict does not flicker.
"""

import itertools
import math
import os

import numpy as np
import pytest
import torch
from conftest import BACKENDS

from orthlin import adaptive_range_finder, metrics, randomized_range_finder

FULL = os.environ.get("ORTHLIN_FULL") == "1"
DRAWS, TAIL_DRAWS = (2000, 10_000) if FULL else (200, 200)
M, N, K = 60, 50, 50
J = np.arange(K)
SPECTRA = {
    "step": np.where(J < 10, 1.0, 0.1),
    "exponential": 0.7**J,
    "polynomial": 1.0 / (1 + J),
    "spiked": np.where(J < 3, 100.0, 1.0),
    "coherent": np.where(J < 10, 1.0, 0.1),  # the step again, with unit vectors for singular vectors
}


GENERATORS = {"numpy": np.random.default_rng, "torch:cpu": lambda seed: torch.Generator().manual_seed(seed)}


@pytest.fixture(params=GENERATORS)
def host(request):
    return BACKENDS[request.param]


@pytest.fixture(params=SPECTRA)
def matrix(request):
    sigma, rng = SPECTRA[request.param], np.random.default_rng(0)
    if request.param == "coherent":
        return np.eye(M, K) * sigma, sigma
    U, V = (np.linalg.qr(rng.standard_normal((size, K))).Q for size in (M, N))
    return (U * sigma) @ V.T, sigma


def errors(host, A, k, p, draws, ord="fro", **options):
    """Errors of that many bases, with one generator of the library that goes on from draw to draw."""
    rng = GENERATORS[host.name](1)
    for _ in range(draws):
        Q = host.call(randomized_range_finder, A, k, n_oversamples=p, rng=rng, **options)
        yield np.linalg.norm(A - Q @ (Q.T @ A), ord)


def mean_over_bound(sample, bound):
    """Ratio of the mean to the bound, and the standard error of that ratio."""
    sample = np.fromiter(sample, dtype=float) / bound
    return sample.mean(), sample.std(ddof=1) / math.sqrt(sample.size)


@pytest.mark.parametrize(("k", "p"), [(10, 5), (5, 2)])
def test_the_mean_frobenius_error_keeps_its_bound(host, matrix, k, p):
    """Three standard errors: a mean at the bound would fail once in 700, and the sharpest is at 0.95 of it."""
    A, sigma = matrix
    ratio, error = mean_over_bound(errors(host, A, k, p, DRAWS), metrics.hmt_frobenius_bound(sigma, k, p))
    assert ratio <= 1 + 3 * error


def test_the_frobenius_bound_is_sharp_on_a_long_step(host):
    """So that a sketch a little worse than a Gaussian one of its width could not pass."""
    sigma = np.where(np.arange(300) < 10, 1.0, 1e-3)
    bound = metrics.hmt_frobenius_bound(sigma, 10, 5)
    right, wrong = (mean_over_bound(errors(host, np.diag(sigma), 10, p, 100), bound) for p in (5, 3))
    assert 0.9 <= right[0] <= 1 + 3 * right[1]
    assert wrong[0] > 1


@pytest.mark.parametrize("n_iter", [0, 1, 2])
def test_the_mean_spectral_error_keeps_its_bound(host, matrix, n_iter):
    A, sigma = matrix
    bound = metrics.hmt_spectral_bound(sigma, 10, 5, n_iter=n_iter)
    ratio, error = mean_over_bound(errors(host, A, 10, 5, DRAWS, ord=2, n_iter=n_iter), bound)
    assert ratio <= 1 + 3 * error


def test_power_iterations_bring_the_error_to_the_best_possible(host, matrix):
    """HMT, corollary 10.10: the factor over sigma_(k+1) goes to one like a root of order 2q + 1."""
    A, sigma = matrix
    means = [np.mean(list(errors(host, A, 10, 5, 20, ord=2, n_iter=q))) for q in (0, 1, 2, 6)]
    slack = 1 + 1e-6  # where the tail is flat nothing can be gained
    assert all(later <= slack * earlier for earlier, later in itertools.pairwise(means))
    assert means[-1] <= metrics.hmt_spectral_bound(sigma, 10, 5, n_iter=6) <= 1.3 * sigma[10]


def test_no_draw_exceeds_the_tail_bound(host, matrix):
    """With p = 15 a draw fails with probability 9.2e-7: 0 violations are expected with 99 % even of 10,000."""
    A, sigma = matrix
    tail = metrics.hmt_tail_bound(sigma, 10, 15, t=math.e, u=math.sqrt(30))
    assert tail.failure_probability * TAIL_DRAWS <= 0.01
    assert max(errors(host, A, 10, 15, TAIL_DRAWS)) <= tail.bound


def test_columns_exceed_the_bounds_on_a_coherent_matrix(host):
    """Ten columns out of fifty hold the energy, and fifteen taken at random miss seven of them on average."""
    sigma = np.where(J < 10, 1.0, 1e-3)
    bound = metrics.hmt_frobenius_bound(sigma, 10, 5)
    ratio, error = mean_over_bound(errors(host, np.eye(M, K) * sigma, 10, 5, 50, sketch="columns"), bound)
    assert ratio > 100 + 3 * error


def test_sparse_signs_are_about_as_good_as_gaussian(host, matrix):
    """Not proven for eight nonzeros, yet they keep to the bound for Gaussian columns."""
    A, sigma = matrix
    bound = metrics.hmt_frobenius_bound(sigma, 10, 5)
    assert mean_over_bound(errors(host, A, 10, 5, 100, sketch="sparse_sign"), bound)[0] <= 1


def test_one_probe_of_the_posterior_estimator_fails_as_often_as_promised(host):
    """A rank-one remainder is the worst case: |w| < 1/posterior_factor has probability 0.0997, promised is 0.1.

    Four by four, blocks of one, failure probability 1/2: five tests of one probe each; the first one ends the
    search, wrongly, with an empty basis.  3.5 standard errors of 4,000 draws to either side.
    """
    A, rng = np.outer(*np.eye(4)[:2]), GENERATORS[host.name](2)
    options = {"tol": 1 - 1e-9, "block_size": 1, "failure_probability": 0.5, "rng": rng}
    wrong = np.mean([host.call(adaptive_range_finder, A, **options).shape[1] == 0 for _ in range(4000)])
    expected = math.erf(1 / metrics.posterior_factor() / math.sqrt(2))
    assert 0.099 < expected < 0.1
    assert abs(wrong - expected) <= 3.5 * math.sqrt(0.1 * 0.9 / 4000)


def test_the_adaptive_basis_misses_tol_less_often_than_its_failure_probability(host):
    """At failure probability 0.3 three probes a test: three standard errors above the promise."""
    sigma, rng, draws = SPECTRA["step"], GENERATORS[host.name](3), 100
    options = {"tol": 0.05, "block_size": 1, "failure_probability": 0.3, "rng": rng}
    A = np.eye(M, K) * sigma
    bases = (host.call(adaptive_range_finder, A, **options) for _ in range(draws))
    missed = sum(np.linalg.norm(A - Q @ (Q.T @ A), 2) > options["tol"] for Q in bases)
    assert missed <= 0.3 * draws + 3 * math.sqrt(0.3 * draws)
