"""Test matrices: their distribution, and that a draw depends on `rng` and on nothing else."""

import math
import random

import jax
import numpy as np
import pytest
import scipy.stats
import torch
from array_api_compat import array_namespace
from conftest import BACKENDS
from torch._subclasses import FakeTensorMode

import orthlin
from orthlin import _signs, sketch
from orthlin.errors import DeviceError, DTypeError, RankError, RngError

SIX_SIGMA = 6.0  # exceeded by a normal number with probability 2e-9
N, WIDTH = 500, 40  # one shape for all, because JAX compiles every new one
KINDS = ("gaussian", "sparse_sign", "columns")
LIBRARIES = {"numpy": np.ones, "torch": torch.ones, "jax": jax.numpy.ones}


def draw(xp, kind, rng, n=N, width=WIDTH, dtype="float64", **options):
    """A test matrix, or the indices of columns as numbers of `dtype`, from arrays of a backend."""

    def run(like, **options):
        drawn = getattr(sketch, kind)(n, width, like=like, **options)
        return array_namespace(like).astype(drawn, like.dtype)

    return xp.call(run, np.zeros(1, dtype=dtype), **({} if xp.jit and rng is None else {"rng": rng}), **options)


@pytest.fixture(params=["numpy", "torch:cpu"])
def host(request):
    return BACKENDS[request.param]


@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_gaussian_numbers_are_standard_normal(xp, dtype):
    """Six standard errors for the moments; Kolmogorov and Smirnov's statistic fails with probability 1e-9."""
    omega = draw(xp, "gaussian", 1, dtype=dtype)
    assert omega.shape == (N, WIDTH)
    parts = [omega.real, omega.imag] if omega.dtype.kind == "c" else [omega]
    for part in (p.ravel() * math.sqrt(len(parts)) for p in parts):
        count = part.size
        assert abs(part.mean()) <= SIX_SIGMA / math.sqrt(count)
        assert abs((part**2).mean() - 1) <= SIX_SIGMA * math.sqrt(2 / count)
        assert scipy.stats.kstest(part, "norm").statistic <= math.sqrt(math.log(2 / 1e-9) / (2 * count))
    if len(parts) == 2:
        assert abs((omega**2).mean()) <= SIX_SIGMA / math.sqrt(omega.size / 2)  # the parts do not depend on each other


def test_gaussian_columns_are_uncorrelated(host):
    omega = draw(host, "gaussian", 2)
    gram = omega.T @ omega / N - np.eye(WIDTH)
    assert np.abs(gram - np.diag(np.diag(gram))).max() <= SIX_SIGMA / math.sqrt(N)


@pytest.mark.parametrize("nonzeros", [1, 8, 100])
def test_sparse_sign_has_its_nonzeros_in_every_row(xp, nonzeros):
    taken = min(nonzeros, WIDTH)
    omega = draw(xp, "sparse_sign", 3, nonzeros=nonzeros)
    assert (np.count_nonzero(omega, axis=1) == taken).all()
    assert np.allclose(np.abs(omega[omega != 0]), 1 / math.sqrt(taken), rtol=1e-15, atol=0)


def test_sparse_sign_is_uniform_over_places_and_signs(host):
    """A place is Bernoulli with probability 8/40 and a sign with 1/2; six standard deviations each."""
    omega, p = draw(host, "sparse_sign", 4), 8 / WIDTH
    per_column = np.count_nonzero(omega, axis=0)
    assert np.abs(per_column - N * p).max() <= SIX_SIGMA * math.sqrt(N * p * (1 - p))
    assert abs(np.sign(omega).sum()) <= SIX_SIGMA * math.sqrt(N * 8)
    assert np.sum(omega**2) == pytest.approx(N)  # a column has N / WIDTH on average


