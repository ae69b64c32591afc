"""The edge where a derivative of our own is attached to a function of arrays."""

from collections.abc import Callable
from functools import cache
from typing import Any

from orthlin._backend.arrays import Array, library

Arrays = tuple[Array, ...]
Function = Callable[..., Arrays]
Rule = Callable[[Any, Arrays, Arrays, Arrays], Arrays]


def differentiable(
    xp: Any,
    function: Function,
    rule: Rule,
    *arrays: Array,
    adjoint: Rule | None = None,
    solves: Callable[[Array, Array], Array] | None = None,
) -> Arrays:
    """`function(*arrays)`, a tuple, with a derivative where the library has derivatives and one can be asked for.

    `rule(xp, arrays, outputs, tangents)` is the tangents of the outputs, linear in those of the arrays, and
    differentiable itself.  `adjoint(xp, arrays, outputs, cotangents)` is its adjoint, the cotangents of the
    arrays, for a library that cannot transpose a rule made of primitives like this one; without it torch
    transposes the rule.  Where `function(N, F)` is the solution Z of a linear equation `solves(N, Z)` = F, whose
    transpose is that of N^T, JAX is told so: it transposes a rule by what is inside, and would differentiate that.
    `function` must not close over traced arrays, and takes leading dimensions.
    """
    if 0 in arrays[0].shape:
        return function(*arrays)
    if library(arrays[0]) == "jax":
        return _jax(xp, function, rule, arrays, solves)
    if library(arrays[0]) == "torch" and _torch_asks(arrays):
        done: Arrays = _torch_function().apply(xp, function, rule, adjoint, *arrays)
        return done
    return function(*arrays)


def constant(x: Array) -> Array:
    """`x` without its derivative."""
    if library(x) == "torch":
        return x.detach()
    if library(x) == "jax":
        from jax.lax import stop_gradient

        return stop_gradient(x)
    return x


def _jax(xp: Any, function: Function, rule: Rule, arrays: Arrays, solves: Any) -> Arrays:
    import jax

    if not any(isinstance(x, jax.core.Tracer) for x in arrays):
        return function(*arrays)
    if solves is not None:
        N, F = arrays
        solve, transposed = (lambda _, F, N=N: function(N, F)[0] for N in (N, N.mT))
        return (jax.lax.custom_linear_solve(lambda Z: solves(N, Z), F, solve, transposed),)
    primitive = jax.custom_jvp(function)

    def with_tangents(primals: Arrays, tangents: Arrays) -> tuple[Arrays, Arrays]:
        outputs = primitive(*primals)
        return outputs, rule(xp, primals, outputs, tangents)

    primitive.defjvp(with_tangents)
    done: Arrays = primitive(*arrays)
    return done


def _torch_asks(arrays: Arrays) -> bool:
    """Whether a derivative can be asked for.  A compiled graph differentiates the products and factorizations in it."""
    import torch

    if torch.compiler.is_compiling():
        return False
    return (
        (torch.is_grad_enabled() and any(x.requires_grad for x in arrays))
        or torch.autograd.forward_ad._current_level >= 0
        or any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in arrays)
    )


@cache
def _torch_function() -> Any:
    import torch

    class Differentiable(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(_xp: Any, function: Function, _rule: Rule, _adjoint: Rule | None, *arrays: Array) -> Arrays:
            given = {id(x) for x in arrays}  # which torch does not take back as they are
            return tuple(x.clone() if id(x) in given else x for x in function(*arrays))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Arrays) -> None:
            ctx.xp, _, ctx.rule, ctx.adjoint, *arrays = inputs
            ctx.count = len(arrays)
            ctx.save_for_backward(*arrays, *output)
            ctx.save_for_forward(*arrays, *output)

        @staticmethod
        def jvp(ctx: Any, *tangents: Array) -> Any:
            arrays, outputs = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
            given = zip(arrays, tangents[4:], strict=True)
            return ctx.rule(ctx.xp, arrays, outputs, tuple(torch.zeros_like(a) if t is None else t for a, t in given))

        @staticmethod
        def backward(ctx: Any, *cotangents: Array) -> tuple[Any, ...]:
            arrays, outputs = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
            return None, None, None, None, *(ctx.adjoint or _transposed(ctx.rule))(ctx.xp, arrays, outputs, cotangents)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Arrays, tuple[int, ...]]:
            xp, function, rule, adjoint, *arrays = inputs
            outputs = differentiable(
                xp, function, rule, *_stacked(info.batch_size, in_dims[4:], arrays), adjoint=adjoint
            )
            return outputs, (0,) * len(outputs)

    return Differentiable


def _transposed(rule: Rule) -> Rule:
    import torch

    def by_torch(xp: Any, arrays: Arrays, outputs: Arrays, cotangents: Arrays) -> Arrays:
        zeros = map(torch.zeros_like, arrays)
        done: Arrays = torch.func.vjp(lambda *tangents: rule(xp, arrays, outputs, tangents), *zeros)[1](cotangents)
        return done

    return by_torch


def _stacked(count: int, dims: tuple[Any, ...], arrays: list[Array]) -> list[Array]:
    """Arrays of torch with the mapped axis, or one of copies, in front."""
    pairs = zip(arrays, dims, strict=True)
    return [x.expand(count, *x.shape) if d is None else x.movedim(d, 0) for x, d in pairs]
