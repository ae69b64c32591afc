"""The polynomials are optimal by Chebyshev's criterion, agree with published tables, and ranges are exact."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orthlin._minimax import (
    bisect,
    cheapest,
    critical_points,
    evaluate,
    greedy,
    guarded_step,
    image,
    image_of_all,
    optimal,
)

DEGREES = st.sampled_from([3, 5, 7, 9])


def dense(coefficients, x):
    value = np.zeros_like(x)
    for c in reversed(coefficients):
        value = value * x * x + c
    return value * x


@settings(deadline=None, max_examples=40)
@given(degree=DEGREES, decade=st.floats(-16, -0.01), upper=st.floats(0.5, 2.0))
def test_error_equioscillates(degree, decade, upper):
    lower = upper * 10**decade
    coefficients, error = optimal(degree, lower, upper)
    q = degree // 2
    points = [lower, *critical_points(coefficients), upper]
    assert len(points) == q + 2
    for j, x in enumerate(points):
        assert 1 - evaluate(coefficients, x) == pytest.approx((-1) ** j * error, rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(degree=DEGREES, gap=st.floats(-12, -1))
def test_short_intervals(degree, gap):
    # p - 1 is about comb(2q+2, q+1) (gap/4)^(q+1) there: below rounding for the short ones
    lower = 1 - 10**gap
    coefficients, error = optimal(degree, lower, 1.0)
    low, high = image(coefficients, lower, 1.0)
    assert max(1 - low, high - 1) <= error <= 10 ** (gap * (degree // 2 + 1)) + 2e-15


@settings(deadline=None, max_examples=40)
@given(degree=DEGREES, decade=st.floats(-6, -0.1), seed=st.integers(0, 2**16))
def test_no_perturbation_is_better(degree, decade, seed):
    lower = 10**decade
    coefficients, error = optimal(degree, lower, 1.0)
    noise = np.random.default_rng(seed).standard_normal(len(coefficients))
    low, high = image(tuple(coefficients + 1e-3 * noise), lower, 1.0)
    assert max(1 - low, high - 1) >= error


@pytest.mark.parametrize("degree", [3, 5, 7, 9])
def test_tiny_lower_end_keeps_its_digits(degree):
    # for l -> 0 the image of l is slope * l, whose digits 1 - error cannot hold
    coefficients, _ = optimal(degree, 1e-16, 1.0)
    near, _ = optimal(degree, 1e-12, 1.0)
    assert coefficients == pytest.approx(near, rel=1e-10)
    assert evaluate(coefficients, 1e-16) == pytest.approx(coefficients[0] * 1e-16, rel=1e-15)


@pytest.mark.parametrize(
    ("degree", "limit"),
    [(3, (1.5, -0.5)), (5, (1.875, -1.25, 0.375)), (7, (2.1875, -2.1875, 1.3125, -0.3125))],
)
def test_limit_is_the_taylor_polynomial(degree, limit):
    assert optimal(degree, 1.0, 1.0)[0] == pytest.approx(limit, rel=1e-15)
    assert optimal(degree, 2.0, 2.0)[0] == pytest.approx([c / 2 ** (2 * i + 1) for i, c in enumerate(limit)])


@settings(deadline=None, max_examples=80)
@given(
    coefficients=st.lists(st.floats(-5, 5), min_size=1, max_size=5).map(tuple),
    low=st.floats(-2, 2),
    width=st.floats(1e-3, 2),
)
def test_image_is_exact(coefficients, low, width):
    x = np.linspace(low, low + width, 20_001)
    x[-1] = high = low + width
    values = dense(coefficients, x)
    bottom, top = image(coefficients, low, high)
    scale = sum(abs(c) * 4 ** (2 * i + 1) for i, c in enumerate(coefficients)) * 1e-15
    assert bottom <= values.min() + scale
    assert top >= values.max() - scale
    # the grid misses an extremum by at most p'' h^2 / 8
    curvature = sum(abs(c) * (2 * i + 1) * 2 * i * 4.0 ** max(2 * i - 1, 0) for i, c in enumerate(coefficients))
    miss = curvature * (width / 20_000) ** 2 / 8 + scale
    assert bottom >= values.min() - miss
    assert top <= values.max() + miss


def test_critical_points_of_degenerate_polynomials():
    assert critical_points((1.0,)) == ()
    assert critical_points((0.0, 0.0)) == ()
    assert critical_points((1.0, 1.0)) == ()
    assert critical_points((1.5, -0.5, 0.0)) == (1.0,)
    assert critical_points((0.0, 2.5, -1.5)) == pytest.approx((1.0,), rel=1e-15)


def test_bisect_returns_the_last_float_that_holds():
    assert bisect(lambda x: x <= 0.25, 0.0, 1.0) == 0.25
    assert bisect(lambda x: x < 0.0, 0.0, 1.0) == 0.0


def test_rounding_widens_the_range():
    steps = greedy(5, 1e-3, 5, 0.01, 0.024)
    ranges = [image_of_all(steps, 1e-3, 1.0, delta) for delta in (0.0, 1e-6, 1e-4, 1e-3)]
    assert all(a[0] > b[0] and a[1] < b[1] for a, b in pairwise(ranges))
    assert image_of_all(greedy(5, 1e-3, 8, 0.0, 0.0), 1e-3, 1.0, 0.01) == (-np.inf, np.inf)


def test_rounding_sees_a_large_value_sent_near_zero():
    # the optimum without cushion takes 0.83 down to 1 - E = 8.5e-7: any rounding may turn that negative
    bare = guarded_step(5, 1e-7, 1.0, 0.01, 0.0)
    cushioned = guarded_step(5, 1e-7, 1.0, 0.01, 0.024)
    assert image_of_all([bare], 1e-7, 1.0, 1e-4)[0] < 0
    assert image_of_all([cushioned], 1e-7, 1.0, 1e-4)[0] > 0


@settings(deadline=None, max_examples=15)
@given(degree=DEGREES, decade=st.floats(-8, -1), safety=st.floats(0.0, 0.05), cushion=st.floats(0.0, 0.05))
def test_guarded_composition_stays_in_the_interval_it_is_designed_for(degree, decade, safety, cushion):
    lower = 10**decade
    low, high = lower, 1.0
    for step in greedy(degree, lower, 4, safety, cushion):
        smallest, largest = image(step, low, high)
        low = evaluate(step, low)
        assert smallest >= low * (1 - 1e-9) - 1e-13
        assert largest <= (2.0 - low) * (1 + 1e-12)
        high = 2.0 - low


def test_cheapest_gives_up():
    assert cheapest(1e-6, 1e-6, 1e-3, max_products=12) is None


PAPER = [  # Amsel et al., before the division by powers of 1.01
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
]
SPEED_RUN = [  # NanoGPT speed run, nanochat, Dion
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
PLAIN = [  # the optimum without cushion and safety, as shipped under the name CANS
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
]


def test_table_of_the_polar_express_paper():
    rows = greedy(5, 1e-3, 8, 0.0, 0.02407327424182761)
    for k, (computed, printed) in enumerate(zip(rows, PAPER, strict=True)):
        # row 7 was published in double precision from a system of condition 1e6: its last digits are rounding
        assert computed == pytest.approx(printed, rel=1e-10 if k == 6 else 5e-15)


def test_table_of_the_speed_run():
    for computed, printed in zip(greedy(5, 1e-3, 5, 0.02, 0.02), SPEED_RUN, strict=True):
        assert computed == pytest.approx(printed, rel=8e-15)


def test_table_without_cushion_and_safety():
    assert [tuple(round(c, 4) for c in row) for row in greedy(5, 1e-3, 5, 0.0, 0.0)] == PLAIN


MINIMAL_STEPS = {  # kappa: counts for degree 3, 5, 7 at tolerance 1e-2, 1e-3, 1e-6, 1e-15
    10: ((4, 3, 2), (5, 3, 3), (6, 4, 3), (7, 5, 4)),
    1e2: ((7, 5, 4), (7, 5, 4), (8, 6, 5), (10, 6, 5)),
    1e3: ((9, 6, 5), (10, 6, 5), (11, 7, 6), (12, 8, 7)),
    1e4: ((12, 8, 6), (12, 8, 7), (13, 9, 7), (14, 10, 8)),
    1e6: ((16, 11, 9), (17, 11, 9), (18, 12, 10), (19, 13, 10)),
    1e8: ((21, 14, 12), (22, 14, 12), (23, 15, 12), (24, 16, 13)),
    1e16: ((40, 27, 22), (41, 27, 22), (42, 28, 23), (43, 29, 23)),
}
TOLERANCES = (1e-2, 1e-3, 1e-6, 1e-15)


@pytest.mark.parametrize("kappa", MINIMAL_STEPS)
def test_minimal_number_of_steps(kappa):
    for column, degree in enumerate((3, 5, 7)):
        low, high, errors = 1 / kappa, 1.0, []
        for _ in range(1 + MINIMAL_STEPS[kappa][-1][column]):
            coefficients, error = optimal(degree, low, high)
            errors.append(error)
            low = evaluate(coefficients, low)
            high = 2.0 - low
        for tol, counts in zip(TOLERANCES, MINIMAL_STEPS[kappa], strict=True):
            steps = 1 + next(n for n, error in enumerate(errors) if error <= tol)
            # at 1e-15 an error is known to a few units in the last place only
            assert steps == pytest.approx(counts[column], abs=1 if tol == 1e-15 else 0)


@pytest.mark.parametrize("kappa", MINIMAL_STEPS)
def test_cheapest_is_never_dearer_than_a_single_degree(kappa):
    for tol, counts in zip(TOLERANCES, MINIMAL_STEPS[kappa], strict=True):
        steps = cheapest(1 / kappa, tol, 1e-3, 200)
        low, high = image_of_all(steps, 1 / kappa, 1.0)
        assert max(1 - low, high - 1) <= tol * (1 + 1e-9) + 2e-15
        single = min(products * n for products, n in zip((2, 3, 4), counts, strict=True))
        assert single - 2 <= sum(map(len, steps)) <= single