@pytest.mark.parametrize("entries", [1, 64, 1 << 18])
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
@pytest.mark.parametrize(("shape", "width"), [((9, 50), 8), ((2, 5, 21), 21), ((3, 7, 4), 9), ((0, 6), 2), ((6, 0), 0)])
@pytest.mark.parametrize("name", [name for name, backend in BACKENDS.items() if backend.host])
def test_sums_of_blocks_are_the_product(monkeypatch, name, shape, width, dtype, entries):
    """A few rows at a time, or all of them."""
    host = BACKENDS[name]
    monkeypatch.setattr(_signs, "_ENTRIES", entries)
    X = np.random.default_rng(0).standard_normal(shape).astype(dtype)

    def sums(X):
        return _signs.sparse_sampler(array_namespace(X), X, width, 8)(X, None)

    omega = draw(host, "sparse_sign", 8, n=shape[-1], width=width, dtype=dtype, nonzeros=_signs.NONZEROS)
    np.testing.assert_allclose(host.call(sums, X), X @ omega, atol=50 * np.finfo(dtype).eps)


def test_columns_are_distinct_and_any_can_be_taken(xp):
    indices = draw(xp, "columns", 5)
    assert indices.shape == (WIDTH,)
    assert len(set(indices)) == WIDTH
    assert set(indices) <= set(range(N))


def test_columns_are_uniform(host):
    """2,000 draws of 3 out of 7 in order: a column is each of them with probability 1/7."""
    drawn = np.stack([draw(host, "columns", seed, n=7, width=3) for seed in range(2000)])
    for position in drawn.T:
        counts = np.bincount(position.astype(int), minlength=7)
        assert np.abs(counts - 2000 / 7).max() <= SIX_SIGMA * math.sqrt(2000 * 6 / 49)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "width"), [(0, 0), (4, 0), (4, 4)])
