"""Loading the state of an optimizer: checked whole before anything is written, and kept in its dtypes."""

from typing import Any

import torch
from torch import Tensor

from orthlin.errors import OptionError, OrthlinError
from orthlin.torch._groups import checked, recipe_of

Saved = list[tuple[Tensor, dict[str, Any]]]


def fitting(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> Saved:
    """Parameters with their saved state; OptionError, naming what differs, unless all of it fits."""
    state, groups = state_dict.get("state"), state_dict.get("param_groups")
    if not isinstance(state, dict) or not isinstance(groups, list):
        raise OptionError("state_dict: expected 'state', a dict, and 'param_groups', a list")
    here = optimizer.param_groups
    keys = [_keys(i, group) for i, group in enumerate(groups)]
    if [len(k) for k in keys] != [len(group["params"]) for group in here]:
        sizes = [len(k) for k in keys], [len(group["params"]) for group in here]
        raise OptionError(f"state_dict: has groups of {sizes[0]} parameters, the optimizer of {sizes[1]}")
    known = [key for group in keys for key in group]
    if len(set(known)) < len(known) or not set(state) <= set(known):
        raise OptionError("state_dict: its groups list a parameter twice, or miss one that has a state")
    pairs = []
    for i, (saved, mine) in enumerate(zip(groups, here, strict=True)):
        _check_group(i, saved, mine)
        for j, (key, p) in enumerate(zip(keys[i], mine["params"], strict=True)):
            where = f"parameter {j} of group {i}"
            _check_state(where, state.get(key, {}), _expected(p, optimizer.state.get(p, {}), mine, state.get(key)))
            pairs.append((p, state.get(key, {})))
    return pairs


def restore(optimizer: torch.optim.Optimizer, saved: Saved) -> None:
    """Undo that torch casts a state to the dtypes of the parameters."""
    for p, values in saved:
        for key, value in values.items():
            device = value.device if key == "step" else p.device
            optimizer.state[p][key] = value.detach().to(device, copy=True)


def _keys(i: int, group: Any) -> list[int]:
    params = group.get("params") if isinstance(group, dict) else None
    if not isinstance(params, list) or not all(isinstance(key, int) for key in params):
        raise OptionError(f"state_dict: group {i} is not a dict with a list of numbers as 'params'")
    return params


def _check_group(i: int, saved: dict[str, Any], mine: dict[str, Any]) -> None:
    missing = sorted(set(mine) - set(saved) - {"param_names"})
    if missing:
        raise OptionError(f"state_dict: group {i} lacks {', '.join(map(repr, missing))}")
    for key in ("algorithm", "view", "scheduled_rank"):
        if _plain(saved.get(key)) != _plain(mine.get(key)):
            raise OptionError(f"state_dict: group {i} has {key} {saved[key]!r}, the optimizer {mine[key]!r}")
    if "param_names" in saved and "param_names" in mine and saved["param_names"] != mine["param_names"]:
        raise OptionError(f"state_dict: group {i} has other parameter names than the optimizer")
    try:
        checked(saved)
        if mine["algorithm"] == "orthogonal":
            recipe_of(saved)
    except OrthlinError as error:
        raise OptionError(f"state_dict: group {i}: {error}") from error
    if not isinstance(saved.get("step", 0), int):
        raise OptionError(f"state_dict: group {i} has step {saved['step']!r}, expected an integer")


def _plain(value: Any) -> Any:
    """Tuples as lists, for a state that has been through JSON."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return list(value) if isinstance(value, tuple | list) else value


def _expected(p: Tensor, mine: dict[str, Any], group: dict[str, Any], saved: Any) -> dict[str, Tensor]:
    """Tensors with the shapes and dtypes that the state of a parameter must have."""
    if group["algorithm"] == "orthogonal":
        return mine
    if not mine and not saved:
        return {}  # AdamW makes its state in its first step
    moments = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
    return {"step": torch.zeros(()), **dict.fromkeys(moments, p)}


def _check_state(where: str, saved: Any, expected: dict[str, Tensor]) -> None:
    if not isinstance(saved, dict) or set(saved) != set(expected):
        got = sorted(saved) if isinstance(saved, dict) else type(saved).__name__
        raise OptionError(f"state_dict: {where} has {got}, the optimizer {sorted(expected)}")
    for key, like in expected.items():
        value = saved[key]
        if not isinstance(value, Tensor):
            raise OptionError(f"state_dict: {key} of {where} is {type(value).__name__}, expected a tensor")
        shapes = [list(x.shape) for x in (value, like)]
        if key.startswith("right_"):  # the number of rows is the rank, which may change with the step
            del shapes[0][-2:-1], shapes[1][-2:-1]
        if shapes[0] != shapes[1] or value.dtype != like.dtype:
            raise OptionError(
                f"state_dict: {key} of {where} is {tuple(value.shape)} {value.dtype}, "
                f"expected {tuple(like.shape)} {like.dtype}"
            )
