"""Low-rank orthogonalization: edges, scale, batches, errors, and what tracers and autograd see."""

import jax
import numpy as np
import pytest
import torch
from conftest import BACKENDS
from test_rangefinder import RANK, SHAPE, defect, gaussian, with_spectrum

from orthlin import lowrank_orth, lowrank_orth_factors, randomized_range_finder
from orthlin.errors import ArrayTypeError, DeviceError, DTypeError, NonFiniteError, OptionError, RankError, ShapeError

METHODS = ("auto", "exact")


@pytest.fixture(params=["numpy", "torch:cpu"])
def host(request):
    return BACKENDS[request.param]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 6), (0, 4), (4, 0), (0, 4, 3), (2, 0, 3, 4), (2, 3, 0)])
def test_rank_zero_and_empty_dimensions_give_zeros_of_the_right_shape(host, shape, method):
    for r in {0, min(shape[-2:])} if 0 in shape else {0}:
        O = host.call(lowrank_orth, gaussian(*shape), r, method=method, rng=0)
        Q, W = host.call(lowrank_orth_factors, gaussian(*shape), r, method=method, rng=0)
        assert O.shape == shape
        assert not O.any()
        assert (Q.shape, W.shape) == ((*shape[:-1], r), (*shape[:-2], r, shape[-1]))


@pytest.mark.parametrize("n_oversamples", [2, 100])
def test_rank_zero_stays_zero_with_oversampling(host, n_oversamples):
    O = host.call(lowrank_orth, gaussian(3, 6, 4), 0, n_oversamples=n_oversamples, rng=0)
    assert O.shape == (3, 6, 4)
    assert not O.any()


OPTIONS = [{}, {"method": "exact"}, {"n_oversamples": 3}, {"n_iter": 2}, {"sketch": "columns"}]


@pytest.mark.parametrize("options", OPTIONS)
def test_zero_gives_zero(host, options):
    assert not host.call(lowrank_orth, np.zeros((3, 8, 12)), 4, rng=0, **options).any()


def test_zero_gives_zero_on_devices():
    for name in ("strict:device1", "jax"):
        assert not BACKENDS[name].call(lowrank_orth, np.zeros(SHAPE), RANK, test_matrix=gaussian(SHAPE[1], RANK)).any()


MIXED = np.stack(
    [
        with_spectrum(s, 60, 40)
        for s in (
            np.ones(40),
            np.geomspace(1, 1e-3, 40),
            np.geomspace(1, 1e-7, 40),
            np.ones(5),
            np.geomspace(1, 1e-14, 40),
        )
    ]
)


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64"])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_batch_is_a_loop_bit_for_bit_whatever_it_mixes(dtype, options):
    """Well and badly conditioned matrices take different ways; each takes its own in company too."""
    G = MIXED.astype(dtype)
    together = lowrank_orth(G, 12, rng=1, **options)
    for i, one in enumerate(G):
        assert np.array_equal(together[i], lowrank_orth(one, 12, rng=1, **options)), i


def test_leading_dimensions_are_kept_and_scales_may_differ_within_a_batch(host):
    G = gaussian(2, 3, 8, 12) * 10.0 ** gaussian(2, 3, 1, 1, seed=3) ** 3
    O = host.call(lowrank_orth, G, 4, rng=0)
    for index in np.ndindex(2, 3):
        alone = host.call(lowrank_orth, G[index], 4, rng=0)
        assert np.linalg.norm(O[index] - alone) <= 1e3 * np.finfo(float).eps


@pytest.mark.parametrize("batch", [(3,), (1,), (2, 3), (2, 1)])
def test_a_stack_of_test_matrices_broadcasts(host, batch):
    G, omega = gaussian(2, 3, 8, 12), gaussian(*batch, 12, 4, seed=1)
    O, each = host.call(lowrank_orth, G, 4, test_matrix=omega), np.broadcast_to(omega, (2, 3, 12, 4))
    for index in np.ndindex(2, 3):
        alone = host.call(lowrank_orth, G[index], 4, test_matrix=np.array(each[index]))
        assert np.linalg.norm(O[index] - alone) <= 1e3 * np.finfo(float).eps


@pytest.mark.parametrize("power", [-100, 100])
def test_powers_of_two_change_nothing(xp, power):
    G, omega = gaussian(*SHAPE, dtype="float32"), gaussian(SHAPE[1], RANK, dtype="float32", seed=1)
    plain, large = (xp.call(lowrank_orth, A, RANK, test_matrix=omega) for A in (G, G * 2.0**power))
    assert np.array_equal(plain, large)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("decade", range(-36, 38, 6))
