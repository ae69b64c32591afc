"""Repeated steps: a loop of Python, or one of JAX whose body is compiled once; and how large JAX's programs are."""

import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import orthlin
from orthlin import _backend as be
from orthlin import steppers
from orthlin._backend import loop
from orthlin._newton import newton_sign
from orthlin.jax import gradient_transformation

CUBICS, QUINTICS = ((1.5, -0.5), (1.4, -0.4), (1.3, -0.3), (1.2, -0.2)), ((1.875, -1.25, 0.375),) * 5
ROWS = {
    "none": (),
    "one": CUBICS[:1],
    "few": CUBICS[:3],
    "many": CUBICS * 3,
    "equal": QUINTICS,
    "of two lengths": CUBICS + QUINTICS + CUBICS[:2],
    "without coefficients": ((),) * 6,
}


def body(xp, state, row, *, first, last):
    """An odd polynomial of X; the ends leave out nothing that is asked for."""
    X, S, missing = state
    even = sum((c * S**i for i, c in enumerate(row)), start=xp.zeros_like(S)) if len(row) else xp.ones_like(S)
    X = even * X
    return X, S if last else X * X, missing


def run(x, rows):
    xp = be.namespace(x)
    return be.repeat(xp, body, (x, x * x, None), rows)[0]


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_the_same_on_every_library(xp, rows, dtype):
    x = np.random.default_rng(0).uniform(0.3, 0.9, (2, 3, 4)).astype(dtype)
    np.testing.assert_allclose(xp.call(lambda x: run(x, rows), x), run(x, rows), rtol=1e-5)


@pytest.mark.parametrize("rows", [CUBICS + QUINTICS, QUINTICS], ids=["varied", "equal"])
def test_a_loop_has_derivatives_in_both_modes(rows):
    x = jnp.asarray(np.random.default_rng(0).uniform(0.3, 0.9, (3, 4)))
    check_grads(lambda x: run(x, rows), (x,), order=2, modes=["fwd", "rev"])


def test_an_array_that_all_matrices_share_is_one_of_each():
    stack, shared = jnp.full((2, 3, 3), 0.5), jnp.full((3, 3), 0.5)
    X, _, _ = be.repeat(jnp, body, (shared, stack**2, None), QUINTICS)
    np.testing.assert_array_equal(X, jnp.broadcast_to(run(shared, QUINTICS), stack.shape))


def test_the_host_stops_where_it_may_and_tells_the_ends():
    seen = []

    def step(xp, state, row, *, first, last):
        seen.append((row[0], first, last))
        return (state[0] + 1,)

    rows = [(float(i),) for i in range(5)]
    x = np.zeros((1, 1))
    (found,) = be.repeat(np, step, (x,), rows, lambda _, state: bool(state[0][0, 0] == 3))
    assert (found[0, 0], seen) == (3, [(0.0, True, False), (1.0, False, False), (2.0, False, False)])
    be.repeat(np, step, (x,), rows)
    assert seen[-1] == (4.0, False, True)


def test_what_is_compiled_for_eager_arrays_is_found_again():
    A, compilations = jnp.asarray(np.random.default_rng(0).standard_normal((12, 12))), []

    def listener(event, _, **__):
        compilations.append(event) if "backend_compile" in event else None

    def every():
        orthlin.orthogonalize(A), orthlin.matrix_sign(A), orthlin.lowrank_orth(A.astype("float32"), 3, rng=0)

    every()
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        every()
    finally:
        jax.monitoring.clear_event_listeners()
    assert compilations == []


# Programs ----------------------------------------------------------------------------------------------------------

LEAVES = {f"w{i}": (256, 640) for i in range(8)}
SHAPES = {f"{name}{i}": s for i in (0, 1) for name, s in zip("abc", ((256, 256), (256, 640), (640, 256)), strict=True)}
STEPPER = steppers.muon(0.1, rank=64, warm_start=True, tail="auto")


def ones(tree):
    return {name: jnp.ones(shape, jnp.float32) for name, shape in tree.items()}


def stepped(tree):
    """An update of a tree of leaves of these shapes."""
    transformation, params = gradient_transformation(STEPPER), ones(tree)
    return transformation.update, (params, transformation.init(params), params)


def of(function, *shapes, **options):
    return lambda: (lambda *x: function(*x, **options), [jnp.ones(shape, jnp.float32) for shape in shapes])


def low_rank(r, shape=(256, 640), **options):
    return of(lambda G, omega: orthlin.lowrank_orth(G, r, test_matrix=omega, **options), shape, (640, r))


PROGRAMS = {
    "lowrank_orth": (low_rank(64), 300),
    "lowrank_orth stack": (low_rank(64, (12, 256, 640)), 310),
    "lowrank_orth r=192": (low_rank(192), 310),
    "lowrank_orth method=exact": (low_rank(64, method="exact"), 310),
    "orthogonalize": (of(orthlin.orthogonalize, (256, 640)), 175),
    "orthogonalize muon": (of(orthlin.orthogonalize, (256, 640), schedule=orthlin.schedules.muon()), 150),
    "polar": (of(orthlin.polar, (256, 640)), 310),
    "matrix_sign": (of(orthlin.matrix_sign, (256, 256)), 275),
    "matrix_sign newton_schulz": (of(orthlin.matrix_sign, (256, 256), method="newton_schulz"), 140),
    "8 leaves of one shape": (lambda: stepped(LEAVES), 490),
    "6 leaves of three shapes": (lambda: stepped(SHAPES), 1250),
}


def operations(prepare):
    """StableHLO operations of a program, constants among them: what XLA has to compile."""
    function, arguments = prepare()
    return len(re.findall(r'= "?stablehlo\.', jax.jit(function).lower(*arguments).as_text()))


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize(("prepare", "most"), PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_stays_small(prepare, most, x64):
    with jax.enable_x64(x64):
        assert operations(prepare) <= most


@pytest.mark.parametrize(("prepare", "most"), PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_without_its_loops_is_too_large(prepare, most):
    jax.clear_caches()
    with jax.enable_x64(False), mock.patch.object(loop, "_LOOP_FROM", 1000):
        assert operations(prepare) > most
    jax.clear_caches()


def test_newtons_iteration_carries_a_block_along_or_none():
    N, F = (jnp.asarray(np.random.default_rng(i).standard_normal((4, 4))) for i in range(2))
    N = N @ N.T + jnp.eye(4)
    S, Z = newton_sign(jnp, N, F)
    np.testing.assert_allclose(S, newton_sign(jnp, N)[0], atol=1e-12)
    np.testing.assert_allclose(N @ Z + Z @ N, 2 * F, atol=1e-10)
