"""Steppers on trees: the form of optax, and what the tools around it do to a transformation and its state."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx

import orthlin
from orthlin import steppers
from orthlin.errors import OptionError, ShapeError
from orthlin.jax import gradient_transformation

QUICK = {"schedule": orthlin.schedules.muon()}  # to compile: the filter of a low-rank step takes seconds
STEPPERS = {
    "muon": steppers.muon(0.1, weight_decay=0.1, **QUICK),
    "msgd": steppers.msgd(0.1, **QUICK),
    "warm": steppers.muon(0.1, rank=3, weight_decay=0.1, warm_start=True, tail="auto", **QUICK),  # full for 3 x 6
}
every_stepper = pytest.mark.parametrize("stepper", STEPPERS.values(), ids=STEPPERS)
quick_stepper = pytest.mark.parametrize("stepper", [STEPPERS["muon"], STEPPERS["msgd"]], ids=["muon", "msgd"])
QUICK_STEPPER, WARM_STEPPER = STEPPERS["muon"], STEPPERS["warm"]


TRANSFORMATIONS = {stepper: gradient_transformation(stepper) for stepper in STEPPERS.values()}


def tree(seed):
    """Two leaves of one shape, one of another."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return {"a": normal(5, 4), "b": [normal(5, 4), normal(3, 6)]}


def close(a, b, atol=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x, float), np.asarray(y, float), rtol=0, atol=atol)


@functools.cache
def compiled(transformation):
    return jax.jit(transformation.update)


def ran(transformation, steps=3, params=None, state=None, first=1, jit=True):
    """Parameters and state after some steps."""
    params = tree(0) if params is None else params
    state = transformation.init(params) if state is None else state
    update = compiled(transformation) if jit else transformation.update
    for seed in range(first, first + steps):
        updates, state = update(tree(seed), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


# one tree ------------------------------------------------------------------------------------------


@every_stepper
def test_a_tree_is_stepped_leaf_by_leaf_under_the_name_of_a_leafs_shape(stepper):
    params, state = ran(TRANSFORMATIONS[stepper])
    update = jax.jit(stepper.update, static_argnames="name")
    for place, name in ((lambda t: t["a"], "5x4"), (lambda t: t["b"][0], "5x4"), (lambda t: t["b"][1], "3x6")):
        X = place(tree(0))
        single = stepper.init(X, name)
        for seed in range(1, 4):
            delta, single = update(place(tree(seed)), single, X, name=name)
            X = X + delta
        close(place(params), X)
        if single.momentum is not None:
            close(place(state.momentum), single.momentum)
    assert (state.step.dtype, int(state.step)) == (jnp.int32, 3)


@every_stepper
def test_the_state_is_a_tree_of_arrays_and_its_form_does_not_change(stepper):
    transformation = TRANSFORMATIONS[stepper]
    before = transformation.init(tree(0))
    _, after = jax.eval_shape(transformation.update, tree(1), before, tree(0))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(before))
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(before)] == [(x.shape, x.dtype) for x in jax.tree.leaves(after)]


def test_a_gradient_of_lower_precision_is_stepped_in_that_of_its_parameter():
    transformation = TRANSFORMATIONS[QUICK_STEPPER]
    updates, state = transformation.update(
        {"a": jnp.ones((3, 2), jnp.bfloat16), "b": jnp.ones((3, 2))},
        transformation.init({"a": jnp.ones((3, 2)), "b": jnp.ones((3, 2))}),
        {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 2))},
    )
    assert updates["a"].dtype == state.momentum["a"].dtype == jnp.ones(1).dtype


def test_parameters_are_needed():
    transformation = TRANSFORMATIONS[WARM_STEPPER]
    with pytest.raises(OptionError, match="params"):
        transformation.update(tree(1), transformation.init(tree(0)))


def test_a_leaf_that_does_not_fit_is_named():
    transformation = TRANSFORMATIONS[WARM_STEPPER]
    with pytest.raises(ShapeError, match=r"^params\['bias'\]: .*\(4,\)"):
        transformation.init(tree(0) | {"bias": jnp.zeros(4)})
    with pytest.raises(ShapeError, match=r"^gradients: .*\(5, 4\)"):
        transformation.update(tree(1) | {"a": jnp.ones((4, 5))}, transformation.init(tree(0)), tree(0))


