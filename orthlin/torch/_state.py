"""Loading the state of an optimizer: checked whole before anything is written, and kept in its dtypes."""

import re
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from orthlin._direction import Recipe
from orthlin.errors import OptionError, OrthlinError
from orthlin.torch._groups import checked, first_recipe, fresh, needed, plain, ready
from orthlin.torch._sharded import placed

Saved = list[tuple[Tensor, dict[str, Any]]]
# What a state may lack: a new one goes on as the old one would have, but for rounding or a note.
_MADE_ANEW = {"fading", "master", "diagnostics", "max_exp_avg_sq"}
_WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def fitting(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], rank: Callable[[Any], Any] | None, pairs: Saved
) -> dict[str, Any]:
    """Groups to load, and parameters with the state that they get, in `pairs`; OptionError unless all of it fits."""
    state, groups = state_dict.get("state"), state_dict.get("param_groups")
    if not isinstance(state, dict) or not isinstance(groups, list):
        raise OptionError("state_dict: expected 'state', a dict, and 'param_groups', a list")
    here = optimizer.param_groups
    keys = [_keys(i, group) for i, group in enumerate(groups)]
    if [len(k) for k in keys] != [len(group["params"]) for group in here]:
        sizes = [len(k) for k in keys], [len(group["params"]) for group in here]
        raise OptionError(f"state_dict: has groups of {sizes[0]} parameters, the optimizer of {sizes[1]}")
    known = {key for group in keys for key in group}
    others = {key: value for key, value in state.items() if key not in known}
    if len(known) < sum(map(len, keys)) or any(isinstance(value, dict) for value in others.values()):
        raise OptionError("state_dict: its groups list a parameter twice, or miss one that has a state")
    loaded = []
    for i, (saved, mine) in enumerate(zip(groups, here, strict=True)):
        group = _group(i, saved, mine)
        recipe = first_recipe(group, rank)
        for j, (key, p) in enumerate(zip(keys[i], mine["params"], strict=True)):
            pairs.append((p, _taken(f"parameter {j} of group {i}", state.get(key, {}), group, p, recipe)))
        loaded.append({**group, "params": keys[i]})
    return {**state_dict, "state": others, "param_groups": loaded}


def _keys(i: int, group: Any) -> list[Any]:
    params = group.get("params") if isinstance(group, dict) else None
    if not isinstance(params, list) or not all(isinstance(key, int | str) for key in params):
        raise OptionError(f"state_dict: group {i} is not a dict with a list of numbers or names as 'params'")
    return params


def _group(i: int, saved: dict[str, Any], mine: dict[str, Any]) -> dict[str, Any]:
    """Return the saved group, with the options that it lacks as they are here, and its parameters."""
    kept = {"params": mine["params"]} | {key: mine[key] for key in ("param_names",) if key in mine}
    group = {**mine, **plain(saved), **kept}
    try:
        group = checked(group)
    except OrthlinError as error:
        raise OptionError(f"state_dict: group {i}: {error}") from error
    for key in ("view", "scheduled_rank"):
        if group[key] != mine[key]:
            raise OptionError(f"state_dict: group {i} has {key} {saved[key]!r}, the optimizer {mine[key]!r}")
    names = [[_WRAPPERS.sub("", str(name)) for name in x.get("param_names", [])] for x in (saved, mine)]
    if all(names) and names[0] != names[1]:
        raise OptionError(f"state_dict: group {i} has other parameter names than the optimizer")
    if type(group["step"]) is not int:
        raise OptionError(f"state_dict: group {i} has step {group['step']!r}, expected an integer")
    return group


def _taken(where: str, saved: Any, group: dict[str, Any], p: Tensor, recipe: Recipe) -> dict[str, Any]:
    """Copy of a saved state for a parameter; what it lacks is made."""
    nowhere = torch.empty_like(p, device="meta")  # shapes and dtypes without memory; fused AdamW does not run there
    if not isinstance(saved, dict):
        raise OptionError(f"state_dict: the state of {where} is {type(saved).__name__}, expected a dict")
    saved = plain(saved)
    shared = {**group, "fused": False, "capturable": False}
    keys = needed(shared, nowhere, recipe, saved)
    notes = {key: x for key, x in saved.items() if key not in keys and isinstance(x, Real | str)}
    kept = saved.keys() - notes.keys()
    if kept and not {*keys} - _MADE_ANEW <= kept <= {*keys}:
        raise OptionError(f"state_dict: {where} has {sorted(saved)}, the optimizer {sorted(keys)}")
    near = group["fused"] or group["capturable"]
    likes = fresh(kept, shared, nowhere, recipe)
    tensors = {key: _copied(f"{key} of {where}", key, saved[key], likes[key], p, near) for key in kept}
    state = {**{key: tensors[key] for key in keys if key in tensors}, **notes}
    ready(state, group, p, recipe)
    return state


def _copied(what: str, key: str, value: Any, like: Tensor, p: Tensor, near: Any) -> Tensor:
    """Copy of a saved tensor where it belongs; the `step` of AdamW may be a number, of any kind, as for torch."""
    if key == "step":
        value = torch.tensor(float(value)) if type(value) in (int, float) else value
        like = like.to(torch.float32) if near else like
    if not isinstance(value, Tensor):
        raise OptionError(f"state_dict: {what} is {type(value).__name__}, expected a tensor")
    if value.is_meta and not p.is_meta:
        raise OptionError(f"state_dict: {what} is on the meta device, where tensors have no values")
    shapes = [list(x.shape) for x in (value, like)]
    if key.startswith("right_"):  # the number of rows is the rank, which may change with the step
        del shapes[0][-2:-1], shapes[1][-2:-1]
    if shapes[0] != shapes[1] or (value.dtype != like.dtype if key != "step" else value.is_complex()):
        raise OptionError(
            f"state_dict: {what} is {tuple(value.shape)} {value.dtype}, expected {tuple(like.shape)} {like.dtype}"
        )
    device = torch.device("cpu") if key == "step" and not near else p.device
    return placed(value.detach().to(device, like.dtype, copy=True), like)
