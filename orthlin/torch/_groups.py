"""Parameter groups: what they may say, who steps which of their parameters, and the state of those."""

from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orthlin import _backend as be
from orthlin import _checks as check
from orthlin import schedules
from orthlin._direction import Recipe
from orthlin.errors import ArrayTypeError, DTypeError, OptionError, ShapeError
from orthlin.torch import _adamw as adamw
from orthlin.torch._adamw import is_matrix, tensor
from orthlin.torch._notes import DIAGNOSTICS
from orthlin.torch._pieces import stream_name
from orthlin.torch._sharded import made, right_factor
from orthlin.torch.views import MatrixView, default_view

ALGORITHMS = ("auto", "orthogonal", "adamw")
NAMED_SCHEDULES = {s.__name__: cache(s) for s in (schedules.muon, schedules.speedrun, schedules.polar_express)}
_FLAGS = ("nesterov", "cautious", "error_feedback", "master_weights", "diagnostics", "maximize")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
_OWN_DTYPE = ("step", "skipped", "fading", "diagnostics")  # whatever that of the parameter
_RECIPE = ("rank", "n_iter", "sketch", "warm_start", "tail", "tol", "precision", "scale", "seed")


def plain(value: Any) -> Any:
    """Numbers of NumPy as Python's, also inside of lists and dicts: a checkpoint of others is read as pickle only."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value.item() if isinstance(value, np.generic | np.ndarray) and value.ndim == 0 else value


def listed(param_group: Any, others: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a group as a dict of its own, with "params" a list of tensors, or of pairs of a name and a tensor.

    Without names it gets numbers for them if the other groups have names, which torch wants in all or none.
    """
    params = param_group["params"]
    if isinstance(params, set | frozenset):
        raise ArrayTypeError("params: expected an ordered collection, got a set, whose order differs between runs")
    items = [params] if isinstance(params, Tensor) else list(params)
    for x in map(tensor, items):
        if not isinstance(x, Tensor):
            raise ArrayTypeError(f"params: expected torch tensors, got {type(x).__qualname__}")
        if torch.nn.parameter.is_lazy(x):
            raise ShapeError("params: a parameter of a lazy module has no shape yet; run the model once first")
    if any("param_names" in group for group in others) and not any(isinstance(item, tuple) for item in items):
        items = [(f"{len(others)}.{j}", p) for j, p in enumerate(items)]
    return {**{key: plain(value) for key, value in param_group.items() if key != "params"}, "params": items}


def check_rate(rate: Any, name: str) -> None:
    """Check that a learning rate or decay is a number of at least zero, or a tensor that holds one."""
    single = isinstance(rate, Tensor) and rate.numel() == 1
    check.non_negative(float(rate) if single else rate, name)


def merged(group: dict[str, Any], defaults: dict[str, Any], beside: dict[str, Any]) -> dict[str, Any]:
    """Return a group with all its options: what it says itself holds for all of its parameters."""
    group = {"algorithm": "auto", **group}
    check.option(group["algorithm"], "algorithm", ALGORITHMS)
    shared = {f"adamw_{key}": group.get(key, beside[key]) for key in ("weight_decay", "maximize")}
    first, second = (defaults, beside) if group["algorithm"] == "adamw" else (beside, defaults)
    return {**first, **second, **shared, **group}


def checked(group: dict[str, Any]) -> dict[str, Any]:
    """Return the group with its view in plain containers; OptionError unless its options are as described."""
    check.option(group["algorithm"], "algorithm", ALGORITHMS)
    check_rate(group["lr"], "lr")
    check_rate(group["weight_decay"], "weight_decay")
    part = adamw.part_of(group)
    if part["params"]:
        adamw.checked_options({key: part[key] for key in adamw.OPTIONS})
    if group["algorithm"] == "adamw":
        return group
    if group["capturable"] and (group["scheduled_rank"] or not (group["warm_start"] or group["rank"] is None)):
        raise OptionError(
            "capturable: a graph repeats its rank and random numbers; take a fixed rank and warm_start=True"
        )
    check.non_negative(group["momentum"], "momentum", below=1)
    check.option(group["nonfinite"], "nonfinite", ("skip", "raise"))
    for name in _FLAGS:
        check.flag(group[name], name)
    check.non_negative(group["adamw_lr_factor"], "adamw_lr_factor")
    view = group["view"]
    try:
        view = view if view is None else (view if isinstance(view, MatrixView) else MatrixView(**view)).as_dict()
    except TypeError as error:
        raise OptionError(f"view: expected the fields of a MatrixView, got {view!r}") from error
    recipe_of(group)
    return {**group, "view": view}


def recipe_of(group: dict[str, Any], rank: Callable[[Any], Any] | None = None) -> Recipe:
    """Return the recipe of a group, with a function of the step as its rank if there is one."""
    if callable(group["rank"]):
        raise OptionError(
            f"rank: expected a number in a group, got {group['rank']!r}; pass a function of the step to the constructor"
        )
    options = {key: group[key] for key in _RECIPE} | ({} if rank is None else {"rank": lambda t: plain(rank(t))})
    if (name := group["schedule"]) is not None:
        check.option(name, "schedule", tuple(NAMED_SCHEDULES))
    return Recipe(schedule=None if name is None else NAMED_SCHEDULES[name](), **options)