def test_every_scale_of_float32_is_right(host, method, decade):
    """Entries down to 1e-39 lose bits to gradual underflow, which changes the matrix itself: from 1e-36 on."""
    G, omega = gaussian(*SHAPE), gaussian(SHAPE[1], RANK, dtype="float32", seed=1)
    A = (G / 4 * 10.0**decade).astype("float32")
    O = host.call(lowrank_orth, A, RANK, test_matrix=omega, method=method)
    plain = host.call(lowrank_orth, (G / 4).astype("float32"), RANK, test_matrix=omega, method=method)
    assert np.linalg.norm(O - plain) <= 1e3 * np.finfo(np.float32).eps


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_in_half_precision_out(dtype, method):
    """Against the same numbers in float64: only the result is rounded."""
    dtype = getattr(torch, dtype)
    G, omega = (torch.from_numpy(gaussian(*s, seed=i)).to(dtype) for i, s in enumerate((SHAPE, (SHAPE[1], RANK))))
    O = lowrank_orth(G, RANK, test_matrix=omega, method=method)
    expected = lowrank_orth(G.double(), RANK, test_matrix=omega.double())
    assert O.dtype == dtype
    bound = torch.finfo(dtype).eps * RANK**0.5
    assert torch.linalg.matrix_norm(O.double() - expected) <= bound


def test_half_precision_of_numpy():
    G = gaussian(*SHAPE, dtype="float16")
    O = lowrank_orth(G, RANK, rng=0)
    assert O.dtype == np.float16
    assert np.abs(np.linalg.svd(O.astype(float), compute_uv=False)[:RANK] - 1).max() <= np.finfo(np.float16).eps * RANK


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("argument", ["G", "test_matrix"])
def test_what_is_not_finite_is_an_error_on_the_host_and_nan_elsewhere(xp, argument, value):
    given = {"G": gaussian(*SHAPE), "test_matrix": gaussian(SHAPE[1], RANK)}
    given[argument][1, 2] = value
    if xp.host:
        with pytest.raises(NonFiniteError, match=f"{argument}: holds NaN or infinity"):
            xp.call(lowrank_orth, given["G"], RANK, test_matrix=given["test_matrix"])
    else:
        assert np.isnan(xp.call(lowrank_orth, given["G"], RANK, test_matrix=given["test_matrix"])).all()


@pytest.mark.parametrize("routine", [lowrank_orth, lowrank_orth_factors])
@pytest.mark.parametrize(("bad", "named"), [(-1, "-1"), (9, "9"), (2.5, r"2\.5"), (None, "None"), (True, "True")])
def test_a_bad_rank_is_an_error_that_names_it_and_the_limit(host, routine, bad, named):
    for shape in ((8, 12), (3, 12, 8)):
        with pytest.raises(RankError, match=f"r: .*{named}.* = 8 "):
            host.call(routine, gaussian(*shape), bad, rng=0)


@pytest.mark.parametrize("r", [0, 8, np.int64(5), np.uint8(5)])
def test_a_good_rank_of_any_integer_type_is_taken(host, r):
    sigma = np.linalg.svd(host.call(lowrank_orth, gaussian(8, 12), r, rng=0), compute_uv=False)
    assert np.count_nonzero(sigma > 0.5) == r


@pytest.mark.parametrize(
    ("shape", "error"), [((11, 4), ShapeError), ((12, 3), ShapeError), ((12, 9), ShapeError), ((2, 12, 4), ShapeError)]
)
def test_a_test_matrix_that_does_not_fit_is_an_error(shape, error):
    with pytest.raises(error, match="test_matrix"):
        lowrank_orth(gaussian(3, 8, 12), 4, test_matrix=gaussian(*shape))


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (torch.ones(12, 4, dtype=torch.float64), ArrayTypeError),
        (np.ones((12, 4), dtype=int), DTypeError),
        (np.ones((12, 4), dtype=complex), DTypeError),
    ],
)
def test_a_test_matrix_of_another_kind_is_an_error(bad, error):
    with pytest.raises(error, match="test_matrix"):
        lowrank_orth(gaussian(8, 12), 4, test_matrix=bad)


def test_a_test_matrix_on_another_device_is_an_error():
    G, omega = BACKENDS["strict:device1"].asarray(gaussian(8, 12)), BACKENDS["strict"].asarray(gaussian(12, 4))
    with pytest.raises(DeviceError, match="test_matrix"):
        lowrank_orth(G, 4, test_matrix=omega)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"method": "svd"}, OptionError),
        ({"sketch": "fft"}, OptionError),
        ({"n_iter": -1}, RankError),
        ({"n_oversamples": 1.5}, RankError),
    ],
)
def test_a_bad_option_is_an_error_that_names_it(options, error):
    ((name, value),) = options.items()
    with pytest.raises(error, match=f"{name}: .*{value}"):
        lowrank_orth(gaussian(8, 12), 4, **options)


FUNCTIONS = {
    "auto": lambda G, omega: lowrank_orth(G, RANK, test_matrix=omega),
    "tol": lambda G, omega: lowrank_orth(G, RANK, test_matrix=omega, tol=0.1),
    "truncated": lambda G, omega: lowrank_orth(G, RANK - 1, test_matrix=omega, n_iter=1),
    "factors": lambda G, omega: lowrank_orth_factors(G, RANK, test_matrix=omega).W,
    "range": lambda G, omega: randomized_range_finder(G, RANK, test_matrix=omega, n_iter=1),
    "plain_range": lambda G, omega: randomized_range_finder(G, 2, test_matrix=omega, normalizer="none", n_iter=1),
}
G64, OMEGA64 = (torch.from_numpy(gaussian(*s, seed=i)) for i, s in enumerate((SHAPE, (SHAPE[1], RANK))))


