"""Steppers on trees: the form of optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orthlin import steppers
from orthlin.errors import OptionError
from orthlin.jax import gradient_transformation

STEPPER = steppers.muon(0.1, rank=2, weight_decay=0.1, warm_start=True, tail="auto")


def tree(seed):
    rng = np.random.default_rng(seed)
    return {"a": jnp.asarray(rng.standard_normal((5, 4))), "b": [jnp.asarray(rng.standard_normal((3, 6)))]}


def test_a_tree_is_stepped_leaf_by_leaf_under_the_name_of_its_path():
    params = tree(0)
    transformation = gradient_transformation(STEPPER)
    state = transformation.init(params)
    single, X = STEPPER.init(params["b"][0], "['b'][0]"), params["b"][0]
    for seed in range(1, 4):
        updates, state = transformation.update(tree(seed), state, params)
        params = optax.apply_updates(params, updates)
        delta, single = STEPPER.update(tree(seed)["b"][0], single, X, "['b'][0]")
        X = X + delta
    assert jnp.array_equal(params["b"][0], X)
    assert int(state["b"][0].step) == 3


def test_it_chains_with_optax_and_can_be_compiled():
    params = tree(0)
    chain = optax.chain(optax.clip_by_global_norm(1.0), gradient_transformation(STEPPER))
    state = chain.init(params)
    eager, _ = chain.update(tree(1), state, params)
    jitted, _ = jax.jit(chain.update)(tree(1), state, params)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 if a.dtype == jnp.float32 else 1e-14)


def test_parameters_are_needed():
    transformation = gradient_transformation(STEPPER)
    with pytest.raises(OptionError, match="params"):
        transformation.update(tree(1), transformation.init(tree(0)))
