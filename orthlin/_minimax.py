"""Optimal odd polynomials on an interval, and the exact range of any odd polynomial, in plain floats.

An odd polynomial ``p(x) = c_0 x + c_1 x^3 + ... + c_q x^(2q+1)`` is the tuple ``(c_0, ..., c_q)``.
Its derivative is a polynomial of degree q in ``t = x^2``, so everything about its extrema is a question
about the positive roots of a short polynomial in t.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from itertools import pairwise
from math import comb, cos, inf, pi, sqrt

__all__ = [
    "Odd",
    "bisect",
    "cheapest",
    "critical_points",
    "evaluate",
    "greedy",
    "growth",
    "guarded_step",
    "image",
    "image_of_all",
    "optimal",
]

Odd = tuple[float, ...]

_ROUNDOFF = 2.0**-52
_MAX_EXCHANGES = 12  # convergence is quadratic: half a dozen, unless the points move by rounding alone
_STEEPEST = 2.4  # of a cubic of stable growth, which sends one to 0.352
_EXPLODED = 1e9  # a range this wide has diverged; going on would only overflow


def _horner(ascending: Sequence[float], t: float) -> float:
    result = 0.0
    for coefficient in reversed(ascending):
        result = result * t + coefficient
    return result


def evaluate(coefficients: Odd, x: float) -> float:
    """Return ``sum_i c_i x^(2i+1)`` by Horner's rule in x^2.

    >>> evaluate((1.5, -0.5), 1.0)
    1.0
    """
    return x * _horner(coefficients, x * x)


def bisect(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Return the last float of [low, high) at which a condition holds that fails from some point on.

    >>> bisect(lambda x: x * x <= 2.0, 0.0, 2.0)
    1.414213562373095
    """
    while low < (middle := low + (high - low) / 2) < high:
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _sign_changes(ascending: Sequence[float], low: float, high: float) -> list[float]:
    """Return the points of (low, high) where a polynomial in t changes sign, in increasing order."""
    if len(ascending) < 2:
        return []
    derivative = [i * c for i, c in enumerate(ascending)][1:]
    # Between two sign changes of its derivative a polynomial is monotone, so each piece is one bisection.
    knots = [low, *_sign_changes(derivative, low, high), high]
    signs = [_horner(ascending, knot) < 0 for knot in knots]

    def root(left: float, right: float, sign: bool) -> float:
        return bisect(lambda t: (_horner(ascending, t) < 0) == sign, left, right)

    pieces = zip(pairwise(knots), pairwise(signs), strict=True)
    return [root(left, right, before) for (left, right), (before, after) in pieces if before != after]


@cache
def critical_points(coefficients: Odd) -> tuple[float, ...]:
    """Return the x > 0 where ``p'(x) = sum_i (2i+1) c_i x^(2i)`` changes sign, in increasing order.

    >>> critical_points((1.5, -0.5))
    (1.0,)
    """
    slope = [(2 * i + 1) * c for i, c in enumerate(coefficients)]
    while slope and slope[-1] == 0.0:
        slope.pop()
    # Cauchy's bound: no root in t lies beyond 1 + max |s_i / s_q|.
    bound = 1.0 + max((abs(s / slope[-1]) for s in slope), default=0.0)
    return tuple(sqrt(t) for t in _sign_changes(slope, 0.0, bound))


def image(coefficients: Odd, low: float, high: float) -> tuple[float, float]:
    """Return the exact range on [low, high]: extremes are taken at an end or at a critical point.

    >>> image((1.5, -0.5), 0.5, 1.5)
    (0.5625, 1.0)
    """
    extrema = [s * x for x in critical_points(coefficients) for s in (-1.0, 1.0) if low < s * x < high]
    values = [evaluate(coefficients, x) for x in (low, *extrema, high)]
    return min(values), max(values)


