"""The direction of a step: the formula written out with an SVD, and what follows from it."""

import math
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
from conftest import BACKENDS
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import matrix
from test_lowrank import sign
from test_rangefinder import RANK, SHAPE, gaussian, with_spectrum

from orthlin import _backend as be
from orthlin import schedules, sketch
from orthlin._direction import SCALES, Recipe, tail_weight
from orthlin.errors import OptionError, RankError

EAGER = [name for name in BACKENDS if name != "jax:jit"]  # each recipe would be compiled anew
FLOOR = 1e-2
"""A column of the tail with less than this share of its column of U comes back in proportion to its size."""


eager = pytest.mark.parametrize("xp", EAGER, indirect=True)


@pytest.fixture(params=["numpy", "torch:cpu"])
def host(request):
    return BACKENDS[request.param]


# the reference -----------------------------------------------------------------------------------


def adjoint(A):
    return A.conj().swapaxes(-1, -2)


def weight(tail, r, k):
    return math.sqrt(8 * r / k) if tail == "auto" else tail


def length(scale, U, O, r=None, tail=0.0):
    """Multiplier of the learning rate; `U` may be any matrix of its shape unless `scale` is nuclear."""
    m, n = U.shape
    k = min(U.shape)
    square = k if r is None or r >= k else r + weight(tail, r, k) ** 2 * (k - r)  # ||O||_F^2 where U has rank k
    return {
        "none": 1,
        "spectral": max(1, m / n) ** 0.5,
        "rms": 0.2 * max(m, n) ** 0.5,
        "rms_rank": 0.2 * (m * n / square) ** 0.5,
        "nuclear": np.vdot(U, O).real,
    }[scale]


def direction(U, r=None, omega=None, *, n_iter=0, tail=0.0):
    """O = Q msign(B) + alpha sqrt((k - r)/n) T D^-1, the part Q B, and W = msign(B), of one float64 matrix."""
    k = min(U.shape)
    if r is None or r >= k:
        return sign(U) if U.any() else U, U, None
    Y = U @ omega
    for _ in range(n_iter):
        Y = U @ (adjoint(U) @ np.linalg.qr(Y).Q)
    Q = np.linalg.qr(Y).Q
    B = adjoint(Q) @ U
    W = sign(B) if B.any() else B
    return Q @ W + weight(tail, r, k) * levelled(U - Q @ B, U, r), Q @ B, W


def levelled(T, U, r):
    """Columns of T brought to the length sqrt((k - r)/n), those that are small in U to less."""
    lengths = np.maximum(np.linalg.norm(T, axis=0), FLOOR * np.linalg.norm(U, axis=0))
    return math.sqrt((min(U.shape) - r) / U.shape[1]) * T / np.where(lengths > 0, lengths, 1)


# the library -------------------------------------------------------------------------------------


def drawn(recipe, U, step, name):
    """The test matrix of a cold sketch: a function of seed, name and step."""
    space, n, r = be.namespace(U), U.shape[-1], recipe.width(U.shape, step)
    make = {
        "gaussian": sketch.gaussian,
        "sparse_sign": partial(sketch.sparse_sign, nonzeros=2),
        "columns": sketch.columns,
    }[recipe.sketch]
    omega = make(n, r, like=U, rng=be.stream(recipe.seed, name, step, U))
    if recipe.sketch == "columns":
        omega = space.take(space.eye(n, dtype=U.dtype, device=be.device(U)), omega, axis=-1)
    return omega


def computed(xp, recipe, U, right=None, step=0, name="w"):
    """O, its length, the captured part Q B and the test matrix, the last two only at low rank."""

    def compute(U, *right):
        space = be.namespace(U)
        with be.settings(U):
            d = recipe.direction(space, U, right[0] if right else None, step, name)
        one = space.ones_like(U[..., :1, :1])
        result = d.dense(), one * (space.astype(d.length, U.dtype) if recipe.scale == "nuclear" else d.length)
        if d.Q is None:
            return result
        omega = be.adjoint(space, right[0]) if right else drawn(recipe, U, step, name)
        return (*result, d.Q @ d.captured(space), omega)

    return xp.call(compute, U, *(() if right is None else (right,)))


