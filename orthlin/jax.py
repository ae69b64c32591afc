"""Steppers on trees of JAX arrays, in the form of optax's gradient transformations."""

from collections.abc import Callable
from typing import Any, NamedTuple

from orthlin.errors import OptionError
from orthlin.steppers import Stepper

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
    """Apply a stepper to every leaf of a tree; the path of a leaf is its name.

    Parameters
    ----------
    stepper : Stepper
        From :mod:`orthlin.steppers`.  Its updates hold learning rate and weight decay already.

    Returns
    -------
    GradientTransformation
        Works with ``optax.chain``, ``optax.apply_updates`` and, for trees with leaves that are not
        matrices, ``optax.partition``.

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
    from jax import tree_util

    def named(tree: Any) -> tuple[list[str], list[Any], Any]:
        leaves, structure = tree_util.tree_flatten_with_path(tree)
        return [tree_util.keystr(path) for path, _ in leaves], [leaf for _, leaf in leaves], structure

    def init(params: Any) -> Any:
        names, leaves, structure = named(params)
        return structure.unflatten([stepper.init(X, name) for name, X in zip(names, leaves, strict=True)])

    def update(gradients: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, Any]:
        if params is None:
            raise OptionError("params: expected the tree of parameters, got None; pass it to update()")
        names, leaves, structure = named(gradients)
        before, values = structure.flatten_up_to(state), structure.flatten_up_to(params)
        done = [stepper.update(*args) for args in zip(leaves, before, values, names, strict=True)]
        return structure.unflatten([delta for delta, _ in done]), structure.unflatten([after for _, after in done])

    return GradientTransformation(init, update)
