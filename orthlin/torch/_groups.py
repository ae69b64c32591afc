"""Parameter groups: what they may say, the state of their parameters, and their matrices."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from orthlin import _backend as be
from orthlin import _checks as check
from orthlin import schedules
from orthlin._direction import Recipe
from orthlin.errors import ArrayTypeError, DTypeError, OptionError
from orthlin.schedules import Schedule
from orthlin.torch._update import DIAGNOSTICS, Piece, stream_name
from orthlin.torch.views import MatrixView, default_view

NAMED_SCHEDULES = {s.__name__: s for s in (schedules.muon, schedules.speedrun, schedules.polar_express)}
_FLAGS = ("nesterov", "cautious", "error_feedback", "master_weights", "diagnostics", "maximize")
_RECIPE = ("rank", "n_iter", "sketch", "warm_start", "tail", "tol", "scale", "seed")


def listed(params: Any) -> list[Any]:
    """Return "params" of a group as a list of tensors, or of pairs of a name and a tensor."""
    if isinstance(params, set | frozenset):
        raise ArrayTypeError("params: expected an ordered collection, got a set, whose order differs between runs")
    items = [params] if isinstance(params, Tensor) else list(params)
    for item in items:
        if not isinstance(tensor(item), Tensor):
            raise ArrayTypeError(f"params: expected torch tensors, got {type(tensor(item)).__qualname__}")
    return items


def tensor(item: Any) -> Any:
    """Return the parameter of an item of "params"."""
    return item[1] if isinstance(item, tuple) and len(item) == 2 else item


def check_lr(lr: Any) -> None:
    """Check that a learning rate is a number of at least zero, or a tensor that holds one."""
    single = isinstance(lr, Tensor) and lr.numel() == 1
    check.non_negative(float(lr) if single else lr, "lr")


def checked(group: dict[str, Any]) -> dict[str, Any]:
    """Return the group with its view in plain containers; OptionError unless its options are as described."""
    check_lr(group["lr"])
    check.non_negative(group["weight_decay"], "weight_decay")
    if group["algorithm"] == "adamw":
        return group
    check.non_negative(group["momentum"], "momentum", below=1)
    check.option(group["nonfinite"], "nonfinite", ("skip", "raise"))
    for name in _FLAGS:
        check.flag(group[name], name)
    if group["schedule"] is not None:
        check.option(group["schedule"], "schedule", tuple(NAMED_SCHEDULES))
    view = group["view"]
    try:
        view = view if view is None else (view if isinstance(view, MatrixView) else MatrixView(**view)).as_dict()
    except TypeError as error:
        raise OptionError(f"view: expected the fields of a MatrixView, got {view!r}") from error
    return {**group, "view": view}


@cache
def _schedule(name: str | None) -> Schedule | None:
    return None if name is None else NAMED_SCHEDULES[name]()


def recipe_of(group: dict[str, Any], rank: Callable[[Any], Any] | None = None) -> Recipe:
    """Return the recipe of a group, with a function of the step as its rank if there is one."""
    options = {key: group[key] for key in _RECIPE} | ({} if rank is None else {"rank": rank})
    return Recipe(schedule=_schedule(group["schedule"]), **options)


def initial_state(p: Tensor, recipe: Recipe, group: dict[str, Any]) -> dict[str, Any]:
    """State with all its keys from the start, so that every process has the same."""
    if not p.is_floating_point():
        raise DTypeError(f"params: expected real floating-point matrices, got {p.dtype}; leave others to 'adamw'")
    shapes = [tuple(stack.shape) for stack in _view(group, p).view(p.detach())]
    working = torch.float32 if p.dtype.itemsize < 4 else p.dtype
    state = {"skipped": torch.zeros(sum(shape[0] for shape in shapes), dtype=torch.int32, device=p.device)}
    if group["momentum"] or group["error_feedback"]:
        state["momentum"] = torch.zeros_like(p, dtype=working, memory_format=torch.preserve_format)
    if working != p.dtype and group["master_weights"]:
        state["master"] = p.detach().to(working)
    if group["diagnostics"]:
        state["diagnostics"] = torch.zeros(state["skipped"].shape[0], len(DIAGNOSTICS), device=p.device)
    like = torch.zeros((), dtype=working, device=p.device)
    for i, shape in enumerate(shapes):
        right = recipe.first_right(be.namespace(like), like.expand(shape), stream_name(shape))
        if right is not None:
            state[f"right_{i}"] = right.clone()
    return state


def _view(group: dict[str, Any], p: Tensor) -> MatrixView:
    return default_view(tuple(p.shape)) if group["view"] is None else MatrixView(**group["view"])


def pieces_of(p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> list[Piece]:
    """Split a parameter, its gradient and its state into matrices."""
    if p.grad is None or p.grad.is_sparse:
        raise ArrayTypeError("params: a gradient is sparse; use dense gradients for matrices")
    view = _view(group, p)
    weights = view.view(state.get("master", p.detach()))
    momenta = view.view(state["momentum"]) if "momentum" in state else [None] * len(weights)
    pieces, start = [], 0
    for i, (g, w, m) in enumerate(zip(view.view(p.grad, copy=True), weights, momenta, strict=True)):
        rows = slice(start, start + w.shape[0])
        start = rows.stop
        noted = state["diagnostics"][rows] if "diagnostics" in state else None
        pieces.append(Piece(g, w, m, state, f"right_{i}", state["skipped"][rows], noted))
    return pieces
