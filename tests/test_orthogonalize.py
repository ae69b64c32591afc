"""A direction is the matrix sign of its input: one above the line, zero below it, on every library."""

import itertools

import array_api_strict
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import BACKENDS
from gallery import DTYPES, FAMILIES, case, ldexp, scaled

import orthlin
from orthlin import schedules, steppers
from orthlin._polynomial import converging, separating

SHAPES = ((1, 1), (7, 1), (32, 32), (96, 32), (32, 96), (128, 128))
PATHS = {"numpy": 0.9, "torch:cpu": 0.9, "strict:device1": None}  # below which share of the line all is zero
METHODS = ("auto", "svd", "newton_schulz", "gram_newton_schulz")


def zone(k):
    """Below which share of the line the products leave nothing."""
    return 1 / (4 * k**0.25)


def judged(A, O, share):
    """How far from one above the line, and how large below `share` of it, in eps."""
    sigma = np.linalg.svd(scaled(A)[0], compute_uv=False)
    eps, line = np.finfo(A.dtype).eps, max(A.shape) * np.finfo(A.dtype).eps * sigma[0]
    given = np.linalg.svd(ldexp(O, 0), compute_uv=False)
    above, below = int((sigma > 1.1 * line).sum()), int((sigma > share * line).sum())
    one = np.abs(given[:above] - 1).max(initial=0) / (eps * np.sqrt(len(sigma)))
    return one, given[below:].max(initial=0) / eps, (given[0] - 1) / eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PATHS)
def test_above_the_line_one_and_below_it_zero(name, dtype):
    for family, shape, seed in itertools.product(FAMILIES, SHAPES, (21,)):
        A = case(family, shape, dtype, seed).A
        share = PATHS[name] or zone(min(shape))
        one, rest, over = judged(A, BACKENDS[name].call(orthlin.orthogonalize, A), share)
        assert max(one, rest, over / np.sqrt(min(shape))) <= 32, (family, shape)


@pytest.mark.parametrize("dtype", ["float32", "complex128"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_the_rule(method, dtype):
    for family in ("half_rank", "zero_column", "all_ones", "geometric_sqrt", "zero", "one_large"):
        for shape in ((32, 32), (32, 96)):
            A = case(family, shape, dtype, 3).A
            one, rest, _ = judged(A, orthlin.orthogonalize(A, method=method), zone(32))
            assert max(one, rest) <= 32, (family, shape)


def test_jax_keeps_the_rule():
    A = np.stack([case(f, (32, 32), "float32", 4).A for f in ("half_rank", "zero_column", "all_ones", "gaussian")])
    for given, O in zip(A, BACKENDS["jax"].call(orthlin.orthogonalize, A), strict=True):
        assert max(judged(given, O, zone(32))[:2]) <= 32


@pytest.mark.parametrize("name", ["numpy", "torch:cpu", "strict:device1", "jax"])
@pytest.mark.parametrize("stepper", [steppers.msgd(1.0), steppers.muon(1.0), steppers.muon(1.0, rank=64)])
def test_a_full_step_of_a_rank_one_gradient_has_rank_one_and_dead_rows_rest(name, stepper):
    rng = np.random.default_rng(0)
    u, v = rng.standard_normal((8, 1)), rng.standard_normal((1, 12))
    u[3] = 0
    G, X = (u @ v).astype("float32"), np.zeros((8, 12), "float32")
    with BACKENDS[name].context():
        native, gradient = BACKENDS[name].asarray(X), BACKENDS[name].asarray(G)
        step = BACKENDS[name].to_numpy(stepper.update(gradient, stepper.init(native), native)[0])
    np.testing.assert_allclose(abs(step), abs(u @ v) / np.linalg.norm(u @ v), rtol=0, atol=1e-5)
    assert np.linalg.norm(step[3]) <= 1e-6


HALVES = {
    "numpy:float16": (lambda a: a.astype("float16"), 2.0**-10),
    "torch:bfloat16": (lambda a: torch.asarray(a, dtype=torch.bfloat16), 2.0**-7),
    "jax:bfloat16": (lambda a: jnp.asarray(a, dtype=jnp.bfloat16), 2.0**-7),
}


@pytest.mark.parametrize(("make", "eps"), HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("method", ["auto", "newton_schulz"])
def test_half_precision_is_as_accurate_as_it_can_hold(make, eps, method):
    """One rounding of the result, and the noise of a rank-one input is not lifted."""
    rng = np.random.default_rng(1)
    Q = np.linalg.qr(rng.standard_normal((24, 16))).Q
    for sigma, rank in ((np.geomspace(1, 0.1, 16), 16), (np.eye(16)[0], 1)):
        A = make((Q * sigma) @ np.linalg.qr(rng.standard_normal((16, 16))).Q)
        O = orthlin.orthogonalize(A, method=method)
        assert O.dtype == A.dtype
        given = np.linalg.svd(np.asarray(O.double() if isinstance(O, torch.Tensor) else O, float), compute_uv=False)
        assert np.abs(given[:rank] - 1).max() <= eps * 4
        assert given[rank:].max(initial=0) <= eps * 4


def test_the_rule_costs_no_more_products_than_convergence():
    for eps, n in itertools.product((2.0**-23, 2.0**-52), (128, 300, 1024, 4096)):
        assert separating(n * eps / n**0.25, eps).products <= converging(eps, eps).products
    assert separating(2.0**-7 / 128**0.25, 2.0**-7).products < converging(2.0**-23, 2.0**-23).products


@pytest.mark.parametrize("kind", ["gaussian", 10.0, 1e2, 1e4, 1e6])
def test_the_backward_error_of_products_is_near_that_of_decompositions(kind):
    """300 x 300 in float32: 4.8 eps, before the last step 12.9; JAX's QDWH has 3.6 to 8.2."""
    rng = np.random.default_rng(0)
    A = rng.standard_normal((300, 300))
    if kind != "gaussian":
        Q, V = np.linalg.qr(A).Q, np.linalg.qr(rng.standard_normal((300, 300))).Q
        A = (Q * np.geomspace(1, 1 / kind, 300)) @ V
    A = A.astype("float32")
    U, H = (x.astype(float) for x in BACKENDS["strict:device1"].call(orthlin.polar, A))
    assert np.linalg.norm(A - U @ H) <= 7 * 2.0**-23 * np.linalg.norm(A)


@pytest.mark.parametrize("device", ["no_x64", "no_float64"])
def test_devices_without_wide_dtypes(device):
    xs = array_api_strict
    A = xs.asarray(np.random.default_rng(0).standard_normal((6, 8)).astype("float32"), device=xs.Device(device))
    for sketch, method in itertools.product(("gaussian", "columns", "sparse_sign"), ("auto", "exact")):
        assert orthlin.lowrank_orth(A, 3, sketch=sketch, method=method, rng=0).dtype == xs.float32
    for sketch in ("gaussian", "columns", "sparse_sign"):
        assert orthlin.randomized_range_finder(A, 3, sketch=sketch, n_iter=1, rng=0).shape[0] == 6
    assert int(orthlin.metrics.numerical_rank(A)) == 6
    for method in ("auto", "householder", "cholesky2", "shifted_cholesky3"):
        assert orthlin.qr(A.mT, method=method).Q.device == A.device
    for options in ({}, {"method": "svd"}, {"tol": 0.1}, {"schedule": schedules.muon()}):
        assert orthlin.orthogonalize(A, **options).device == A.device
    for stepper in (steppers.muon(0.1), steppers.msgd(0.1, rank=3, sketch="columns")):
        assert stepper.update(A, stepper.init(A), A)[0].device == A.device