@pytest.mark.parametrize("which", ["state", "params"])
@pytest.mark.parametrize("leaf", ["other", "less", "none", "deeper"])
def test_trees_that_differ_are_refused_by_name(which, leaf):
    transformation, params = TRANSFORMATIONS[QUICK_STEPPER], tree(0)
    state, first = transformation.init(params), min(params)
    other = {
        "other": {("new" if key == first else key): x for key, x in params.items()},
        "less": {key: x for key, x in params.items() if key != first},
        "none": params | {first: None},
        "deeper": [params],
    }[leaf]
    given = {"state": state, "params": params} | ({"params": other} if which == "params" else {})
    if which == "state":
        given["state"] = state._replace(momentum=other)
    with pytest.raises(OptionError, match=rf"^{which}: expected the tree of the gradients, .*, got "):
        transformation.update(params, **given)


@pytest.mark.parametrize(
    "state", [None, (), {}, TRANSFORMATIONS[STEPPERS["msgd"]].init(tree(0))], ids=["none", "tuple", "dict", "msgd"]
)
def test_a_state_of_something_else_is_refused_by_name(state):
    with pytest.raises(OptionError, match=r"^state: expected .*, got (NoneType|tuple|dict|State)"):
        TRANSFORMATIONS[QUICK_STEPPER].update(tree(1), state, tree(0))


def test_a_state_can_be_made_of_shapes_and_of_host_arrays():
    transformation = TRANSFORMATIONS[WARM_STEPPER]
    expected = transformation.init(tree(0))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree(0))
    close(transformation.init(shapes), expected)
    close(transformation.init(jax.tree.map(np.asarray, tree(0))), expected)
    single = WARM_STEPPER.init(shapes["a"], "5x4")
    close(single, WARM_STEPPER.init(tree(0)["a"], "5x4"))


# optax and flax ------------------------------------------------------------------------------------


@every_stepper
def test_tools_find_the_momentum_and_nothing_else_as_parameters(stepper):
    transformation = TRANSFORMATIONS[stepper]
    state, shapes = transformation.init(tree(0)), []
    mapped = optax.tree_utils.tree_map_params(
        transformation, lambda x: shapes.append(x.shape) or x + 1, state, transform_non_params=lambda x: x
    )
    momenta = jax.tree.leaves(state.momentum)
    assert sorted(shapes) == sorted(x.shape for x in momenta)
    close(mapped._replace(momentum=()), state._replace(momentum=()))


def test_a_chain_with_a_schedule_is_the_same_compiled():
    chain = optax.chain(
        optax.clip_by_global_norm(1.0),
        TRANSFORMATIONS[QUICK_STEPPER],
        optax.scale_by_schedule(optax.linear_schedule(1.0, 0.0, 5)),
    )
    close(ran(chain, 2, jit=False)[0], ran(chain, 2)[0])


INJECTED = steppers.muon(0.2, weight_decay=0.2, momentum=0.2, **QUICK)
HYPER = {
    "number": 0.2,
    "schedule": optax.constant_schedule(0.2),
    "array": jnp.asarray(0.2),
    "numpy": np.asarray(0.2),
}


@pytest.mark.parametrize("value", HYPER.values(), ids=HYPER)
def test_hyperparameters_may_be_injected(value):
    def make(learning_rate, weight_decay, momentum):
        stepper = steppers.muon(learning_rate, weight_decay=weight_decay, momentum=momentum, **QUICK)
        return gradient_transformation(stepper)

    params, state = ran(optax.inject_hyperparams(make)(value, value, value), 2)
    expected, _ = ran(gradient_transformation(INJECTED), 2)
    assert all(float(state.hyperparams[name]) == pytest.approx(0.2) for name in state.hyperparams)
    close(params, expected)


def test_a_learning_rate_in_the_state_is_followed():
    def make(learning_rate):
        return gradient_transformation(steppers.muon(lambda step: learning_rate / (1 + step), **QUICK))

    injected = optax.inject_hyperparams(make)(learning_rate=0.1)
    state = injected.init(tree(0))
    ones = []
    for rate in (0.1, 0.2):
        state.hyperparams["learning_rate"] = jnp.asarray(rate)
        ones.append(compiled(injected)(tree(1), state, tree(0))[0])
    close(jax.tree.map(lambda x: 2 * x, ones[0]), ones[1])


def test_steps_accumulate_in_multisteps():
    multi = optax.MultiSteps(TRANSFORMATIONS[QUICK_STEPPER], 2)
    params, state = tree(0), multi.init(tree(0))
    update = jax.jit(multi.update)
    for seed in (1, 1, 2, 2):
        updates, state = update(tree(seed), state, params)
        params = optax.apply_updates(params, updates)
    close(params, ran(TRANSFORMATIONS[QUICK_STEPPER], 2)[0], 1e-4)