def image_of_all(steps: Sequence[Odd], low: float, high: float, delta: float = 0.0) -> tuple[float, float]:
    """Return the range of a composition on [low, high] when every step is rounded.

    The image of an interval is an interval, so with ``delta = 0`` this is exact.  Otherwise input and
    results are off by a relative `delta`; but what a step takes down from its first maximum on belongs to
    large singular values and is off by `delta` times the largest: the error of a matrix product is
    relative to the norm, and could turn a value near zero negative.

    >>> image_of_all([(1.5, -0.5), (1.5, -0.5)], 0.5, 1.0)
    (0.8687744140625, 1.0)
    """
    low, high = low * (1.0 - delta), high * (1.0 + delta)
    for step in steps:
        peak = max(low, min([*critical_points(step)[:1], high]))
        trough = image(step, peak, high)[0]
        low, high = image(step, low, high)
        low = min(low - delta * abs(low), trough - delta * abs(high))
        high += delta * abs(high)
        if high - low > _EXPLODED:
            return -inf, inf
    return low, high


def _solve(rows: list[list[Fraction]]) -> Odd:
    """Solve a small linear system, given with its right-hand side as last column, by Gauss and Jordan."""
    for _ in range(len(rows)):
        # The first row gives its unknown by the others; that goes into all rows and the row goes last.
        pivot = next(i for i, row in enumerate(rows) if row[0])
        leading, *others = rows.pop(pivot)
        solved = [a / leading for a in others]
        rows = [[a - row[0] * b for a, b in zip(row[1:], solved, strict=True)] for row in rows] + [solved]
    return tuple(float(value) for (value,) in rows)


def _cubic(lower: float, upper: float) -> Odd:
    """Return the optimal cubic in closed form (Grishina, Smirnov, Rakhuba, arXiv 2506.10935)."""
    e2 = (lower * lower + lower * upper + upper * upper) / 3
    scale = 6 / (2 * e2**1.5 + lower * upper * (lower + upper))
    return scale * e2, -scale / 3


def _limit(q: int, middle: float) -> Odd:
    """Return the optimum for l -> u: with x = y middle, y * sum_(j <= q) comb(2j, j) ((1 - y^2)/4)^j."""
    return tuple(
        (-1) ** i * sum(comb(2 * j, j) * comb(j, i) / 4**j for j in range(i, q + 1)) / middle ** (2 * i + 1)
        for i in range(q + 1)
    )


def _remez(q: int, lower: float, upper: float) -> Odd:
    """Exchange points until p - 1 has the same size and alternating sign at all q + 2 of them."""
    inner = [(lower + upper - (upper - lower) * cos(pi * j / (q + 1))) / 2 for j in range(1, q + 1)]
    coefficients: Odd = ()
    for _ in range(_MAX_EXCHANGES):
        # p(x_j) - 1 = (-1)^(j+1) E with E = 1 - p(l) put in: without the unknown E no digit of a tiny p(l)
        # is lost.  For l near u the system is as ill-conditioned as (u - l)^-q, hence exact rationals.
        rows = []
        for j, x in enumerate([*inner, upper], start=1):
            powers = [Fraction(x) ** i - (-1) ** j * Fraction(lower) ** i for i in range(1, 2 * q + 2, 2)]
            rows.append([*powers, Fraction(1 - (-1) ** j)])
        coefficients = _solve(rows)
        moved = critical_points(coefficients)
        # p changes with the square of an error in the points, so 1e-8 leaves rounding only.
        if len(moved) != q or max(abs(a - b) for a, b in zip(moved, inner, strict=True)) <= 1e-8 * upper:
            break
        inner = list(moved)
    return coefficients


@cache
def optimal(degree: int, lower: float, upper: float) -> tuple[Odd, float]:
    """Return the odd polynomial closest to one on [lower, upper], and its largest distance from one.

    It solves ``min_c max_x |1 - sum_i c_i x^(2i+1)|``; by Chebyshev the maximum is taken at q + 2 points
    with alternating sign, the first of them `lower`.  Degree 3 has a closed form, others take the Remez
    exchange, and ``lower -> upper`` is its limit once the error of that,
    ``comb(2q+2, q+1) ((1 - lower^2/upper^2)/4)^(q+1)`` at most, is below the unit roundoff
    (degree 5: ``lower/upper > 1 - 5e-6``).

    >>> coefficients, error = optimal(5, 1e-3, 1.0)
    >>> [round(c, 4) for c in coefficients]
    [8.4703, -25.1081, 18.6293]
    """
    q = degree // 2
    if q == 1:
        coefficients = _cubic(lower, upper)
    elif comb(2 * q + 2, q + 1) * ((1 - (lower / upper) ** 2) / 4) ** (q + 1) < _ROUNDOFF:
        coefficients = _limit(q, (lower + upper) / 2)
    else:
        coefficients = _remez(q, lower, upper)
    low, high = image(coefficients, lower, upper)
    return coefficients, max(1.0 - low, high - 1.0)


