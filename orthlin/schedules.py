"""Polynomial schedules: which odd polynomials to compose so that singular values go to one.

A step ``p(x) = c_0 x + c_1 x^3 + ... + c_q x^(2q+1)`` acts on a matrix through products alone,
``p(A) = (c_0 I + c_1 A A^H + ... + c_q (A A^H)^q) A``, and maps each singular value s of A to p(s).
So everything that can be promised about a schedule is a statement about a scalar function: it is
computed here, exactly, before any matrix is touched.

Source of the idea: Kovarik (1970), Bjorck and Bowie (1971); see Higham, Functions of Matrices, chapter 8.
"""

from math import inf

from orthlin._minimax import cheapest, greedy, growth
from orthlin._schedule import FINEST_TOL, Schedule, check_design, number, require, whole

__all__ = [
    "Schedule",
    "cans",
    "for_tolerance",
    "muon",
    "newton_schulz",
    "polar_express",
    "speedrun",
    "stable",
    "suppress",
]

_CLASSICAL = {3: (1.5, -0.5), 5: (1.875, -1.25, 0.375)}
_MUON = (3.4445, -4.7750, 2.0315)
_SPEEDRUN = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
_PAPER_CUSHION = 0.02407327424182761
_HIGH_PASS = (0.0, 2.5, -1.5)
_MAX_PRODUCTS = 400  # reaches lower = 1e-60


def newton_schulz(n_iter: int, degree: int = 3, *, lower: float = 1e-3, upper: float = 1.0) -> Schedule:
    """Make the classical iteration: slow at first, monotone on [0, 1], convergent of order (degree + 1)/2.

    Parameters
    ----------
    n_iter, degree : int
        Number of steps; 3 for ``(3 x - x^3)/2``, 5 for ``(15 x - 10 x^3 + 3 x^5)/8``.
    lower, upper : float
        The interval; `upper` above one lets it finish another schedule (cubic: below sqrt(3)).

    Returns
    -------
    Schedule
        ``sum_(j <= q) comb(2j, j) x ((1 - x^2)/4)^j`` repeated (Kovarik 1970; Bjorck and Bowie 1971).

    Raises
    ------
    OptionError
        If an argument is out of range.

    Examples
    --------
    >>> [round(x, 4) for x in newton_schulz(20).band]
    [0.9999, 1.0]
    """
    low, high, order, n_iter = number(lower), number(upper), whole(degree, "degree"), whole(n_iter, "n_iter")
    require(0.0 < high < inf, f"upper must be a number above 0, got {upper!r}")
    require(0.0 < low < high, f"lower must lie above 0 and below upper = {high:g}, got {lower!r}")
    require(order in _CLASSICAL, f"degree must be 3 or 5, got {degree!r}")
    source = "Kovarik 1970; Bjorck and Bowie 1971: Taylor polynomial of (1 - t)^(-1/2), t = 1 - x^2"
    steps = (_CLASSICAL[order],) * n_iter
    return Schedule(f"newton_schulz({n_iter}, {order})", steps, (low, high), source)


def muon(n_iter: int = 5, *, lower: float = 1e-3) -> Schedule:
    """Make the quintic of the Muon optimizer, which does not converge but is steep and bounded.

    Parameters
    ----------
    n_iter, lower : int, float
        Number of steps; smallest singular value of interest.

    Returns
    -------
    Schedule
        ``3.4445 x - 4.7750 x^3 + 2.0315 x^5`` repeated (Jordan et al., Muon, 2024): slope 485 after five
        steps, no value above 1.21, those from 0.01 on between 0.68 and 1.14.

    Raises
    ------
    OptionError
        If an argument is out of range.

    Examples
    --------
    >>> [round(x, 3) for x in muon(lower=1e-2).band]
    [0.682, 1.134]
    """
    lower, n_iter, _ = check_design(lower, n_iter)
    return Schedule(f"muon({n_iter})", (_MUON,) * n_iter, (lower, 1.0), "Jordan et al., Muon, 2024")


