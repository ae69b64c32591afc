"""Loading the state of an optimizer: checked whole before anything is written, and kept in its dtypes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from orthlin.errors import OptionError


def exact_load(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], load: Callable[[dict[str, Any]], None]
) -> None:
    """Check a state against the optimizer, load it, and undo that torch casts state to the parameters' dtypes."""
    saved = _checked(optimizer, state_dict)
    load(state_dict)
    for p, values in saved:
        for key, value in values.items():
            if isinstance(value, Tensor):
                device = value.device if key == "step" else p.device
                optimizer.state[p][key] = value.detach().to(device, copy=True)


def _checked(optimizer: torch.optim.Optimizer, state_dict: Any) -> list[tuple[Tensor, dict[str, Any]]]:
    """Parameters with their saved state; OptionError, naming what differs, unless all of it fits."""
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= set(state_dict):
        raise OptionError("state_dict: expected a dict with 'state' and 'param_groups'")
    groups, here = state_dict["param_groups"], optimizer.param_groups
    sizes = [len(group["params"]) for group in groups], [len(group["params"]) for group in here]
    if sizes[0] != sizes[1]:
        raise OptionError(f"state_dict: has groups of {sizes[0]} parameters, the optimizer of {sizes[1]}")
    pairs = []
    for i, (saved, mine) in enumerate(zip(groups, here, strict=True)):
        _same_group(i, saved, mine)
        for j, (key, p) in enumerate(zip(saved["params"], mine["params"], strict=True)):
            values = state_dict["state"].get(key, {})
            _same_state(f"parameter {j} of group {i}", values, p, optimizer.state.get(p, {}), mine)
            pairs.append((p, values))
    return pairs


def _same_group(i: int, saved: dict[str, Any], mine: dict[str, Any]) -> None:
    missing = sorted(set(mine) - set(saved) - {"param_names"})
    if missing:
        raise OptionError(f"state_dict: group {i} lacks {', '.join(map(repr, missing))}")
    for key in ("algorithm", "view"):
        if _plain(saved[key]) != _plain(mine[key]):
            raise OptionError(f"state_dict: group {i} has {key} {saved[key]!r}, the optimizer {mine[key]!r}")
    if "param_names" in saved and "param_names" in mine and saved["param_names"] != mine["param_names"]:
        raise OptionError(f"state_dict: group {i} has other parameter names than the optimizer")


def _plain(value: Any) -> Any:
    """Tuples as lists, for a state that went through JSON or weights-only loading."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return list(value) if isinstance(value, tuple | list) else value


def _same_state(where: str, saved: dict[str, Any], p: Tensor, mine: dict[str, Any], group: dict[str, Any]) -> None:
    if group["algorithm"] == "adamw":
        expected = {key: tuple(p.shape) for key in saved if key != "step"}
        mine = {}
    else:
        expected = {key: tuple(value.shape) for key, value in mine.items()}
        if set(saved) != set(expected):
            raise OptionError(f"state_dict: {where} has {sorted(saved)}, the optimizer {sorted(expected)}")
    for key, shape in expected.items():
        value = saved[key]
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise OptionError(f"state_dict: {key} of {where} is {got}, expected a tensor of shape {shape}")
        if key in mine and value.dtype != mine[key].dtype:
            raise OptionError(f"state_dict: {key} of {where} is {value.dtype}, expected {mine[key].dtype}")