def test_leaves_may_be_masked_or_go_elsewhere():
    params = tree(0) | {"bias": jnp.zeros(4)}
    gradients = tree(1) | {"bias": jnp.ones(4)}
    labels = {"a": "matrix", "b": ["matrix", "matrix"], "bias": "vector"}
    transformation = TRANSFORMATIONS[QUICK_STEPPER]
    wrapped = {
        "masked": optax.masked(transformation, jax.tree.map(lambda x: x == "matrix", labels)),
        "partition": optax.partition({"matrix": transformation, "vector": optax.sgd(0.1)}, labels),
        "multi": optax.multi_transform({"matrix": transformation, "vector": optax.adam(0.1)}, labels),
        "nothing": optax.partition(
            {"matrix": transformation, "vector": optax.sgd(0.1)}, lambda t: jax.tree.map(lambda _: "vector", t)
        ),
    }
    expected, _ = compiled(transformation)(tree(1), transformation.init(tree(0)), tree(0))
    for name, wrapper in wrapped.items():
        state = wrapper.init(params)
        updates, after = jax.jit(wrapper.update)(gradients, state, params)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        if name != "nothing":
            close({k: updates[k] for k in expected}, expected)
        optax.tree_utils.tree_map_params(wrapper, lambda x: x, state)


@pytest.mark.parametrize("jit", [False, True])
@every_stepper
def test_flax_steps_a_model(stepper, jit):
    model = nnx.Linear(6, 8, use_bias=False, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, TRANSFORMATIONS[stepper], wrt=nnx.Param)

    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(lambda m: ((m(jnp.ones((3, 6))) - 1) ** 2).sum())(model)
        optimizer.update(model, gradients)
        return loss

    step = nnx.jit(step) if jit else step
    losses = [float(step(model, optimizer)) for _ in range(4)]
    assert losses[-1] < losses[0]


# JAX -----------------------------------------------------------------------------------------------


@quick_stepper
def test_steps_may_be_scanned_with_donated_buffers(stepper):
    transformation = TRANSFORMATIONS[stepper]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(tree(seed) for seed in (1, 2, 3)))

    def run(params, state, gradients):
        def body(carry, G):
            params, state = carry
            updates, state = transformation.update(G, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, state), gradients)[0]

    params = tree(0)
    found = jax.jit(run, donate_argnums=(0, 1))(params, transformation.init(params), stacked)
    close(found, ran(transformation))


@every_stepper
def test_a_run_resumed_from_an_orbax_checkpoint_is_the_run(stepper, tmp_path):
    transformation = TRANSFORMATIONS[stepper]
    params, state = ran(transformation, 2)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", (params, state))
        checkpointer.wait_until_finished()
        params, state = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: (params, state)))
    found = ran(transformation, 2, params, state, first=3)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(ran(transformation, 4)), strict=True):
        np.testing.assert_array_equal(x, y)


SHARDED = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import orthlin
from orthlin import schedules, steppers
from orthlin.jax import gradient_transformation
mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
def put(x, *names):
    return jax.device_put(x, NamedSharding(mesh, P(*names)))
A = jax.random.normal(jax.random.key(0), (8, 12))
X, G = put(A, "x", None), put(A, None, "x")
transformation = gradient_transformation(steppers.muon(0.1, rank=2, warm_start=True))
assert transformation.init({"w": X}).momentum["w"].sharding == X.sharding
stepper = steppers.msgd(0.1, schedule=schedules.newton_schulz(1))
delta, _ = stepper.update(G, stepper.init(X), X)
expected, _ = stepper.update(A, stepper.init(A), A)
assert jnp.allclose(delta, expected, atol=1e-6)
Q = orthlin.randomized_range_finder(X, 2, test_matrix=put(A[:2], None, "x").T)
assert jnp.allclose(abs(Q.T @ orthlin.randomized_range_finder(A, 2, test_matrix=A[:2].T)), jnp.eye(2), atol=1e-5)
here, there = (jax.device_put(x, device) for x, device in zip((A, A[:2].T), jax.devices()[1:3]))
try:
    orthlin.randomized_range_finder(here, 2, test_matrix=there)
except orthlin.errors.DeviceError:
    print("refused")
"""


def test_a_sharding_is_no_device():
    run = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, check=False)
    assert (run.stdout, run.returncode) == ("refused\n", 0), run.stderr


def test_a_constant_may_stand_beside_a_tracer():
    G, omega = tree(0)["a"], tree(1)["a"][:4, :2]

    def f(A, omega=omega):
        return orthlin.randomized_range_finder(A, 2, test_matrix=omega)

    expected = f(G)
    for found in (jax.jit(f)(G), jax.vmap(f)(G[None])[0], jax.jit(lambda omega: f(G, omega))(omega)):
        close(found, expected)
    stepper = QUICK_STEPPER
    close(jax.jit(lambda g: stepper.update(g, stepper.init(G), G)[0])(G), compiled(stepper)(G, stepper.init(G), G)[0])