def speedrun(*, lower: float = 1e-3) -> Schedule:
    """Make the five tuned quintics of the NanoGPT speed run.

    Parameters
    ----------
    lower : float
        Smallest singular value of interest.

    Returns
    -------
    Schedule
        You Jiacheng, 2025: as steep as `muon` and within 0.033 of one from 0.01 on.

    Raises
    ------
    OptionError
        If an argument is out of range.

    Examples
    --------
    >>> [round(x, 3) for x in speedrun(lower=1e-2).band]
    [0.978, 1.032]
    """
    lower, _, _ = check_design(lower)
    return Schedule("speedrun", _SPEEDRUN, (lower, 1.0), "You Jiacheng, NanoGPT speed run, 2025")


def polar_express(
    lower: float = 1e-3, n_iter: int = 5, *, safety: float = 0.01, cushion: float = _PAPER_CUSHION, degree: int = 5
) -> Schedule:
    """Make the composition that brings [lower, 1] closest to one in a number of steps.

    Parameters
    ----------
    lower, n_iter, degree : float, int, int
        Smallest singular value; number of steps; their odd degree.
    safety : float
        All steps but the last are ``p(x / (1 + safety))``, which keeps bfloat16 from exploding; 0 gives the
        rows printed in the paper.  The speed run's table has ``safety=0.02, cushion=0.02``.
    cushion : float
        No step is designed for a ratio of interval ends below this, so large values stay clear of zero.

    Returns
    -------
    Schedule
        Step k minimizes ``max |1 - p|`` on ``[l, 2 - l]``, l being what the steps before make of `lower`
        (Amsel, Persson, Musco, Gower, arXiv 2505.16932).

    Raises
    ------
    OptionError
        If an argument is out of range.

    Examples
    --------
    >>> polar_express(safety=0.0).steps[0]
    (8.28721201814562, -23.59588651909881, 17.300387312530912)
    """
    lower, n_iter, safety = check_design(lower, n_iter, safety)
    require(0.0 <= number(cushion) < 1.0, f"cushion must lie in [0, 1), got {cushion!r}")
    require(whole(degree, "degree") in range(3, 22, 2), f"degree must be odd, from 3 to 21, got {degree!r}")
    steps = greedy(whole(degree, "degree"), lower, n_iter, safety, number(cushion))
    source = "Amsel et al., Polar Express, arXiv 2505.16932; computed here by the Remez exchange"
    return Schedule(f"polar_express({lower:g}, {n_iter})", steps, (lower, 1.0), source)


def cans(lower: float, n_iter: int, *, safety: float = 0.0) -> Schedule:
    """Make the optimal composition of cubics, which has a closed form.

    Parameters
    ----------
    lower, n_iter, safety : float, int, float
        As for `polar_express`.

    Returns
    -------
    Schedule
        On [l, u] with ``e = (l^2 + l u + u^2)/3``: ``p = 6 (e x - x^3/3) / (2 e^1.5 + l u (l + u))``
        (Grishina, Smirnov, Rakhuba, arXiv 2506.10935).

    Raises
    ------
    OptionError
        If an argument is out of range.

    Examples
    --------
    >>> [round(x, 3) for x in cans(1e-3, 9).band]
    [0.998, 1.002]
    """
    lower, n_iter, safety = check_design(lower, n_iter, safety)
    steps = greedy(3, lower, n_iter, safety, cushion=0.0)
    source = "Grishina, Smirnov, Rakhuba, CANS, arXiv 2506.10935; closed form"
    return Schedule(f"cans({lower:g}, {n_iter})", steps, (lower, 1.0), source)


