"""Every promise a schedule makes is checked against dense evaluation and against published figures."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orthlin._minimax import greedy
from orthlin.errors import OptionError, ScheduleError
from orthlin.schedules import (
    Schedule,
    cans,
    for_tolerance,
    muon,
    newton_schulz,
    polar_express,
    speedrun,
    stable,
    suppress,
)

SHIPPED = [
    newton_schulz(15),
    newton_schulz(10, 5),
    newton_schulz(3, 5, lower=0.5, upper=1.3),
    muon(),
    muon(lower=1e-2),
    muon(8),
    speedrun(),
    polar_express(),
    polar_express(n_iter=8),
    polar_express(safety=0.0),
    polar_express(1e-4, 6, safety=0.02, cushion=0.02),
    polar_express(1e-2, 4, degree=3),
    polar_express(1e-3, 4, degree=7),
    cans(1e-3, 5),
    cans(1e-3, 9, safety=1e-3),
    for_tolerance(1e-3, 1e-3),
    for_tolerance(1e-6, 1e-6),
    for_tolerance(1e-3, 1e-2, safety=0.01),
    stable(1e-3, 1e-6),
    stable(),
    suppress(),
    polar_express().then(newton_schulz(2, 5, lower=0.8, upper=1.2)),
]
each = pytest.mark.parametrize("schedule", SHIPPED, ids=lambda s: s.name)


def dense(schedule, low, high, size=50_001):
    """Evaluate on equal and on geometric steps, so that small singular values are seen too."""
    x = np.concatenate([np.linspace(low, high, size), np.geomspace(max(low, high * 1e-18), high, size)])
    return x, schedule(np.clip(x, low, high))


@pytest.mark.parametrize(
    ("schedule", "slope", "floor", "worst", "products"),
    [
        (muon(lower=1e-2), 485, 1.1e-3, 0.32, 15),
        (speedrun(lower=1e-2), 493, 1.1e-3, 0.032, 15),
        (polar_express(1e-3, 8), 6500, 8.3e-5, 1e-15, 24),
        (polar_express(1e-3, 5, safety=0.0, cushion=0.0), 1049, 5.0e-4, 0.11, 15),
        (polar_express(1e-4, 8, safety=0.0, cushion=0.0), 25641, 2.1e-5, 1.5e-5, 24),
        (polar_express(1e-3, 4, safety=0.0, cushion=0.0, degree=7), 997, 5.2e-4, 0.14, 16),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_slope_floor_and_accuracy(schedule, slope, floor, worst, products):
    assert schedule.products == products
    assert schedule.slope == pytest.approx(slope, rel=2e-3)
    x = np.geomspace(1e-6, 1e-2, 20_000)
    assert x[np.argmax(schedule(x) > 0.5)] == pytest.approx(floor, rel=0.05)
    low, high = schedule.band
    assert max(1 - low, high - 1) == pytest.approx(worst, rel=0.05, abs=1e-15)


@pytest.mark.parametrize(
    ("schedule", "band"),
    [
        (muon(), (0.471, 1.202)),
        (muon(lower=1e-2), (0.682, 1.134)),
        (speedrun(), (0.475, 1.145)),
        (speedrun(lower=1e-2), (0.978, 1.032)),
        (polar_express(safety=0.0), (0.876, 1.124)),
        (polar_express(safety=0.02, cushion=0.02), (0.859, 1.141)),
        (newton_schulz(5, 3, lower=1e-2), (0.076, 1.0)),
        (newton_schulz(5, 5, lower=1e-2), (0.228, 1.0)),
        (cans(1e-3, 5), (0.204, 1.796)),
        (cans(1e-3, 7), (0.735, 1.265)),
        (cans(1e-3, 9), (0.998, 1.002)),
    ],
)
def test_published_bands(schedule, band):
    assert schedule.band == pytest.approx(band, abs=6e-4)


@each
def test_band_equals_dense_evaluation(schedule):
    low, high = schedule.band
    # the grid alone misses an extremum by up to 1e-8, hence the refinement below
    _, values = dense(schedule, *schedule.interval)
    assert low <= values.min() + 1e-12
    assert high >= values.max() - 1e-12
    refined = [extremum(schedule, sign) for sign in (1, -1)]
    assert low == pytest.approx(refined[0], abs=1e-12)
    assert high == pytest.approx(-refined[1], abs=1e-12)


def extremum(schedule, sign):
    """Minimize sign * schedule by zooming into the best cell of ever finer grids."""
    low, high = schedule.interval
    x, values = dense(schedule, low, high)
    order = np.argsort(x)
    x, values = x[order], values[order]
    for _ in range(6):
        best = int(np.argmin(sign * values))
        x = np.linspace(x[max(best - 1, 0)], x[min(best + 1, len(x) - 1)], 1_001)
        x = np.clip(x, low, high)
        values = schedule(x)
    return (sign * values).min()


@each
def test_no_sign_flip_up_to_the_overshoot(schedule):
    ceiling = 1.1 * schedule.band_with_rounding(0.0)[1]
    _, values = dense(schedule, 0.0, schedule.interval[1] * (1 + schedule.overshoot))
    assert values.min() >= -1.1e-12
    assert values.max() <= ceiling * (1 + 1e-9)


@each
def test_slope_bounds_the_growth_of_null_directions(schedule):
    x, values = dense(schedule, 0.0, schedule.interval[1])
    if schedule.slope > 0:
        assert np.all(np.abs(values) <= schedule.slope * x * (1 + 1e-12) + 1e-300)
        assert schedule(1e-30) == pytest.approx(schedule.slope * 1e-30)
    else:
        assert schedule(1e-10) == 0.0 or schedule(1e-10) < 1e-25


@each
def test_rounded_evaluation_stays_in_the_rounded_band(schedule):
    delta = min(schedule.rounding, 2.0**-8)
    low, high = schedule.band_with_rounding(delta)
    assert low > 0
    rng = np.random.default_rng(7)
    lower, upper = schedule.interval
    start = np.concatenate([np.linspace(lower, upper, 20_000), np.geomspace(max(lower, 1e-18), upper, 20_000)])
    for _ in range(3):
        x = start * (1 + delta * rng.uniform(-1, 1, start.size))
        for step in schedule.steps:
            x = Schedule("step", (step,), (0.0, 1.0), "test")(x) * (1 + delta * rng.uniform(-1, 1, x.size))
        assert low * (1 - 1e-9) - 1e-13 <= x.min()
        assert x.max() <= high * (1 + 1e-9) + 1e-13


@each
def test_provenance_is_stated(schedule):
    assert len(schedule.source) > 20
    assert "http" not in schedule.source


def test_what_half_precision_may_run():
    bfloat16, float16, float32 = 2.0**-8, 2.0**-11, 2.0**-24
    for schedule in (muon(), muon(8), speedrun(), polar_express(), polar_express(n_iter=8), stable()):
        assert schedule.rounding > 2 * bfloat16
        assert schedule.band_with_rounding(bfloat16)[1] < 1.3
    assert for_tolerance(1e-3, 1e-3).rounding > float16
    assert for_tolerance(1e-3, 1e-3, safety=0.01).rounding > 2 * bfloat16
    raw = polar_express(safety=0.0)
    assert float32 < raw.rounding < float16
    assert 1e-6 < raw.overshoot < 1e-4


def test_overshoot_grows_with_the_safety():
    assert polar_express().overshoot == pytest.approx(0.0109, abs=1e-4)
    assert polar_express(safety=0.02).overshoot == pytest.approx(0.0218, abs=1e-4)
    assert muon().overshoot == pytest.approx(0.26, abs=0.01)
    assert newton_schulz(15).overshoot == pytest.approx(3**0.5 - 1, abs=1e-3)


def test_a_set_that_flips_signs_is_found_out():
    # sets like this one were published: the first polynomial is negative above 0.884
    flipping = Schedule("bad", ((4.0098, -7.0585, 2.4635), (1.875, -1.25, 0.375)), (1e-2, 1.0), "test")
    assert flipping.band[0] < -0.5
    assert flipping.overshoot == 0.0
    assert flipping.rounding == 0.0


def test_both_published_conventions_of_polar_express():
    assert polar_express(1e-3, 8, safety=0.0).steps == greedy(5, 1e-3, 8, 0.0, 0.02407327424182761)
    assert polar_express(safety=0.02, cushion=0.02).steps == greedy(5, 1e-3, 5, 0.02, 0.02)
    assert cans(1e-3, 7).steps == greedy(3, 1e-3, 7, 0.0, 0.0)


@settings(deadline=None, max_examples=25)
@given(decade=st.floats(-8, -0.3), n_iter=st.integers(1, 6), degree=st.sampled_from([3, 5, 7]))
def test_optimal_bands_are_centred_at_one(decade, n_iter, degree):
    low, high = polar_express(10**decade, n_iter, safety=0.0, cushion=0.0, degree=degree).band
    assert low + high == pytest.approx(2.0, abs=1e-9)


@settings(deadline=None, max_examples=6)
@given(decade=st.floats(-9, -0.3), tol=st.floats(-12, -0.3), safety=st.sampled_from([1e-4, 1e-3, 1e-2]))
def test_for_tolerance_reaches_its_tolerance(decade, tol, safety):
    schedule = for_tolerance(10**decade, 10**tol, safety=safety)
    low, high = schedule.band
    assert max(1 - low, high - 1) <= 10**tol * (1 + 1e-9) + 2e-15
    assert schedule.rounding > 0.5 * safety


@settings(deadline=None, max_examples=25)
@given(decade=st.floats(-16, -0.5), tol=st.floats(-15, -1))
def test_stable_is_stable_and_reaches_its_tolerance(decade, tol):
    schedule = stable(10**decade, 10**tol)
    low, high = schedule.band
    assert max(1 - low, high - 1) <= 10**tol * (1 + 1e-9) + 1e-15
    x = np.linspace(0.0, 1.0, 2_001)
    for step in schedule.steps:
        values = Schedule("step", (step,), (0.0, 1.0), "test")(x)
        assert values.max() <= 1 + 1e-15
        # Nakatsukasa and Higham: p(x) / max p >= x / d, with d = 2.84 for the growing steps and 1 after them
        assert np.all(values >= x * (0.352 if len(step) == 2 else 1.0) - 1e-15)


def test_suppress_separates_at_its_unstable_fixed_point():
    fixed = (2 / 3) ** 0.5
    filtering = suppress(12)
    assert suppress(1)(fixed) == pytest.approx(fixed, rel=1e-15)
    assert filtering(fixed * 0.98) < 1e-12
    assert filtering(fixed * 1.02) == pytest.approx(1.0, abs=1e-12)
    assert filtering.slope == 0.0
    assert suppress().band[0] > 0.99


def test_then_composes():
    first, second = polar_express(), newton_schulz(3, 5, lower=0.5, upper=1.2)
    both = first.then(second)
    assert both.steps == first.steps + second.steps
    assert both.interval == first.interval
    assert both(0.3) == second(first(0.3))
    assert both.band == pytest.approx((1.0, 1.0), abs=1e-12)
    assert for_tolerance(1e-3, 0.05).then(suppress()).band == pytest.approx((1.0, 1.0), abs=1e-2)


def test_then_refuses_the_wrong_order():
    express = polar_express()
    head = Schedule("head", express.steps[:2], express.interval, "test")
    tail = Schedule("tail", express.steps[2:], head.band, "test")
    assert head.then(tail).steps == express.steps
    with pytest.raises(ScheduleError, match=r"'head' is made for .*'tail' delivers"):
        tail.then(head)
    with pytest.raises(ScheduleError, match="suppress"):
        muon().then(suppress())
    with pytest.raises(ScheduleError, match="newton_schulz"):
        express.then(newton_schulz(2))


@pytest.mark.parametrize(
    "build",
    [
        lambda: Schedule("none", (), (0.0, 1.0), ""),
        lambda: Schedule("empty", ((),), (0.0, 1.0), ""),
        lambda: Schedule("nan", ((1.0, float("nan")),), (0.0, 1.0), ""),
        lambda: Schedule("reversed", ((1.0,),), (1.0, 0.5), ""),
        lambda: Schedule("negative", ((1.0,),), (-1.0, 0.5), ""),
        lambda: Schedule("infinite", ((1.0,),), (0.0, float("inf")), ""),
        lambda: newton_schulz(5, 7),
        lambda: newton_schulz(0),
        lambda: newton_schulz(5, lower=1.0),
        lambda: muon(2.0),
        lambda: muon(True),
        lambda: speedrun(lower=0.0),
        lambda: polar_express(1.0),
        lambda: polar_express(float("nan")),
        lambda: polar_express(degree=4),
        lambda: polar_express(safety=-0.1),
        lambda: polar_express(cushion=1.0),
        lambda: cans(0.0, 3),
        lambda: for_tolerance(1e-3, 1e-17),
        lambda: for_tolerance(1e-3, 1.0),
        lambda: for_tolerance(1e-3, 1e-3, safety=1.0),
        lambda: stable(tol=0.0),
        lambda: suppress(0),
    ],
)
def test_options_out_of_range(build):
    with pytest.raises(OptionError):
        build()


@pytest.mark.parametrize("tol", [0.3, 0.5, 0.99])
@pytest.mark.parametrize("lower", [0.3, 0.5, 0.9, 1 - 2**-53])
@pytest.mark.parametrize("build", [stable, for_tolerance])
def test_what_is_close_enough_already_gets_a_step(build, lower, tol):
    low, high = build(lower, tol).band
    assert 1 - tol <= low <= high <= 1 + tol


def test_schedules_are_immutable_and_comparable():
    assert muon() == muon()
    assert hash(muon()) == hash(muon())
    with pytest.raises(AttributeError):
        muon().name = "other"