def test_edges_of_the_shape(host, kind, n, width):
    drawn = draw(host, kind, 6, n=n, width=width)
    assert drawn.shape == ((width,) if kind == "columns" else (n, width))
    if kind == "columns" and width == n:
        assert sorted(drawn) == list(range(n))


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_numpy_generator_gives_the_same_test_matrix_on_every_library(xp, kind, dtype):
    double = "complex128" if dtype.startswith("complex") else "float64"
    expected = draw(BACKENDS["numpy"], kind, np.random.default_rng(7), dtype=double)
    found = draw(xp, kind, np.random.default_rng(7), dtype=dtype)
    assert np.array_equal(found, expected.astype(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_says_everything(xp, kind):
    first, again, other = (draw(xp, kind, seed) for seed in (11, np.int64(11), 12))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_seed_sequence_is_a_seed(host):
    first, again, other = (draw(host, "gaussian", np.random.SeedSequence(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("seed", [2**32, 2**63, 10**30])
def test_large_seeds_are_seeds_of_their_own(host, seed):
    assert not np.array_equal(draw(host, "gaussian", seed), draw(host, "gaussian", 0))


@pytest.mark.parametrize("name", LIBRARIES)
def test_no_seed_is_fresh_every_time(name):
    like = LIBRARIES[name](1)
    first, second = (np.asarray(sketch.gaussian(N, WIDTH, like=like)) for _ in range(2))
    assert not np.array_equal(first, second)


def test_a_native_generator_is_used_as_it_is():
    like = torch.ones(1, dtype=torch.float64)
    rng = torch.Generator().manual_seed(5)
    expected = torch.randn((N, WIDTH), dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    assert torch.equal(sketch.gaussian(N, WIDTH, like=like, rng=rng), expected)
    assert not torch.equal(sketch.gaussian(N, WIDTH, like=like, rng=rng), expected)  # it moved on


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_a_jax_key_says_everything(make):
    like = jax.numpy.ones(1)
    first, again, other = (np.asarray(sketch.gaussian(N, WIDTH, like=like, rng=make(s))) for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_cupy_generator_is_used_as_it_is():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    if not cupy.cuda.is_available():
        pytest.skip("CuPy is installed, but no CUDA device is available")
    like = cupy.ones(1)
    first, again = (sketch.gaussian(N, WIDTH, like=like, rng=cupy.random.default_rng(5)) for _ in range(2))
    assert bool((first == again).all())


def consumers(A):
    """Every public routine that draws, with an int for `rng`."""
    yield from (getattr(sketch, kind)(A.shape[1], 3, like=A, rng=0) for kind in KINDS)
    yield from (orthlin.lowrank_orth(A, 3, sketch=kind, rng=0) for kind in KINDS)
    yield orthlin.lowrank_orth_factors(A, 3, rng=0).W
    yield orthlin.randomized_range_finder(A, 3, rng=0)
    yield orthlin.adaptive_range_finder(A, tol=1e-3, rng=0)


@pytest.mark.parametrize("name", ["numpy", "torch"])
@pytest.mark.parametrize("seeds", [(0, 1)])
def test_global_random_state_is_neither_read_nor_written(name, seeds):
    A = LIBRARIES[name]((9, 8))
    results = []
    for seed in seeds:
        np.random.seed(seed)  # noqa: NPY002 the global state is what this test is about
        torch.manual_seed(seed)
        random.seed(seed)
        before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), random.getstate()  # noqa: NPY002
        results.append([np.asarray(x) for x in consumers(A)])
        sketch.gaussian(3, 2, like=A)  # neither does a fresh draw
        after = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), random.getstate()  # noqa: NPY002
        assert after == before
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize(
    "bad", [2.5, "seed", True, [1], np.random.RandomState(0), np.float64(1), object()], ids=lambda x: type(x).__name__
)
def test_what_is_no_source_is_an_error_that_names_it(name, bad):
    with pytest.raises(RngError, match=rf"rng: expected.*{type(bad).__name__}"):
        sketch.gaussian(3, 2, like=LIBRARIES[name](1), rng=bad)


@pytest.mark.parametrize(
    ("name", "foreign"),
    [
        ("numpy", torch.Generator()),
        ("jax", torch.Generator()),
        ("torch", jax.random.key(0)),
        ("numpy", jax.random.key(0)),
    ],
)
def test_a_generator_of_another_library_is_an_error(name, foreign):
    with pytest.raises(RngError, match="rng: expected"):
        sketch.columns(3, 2, like=LIBRARIES[name](1), rng=foreign)


def test_a_negative_seed_is_an_error_that_names_it(xp):
    with pytest.raises(RngError, match="-1"):
        draw(xp, "gaussian", -1)


def test_a_torch_generator_of_another_device_is_an_error():
    with FakeTensorMode():  # a CUDA array as far as its attributes go
        like = torch.empty(1, device="cuda")
    with pytest.raises(DeviceError, match=r"rng.*cpu.*cuda"):
        sketch.gaussian(3, 2, like=like, rng=torch.Generator())


@pytest.mark.parametrize("kind", KINDS)
def test_a_traced_function_cannot_draw_fresh_numbers(kind):
    with pytest.raises(RngError, match="key or an int"):
        draw(BACKENDS["jax:jit"], kind, None)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda like: sketch.gaussian(-1, 2, like=like), "n: .*-1"),
        (lambda like: sketch.gaussian(3, 2.5, like=like), "width: .*2.5"),
        (lambda like: sketch.sparse_sign(3, 2, like=like, nonzeros=0), "nonzeros: .*0"),
        (lambda like: sketch.columns(3, 4, like=like), "width: .*3.*4"),
        (lambda like: sketch.columns(None, 1, like=like), "n: .*None"),
    ],
)
def test_a_count_out_of_range_is_an_error_that_names_it(call, named):
    with pytest.raises(RankError, match=named):
        call(np.ones(1))


def test_integers_are_no_model_for_a_test_matrix():
    with pytest.raises(DTypeError, match=r"like: .*int64"):
        sketch.gaussian(3, 2, like=np.ones(1, dtype=np.int64))