def first_recipe(group: dict[str, Any], rank: Callable[[Any], Any] | None) -> Recipe:
    """Return the recipe by which the state of a group is made."""
    return recipe_of(group, rank if group["scheduled_rank"] else None)


def scheduled(group: dict[str, Any], rank: Callable[[Any], Any] | None) -> dict[str, Any]:
    """Return the group with the rank of its step."""
    return group if rank is None or not group["scheduled_rank"] else {**group, "rank": plain(rank(group["step"]))}


def view_of(group: dict[str, Any], p: Tensor) -> MatrixView:
    """Return the view of a parameter of a group."""
    if group["view"] is None:
        return default_view(tuple(p.shape))
    return _view(**{key: tuple(x) if isinstance(x, list) else x for key, x in group["view"].items()})


@cache
def _view(**fields: Any) -> MatrixView:
    return MatrixView(**fields)


def _working(p: Tensor) -> torch.dtype:
    """Dtype in which a matrix is stepped."""
    return torch.float32 if p.dtype.itemsize < 4 else p.dtype


def needed(group: dict[str, Any], p: Tensor, recipe: Recipe, have: Collection[str] = ()) -> list[str]:
    """Keys of the state of a parameter: those of its options and, of what it has, the others."""
    if not is_matrix(group, p):
        more = ["max_exp_avg_sq"] if group["amsgrad"] or "max_exp_avg_sq" in have else []
        return ["step", "exp_avg", "exp_avg_sq", *more]
    if p.dtype not in _DTYPES:
        raise DTypeError(f"params: expected real or complex matrices, got {p.dtype}; leave others to 'adamw'")
    found = ["skipped"]
    if group["momentum"] or group["error_feedback"] or "momentum" in have:
        found += ["momentum", "fading"]
    if group["master_weights"] and p.dtype.itemsize < 4:
        found.append("master")
    if group["diagnostics"] or "diagnostics" in have:
        found.append("diagnostics")
    for i, shape in enumerate(view_of(group, p).shapes(p.shape)):
        warm = recipe.warm_start and (group["scheduled_rank"] or recipe.width(shape) is not None)
        if warm or f"right_{i}" in have:
            found.append(f"right_{i}")
    return found


def fresh(keys: Collection[str], group: dict[str, Any], p: Tensor, recipe: Recipe) -> dict[str, Tensor]:
    """Return what these keys of the state of a parameter start with."""
    if keys and not is_matrix(group, p):
        whole = adamw.state_of(group, p)
        return {key: whole[key] for key in keys}
    return {key: _start(key, group, p, recipe) for key in keys}


def _start(key: str, group: dict[str, Any], p: Tensor, recipe: Recipe) -> Tensor:
    dtype, device, view = _working(p), p.device, view_of(group, p)
    shapes = view.shapes(p.shape)
    count = sum(shape[0] for shape in shapes)
    if key == "momentum":
        return made(p, lambda x: torch.zeros(x.shape, dtype=dtype, device=device))
    if key == "master":
        return made(p, lambda x: x.to(dtype, memory_format=torch.contiguous_format))
    if key == "skipped":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if key == "fading":
        return torch.ones(count, dtype=torch.float32, device=device)
    if key == "diagnostics":
        return torch.zeros(count, len(DIAGNOSTICS), dtype=torch.float32, device=device)
    return _first_right(recipe, shapes[int(key.removeprefix("right_"))], dtype, p, view)


def _first_right(recipe: Recipe, shape: tuple[int, ...], dtype: torch.dtype, p: Tensor, view: MatrixView) -> Tensor:
    like = torch.zeros((), dtype=dtype, device=p.device)
    right: Tensor | None = recipe.first_right(be.namespace(like), like.expand(shape), stream_name(shape))
    right = like.expand(shape)[:, :0] if right is None else right  # left from other options, and of any rank
    return right_factor(right.clone(memory_format=torch.contiguous_format), p, view)


def ready(state: dict[str, Any], group: dict[str, Any], p: Tensor, recipe: Recipe) -> None:
    """Make what a state lacks, and bring the rest to the dtype and device that its parameter has by now."""
    keys = needed(group, p, recipe, state)
    matrix = is_matrix(group, p)
    dtype = _working(p) if matrix else p.dtype
    if "master" not in keys:
        state.pop("master", None)
    state.update(fresh([key for key in keys if key not in state], group, p, recipe))
    for key in keys:
        if key not in _OWN_DTYPE:
            value = state[key].to(p.device, dtype)
            state[key] = value.contiguous() if matrix else value
        elif key != "step":
            state[key] = state[key].to(p.device)


def make_ready(
    optimizer: torch.optim.Optimizer,
    rank: Callable[[Any], Any] | None,
    which: Callable[[Tensor], bool] | None = None,
) -> None:
    """Make what the state of some parameters lacks; or of all, and forget parameters that no group has any more."""
    state = optimizer.state
    for group in optimizer.param_groups:
        recipe = first_recipe(group, rank)
        for p in filter(which, group["params"]) if which else group["params"]:
            ready(state.setdefault(p, {}), group, p, recipe)
    if which is None:
        known = {p for group in optimizer.param_groups for p in group["params"]}
        for p in [p for p in state if isinstance(p, Tensor) and p not in known]:
            del state[p]
