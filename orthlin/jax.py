"""Steppers on trees of JAX arrays, in the form of optax's gradient transformations."""

from collections.abc import Callable
from typing import Any, NamedTuple

from orthlin import _backend as be
from orthlin import _checks as check
from orthlin.errors import OptionError, ShapeError
from orthlin.steppers import State, Stepper

Array = Any

__all__ = ["GradientTransformation", "gradient_transformation"]


class GradientTransformation(NamedTuple):
    """A pair of functions on trees, with the names and the arguments that optax uses.

    Attributes
    ----------
    init : callable
        ``init(params)`` returns a state.
    update : callable
        ``update(gradients, state, params)`` returns (updates, state).
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]


def gradient_transformation(stepper: Stepper) -> GradientTransformation:
    """Apply a stepper to every leaf of a tree, to leaves of one shape and dtype as one stack.

    Parameters
    ----------
    stepper : Stepper
        From :mod:`orthlin.steppers`.  Its updates hold learning rate and weight decay already.

    Returns
    -------
    GradientTransformation
        Works with ``optax.chain``, ``optax.apply_updates``, ``optax.inject_hyperparams`` and, for trees with
        leaves that are not matrices, ``optax.partition``.  Its state is a :class:`orthlin.steppers.State` of
        arrays only: `step` is one int32, `momentum` a tree like the parameters (empty without momentum), and
        every other field holds a stack for each shape and dtype, by a key like ``"float32[4,3]"``.  Tools like
        ``optax.tree_utils.tree_map_params`` therefore take the momentum for parameters, and nothing else.

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError
        By `init` and `update`, if a leaf is not a matrix, or its gradient has another shape.
    OptionError
        By `update`, if gradients, state and parameters are not of one tree, or the state is not of this stepper.

    Notes
    -----
    Random numbers are a function of the stepper's seed, the last two sizes of a leaf and the step: all matrices
    of a shape share a draw.
    Cost: that of the stepper, and two copies of what is stepped, into stacks and out of them.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from orthlin import steppers
    >>> from orthlin.jax import gradient_transformation
    >>> params = {"a": jnp.eye(3), "b": jnp.ones((4, 2))}
    >>> transformation = gradient_transformation(steppers.muon(0.1, rank=1))
    >>> updates, state = transformation.update(params, transformation.init(params), params)
    >>> {name: update.shape for name, update in updates.items()}
    {'a': (3, 3), 'b': (4, 2)}
    """
    import jax.numpy as jnp
    from jax import tree

    def init(params: Any) -> State:
        leaves, structure = _matrices(params, "params")
        states = [stepper.init(X, _name(X)) for X in leaves]
        momenta = [s.momentum for s in states if s.momentum is not None]
        rest = [s._replace(momentum=None) for s in states]
        stacks = {k: tree.map(lambda *x: jnp.stack(x), *(rest[i] for i in at)) for k, at in _groups(leaves).items()}
        momentum = structure.unflatten(momenta) if len(momenta) == len(leaves) else ()
        return _state(jnp.zeros((), jnp.int32), momentum, stacks)

    def update(gradients: Any, state: State, params: Any = None, **_: Any) -> tuple[Any, State]:
        if params is None:
            raise OptionError("params: expected the tree of parameters, got None; pass it to update()")
        given, structure = _matrices(gradients, "gradients")
        leaves = list(map(jnp.asarray, _flattened(structure, params, "params")))
        if [G.shape for G in given] != [X.shape for X in leaves]:
            shapes = tuple([x.shape for x in side] for side in (leaves, given))
            raise ShapeError(f"gradients: expected the shapes of params, {shapes[0]}, got {shapes[1]}")
        if not isinstance(state, State):
            raise OptionError(f"state: expected what init() returns, got {type(state).__name__}")
        momenta = _flattened(structure, state.momentum, "state") if tree.leaves(state.momentum) else None
        deltas, moved, stacks = list(leaves), list(leaves), {}
        for key, places in _groups(leaves).items():
            G, X, M = (side and _stacked([side[i] for i in places]) for side in (given, leaves, momenta))
            before = State(state.step, M, *(getattr(state, field).get(key) for field in _STACKED))
            delta, stacks[key] = stepper.update(G, before, X, _name(X))
            for side, stack in ((deltas, delta), (moved, stacks[key].momentum)):
                for i, x in zip(places, () if stack is None else jnp.unstack(stack), strict=stack is not None):
                    side[i] = x
        momentum = state.momentum if momenta is None else structure.unflatten(moved)
        return structure.unflatten(deltas), _state(state.step + 1, momentum, stacks)

    return GradientTransformation(init, update)


_STACKED = State._fields[2:]  # what is no tree like the parameters


def _matrices(tree: Any, name: str) -> tuple[list[Array], Any]:
    """Leaves of a tree, each a stack of matrices of JAX, and its structure."""
    import jax.numpy as jnp
    from jax.tree_util import keystr, tree_flatten_with_path

    leaves, structure = tree_flatten_with_path(tree)
    arrays = [jnp.asarray(be.filled(leaf)) for _, leaf in leaves]
    for (path, _), X in zip(leaves, arrays, strict=True):
        check.matrix(X, name + keystr(path))
    return arrays, structure


def _flattened(structure: Any, tree: Any, name: str) -> list[Any]:
    """Leaves of a tree that has the structure of the gradients."""
    from jax.tree_util import tree_flatten

    leaves, got = tree_flatten(tree)
    if got != structure:
        raise OptionError(f"{name}: expected the tree of the gradients, {structure}, got {got}")
    return list(leaves)


def _name(X: Array) -> str:
    """Name under which random numbers are drawn: all matrices of a shape share a draw."""
    return "x".join(map(str, X.shape[-2:]))


def _groups(leaves: list[Array]) -> dict[str, list[int]]:
    """Places of the leaves of each shape and dtype."""
    groups: dict[str, list[int]] = {}
    for i, X in enumerate(leaves):
        groups.setdefault(f"{X.dtype}[{','.join(map(str, X.shape))}]", []).append(i)
    return groups


def _stacked(arrays: list[Array]) -> Array:
    import jax.numpy as jnp

    with be.settings(arrays[0]):
        return jnp.stack(arrays)


def _state(step: Array, momentum: Any, stacks: dict[str, State]) -> State:
    """State of a tree.

    A field of a tree without leaves is an array, which is a prefix of every tree: for optax's tools, which find
    parameters by the state of a tree without leaves, the field is none.
    """
    import jax.numpy as jnp

    def by_key(field: str) -> Any:
        found = {key: getattr(stack, field) for key, stack in stacks.items()}
        return {k: x for k, x in found.items() if x is not None} if stacks else jnp.zeros((), jnp.int32)

    return State(step, momentum, *map(by_key, _STACKED))
