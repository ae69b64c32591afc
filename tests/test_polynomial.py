"""A schedule on a matrix does what it does to numbers, in every precision and in both forms."""

import numpy as np
import pytest
import torch
from conftest import BACKENDS

import orthlin
from orthlin import schedules
from orthlin._polynomial import GRAM_NOISE, _restarts, gram_noise
from orthlin.errors import ScheduleError

SHIPPED = (
    schedules.newton_schulz(15),
    schedules.newton_schulz(10, 5),
    schedules.muon(),
    schedules.muon(8),
    schedules.speedrun(),
    schedules.polar_express(),
    schedules.polar_express(n_iter=8),
    schedules.polar_express(safety=0.0),
    schedules.polar_express(1e-4, 6, safety=0.02, cushion=0.02),
    schedules.polar_express(1e-3, 4, degree=7),
    schedules.polar_express(1e-2, 3, degree=7, safety=0.02),
    schedules.cans(1e-3, 9),
    schedules.cans(1e-3, 9, safety=1e-3),
    schedules.cans(1e-2, 9, safety=1e-2),
    schedules.for_tolerance(1e-3, 1e-3),
    schedules.for_tolerance(1e-3, 1e-2, safety=0.01),
    schedules.for_tolerance(1e-2, 1e-2, safety=0.01),
    schedules.stable(1e-3, 1e-6),
    schedules.polar_express().then(schedules.newton_schulz(2, 5, lower=0.8, upper=1.2)),
)
GRAM = "gram_newton_schulz"
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SPECTRA = (
    np.ones,
    lambda r: np.geomspace(1, 1e-2, r),
    lambda r: np.linspace(1, 1e-3, r),
    lambda r: np.r_[1, np.full(r - 1, 1e-2)],
    lambda r: np.r_[np.ones(max(r - 1, 1)), [1e-3] * (r > 1)],
    lambda r: np.geomspace(1, 1e-6, r),
)


def known_svd(rng, m, n, sigma):
    U, V = (np.linalg.qr(rng.standard_normal((rows, len(sigma)))).Q for rows in (m, n))
    return (U * sigma) @ V.T


def matrices():
    """Sixty matrices of rank 1 to 64, square, wide and tall: null directions, clusters and long tails."""
    rng, shapes = np.random.default_rng(5), ((64, 64), (64, 160), (128, 64))
    for i, rank in enumerate((1, 2, 3, 5, 8, 13, 21, 34, 50, 64)):
        for j, spectrum in enumerate(SPECTRA):
            yield known_svd(rng, *shapes[(i + j) % 3], spectrum(rank))


MATRICES = tuple(matrices())


def schatten(A):
    sigma = np.linalg.svd(A, compute_uv=False)
    return sigma / np.sum(sigma**4) ** 0.25


def admitted(schedule, dtype):
    try:
        orthlin.orthogonalize(torch.eye(3, dtype=dtype), schedule=schedule)
    except ScheduleError:
        return False
    return True


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("schedule", SHIPPED, ids=lambda s: s.name)
def test_no_singular_value_leaves_the_band(schedule, dtype):
    """Upper side with null directions; lower side for values inside the interval.

    Two rounding errors, of the division by the norm and of a step, widen the band; the smallest value is
    bounded through four, because the noise of a step is relative to the largest one.
    """
    if not admitted(schedule, dtype):
        return
    unit = UNIT[dtype]
    slack = 16 * 2.0**-24  # of the norms and of products in single precision
    low, high = schedule.band_with_rounding(4 * unit)[0] - slack, schedule.band_with_rounding(2 * unit)[1] + slack
    for A in MATRICES:
        X = torch.asarray(A, dtype=dtype)
        O = orthlin.orthogonalize(X, schedule=schedule, method="newton_schulz").double().numpy()
        assert np.isfinite(O).all()
        sigma = np.linalg.svd(O, compute_uv=False)
        assert sigma[0] <= high
        inside = int(np.sum(schatten(X.double().numpy()) >= schedule.interval[0] * (1 + 1e-5)))
        assert inside == 0 or sigma[inside - 1] >= low


def test_half_precision_refuses_what_it_cannot_hold():
    """By name: raw Polar Express and everything of degree 7, which overflow or flip signs there, and few others."""
    refused = {dtype: {s.name for s in SHIPPED if not admitted(s, dtype)} for dtype in UNIT}
    assert refused[torch.float32] == set()
    assert all(s.name in refused[dtype] for dtype in UNIT for s in SHIPPED if s.rounding < UNIT[dtype])
    with pytest.raises(ScheduleError, match=r"'polar_express\(0.001, 5\)' .* torch.bfloat16 makes errors of 3.9e-03"):
        orthlin.orthogonalize(torch.eye(3, dtype=torch.bfloat16), schedule=schedules.polar_express(safety=0.0))
    assert refused[torch.float16] < refused[torch.bfloat16]
    assert schedules.polar_express(1e-3, 4, degree=7).name in refused[torch.float16]
    kept = {schedules.muon().name, schedules.speedrun().name, schedules.newton_schulz(15).name}
    assert kept.isdisjoint(refused[torch.bfloat16])


@pytest.mark.parametrize("method", ["newton_schulz", "gram_newton_schulz"])
@pytest.mark.parametrize("shape", [(6, 6), (5, 40), (40, 5), (1, 1), (1, 9), (9, 1)])
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("schedule", [SHIPPED[2], SHIPPED[9], SHIPPED[14]], ids=lambda s: s.name)
def test_singular_values_go_where_the_polynomial_sends_them(schedule, dtype, shape, method):
    rng = np.random.default_rng(1)
    A = rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if dtype == "complex128" else 0)
    U, sigma, Vh = np.linalg.svd(A, full_matrices=False)
    expected = (U * schedule(sigma / np.sum(sigma**4) ** 0.25)) @ Vh
    # errors grow with the slope of the polynomial, and in the Gram form through its square
    bound = 2.0**-52 * schedule.slope ** (2 if method[0] == "g" else 1)
    assert np.linalg.norm(orthlin.orthogonalize(A, schedule=schedule, method=method) - expected) <= bound