def example(dtype="float64", shape=SHAPE, seed=0):
    """Singular values from 1 to 1/2: sketched blocks have condition numbers below 10."""
    return with_spectrum(np.linspace(1, 0.5, min(shape)), *shape, dtype, seed)


def expected_length(recipe, U, O):
    return length(recipe.scale, U, O, recipe.rank, recipe.tail)


def error(x, y):
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


RECIPES = {
    "full": Recipe(),
    "cold": Recipe(rank=RANK),
    "powers": Recipe(rank=RANK, n_iter=2, tail=0.5, scale="spectral"),
    "sparse": Recipe(rank=RANK, sketch="sparse_sign", scale="rms", seed=3),
    "columns": Recipe(rank=RANK, sketch="columns", scale="rms_rank"),
    "tail": Recipe(rank=RANK, tail=1.0, scale="nuclear"),
    "auto": Recipe(rank=RANK, tail="auto", scale="rms_rank"),
}


@eager
@pytest.mark.parametrize("name", RECIPES)
def test_it_is_the_formula(xp, name):
    """1e3 eps cover the condition of the block; measured 30."""
    recipe, U = RECIPES[name], example()
    O, s, *rest = computed(xp, recipe, U)
    captured, omega = rest or (None, None)
    expected, part, _ = direction(U, recipe.rank, omega, n_iter=recipe.n_iter, tail=recipe.tail)
    tol = 1e3 * np.finfo(float).eps
    assert error(O, expected) <= tol
    assert s.item() == pytest.approx(expected_length(recipe, U, expected), rel=tol)
    assert captured is None or error(captured, part) <= tol


@pytest.mark.parametrize("dtype", ["float32", "complex64", "complex128"])
@pytest.mark.parametrize("shape", [SHAPE, SHAPE[::-1], (30, 30), (400, 20)])
@pytest.mark.parametrize("xp", ["numpy", "torch:cpu", "strict:device1"], indirect=True)
def test_it_is_the_formula_for_tall_and_wide_in_every_dtype(xp, dtype, shape):
    U = example(dtype, shape)
    wide = U.astype(np.result_type(dtype, float))
    for recipe in RECIPES.values():
        O, s, *rest = computed(xp, recipe, U)
        omega = rest[1].astype(wide.dtype) if rest else None
        expected, _, _ = direction(wide, recipe.rank, omega, n_iter=recipe.n_iter, tail=recipe.tail)
        tol = 1e3 * float(np.finfo(dtype).eps)
        assert error(O, expected) <= tol, recipe
        assert s.item().real == pytest.approx(expected_length(recipe, wide, expected), rel=tol), recipe


# facts -------------------------------------------------------------------------------------------


@eager
def test_without_a_tail_r_singular_values_are_one(xp):
    O, *_ = computed(xp, RECIPES["cold"], example())
    sigma = np.linalg.svd(O, compute_uv=False)
    assert np.abs(sigma - (np.arange(min(SHAPE)) < RANK)).max() <= 32 * np.finfo(float).eps


@eager
def test_with_a_tail_of_weight_one_the_norm_is_that_of_a_full_direction(xp):
    for rank in (RANK,) if xp.name == "jax" else (1, RANK, 12):
        O, *_ = computed(xp, Recipe(rank=rank, tail=1.0), example())
        assert np.linalg.norm(O) == pytest.approx(math.sqrt(min(SHAPE)), rel=64 * np.finfo(float).eps)


def test_the_automatic_weight_is_the_root_of_eight_times_the_share_of_the_rank():
    assert [tail_weight(r, 128) for r in (4, 16, 64)] == [0.5, 1.0, 2.0]
    auto, given = (Recipe(rank=RANK, tail=t).alpha(16, 128) for t in ("auto", 1.0))
    assert auto == given


