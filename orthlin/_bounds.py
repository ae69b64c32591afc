"""Published error bounds of randomized range finders: scalar formulas, no arrays."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from orthlin import _checks as check
from orthlin.errors import OptionError

__all__ = ["TailBound", "hmt_frobenius_bound", "hmt_spectral_bound", "hmt_tail_bound", "posterior_factor"]


class TailBound(NamedTuple):
    """An error bound and a bound on the probability that a draw exceeds it.

    Attributes
    ----------
    bound : float
        The bound, in the units of the singular values.
    failure_probability : float
        At most this share of draws exceeds it.
    """

    bound: float
    failure_probability: float


def hmt_frobenius_bound(singular_values: Iterable[float], /, k: int, p: int) -> float:
    """Return the bound on the expected Frobenius error of a Gaussian range finder with ``k + p`` columns.

    ``sqrt(1 + k / (p - 1)) tau`` with ``tau`` the root of the sum of ``sigma_j^2`` over ``j > k``:
    Halko, Martinsson and Tropp, SIAM Review 53 (2011), Theorem 10.5.

    Parameters
    ----------
    singular_values : iterable of float
        All singular values, in any order.
    k, p : int
        Target rank, at least 1; oversampling, at least 2.

    Returns
    -------
    float
        The bound, in the units of the singular values.

    Raises
    ------
    RankError, OptionError
        If `k` or `p` is out of range; if a singular value is negative or not finite.

    Examples
    --------
    >>> round(hmt_frobenius_bound([4.0, 3.0, 1.0, 1.0], k=2, p=3), 12)
    2.0
    """
    _, tau = _tail(_values(singular_values), k, p, least=2)
    return math.sqrt(1 + k / (p - 1)) * tau


def hmt_spectral_bound(singular_values: Iterable[float], /, k: int, p: int, *, n_iter: int = 0) -> float:
    """Return the bound on the expected 2-norm error of a Gaussian range finder with ``k + p`` columns.

    ``(1 + sqrt(k / (p - 1))) sigma_{k+1} + e sqrt(k + p) / p tau``: Halko, Martinsson and Tropp (2011),
    Theorem 10.6; with `n_iter` power iterations the same for the singular values to the power
    ``2 n_iter + 1``, and then the root of that order (Corollary 10.10).

    Parameters
    ----------
    singular_values : iterable of float
        All singular values, in any order.
    k, p : int
        Target rank, at least 1; oversampling, at least 2.
    n_iter : int
        Power iterations.

    Returns
    -------
    float
        The bound, in the units of the singular values.

    Raises
    ------
    RankError, OptionError
        If `k`, `p` or `n_iter` is out of range; if a singular value is negative or not finite.

    Examples
    --------
    >>> round(hmt_spectral_bound([4.0, 4.0, 1.0, 1.0], k=2, p=2), 4)
    6.2584
    >>> round(hmt_spectral_bound([4.0, 4.0, 1.0, 1.0], k=2, p=2, n_iter=2), 4)
    1.4431
    """
    power = 2 * check.count(n_iter, "n_iter") + 1
    sigma = _values(singular_values)
    top = max(sigma, default=0.0) or 1.0
    first, tau = _tail([(s / top) ** power for s in sigma], k, p, least=2)
    bound = (1 + math.sqrt(k / (p - 1))) * first + math.e * math.sqrt(k + p) / p * tau
    return float(top * bound ** (1 / power))


def hmt_tail_bound(singular_values: Iterable[float], /, k: int, p: int, t: float, u: float) -> TailBound:
    """Return a bound on the Frobenius error of a Gaussian range finder and its failure probability.

    ``(1 + t sqrt(3 k / (p + 1))) tau + u t e sqrt(k + p) / (p + 1) sigma_{k+1}`` is exceeded with
    probability at most ``2 t^-p + exp(-u^2 / 2)``: Halko, Martinsson and Tropp (2011), Theorem 10.7.
    With ``t = e`` and ``u = sqrt(2 p)`` that is ``3 exp(-p)``: two in a hundred at ``p = 5``.

    Parameters
    ----------
    singular_values : iterable of float
        All singular values, in any order.
    k, p : int
        Target rank, at least 1; oversampling, at least 4.
    t, u : float
        How rare a failure shall be; both at least 1.

    Returns
    -------
    TailBound
        Named tuple (bound, failure_probability).

    Raises
    ------
    RankError, OptionError
        If `k` or `p` is out of range; if `t`, `u` or a singular value is.

    Examples
    --------
    >>> import math
    >>> tail = hmt_tail_bound([1.0] * 4 + [0.1] * 60, k=4, p=15, t=math.e, u=math.sqrt(30))
    >>> round(tail.bound, 3), tail.failure_probability < 1e-6
    (3.701, True)
    """
    t, u = real(t, "t", 1), real(u, "u", 1)
    first, tau = _tail(_values(singular_values), k, p, least=4)
    pinv_norm = math.e * math.sqrt(k + p) / (p + 1)
    bound = (1 + t * math.sqrt(3 * k / (p + 1))) * tau + u * t * pinv_norm * first
    return TailBound(bound, min(1.0, 2 * t**-p + math.exp(-u * u / 2)))


def posterior_factor(alpha: float = 10.0) -> float:
    """Return ``alpha sqrt(2 / pi)``, which turns the largest of ``r`` probed residuals into a bound.

    For a fixed ``B`` and standard Gaussian vectors ``w_i``, ``||B||_2`` exceeds this factor times
    ``max_i ||B w_i||`` with probability at most ``alpha^-r``: Halko, Martinsson and Tropp (2011),
    Lemma 4.1.

    Parameters
    ----------
    alpha : float
        Above one: the failure probability of one probe is 1/alpha.

    Returns
    -------
    float
        The factor.

    Raises
    ------
    OptionError
        If `alpha` is not above one.

    Examples
    --------
    >>> round(posterior_factor(), 3)
    7.979
    """
    return real(alpha, "alpha", 1, above=True) * math.sqrt(2 / math.pi)


def real(value: Any, name: str, low: float, *, above: bool = False) -> float:
    """`value` as a finite float of at least `low`, or `above` it."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not low <= number < math.inf or (above and number == low):
        limit = f"above {low}" if above else f"of at least {low}"
        raise OptionError(f"{name}: expected a finite number {limit}, got {value!r}")
    return number


def _values(singular_values: Iterable[float]) -> list[float]:
    try:
        values = list(singular_values)
    except TypeError:
        raise OptionError(f"singular_values: expected an iterable of numbers, got {singular_values!r}") from None
    return [real(value, "singular_values", 0) for value in values]


def _tail(sigma: list[float], k: int, p: int, *, least: int) -> tuple[float, float]:
    """Return ``sigma_{k+1}`` and the Euclidean norm of everything from there on."""
    check.count(p, "p", low=least)
    tail = sorted(sigma, reverse=True)[check.count(k, "k", low=1) :]
    return max(tail, default=0.0), math.hypot(*tail)
