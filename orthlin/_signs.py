"""Sparse signs in blocks, each of which is a permutation with signs: products with them are sums of blocks."""

import math
from collections.abc import Callable
from typing import Any

from orthlin import _backend as be

Array = Any
_ENTRIES = 1 << 18  # of sums at a time, which a cache holds
NONZEROS = 2  # of a row in a sketch of its own: captures 0.998 of what Gaussian numbers do, one 0.98


def sparse_sampler(xp: Any, X: Array, width: int, rng: Any) -> Callable[[Array, Any], Array]:
    """Host matrices like X times a :func:`orthlin.sketch.sparse_sign`, by sums of blocks; they have no factor."""
    n = X.shape[-1]
    _, shifts, values = signs(n, width, X, rng, NONZEROS)
    values = be.transfer(xp, values, be.working(xp, X))
    rows = max(_ENTRIES // max(2 * width, 1), 1)

    def sample(X: Array, _: Any) -> Array:
        Z = xp.zeros((*X.shape[:-1], 2 * width), dtype=values.dtype, device=be.device(X))  # as shifts go around
        for top in range(0, X.shape[-2], rows):
            part = slice(top, min(top + rows, X.shape[-2]))
            x, z = X[..., part, :], Z[..., part, :]
            for block, start in enumerate(range(0, n, max(width, 1))):
                stop = min(start + width, n)
                for t in range(values.shape[0]):
                    shift = int(shifts[block, t])
                    be.add_to(z[..., shift : shift + stop - start], x[..., start:stop], values[t, start:stop])
        return Z[..., :width] + Z[..., width:]

    return sample


def signs(n: int, width: int, like: Array, rng: Any, nonzeros: int) -> tuple[Any, Array, Array]:
    """Namespace of the source, shifts of each block of `width` rows, (blocks, nonzeros), and values, (nonzeros, n)."""
    nonzeros = min(nonzeros, width)
    source = be.random_source(rng, like)
    shifts = source.xp.argsort(source.uniform((-(-n // max(width, 1)), width)), axis=-1)[:, :nonzeros]
    coin = source.uniform((nonzeros, n))
    value = 0 * coin + 1 / math.sqrt(max(nonzeros, 1))  # in the dtype of the draw, which a bare number may not take
    return source.xp, shifts, source.xp.where(coin < 0.5, value, -value)