def test_the_tail_shrinks_smoothly_to_nothing_as_the_rank_falls_to_r(host):
    """In proportion below FLOOR, down to a tail that is rounding noise of U and ends as one of O.

    A column's ||u||^2 - ||b||^2 loses eps/share^2, of which 64; and 1e5 eps are the noise of U over FLOOR.
    """
    eps, k = np.finfo(float).eps, min(SHAPE)
    left, right = (np.linalg.qr(gaussian(n, k, seed=i)).Q for i, n in enumerate(SHAPE))
    leading = left[:, :RANK] @ right[:, :RANK].T
    omega = right[:, :RANK].T.copy()  # finds the leading directions, so that the tail is known
    for share in (1.0, 0.1, 0.02, 0.005, 1e-3, 1e-6, 1e-10, 1e-13, 1e-15, 0.0):
        T = share * left[:, RANK:] @ right[:, RANK:].T
        O, *_ = computed(host, Recipe(rank=RANK, tail=1.0, warm_start=True), leading + T, omega)
        expected = levelled(T, leading + T, RANK)
        least = np.min(np.linalg.norm(T, axis=0) / np.linalg.norm(leading + T, axis=0))
        bound = 1e5 * eps + 64 * eps * np.linalg.norm(expected) / max(least, FLOOR) ** 2
        assert np.linalg.norm(O - leading - expected) <= bound, share


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_two_roundings_of_a_matrix_of_rank_r_give_one_direction(host, dtype):
    """A tail of rounding noise with norm 4.4 would not agree; 1e4 eps are the noise of U over FLOOR, measured 2600."""
    A, B = gaussian(SHAPE[0], RANK, dtype=dtype), gaussian(RANK, SHAPE[1], dtype=dtype, seed=1)
    recipe, eps = Recipe(rank=RANK, tail=1.0), np.finfo(dtype).eps
    exact = sign(A.astype(float) @ B.astype(float))
    for U in (A @ B, np.add.reduce([np.outer(A[:, i], B[i]) for i in range(RANK)])):
        O, *_ = computed(host, recipe, U)
        assert np.linalg.norm(O - exact) <= 1e4 * eps


def test_nuclear_length_is_the_inner_product_also_where_the_tail_is_nearly_gone(host):
    """<U, O>: what is put back of a tail below the floor counts by its size."""
    for noise in (1e-2, 1e-3, 1e-4, 0):
        U = with_spectrum(np.ones(RANK), *SHAPE) + noise * gaussian(*SHAPE, seed=7) / 10
        O, s, *_ = computed(host, Recipe(rank=RANK, tail="auto", scale="nuclear", n_iter=1), U)
        assert s.item() == pytest.approx(np.vdot(U, O), rel=1e-9), noise


@pytest.mark.parametrize("rank", [24, 100, 1.0, 0.99, None, lambda _: 24])
def test_a_rank_that_reaches_the_smaller_side_is_full(host, rank):
    full, other = (computed(host, Recipe(rank=r, tail=1.0, scale="nuclear"), example()) for r in (None, rank))
    assert len(full) == len(other)
    for x, y in zip(full, other, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("rank", "number"), [(0.25, 6), (0.01, 1), (lambda step: step + 2, 5), (lambda _: 0.5, 12)])
