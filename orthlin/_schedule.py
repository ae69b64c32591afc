"""What a polynomial schedule is: a composition of odd polynomials, and what can be promised about it."""

import operator
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property, wraps
from math import inf, isfinite, nan, prod
from numbers import Real
from typing import Any

from orthlin._minimax import Odd, bisect, evaluate, image_of_all
from orthlin.errors import OptionError, ScheduleError

_SIGN_SLACK = 1e-12
_MAXIMUM_SLACK = 0.1
_BAND_SLACK = 1e-12
FINEST_TOL = 2.0**-50  # below this the band of a composition in double precision is rounding only


def constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Cache a function of plain values; torch.compile calls it while it traces instead of looking inside."""
    cached = cache(function)

    @wraps(function)
    def call(*values: Any) -> Any:
        return cached(*values)

    vars(call)["_dynamo_marked_constant"] = True
    return call


def require(holds: bool, message: str) -> None:
    """OptionError with `message` unless `holds`."""
    if not holds:
        raise OptionError(message)


def number(value: Any) -> float:
    """`value` as a float, NaN if it is no real number."""
    if isinstance(value, Real) and not isinstance(value, bool):
        with suppress(OverflowError):
            return float(value)
    return nan


def whole(value: Any, name: str) -> int:
    """`value` as an int of at least 1."""
    with suppress(TypeError):
        count = -1 if isinstance(value, bool) else operator.index(value)
        if count >= 1:
            return count
    raise OptionError(f"{name} must be an integer of at least 1, got {value!r}")


def check_design(lower: Any, n_iter: Any = 1, safety: Any = 0.0) -> tuple[float, int, float]:
    """Return the arguments as Python's numbers; OptionError unless a schedule can be made for [lower, 1]."""
    low, margin = number(lower), number(safety)
    require(sys.float_info.min <= low < 1.0, f"lower must lie strictly between 0 and 1, got {lower!r}")
    require(0.0 <= margin < 1.0, f"safety must lie in [0, 1), got {safety!r}")
    return low, whole(n_iter, "n_iter"), margin


@dataclass(frozen=True)
class Schedule:
    """A composition of odd polynomials, with the interval it is made for and where it comes from.

    Parameters
    ----------
    name : str
        What to call it in messages and tables.
    steps : tuple of tuples of float
        The coefficients ``(c_0, c_1, ...)`` of ``sum_i c_i x^(2i+1)``, in the order of application.
    interval : tuple of float
        ``(lower, upper)``: the singular values it is made for; ``0 <= lower < upper``.
    source : str
        Who published the numbers, or how they were computed.

    Raises
    ------
    OptionError
        If there is no step, a coefficient is not finite or the interval is empty.

    Examples
    --------
    >>> twice = Schedule("two cubics", ((1.5, -0.5), (1.5, -0.5)), (0.5, 1.0), "textbook")
    >>> len(twice), twice.products, twice.slope, twice(1.0)
    (2, 4, 2.25, 1.0)
    >>> twice.band
    (0.8687744140625, 1.0)
    """

    name: str
    steps: tuple[Odd, ...]
    interval: tuple[float, float]
    source: str

    def __post_init__(self) -> None:
        finite = bool(self.steps) and all(step and all(map(isfinite, step)) for step in self.steps)
        require(finite, f"steps of {self.name!r} must be non-empty and finite, got {self.steps!r}")
        lower, upper = self.interval
        require(0.0 <= lower < upper < inf, f"interval of {self.name!r} is empty: {self.interval!r}")

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.steps)

    def __call__(self, x: float) -> float:
        """Return where a singular value x goes: ``p_n(...p_2(p_1(x)))``."""
        for step in self.steps:
            x = evaluate(step, x)
        return x

    @property
    def products(self) -> int:
        """Number of matrix products: q + 1 for a step of degree 2q + 1 (Gram, q - 1 powers, apply)."""
        return sum(map(len, self.steps))

    @property
    def slope(self) -> float:
        """The derivative at zero, ``prod c_0``: by how much directions far below `lower` are multiplied."""
        return prod(step[0] for step in self.steps)

    @cached_property
    def band(self) -> tuple[float, float]:
        """Smallest and largest value on `interval`, exact: the image of an interval, step after step."""
        return image_of_all(self.steps, *self.interval)

    def band_with_rounding(self, delta: float) -> tuple[float, float]:
        """Bound the result when the input and every step are rounded.

        Parameters
        ----------
        delta : float
            Relative error of the smallest value, and of all others relative to the largest, as matrix
            products have it; for instance the unit roundoff of a dtype.

        Returns
        -------
        tuple of float
            The smallest value from ``[lower (1 - delta), upper (1 + delta)]``, and the largest from
            ``[0, upper (1 + delta)]``, because a matrix may have singular values below `lower`.

        Examples
        --------
        >>> from orthlin.schedules import muon
        >>> low, high = muon().band_with_rounding(2.0**-8)
        >>> round(low, 3), round(high, 3)
        (0.46, 1.207)
        """
        lower, upper = self.interval
        smallest, _ = image_of_all(self.steps, lower, upper, delta)
        _, largest = image_of_all(self.steps, 0.0, upper, delta)
        return smallest, largest

    def _harmless(self, excess: float, delta: float) -> bool:
        """Tell if on [0, upper (1 + excess)] no sign changes and the maximum grows by at most 10 %."""
        upper = self.interval[1]
        low, high = image_of_all(self.steps, 0.0, upper * (1.0 + excess), delta)
        _, maximum = image_of_all(self.steps, 0.0, upper)
        return low >= -_SIGN_SLACK and high <= (1.0 + _MAXIMUM_SLACK) * maximum

    @cached_property
    def overshoot(self) -> float:
        """Largest e <= 1 for which [0, upper (1 + e)] keeps its sign (to 1e-12) and its maximum (to 10 %)."""
        return bisect(lambda excess: self._harmless(excess, 0.0), 0.0, 1.0)

    @property
    def rounding(self) -> float:
        """Largest delta for which `band_with_rounding` keeps to the same limits and stays above zero."""
        return float(rounding(self.steps, self.interval))

    def then(self, other: "Schedule") -> "Schedule":
        """Compose with a schedule that is applied afterwards.

        Parameters
        ----------
        other : Schedule
            Its interval must contain the band of this one (to a relative 1e-12).

        Returns
        -------
        Schedule
            ``x -> other(self(x))`` on the interval of this schedule.

        Raises
        ------
        ScheduleError
            If the band of this schedule leaves the interval of the other.

        Examples
        --------
        >>> from orthlin.schedules import newton_schulz
        >>> len(newton_schulz(12, 3).then(newton_schulz(2, 5)))
        14
        """
        (low, high), (lower, upper) = self.band, other.interval
        if low < lower * (1.0 - _BAND_SLACK) or high > upper * (1.0 + _BAND_SLACK):
            raise ScheduleError(
                f"{other.name!r} is made for [{lower:.6g}, {upper:.6g}], "
                f"but {self.name!r} delivers [{low:.6g}, {high:.6g}]"
            )
        name, source = f"{self.name} then {other.name}", f"{self.source}; then {other.source}"
        return Schedule(name, self.steps + other.steps, self.interval, source)


@constant
def rounding(steps: tuple[Odd, ...], interval: tuple[float, float]) -> float:
    """`Schedule.rounding`; cached by value, because factories make equal schedules again and again."""
    schedule = Schedule("", steps, interval, "")
    return bisect(lambda d: schedule._harmless(0.0, d) and schedule.band_with_rounding(d)[0] > 0.0, 0.0, 1.0)