def for_tolerance(lower: float, tol: float, *, safety: float = 1e-3) -> Schedule:
    """Make the composition with the fewest matrix products that brings [lower, 1] within `tol` of one.

    Parameters
    ----------
    lower, tol : float
        Smallest singular value; largest ``|1 - p|``, at least 2^-50.
    safety : float
        Safety and cushion of all steps but the last (see `polar_express`), about the unit roundoff that can
        be borne; 1e-3 serves float16 and finer at hardly a product more, bfloat16 needs 0.01.

    Returns
    -------
    Schedule
        Optimal steps of degree 3, 5 and 7 mixed by dynamic programming on the interval end.

    Raises
    ------
    OptionError
        If an argument is out of range or out of reach.

    Examples
    --------
    >>> for_tolerance(1e-3, 1e-6).products
    20
    """
    lower, _, safety = check_design(lower, safety=safety)
    require(FINEST_TOL <= number(tol) < 1.0, f"tol must lie in [{FINEST_TOL:.3g}, 1), got {tol!r}")
    tol = number(tol)
    steps = cheapest(lower, tol, safety, _MAX_PRODUCTS)
    require(steps is not None, f"tol={tol:g} on [{lower:g}, 1] takes over {_MAX_PRODUCTS} products")
    source = "optimal steps (arXiv 2505.16932), degrees chosen here by dynamic programming"
    return Schedule(f"for_tolerance({lower:g}, {tol:g})", steps or (), (lower, 1.0), source)


def stable(lower: float = 1e-16, tol: float = 2.0**-53) -> Schedule:
    """Make a backward stable composition: no singular value shrinks much relative to the largest.

    Parameters
    ----------
    lower, tol : float
        Smallest singular value; largest ``|1 - p|`` in exact arithmetic.

    Returns
    -------
    Schedule
        Cubics ``a x - (4 a^3/27) x^3`` of maximum 1 until all values are above 0.352: as few as with ``a = 2.4``,
        which sends one to 0.352, and then `a` as small as their number allows; then the classical quintic, for
        which ``1 - p(1 - g) = (20 g^3 - 15 g^4 + 3 g^5)/8``.
        The condition ``p(x)/max p >= x/d``, here d = 2.84, is that of Nakatsukasa and Higham (2012).

    Raises
    ------
    OptionError
        If an argument is out of range.

    Examples
    --------
    >>> len(stable()), stable().products
    (46, 97)
    """
    lower, _, _ = check_design(lower)
    require(0.0 < number(tol) < 1.0, f"tol must lie strictly between 0 and 1, got {tol!r}")
    tol = number(tol)
    steps, low = growth(lower)
    gap = 1.0 - low
    while gap > tol or not steps:
        steps += (_CLASSICAL[5],)
        gap = gap**3 * (20.0 - 15.0 * gap + 3.0 * gap**2) / 8
    source = "scaled cubic and classical quintic under the condition of Nakatsukasa and Higham 2012"
    return Schedule(f"stable({lower:g}, {tol:g})", steps, (lower, 1.0), source)


def suppress(n_iter: int = 4) -> Schedule:
    """Make a high-pass filter: values below about 0.8 go to zero, those near one go to one.

    Parameters
    ----------
    n_iter : int
        Number of steps.

    Returns
    -------
    Schedule
        ``p(x) = (5 x^3 - 3 x^5)/2`` repeated: ``p(1) = 1, p'(1) = 0``, unstable fixed point sqrt(2/3), and
        cubic decay at zero, so `slope` is 0.  Made for [0.9, 1.1]: a value must be near one to be kept.

    Raises
    ------
    OptionError
        If an argument is out of range.

    Examples
    --------
    >>> round(suppress()(0.6), 4), round(suppress()(0.95), 4)
    (0.0, 1.0)
    """
    n_iter = whole(n_iter, "n_iter")
    source = "odd quintic with p(1) = 1, p'(1) = 0 and no linear term; derived here"
    return Schedule(f"suppress({n_iter})", (_HIGH_PASS,) * n_iter, (0.9, 1.1), source)