def test_a_rank_is_a_number_a_fraction_or_a_function_of_the_step(host, rank, number):
    results = (computed(host, Recipe(rank=r, tail=1.0), example(), step=3) for r in (rank, number))
    for x, y in zip(*results, strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_schedule_orthogonalizes_a_full_direction_and_no_other(host):
    muon = schedules.muon()
    O, *_ = computed(host, Recipe(schedule=muon), example())
    sigma = np.linalg.svd(O, compute_uv=False)
    assert 0.01 < np.abs(sigma - 1).max() < 0.35
    low = (computed(host, Recipe(rank=RANK, schedule=s), example())[0] for s in (None, muon))
    np.testing.assert_array_equal(*low)


SAME = {"seed": 0, "name": "w", "step": 0}


@eager
@pytest.mark.parametrize("other", [{"seed": 1}, {"name": "v"}, {"step": 1}])
def test_seed_name_and_step_determine_it_and_each_matters(xp, other):
    def at(seed, name, step):
        return computed(xp, Recipe(rank=RANK, seed=seed), example(), step=step, name=name)[0]

    first, again, another = at(**SAME), at(**SAME), at(**(SAME | other))
    np.testing.assert_array_equal(first, again)
    assert error(another, first) > 0.1


@eager
@pytest.mark.parametrize("name", RECIPES)
def test_a_power_of_two_changes_no_bit_and_multiplies_a_nuclear_length(xp, name):
    recipe, U = RECIPES[name], example()
    O, s, *_ = computed(xp, recipe, U)
    for exponent in (-1000, -600, -40, -3, 5, 33, 700):
        scaled, t, *_ = computed(xp, recipe, np.ldexp(U, exponent))
        np.testing.assert_array_equal(scaled, O, err_msg=str(exponent))
        np.testing.assert_array_equal(t, np.ldexp(s, exponent) if recipe.scale == "nuclear" else s)


@eager
@pytest.mark.parametrize("name", RECIPES)
def test_zero_gives_zero(xp, name):
    O, s, *_ = computed(xp, RECIPES[name], np.zeros(SHAPE))
    assert not O.any()
    assert np.isfinite(s).all()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (0, 4, 6), (2, 0, 3), (2, 3, 0)])
@pytest.mark.parametrize("scale", SCALES)
def test_an_empty_matrix_or_stack_gives_one(host, shape, scale):
    for recipe in (Recipe(scale=scale), Recipe(rank=2, tail=1.0, scale=scale), Recipe(rank=2, scale=scale)):
        assert computed(host, recipe, np.zeros(shape))[0].shape == shape


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_stack_is_a_loop(host, name, dtype):
    """One draw serves the stack; bit for bit on NumPy, to 64 eps where a batched product rounds differently."""
    recipe, U = RECIPES[name], np.stack([example(dtype, seed=i) for i in range(6)]).reshape(2, 3, *SHAPE)
    U[0, 1] *= np.float32(2.0**60)  # makes a stack be scaled as a whole
    U[1, 1] = 0
    together, lengths, *_ = computed(host, recipe, U)
    for i in np.ndindex(2, 3):
        alone, s, *_ = computed(host, recipe, U[i])
        if host.name == "numpy":
            np.testing.assert_array_equal(together[i], alone)
        assert np.linalg.norm(together[i] - alone) <= 64 * np.finfo(dtype).eps * np.linalg.norm(alone)
        assert lengths[i].item() == pytest.approx(s.item(), rel=64 * float(np.finfo(dtype).eps))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        *(({"rank": r}, RankError) for r in (0, -1, 1.5, 0.0, -0.5, math.nan, True, "8")),
        *(({"n_iter": q}, RankError) for q in (-1, 1.5, True)),
        *(({"seed": s}, RankError) for s in (-1, 0.5)),
        *(({"tail": t}, OptionError) for t in (-0.1, math.nan, math.inf, "all", True)),
        ({"sketch": "uniform"}, OptionError),
        ({"scale": "adam"}, OptionError),
        ({"scale": None}, OptionError),
        ({"schedule": "muon"}, OptionError),
    ],
)
def test_a_bad_recipe_is_refused_by_name_when_it_is_written(options, error):
    with pytest.raises(error, match=rf"^{next(iter(options))}: "):
        Recipe(**options)


@pytest.mark.parametrize("rank", [0, 1.5, "8"])
def test_a_bad_rank_of_a_function_is_refused_when_it_is_used(host, rank):
    with pytest.raises(RankError, match=r"^rank: "):
        computed(host, Recipe(rank=lambda _: rank), example())


# any matrix --------------------------------------------------------------------------------------


