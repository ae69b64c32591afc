"""Low rank on shards, in threads: parts of a matrix make the parts of the direction of the whole."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from threading import Barrier

import numpy as np
import pytest

from orthlin import _backend as be
from orthlin._direction import Recipe
from orthlin._shards import Shards

SHAPE, RANK = (2, 37, 20), 5
CUTS = {"whole": [0, 1], "halves": [0, 0.5, 1], "uneven": [0, 0.3, 0.7, 0.9, 1], "empty": [0, 0, 1, 1, 1]}


class Sum:
    """Sums over the parts that threads hold, in their order."""

    def __init__(self, count):
        self.barrier, self.given, self.calls = Barrier(count), [None] * count, []

    def __call__(self, i, arrays):
        self.given[i] = arrays
        self.barrier.wait(60)
        sums = tuple(sum(parts[1:], parts[0]) for parts in zip(*self.given, strict=True))
        if i == 0:
            self.calls.append(sum(x.nbytes for x in arrays) // len(arrays[0]))
        self.barrier.wait(60)
        return sums


def matrices(dtype=np.float32, seed=0, shape=SHAPE, least=1e-3):
    rng = np.random.default_rng(seed)
    decay = np.geomspace(1, least, min(shape[-2:]))
    left, right = (np.linalg.qr(rng.standard_normal((*shape[:-2], n, len(decay))))[0] for n in shape[-2:])
    x = left * decay @ right.swapaxes(-2, -1)
    if np.dtype(dtype).kind == "c":
        x = x * np.exp(1j * rng.random(shape))
    return x.astype(dtype)


def on_shards(recipe, U, right, cuts, side, step=3):
    """Direction, next warm start and finite matrices of the whole, and the bytes of a matrix in each sum."""
    axis = {"rows": -2, "columns": -1}[side]
    edges = [round(c * U.shape[axis]) for c in cuts]
    parts = [slice(a, b) for a, b in pairwise(edges)]
    total = Sum(len(parts))

    def one(i):
        with np.errstate(all="ignore"):
            columns = parts[i] if side == "columns" else slice(None)
            u = U[:, parts[i]] if side == "rows" else U[..., parts[i]]
            shards = Shards(U.shape[-2:], columns, **{f"over_{side}": partial(total, i)})
            d = recipe.direction_on_shards(
                be.namespace(u), u, None if right is None else right[..., columns], step, "w", shards
            )
            return d.dense(), d.right, d.finite

    with ThreadPoolExecutor(len(parts)) as pool:
        results = list(pool.map(one, range(len(parts))))
    dense = np.concatenate([r[0] for r in results], axis=axis)
    warm = None if right is None else results[0][1]
    if warm is not None and side == "columns":
        warm = np.concatenate([r[1] for r in results], axis=-1)
    return dense, warm, [r[2] for r in results], total.calls


def whole(recipe, U, right, step=3):
    """Direction on one process, in double precision, where the same random numbers are drawn."""
    U, right = (x if x is None else x.astype(np.result_type(x, np.float64)) for x in (U, right))
    with np.errstate(all="ignore"):
        d = recipe.direction(be.namespace(U), U, right, step, "w")
        return d.dense(), d.right


RECIPES = {
    "paper": Recipe(rank=RANK),
    "tail": Recipe(rank=RANK, tail="auto"),
    "warm": Recipe(rank=RANK, tail=0.5, warm_start=True),
    "tol": Recipe(rank=RANK, tol=0.01, tail=1.0),
    "scheduled": Recipe(rank=lambda step: RANK, warm_start=True),
}


def condition(recipe, U, right):
    """How much the direction changes with its input, relative to that."""
    rng, size = np.random.default_rng(0), 2.0**-12
    changes = []
    for _ in range(4):
        V, start = (
            x if x is None else x + size * np.sqrt(np.mean(abs(x) ** 2)) * rng.standard_normal(x.shape).astype(x.dtype)
            for x in (U, right)
        )
        changes.append(np.linalg.norm(whole(recipe, V, start)[0] - whole(recipe, U, right)[0]) / size)
    return max(changes)


def start(recipe, dtype, n=20):
    """Right factor of a last step, of a smaller rank where the rank may grow."""
    return matrices(dtype, 1, (2, RANK - 2 * callable(recipe.rank), n), 1.0) if recipe.warm_start else None


every_side = pytest.mark.parametrize("side", ["rows", "columns"])


@every_side
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
@pytest.mark.parametrize("name", RECIPES)
def test_parts_make_the_whole(name, dtype, cuts, side):
    recipe, U = RECIPES[name], matrices(dtype)
    right = start(recipe, dtype)
    O, warm, finite, _ = on_shards(recipe, U, right, CUTS[cuts], side)
    expected, next_right = whole(recipe, U, right)
    # OpenBLAS's kernels for AVX2 leave up to 4 eps, those for AVX512 up to 5.2, of one part as of many
    least = 6 * np.finfo(np.float32).eps * condition(recipe, U, right)
    assert all(f.all() for f in finite)
    assert np.linalg.norm(O - expected) <= least
    assert right is None or np.linalg.norm(warm - next_right) <= least


@every_side
def test_two_sums_of_so_many_bytes(side):
    recipe, (m, n), r = RECIPES["tail"], SHAPE[1:], RANK
    *_, calls = on_shards(recipe, matrices(), None, CUTS["uneven"], side)
    assert calls == {"rows": [8 * (r * r + n), 4 * r * (r + n)], "columns": [8 * m * r, 8 * r * r]}[side]


@every_side
@pytest.mark.parametrize("exponent", [-140, -100, -40, 40, 100, 126])
@pytest.mark.parametrize("name", RECIPES)
def test_scale_changes_nothing(name, exponent, side):
    if exponent < -110 and RECIPES[name].tail:
        pytest.skip("a column below 2^-110 comes back in proportion to its length, as on devices")
    scaled = np.ldexp(matrices(), exponent)
    right = start(RECIPES[name], np.float32)
    O, P = (on_shards(RECIPES[name], x, right, CUTS["uneven"], side)[0] for x in (scaled, np.ldexp(scaled, -exponent)))
    assert np.array_equal(O, P)


@every_side
def test_parts_of_any_size_are_added(side):
    recipe, U = RECIPES["paper"], matrices()
    at = {"rows": np.s_[:, :11], "columns": np.s_[..., :6]}[side]
    for size in (2.0**-60, 0.0, 2.0**60):
        V = U.copy()
        V[at] *= size
        O = on_shards(recipe, V, None, CUTS["uneven"], side)[0]
        assert np.linalg.norm(O - whole(recipe, V, None)[0]) <= 1e-4


@every_side
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", RECIPES)
def test_what_is_not_finite_in_one_part_is_zero_in_all(name, value, side):
    recipe, U = RECIPES[name], matrices()
    right = start(recipe, np.float32)
    expected = on_shards(recipe, U, right, CUTS["uneven"], side)[0]
    U[0, 12, 9] = value
    O, _, finite, _ = on_shards(recipe, U, right, CUTS["uneven"], side)
    assert [f[:, 0, 0].tolist() for f in finite] == [[False, True]] * len(finite)
    assert not O[0].any()
    assert np.array_equal(O[1], expected[1])


@every_side
def test_zero_and_small_rank_stay_as_they_are_on_one_process(side):
    U = np.zeros(SHAPE, np.float32)
    U[1, 3:8, 2:9] = np.outer(np.arange(1, 6), np.arange(1, 8))
    O = on_shards(RECIPES["paper"], U, None, CUTS["uneven"], side)[0]
    assert not O[0].any()
    np.testing.assert_allclose(O[1], U[1] / np.linalg.norm(U[1]), atol=1e-5)