@pytest.mark.parametrize("schedule", SHIPPED, ids=lambda s: s.name)
def test_the_gram_form_equals_the_plain_form(schedule):
    """Up to the noise that it lets grow before it restarts, null directions and long tails included."""
    for A in MATRICES[::4]:
        X = A.astype("float32")
        plain, gram = (orthlin.orthogonalize(X, schedule=schedule, method=m) for m in ("newton_schulz", GRAM))
        assert np.linalg.norm(plain - gram, 2) <= GRAM_NOISE


FINE = (
    schedules.newton_schulz(40),
    schedules.stable(1e-6, 1e-7),
    schedules.cans(1e-5, 14),
    schedules.polar_express(1e-5, 9),
    schedules.for_tolerance(1e-3, 1e-7),
    schedules.for_tolerance(1e-4, 1e-5),
    schedules.for_tolerance(1e-5, 1e-6),
    schedules.for_tolerance(1e-6, 1e-3),
)
"""Made for small values or to many digits: what the Gram form may add is next to the rounding of single precision."""


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("schedule", SHIPPED + FINE, ids=lambda s: s.name)
def test_auto_adds_a_tenth_of_what_the_schedule_leaves_at_most(schedule, dtype):
    """Against the scalar schedule on exact singular values, beyond twice the error of the plain loop."""
    rng = np.random.default_rng(7)
    added = 0.0
    for m, n in ((48, 48), (64, 256), (16, 1024), (200, 40)):
        for sigma in (lambda r: np.geomspace(1, 0.1, r), *SPECTRA[1:]):
            r = min(m, n)
            A = known_svd(rng, m, n, sigma(r))
            A = (A * np.exp(1j * np.arange(n)) if dtype[0] == "c" else A).astype(dtype)
            U, exact, Vh = np.linalg.svd(A.astype(np.result_type(A, float)), full_matrices=False)
            expected = (U * schedule(exact / np.sum(exact**4) ** 0.25)) @ Vh
            auto, plain = (
                np.linalg.norm(orthlin.orthogonalize(A, schedule=schedule, method=method) - expected, 2)
                for method in ("auto", "newton_schulz")
            )
            added = max(added, auto - 2 * plain)
    low, high = schedule.band
    assert added <= min(0.1 * max(1 - low, high - 1), GRAM_NOISE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_auto_is_the_plain_loop_in_half_precision(dtype):
    A = torch.asarray(known_svd(np.random.default_rng(0), 16, 256, np.geomspace(1, 1e-2, 16)), dtype=dtype)
    for schedule in (s for s in SHIPPED if admitted(s, dtype)):
        plain, auto = (orthlin.orthogonalize(A, schedule=schedule, method=m) for m in ("newton_schulz", "auto"))
        assert torch.equal(plain, auto)


@pytest.mark.parametrize("schedule", SHIPPED, ids=lambda s: s.name)
def test_restarts_keep_the_noise_below_its_limit(schedule):
    for unit in (2.0**-24, 2.0**-53):
        noise, restarts = unit, _restarts(schedule.steps, unit, GRAM_NOISE)
        for i, (c, *_) in enumerate(schedule.steps):
            noise = unit if i in restarts else noise
            assert noise <= GRAM_NOISE / (1 + len(restarts))
            noise *= c**2
    assert len(_restarts(schedule.steps, 2.0**-24, 1.0)) <= len(_restarts(schedule.steps, 2.0**-24, GRAM_NOISE))


def test_where_the_gram_form_restarts():
    """A steep schedule must in single precision; one to many digits before every step, which is the plain loop."""
    coarse, fine = schedules.polar_express(), schedules.polar_express(n_iter=8)
    assert len(_restarts(coarse.steps, 2.0**-24, GRAM_NOISE)) == 1
    assert len(_restarts(fine.steps, 2.0**-24, gram_noise(fine.steps, fine.interval))) == len(fine) - 1
    assert not _restarts(schedules.muon().steps, 2.0**-24, GRAM_NOISE)
    assert not _restarts(schedules.muon(8).steps, 2.0**-53, GRAM_NOISE)


@pytest.mark.parametrize("schedule", [schedules.newton_schulz(4, upper=0.9), schedules.newton_schulz(4, 5, upper=0.5)])
@pytest.mark.parametrize("method", ["auto", "newton_schulz", GRAM])
def test_a_schedule_outside_its_interval_is_refused(schedule, method):
    with pytest.raises(ScheduleError, match="here they lie in"):
        orthlin.orthogonalize(np.eye(3), schedule=schedule, method=method)
    with pytest.raises(ScheduleError, match="here they lie in"):
        orthlin.matrix_sign(np.eye(3), method="newton_schulz", schedule=schedule)


def test_every_library_applies_the_same_polynomials(xp):
    """Plain form, and what "auto" takes for a wide matrix, which is the Gram form."""
    A = np.random.default_rng(2).standard_normal((5, 40)).astype("float32")
    schedule = schedules.speedrun()
    expected = BACKENDS["numpy"].call(orthlin.orthogonalize, A.astype(float), schedule=schedule)
    for method in ("newton_schulz", "auto"):
        given = xp.call(orthlin.orthogonalize, A, schedule=schedule, method=method)
        np.testing.assert_allclose(given, expected, atol=2.0**-23 * schedule.slope)