@st.composite
def problems(draw):
    """A recipe and a matrix of 1 to 20 rows and columns, up to four of whose directions may be zero."""
    shape = draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    k = min(shape)
    recipe = Recipe(
        rank=draw(st.one_of(st.none(), st.integers(1, k + 2))),
        n_iter=draw(st.integers(0, 2)),
        sketch=draw(st.sampled_from(["gaussian", "sparse_sign", "columns"])),
        tail=draw(st.sampled_from([0.0, 0.5, 1.0, "auto", 3])),
        scale=draw(st.sampled_from(SCALES)),
        seed=draw(st.integers(0, 9)),
    )
    dtype = draw(st.sampled_from(["float32", "float64", "complex128"]))
    rank = max(1, k - draw(st.integers(0, 4)))
    exponent = draw(st.integers(-30, 30))
    return recipe, matrix(shape, dtype, draw(st.integers(0, 2**32 - 1)), rank=rank, exponent=exponent)


@given(problems(), st.sampled_from(["numpy", "torch:cpu", "strict:device1"]).map(BACKENDS.get))
def test_it_is_finite_and_its_norm_is_bounded(problem, xp):
    """||O||_F^2 <= r + alpha^2 (k - r)."""
    recipe, U = problem
    O, s, *_ = computed(xp, recipe, U)
    k = min(U.shape)
    r = recipe.width(U.shape) or k
    assert np.isfinite(O).all()
    assert np.isfinite(s).all()
    bound = r + recipe.alpha(r, k) ** 2 * (k - r)
    assert np.linalg.norm(O) ** 2 <= bound * (1 + 64 * np.finfo(U.dtype).eps / FLOOR**2)


def condition(U, omega, n_iter, alpha):
    """Condition numbers of what is factorized, multiplied; the lengths of a tail add 1/share^2."""
    Y = U @ omega
    product = np.linalg.cond(Y)
    for _ in range(n_iter):
        Z = adjoint(U) @ np.linalg.qr(Y).Q
        Y = U @ np.linalg.qr(Z).Q
        product *= np.linalg.cond(Z) * np.linalg.cond(Y)
    Q = np.linalg.qr(Y).Q
    B = adjoint(Q) @ U
    T, lengths = U - Q @ B, np.linalg.norm(U, axis=0)
    share = np.min(np.linalg.norm(T, axis=0)[lengths > 0] / lengths[lengths > 0])
    return product * np.linalg.cond(B) + alpha / max(share, FLOOR) ** 2


@given(problems(), st.sampled_from(["numpy", "torch:cpu", "strict:device1"]).map(BACKENDS.get))
def test_it_is_the_formula_wherever_that_is_well_conditioned(problem, xp):
    recipe, U = problem
    O, s, *rest = computed(xp, recipe, U)
    eps, U = np.finfo(U.dtype).eps, U.astype(np.result_type(U, float))
    r, omega = recipe.width(U.shape), rest[1].astype(U.dtype) if rest else None
    alpha = recipe.alpha(r or 1, min(U.shape))
    cond = np.linalg.cond(U) if r is None else condition(U, omega, recipe.n_iter, alpha)
    assume(cond < 1e-3 / eps)
    expected, _, _ = direction(U, r, omega, n_iter=recipe.n_iter, tail=alpha)
    assert error(O, expected) <= 100 * eps * cond
    assert s.item().real == pytest.approx(expected_length(recipe, U, expected), rel=100 * float(eps) * cond)


FRACTIONS = (np.float16(0.25), np.float32(0.25), np.float64(0.25), np.longdouble(0.25), Fraction(1, 4))
COUNTS = (np.int8(8), np.uint16(8), np.int64(8))


@pytest.mark.parametrize("rank", [0.25, *FRACTIONS, 8, *COUNTS], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("given_as", [lambda r: r, lambda r: lambda _: r], ids=["number", "function"])
def test_numbers_of_every_library_are_ranks(rank, given_as):
    assert Recipe(rank=given_as(rank)).width((32, 48)) == 8


@pytest.mark.parametrize(
    "rank",
    [True, np.True_, 0, np.int64(-1), 0.0, np.float32(1.5), np.float64("nan"), 0.25j, "8", np.array(0.25)],
    ids=repr,
)
def test_what_is_no_rank_is_refused(rank):
    with pytest.raises(RankError, match="rank: expected"):
        Recipe(rank=rank)
