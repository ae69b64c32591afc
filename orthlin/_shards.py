"""Low rank on shards: the factors of matrices of which every process holds a part.

Everything large stays where it is.  With A cut into parts A_ij along its rows and columns, the sketch A Omega is a sum
over the parts of a row, its Gram matrix W and the block C = Q^H A are sums over those of a column, and the Gram matrix
C C^H again is one over those of a row: matrices cut along one side need two sums, none larger than r (m + r) or
r (n + r) numbers.  Of an average of matrices over copies, A Omega and Q^H A are averages too, and all there is to
send.  No value is looked at before it is a sum, which all processes have alike, and no decision is taken.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from orthlin import _backend as be
from orthlin._gram import approximate_root, damped_factor, inverse_root, polish, wide

Array = Any
Sum = Callable[[tuple[Array, ...]], tuple[Array, ...]]


def here(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    """Return the sums over one part."""
    return arrays


class Shards(NamedTuple):
    """Where the parts of matrices of a shape lie: the columns that are here, and sums over the parts of a side.

    `over_rows` sums over all parts with these columns, `over_columns` over all parts with these rows, by default of one
    part; `over_copies` averages over matrices whose average is meant.  The arrays of a call have leading dimensions in
    common.
    """

    shape: tuple[int, ...]
    columns: slice = slice(None)
    over_rows: Sum = here
    over_columns: Sum = here
    over_copies: Sum = here


class Factors(NamedTuple):
    """Parts of what :class:`orthlin._direction.Direction` is made of, of A where it is finite, else of zero.

    `squares` are those of the norms of the columns, in double precision, or their sum if no tail needs more;
    W W^H = `gram`.
    """

    X: Array
    finite: Array
    squares: Array
    Q: Array
    B: Array
    W: Array
    gram: Array


def factors(
    xp: Any, A: Array, rows: Array, shards: Shards, *, tail: bool, tol: float | None, precision: str
) -> Factors:
    """Basis Q of the range of A Omega, block B = Q^H A and W = msign(B), for the adjoint (r x n) of Omega.

    Double precision holds the squares of all single-precision numbers: sums are taken in the units of A, products
    with A next to one, and a part need not know how large the others are.
    """
    s = be.safe_factor(xp, A)
    Y = be.large_product(xp, be.reduced(xp, A, precision), be.adjoint(xp, rows) * s, precision=precision)
    squares = be.column_squares(xp, A, double=True)
    squares = squares if tail else xp.sum(squares, axis=-1, keepdims=True)
    (Y,) = shards.over_columns((wide(xp, Y) / wide(xp, s),))
    Y, squares = shards.over_copies((Y, squares))
    N, squares = shards.over_rows((be.gram(xp, be.adjoint(xp, Y)), squares))
    finite = xp.isfinite(xp.sum(xp.abs(N), axis=(-2, -1), keepdims=True))
    Y, N, squares = (xp.where(finite, x, xp.zeros_like(x)) for x in (Y, N, squares))
    X = A if be.is_host(A) and bool(xp.all(finite)) else xp.where(finite, A, xp.zeros_like(A))
    one = be.eye_like(xp, N, N.shape[-1])
    Q = Y @ damped_factor(xp, N, one)
    s = be.power_factor(xp, _largest(xp, squares), A)
    large = be.reduced(xp, X, precision)
    C = be.large_product(xp, be.adjoint(xp, be.convert(xp, Q, A.dtype) * s), large, precision=precision)
    # What the columns of Q lack of being orthonormal rides with the block: as a number next to one, in its precision.
    N, C = shards.over_rows((be.convert(xp, be.gram(xp, be.adjoint(xp, Q)), A.dtype), C))
    (C,) = shards.over_copies((C,))
    K = polish(xp, wide(xp, N), one)
    C = be.adjoint(xp, K) @ wide(xp, C) / wide(xp, s)
    (S,) = shards.over_columns((be.gram(xp, C),))
    u = be.power_factor(xp, xp.sqrt(xp.max(xp.abs(S), axis=(-2, -1), keepdims=True)), S)  # fourth powers come next
    S = S * u * u
    line = max(shards.shape[-2:]) * be.eps(xp, A)
    M = inverse_root(xp, S, line) if tol is None else approximate_root(xp, S, tol)
    Q, B, W, gram = (be.convert(xp, x, A.dtype) for x in (Q @ K, C, M @ (C * u), M @ S @ be.adjoint(xp, M)))
    return Factors(X, finite, squares, Q, B, W, gram)


def _largest(xp: Any, squares: Array) -> Array:
    """Largest norm of a column, shape (..., 1, 1), zero where there is none."""
    zero = xp.zeros((*squares.shape[:-1], 1), dtype=squares.dtype, device=be.device(squares))
    return xp.sqrt(xp.max(xp.concat([squares, zero], axis=-1), axis=-1, keepdims=True))