def close(a, b, factor=1e3):
    return torch.linalg.matrix_norm(a - b).max() <= factor * torch.finfo(a.dtype).eps


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # array-api-compat's
@pytest.mark.parametrize("name", FUNCTIONS)
def test_torch_compile_neither_breaks_the_graph_nor_changes_the_result(name):
    torch.compiler.reset()
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend="eager")
    assert close(compiled(G64, OMEGA64), FUNCTIONS[name](G64, OMEGA64))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_meta_device_gives_shapes(name):
    expected, found = FUNCTIONS[name](G64, OMEGA64), FUNCTIONS[name](G64.to("meta"), OMEGA64.to("meta"))
    assert (found.shape, found.dtype, found.device.type) == (expected.shape, expected.dtype, "meta")


@pytest.mark.parametrize("sketch", ["gaussian", "sparse_sign", "columns"])
def test_the_meta_device_gives_shapes_with_a_seed_too(sketch):
    assert lowrank_orth(G64.to("meta"), 3, sketch=sketch, rng=0).shape == SHAPE


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap_is_a_batch(name):
    stack = torch.from_numpy(gaussian(3, *SHAPE, seed=7))
    mapped = torch.func.vmap(FUNCTIONS[name], in_dims=(0, None))(stack, OMEGA64)
    assert close(mapped, FUNCTIONS[name](stack, OMEGA64))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_leaf_that_requires_grad_is_worked_on_and_left_alone(name):
    leaf = torch.nn.Parameter(G64.clone())
    result = FUNCTIONS[name](leaf, OMEGA64)
    assert torch.equal(result.detach(), FUNCTIONS[name](G64, OMEGA64))
    assert leaf.grad is None
    assert torch.equal(leaf.detach(), G64)
    with torch.no_grad():
        assert not FUNCTIONS[name](leaf, OMEGA64).requires_grad


@pytest.mark.parametrize("name", ["auto", "range"])
def test_jit_is_eager(name):
    jax_, jit = (BACKENDS[b].call(FUNCTIONS[name], G64.numpy(), OMEGA64.numpy()) for b in ("jax", "jax:jit"))
    assert np.linalg.norm(jax_ - jit) <= 1e3 * np.finfo(float).eps


def test_a_key_is_an_argument_under_jit():
    drawn = jax.jit(lambda G, key: lowrank_orth(G, RANK, rng=key))(jax.numpy.asarray(G64.numpy()), jax.random.key(0))
    assert defect(np.linalg.svd(np.asarray(drawn))[0][:, :RANK]) <= 32
    assert abs(np.linalg.svd(np.asarray(drawn), compute_uv=False)[:RANK] - 1).max() <= 32 * np.finfo(float).eps


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("function", [lowrank_orth, lowrank_orth_factors])
def test_what_a_test_matrix_does_not_see_is_refused_all_the_same(function, bad):
    G, omega = np.ones((20, 30), dtype="float32"), np.eye(30, 4, dtype="float32")
    G[3, 7] = bad
    with pytest.raises(NonFiniteError, match="G: holds NaN or infinity"):
        function(G, 4, test_matrix=omega)


def test_what_a_test_matrix_does_not_see_may_be_of_any_size():
    G = np.random.default_rng(0).standard_normal((20, 30)).astype("float32")
    omega = np.random.default_rng(1).standard_normal((30, 4)).astype("float32")
    G[:, 5], omega[5] = 3e38, 0
    O = lowrank_orth(G, 4, test_matrix=omega)
    assert np.isfinite(O).all()
    assert abs(np.linalg.norm(O, 2) - 1) < 1e-6


@pytest.mark.parametrize("tol", [None, 0.1])
@pytest.mark.parametrize("n_iter", [0, 1])
@pytest.mark.parametrize(("dtype", "decades"), [("float32", (8, 20, 30, 37)), ("float64", (8, 160, 200, 307))])
def test_a_sketch_may_miss_all_that_is_large(xp, dtype, decades, n_iter, tol):
    """Also where the squares of what it finds are out of range, with and without a wider dtype."""
    omega = np.eye(9, 2, k=-3, dtype=dtype)
    for decade in decades:
        G = np.zeros((6, 9), dtype)
        G[0, 0], G[1, 3], G[2, 4] = 1.0, 10.0**-decade, 2 * 10.0**-decade
        with jax.enable_x64(dtype == "float64"):
            Q, W = xp.call(lowrank_orth_factors, G, 2, test_matrix=omega, n_iter=n_iter, tol=tol)
        for factor in (Q, W):
            sigma = np.linalg.svd(factor, compute_uv=False)
            assert np.abs(sigma - 1).max() <= (tol or 32 * np.finfo(dtype).eps), decade