def guarded_step(degree: int, lower: float, upper: float, safety: float, cushion: float) -> Odd:
    """Return an optimal polynomial made tolerant of rounding by the recipe of Polar Express.

    * Cushion: design on ``[max(lower, cushion * upper), upper]``, so that no large value is sent near zero,
      and scale until the image of ``[lower, upper]`` is centred at one again.
    * Safety: the step is ``p(x / (1 + safety))``, so values up to ``(1 + safety) upper`` stay in its range.

    Amsel, Persson, Musco, Gower, arXiv 2505.16932, section on finite precision.
    """
    design = max(lower, cushion * upper)
    coefficients, error = optimal(degree, design, upper)
    gain = 2.0 / (evaluate(coefficients, lower) + 1.0 + error) if design > lower else 1.0
    return tuple(gain * c / (1.0 + safety) ** (2 * i + 1) for i, c in enumerate(coefficients))


def greedy(degree: int, lower: float, n_iter: int, safety: float, cushion: float) -> tuple[Odd, ...]:
    """Return `n_iter` guarded steps from [lower, 1], each for the image ``[l, 2 - l]`` of the one before.

    Greedy is optimal among all compositions of that length and degree (Polar Express, theorem 3.1).  The
    last step is not damped by `safety`: nothing after it could amplify a rounding error.
    """
    low, high = lower, 1.0
    steps: tuple[Odd, ...] = ()
    for remaining in reversed(range(n_iter)):
        steps += (guarded_step(degree, low, high, safety if remaining else 0.0, cushion),)
        low = evaluate(steps[-1], low)
        high = 2.0 - low
    return steps


def cheapest(lower: float, tol: float, safety: float, max_products: int) -> tuple[Odd, ...] | None:
    """Return the fewest products that take [lower, 1] to ``|1 - p| <= tol``, or None beyond `max_products`.

    A larger lower end is never worse for what follows, so the best lower end for each number of products
    comes from the best ends for fewer (dynamic programming): a step of degree 2q + 1 costs q + 1 products.
    """
    best: dict[int, tuple[float, float, tuple[Odd, ...]]] = {0: (lower, 1.0, ())}
    for cost in range(2, max_products + 1):
        for degree in (3, 5, 7):
            if (before := best.get(cost - degree // 2 - 1)) is None:
                continue
            low, high, steps = before
            last, error = optimal(degree, low, high)
            if error <= tol:
                return (*steps, last)
            step = guarded_step(degree, low, high, safety, cushion=safety)
            low = evaluate(step, low)
            if cost not in best or low > best[cost][0]:
                best[cost] = (low, 2.0 - low, (*steps, step))
    return None


def growth(lower: float) -> tuple[tuple[Odd, ...], float]:
    """Fewest cubics a x - (4 a^3/27) x^3 with a <= 2.4 that bring [lower, 1] to [f, 1], and f.

    >>> steps, low = growth(1e-3)
    >>> len(steps), round(low, 3)
    (7, 0.352)
    """
    n, low, floor = 0, lower, evaluate(_bounded(_STEEPEST), 1.0)
    while low < floor:
        n, low = n + 1, evaluate(_bounded(_STEEPEST), low)
    if n == 0:
        return (), lower

    def reaches(less: float) -> bool:
        x = lower
        for _ in range(n):
            x = evaluate(_bounded(_STEEPEST - less), x)
        return x >= floor

    return (_bounded(_STEEPEST - bisect(reaches, 0.0, _STEEPEST / 2)),) * n, floor


def _bounded(a: float) -> Odd:
    return (a, -4 * a**3 / 27)
