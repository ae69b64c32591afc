"""The direction of an orthogonalized step: full, or at low rank with what it leaves out put back."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from orthlin import _backend as be
from orthlin import _checks as check
from orthlin import sketch as sk
from orthlin._factors import Way, block, multiplied, rooted
from orthlin._scaling import Seen, in_sight, seen, times
from orthlin._shards import Shards, factors
from orthlin.errors import OptionError
from orthlin.polar import orthogonalize
from orthlin.rangefinder import powered, sampler
from orthlin.schedules import Schedule

Array = Any
Rank = int | float | Callable[[Any], int | float] | None

SCALES = ("none", "spectral", "rms", "rms_rank", "nuclear")
RMS = 0.2  # root mean square of the entries of a step of AdamW
# A tail below this share of a column's square is put back in proportion to its size: at the level of rounding it is
# noise.  The rounding of products in bfloat16 and TensorFloat-32, with three bits more, is larger.
TAIL_FLOOR = {"highest": 1e-4, "high": 1.25e-3, "medium": 1e-2}
_SMALLEST = 2.0**-220  # square of a column below which it is likewise: no factor comes near to overflow


class Direction(NamedTuple):
    """O = X c + Q V for finite X, c a row of column factors (just X if Q is None), and what comes with it.

    `right` is the next warm start; the part of the input that was captured is Q B, times 2^e if e is given;
    `length` is the step scaling; `finite` tells the matrices whose input was finite, the others have X = 0.
    """

    X: Array
    c: Array
    Q: Array | None
    V: Array | None
    right: Array | None
    B: Array | None
    e: Array | None
    length: Array | float
    finite: Array

    def dense(self) -> Array:
        """Return the direction as one array."""
        if self.Q is None:
            return self.X
        return self.Q @ self.V if self.c is None else self.c * self.X + self.Q @ self.V

    def captured(self, xp: Any) -> Array:
        """Return the factor B of the captured part Q B, in units of the input."""
        return None if self.B is None else _unscaled(xp, self.B, self.e)


class Sizes(NamedTuple):
    """What a direction has of the shape of its matrix: rank (None for full), length of a column of its tail, and step.

    For a stack of matrices of several shapes, filled up with zeros, `tail` is an array (..., 1, 1).
    """

    r: int | None
    tail: Array | float
    length: float


def tail_weight(r: int, k: int) -> float:
    r"""Weight of the tail of a direction, :math:`\alpha = \sqrt{8 r / k}`.

    Parameters
    ----------
    r, k : int
        Rank of the direction, and min(m, n) of the matrix.

    Returns
    -------
    float
        alpha; with it :math:`\|O\|_F^2 = r + 8 r (k - r)/k`.

    Examples
    --------
    >>> tail_weight(16, 128), tail_weight(64, 128)
    (1.0, 2.0)
    """
    return math.sqrt(8 * r / k)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a direction is made; see :func:`orthlin.steppers.muon` for the fields."""

    rank: Rank = None
    n_iter: int = 0
    sketch: str = "gaussian"
    warm_start: bool = False
    tail: float | str = 0.0
    tol: float | None = None
    precision: str = "highest"
    scale: str = "none"
    schedule: Schedule | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.rank is None or callable(self.rank)):
            check.rank_or_share(self.rank, 1)
        numbers: dict[str, Any] = {"tol": check.tolerance(self.tol, "tol")}
        numbers |= {name: check.count(getattr(self, name), name) for name in ("n_iter", "seed")}
        check.option(self.sketch, "sketch", sk.KINDS)
        check.flag(self.warm_start, "warm_start")
        check.option(self.precision, "precision", be.PRECISIONS)
        check.option(self.scale, "scale", SCALES)
        if not (self.schedule is None or isinstance(self.schedule, Schedule)):
            raise OptionError(f"schedule: expected an orthlin.schedules.Schedule, got {self.schedule!r}")
        if not (isinstance(self.tail, str) and self.tail == "auto"):
            numbers["tail"] = check.non_negative(self.tail, "tail")
        vars(self).update(numbers)  # as Python's numbers, of which schedules are made

    def width(self, shape: tuple[int, ...], step: Any = 0) -> int | None:
        """Rank at a step for matrices of a shape, None for full."""
        k = min(shape[-2:])
        rank = self.rank(step) if callable(self.rank) else self.rank
        r = k if rank is None else check.rank_or_share(rank, k)
        return None if r >= k else r

    def sizes(self, shape: tuple[int, ...], step: Any = 0) -> Sizes:
        """Sizes of the direction of a matrix of a shape; those of the columns of a tail are alpha sqrt((k - r)/n)."""
        r, (m, n) = self.width(shape, step), shape[-2:]
        tail = 0.0 if r is None else self.alpha(r, min(m, n)) * math.sqrt((min(m, n) - r) / n)
        return Sizes(r, tail, self._scaling(m, n, r))

    def first_right(self, xp: Any, X: Array, name: str) -> Array | None:
        """Right factor to start warm from, Gaussian rows of length about one; None without a warm start."""
        full = min(X.shape[-2:]) if callable(self.rank) else None  # the rank may fall later
        r = self.width(X.shape) or full
        if r is None or not self.warm_start:
            return None
        return xp.broadcast_to(self._rows(X, X.shape[-1], r, 0, name), (*X.shape[:-2], r, X.shape[-1]))

    def resized(
        self, xp: Any, right: Array, r: int, step: Any, name: str, columns: tuple[int, slice] | None = None
    ) -> Array:
        """Warm start with r rows: leading ones where the rank has fallen, fresh Gaussian ones where it has grown.

        Of n columns it may have a part only.
        """
        have = right.shape[-2]
        if have >= r:
            return right[..., :r, :]
        n, part = columns or (right.shape[-1], slice(None))
        more = self._rows(right, n, r - have, step, name)[:, part]
        return xp.concat([right, xp.broadcast_to(more, (*right.shape[:-2], *more.shape))], axis=-2)

    def _rows(self, like: Array, n: int, count: int, step: Any, name: str) -> Array:
        return sk.gaussian(n, count, like=like, rng=be.stream(self.seed, name, step, like)).mT / math.sqrt(n)

    def direction(
        self,
        xp: Any,
        U: Array,
        right: Array | None,
        step: Any,
        name: str,
        sight: Seen | None = None,
        sizes: Sizes | None = None,
    ) -> Direction:
        """Direction of U; the matrices that are not finite have the direction zero.

        With a `sight` of U, they have been made zero already.  `sizes` are given where matrices are filled up.
        """
        if sight is None:
            sight = seen(xp, U)
            U = xp.where(sight.finite, U, xp.zeros_like(U))
        X, s = in_sight(xp, U, sight)
        r, tail, length = sizes or self.sizes(X.shape, step)
        if r is None:
            return self._full(xp, X, right, sight, length)
        large = be.reduced(xp, X, self.precision)
        if right is None:
            rng = be.stream(self.seed, name, step, X)
            sample = sampler(xp, large, r, self.sketch, None, rng, self.precision)
            Y = sample(large, s)
        else:  # rows of length about one, which need no scaling
            right = self.resized(xp, right, r, step, name)
            Y = be.large_product(xp, large, times(be.adjoint(xp, right), s), precision=self.precision)
        Y = powered(xp, large, s, Y, self.n_iter, precision=self.precision)
        way = Way(r, self.tol, precision=self.precision).serving(X)
        Q, B = block(xp, large, s, Y, way)
        W = multiplied(xp, *rooted(xp, Q, B, way)[1:])
        B = B if s is None else B * (1.0 / s)
        squares = be.column_squares(xp, X) if sight.squares is None and self.tail else sight.squares
        c, V, rest = self._with_tail(xp, squares, B, W, tail)
        warm = None if right is None else _refilled(xp, W, right, be.gram(xp, W))
        if self.scale == "nuclear":
            found = _inner(xp, W, B)
            if c is not None:
                found = found + be.convert(xp, rest(), found.dtype)
            length = _unscaled(xp, found, sight.e)
        return Direction(X, c, Q, V, warm, B, sight.e, length, sight.finite)

    def _full(self, xp: Any, X: Array, right: Array | None, sight: Seen, length: float) -> Direction:
        O = orthogonalize(X if self.schedule is None else be.reduced(xp, X, self.precision), schedule=self.schedule)
        if self.scale == "nuclear":
            length = _unscaled(xp, _inner(xp, be.convert(xp, O, X.dtype), X), sight.e)
        return Direction(O, None, None, None, right, None, sight.e, length, sight.finite)

    def fits_shards(self, shape: tuple[int, ...], step: Any = 0) -> bool:
        """Whether matrices of a shape can be stepped along where their parts are, else they are needed whole."""
        drawn = self.warm_start or self.sketch == "gaussian"
        return self.width(shape, step) is not None and drawn and self.n_iter == 0 and self.scale != "nuclear"

    def direction_on_shards(
        self, xp: Any, U: Array, right: Array | None, step: Any, name: str, shards: Shards
    ) -> Direction:
        """Part of the direction of matrices, in single precision, of which U is a part, and so is the warm start."""
        n, (rank, tail, length) = shards.shape[-1], self.sizes(shards.shape, step)
        r = rank or 0
        if right is None:
            omega = sk.gaussian(n, r, like=U, rng=be.stream(self.seed, name, step, U))
            rows = be.adjoint(xp, omega[shards.columns, :])
        else:
            right = rows = self.resized(xp, right, r, step, name, (n, shards.columns))
        f = factors(xp, U, rows, shards, tail=bool(self.tail), tol=self.tol, precision=self.precision)
        c, V, _ = self._with_tail(xp, f.squares, f.B, f.W, tail)
        warm = None if right is None else _refilled(xp, f.W, right, f.gram)
        return Direction(f.X, c, f.Q, V, warm, f.B, None, length, f.finite)

    def alpha(self, r: int, k: int) -> float:
        """Weight of the tail at rank r of k."""
        return tail_weight(r, k) if self.tail == "auto" else float(self.tail)

    def _with_tail(
        self, xp: Any, total: Array, B: Array, W: Array, length: Array | float
    ) -> tuple[Array | None, Array, Callable[[], Array]]:
        """Return c, W - B c and <X, T c> for the tail T = X - Q B, so that Q W + T c = X c + Q (W - B c).

        `total` are the squared norms of the columns of X.

        c = length/||t_j|| for every column t_j, and ||t_j||^2 = ||x_j||^2 - ||b_j||^2, a difference that cancels to
        rounding noise where x_j is in the range of Q.
        """
        if not self.tail:
            return None, W, lambda: W
        rest = total - be.column_squares(xp, B, double=not be.is_single(xp, total))
        floor = TAIL_FLOOR[be.attained(B, self.precision)]
        least = floor * total + max(_SMALLEST, 2.0 ** -be.exponent_bound(xp, total))
        c = length / xp.sqrt(xp.maximum(rest, least))
        lengths = be.convert(xp, c, B.dtype)
        return lengths, W - lengths * B, lambda: xp.sum(c * rest, axis=-1, keepdims=True)

    def _scaling(self, m: int, n: int, r: int | None) -> float:
        """Multiplier of the learning rate by shape and rank."""
        k = min(m, n)
        if self.scale == "rms_rank" and k:
            size = k if r is None else r + self.alpha(r, k) ** 2 * (k - r)  # ||O||_F^2
            return RMS * math.sqrt(m * n / size)
        if self.scale == "spectral" and k:
            return math.sqrt(max(1, m / n))
        return RMS * math.sqrt(max(m, n)) if self.scale == "rms" else 1.0


