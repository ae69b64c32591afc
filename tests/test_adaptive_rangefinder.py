"""The adaptive range finder: its bound, its width, and where it ends."""

import math

import numpy as np
import pytest
from conftest import BACKENDS
from test_rangefinder import defect, gaussian, remainder, with_spectrum

from orthlin import adaptive_range_finder, metrics
from orthlin.errors import NonFiniteError, OptionError, RankError, ShapeError

K = 40
SPECTRA = {
    "flat": np.ones(K),
    "step": np.where(np.arange(K) < 10, 1.0, 1e-6),
    "geometric": np.geomspace(1, 1e-12, K),
    "polynomial": 1.0 / (1 + np.arange(K)) ** 2,
    "one_large": np.where(np.arange(K) < 1, 1.0, 1e-3),
}


@pytest.fixture(params=["numpy", "torch:cpu"])
def host(request):
    return BACKENDS[request.param]


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("tol", [0.5, 1e-2, 1e-5, 1e-9])
def test_the_remainder_is_below_tol(host, spectrum, tol):
    """The documented failure probability is 1e-10 a call; eps times a small factor is rounding of the ruler."""
    A = with_spectrum(SPECTRA[spectrum], 60, 50)
    for seed in range(20):
        Q = host.call(adaptive_range_finder, A, tol=tol, block_size=4, rng=seed)
        assert remainder(A, Q) <= tol + 64 * np.finfo(float).eps
        assert defect(Q) <= 32


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("tol", [0.5, 1e-2, 1e-5])
def test_the_basis_is_not_much_wider_than_the_estimator_asks_for(host, spectrum, tol):
    """A block of ten probes is below 6 times the Frobenius norm of the remainder but for a chance of 1e-12.

    So the search ends two blocks after the last width whose remainder is above the bound over six.
    """
    sigma = SPECTRA[spectrum]
    A = with_spectrum(sigma, 60, 50)
    # half of the directions still to come are a generous loss of a random basis against the best one
    tails = np.array([math.hypot(*sigma[w // 2 :]) for w in range(K + 1)])
    needed = int(np.argmax(np.r_[tails, 0.0] <= tol / (6 * metrics.posterior_factor())))
    for seed in range(20):
        assert host.call(adaptive_range_finder, A, tol=tol, block_size=4, rng=seed).shape[1] <= needed + 8


@pytest.mark.parametrize("block_size", [1, 5, 16, 100])
def test_an_exact_rank_is_found(host, block_size):
    A = with_spectrum(np.geomspace(1, 0.1, 5), 60, 50)
    Q = host.call(adaptive_range_finder, A, tol=1e-8, block_size=block_size, rng=0)
    assert Q.shape == (60, min(math.ceil(5 / block_size) * block_size, 50))


HARD = {
    "rank_5": with_spectrum(np.geomspace(1, 0.1, 5), 60, 50),
    "graded": with_spectrum(np.geomspace(1, 1e-30, 40), 60, 50),
    "wide": with_spectrum(np.geomspace(1, 0.1, 5), 30, 50),
    "sparse": np.diag(np.r_[np.ones(3), np.full(2, 1e-9), np.zeros(25)]),
    "one_row": np.eye(60, 1) @ np.ones((1, 50)),
    "full": gaussian(60, 50),
}


@pytest.mark.parametrize("dtype", ["float32", "complex128"])
@pytest.mark.parametrize("family", HARD)
@pytest.mark.parametrize("block_size", [1, 16, 100])
def test_a_tol_below_rounding_ends_with_orthonormal_columns(host, family, block_size, dtype):
    """What is left of a rank-deficient matrix is noise, which may lie in the range found already.

    As many random vectors as dimensions have a condition number around 1e3, by which rounding grows.
    """
    A = HARD[family].astype(dtype)
    for tol in (1e-12, 1e-300):
        Q = host.call(adaptive_range_finder, A, tol=tol, block_size=block_size, rng=0)
        assert defect(Q) <= 32
        assert remainder(A, Q) <= max(tol, 1e3 * np.finfo(dtype).eps * np.linalg.norm(A, 2))


@pytest.mark.parametrize("max_rank", [0, 1, 7, 40])
def test_max_rank_is_kept_to(host, max_rank):
    Q = host.call(adaptive_range_finder, gaussian(60, 40), tol=1e-12, block_size=4, max_rank=max_rank, rng=0)
    assert Q.shape == (60, max_rank)
    assert defect(Q) <= 32


@pytest.mark.parametrize("A", [np.zeros((6, 5)), np.zeros((6, 0)), np.zeros((0, 5)), np.zeros((0, 0))])
def test_nothing_to_find_is_an_empty_basis(host, A):
    assert host.call(adaptive_range_finder, A, tol=1e-300, rng=0).shape == (A.shape[0], 0)


@pytest.mark.parametrize("exponent", [-900, -100, 100, 1000])
def test_the_tolerance_is_in_the_units_of_the_matrix(host, exponent):
    A = with_spectrum(SPECTRA["geometric"], 60, 50)
    plain = host.call(adaptive_range_finder, A, tol=2.0**-20, rng=0)
    assert np.array_equal(plain, host.call(adaptive_range_finder, A * 2.0**exponent, tol=2.0 ** (exponent - 20), rng=0))


@pytest.mark.parametrize(("size", "tol", "width"), [(1e-300, 1e300, 0), (1e300, 1e-300, 5)])
def test_any_tolerance_meets_any_scale(host, size, tol, width):
    assert host.call(adaptive_range_finder, gaussian(6, 5) * size, tol=tol, rng=0).shape == (6, width)


@pytest.mark.parametrize("name", ["strict", "strict:strictest", "strict:device1", "jax"])
def test_other_libraries_keep_the_bound_too(name):
    A = with_spectrum(SPECTRA["geometric"], 60, 50)
    Q = BACKENDS[name].call(adaptive_range_finder, A, tol=1e-2, block_size=20, rng=np.random.default_rng(0))
    assert 20 <= Q.shape[1] < 50
    assert remainder(A, Q) <= 1e-2
    assert defect(Q) <= 32


@pytest.mark.parametrize("name", ["numpy", "torch:cpu", "jax"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_an_error_on_devices_too(name, value):
    A = gaussian(60, 50)
    A[3, 4] = value
    with pytest.raises(NonFiniteError, match="A: holds NaN or infinity"):
        BACKENDS[name].call(adaptive_range_finder, A, tol=1e-3, rng=0)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"tol": 0.0}, OptionError, r"tol: .*0\.0"),
        ({"tol": -1}, OptionError, "tol: .*-1"),
        ({"tol": math.nan}, OptionError, "tol: .*nan"),
        ({"tol": None}, OptionError, "tol: .*None"),
        ({"tol": 1, "block_size": 0}, RankError, "block_size: .*0"),
        ({"tol": 1, "max_rank": 6}, RankError, "max_rank: .*6.*5"),
        ({"tol": 1, "failure_probability": 1.0}, OptionError, r"failure_probability: .*1\.0"),
        ({"tol": 1, "failure_probability": 0}, OptionError, "failure_probability: .*0"),
    ],
)
def test_a_bad_option_is_an_error_that_names_it(options, error, named):
    with pytest.raises(error, match=named):
        adaptive_range_finder(gaussian(6, 5), **options)


def test_a_stack_is_an_error():
    with pytest.raises(ShapeError, match=r"A: .*\(2, 6, 5\)"):
        adaptive_range_finder(gaussian(2, 6, 5), tol=1)