def _refilled(xp: Any, W: Array, old: Array, gram: Array) -> Array:
    """W + (I - W W^H) Z: directions that W lacks, because its matrix had a smaller rank, come from Z.

    A warm start made of W alone could never find them again; from zero it could find nothing.
    """
    return be.add_product(xp, 1.0, W + old, -1.0, gram, old)


def faded(xp: Any, fading: Array, moved: Array, beta: Any, finite: Array) -> Array:
    """Next share of a full step that a matrix goes: one if it has `moved`, without a gradient beta times as much.

    A momentum that only decays has the same direction for ever.  So the way that is still gone is at most
    1/(1 - beta) steps, as with the momentum of gradient descent.
    """
    less = be.factor(xp, beta, fading) * fading
    return xp.where(finite, xp.where(moved, xp.ones_like(fading), less), fading)


def real_product(xp: Any, x: Array, y: Array) -> Array:
    """Real parts of conj(x) y."""
    return xp.real(xp.conj(x) * y) if be.is_complex(xp, x) else x * y


def _unscaled(xp: Any, x: Array, e: Array | None) -> Array:
    return x if e is None else be.ldexp(xp, x, e)


def _inner(xp: Any, x: Array, y: Array) -> Array:
    return xp.sum(real_product(xp, x, y), axis=(-2, -1), keepdims=True)
