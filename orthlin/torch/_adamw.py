"""What goes to torch's AdamW: which parameters of a group, with which options, and what it would refuse."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from orthlin.errors import OptionError

_FLAGS = ("amsgrad", "foreach", "capturable", "differentiable", "fused")
OPTIONS = ("lr", "betas", "eps", "weight_decay", "maximize", *_FLAGS)


def tensor(item: Any) -> Any:
    """Return the parameter of an item of "params"."""
    return item[1] if isinstance(item, tuple) and len(item) == 2 else item


def is_matrix(group: dict[str, Any], p: Tensor) -> bool:
    """Whether a parameter of a group is stepped along orthogonalized directions, else by AdamW."""
    return p.ndim > 1 if group["algorithm"] == "auto" else bool(group["algorithm"] == "orthogonal")


def part_of(group: dict[str, Any]) -> dict[str, Any]:
    """Return the group as torch's AdamW takes it: parameters that go there, and the options that hold for them."""
    part = {**group, "params": [p for p in group["params"] if not is_matrix(group, tensor(p))]}
    if group["algorithm"] != "adamw":
        factor = group["adamw_lr_factor"]
        lr = group["lr"] if factor == 1 else group["lr"] * factor
        part |= {"lr": lr, "weight_decay": group["adamw_weight_decay"], "maximize": group["adamw_maximize"]}
    return part


def parts_of(group: dict[str, Any], state: Any) -> list[dict[str, Any]]:
    """Return the group in the parts that torch's AdamW takes, fused where that is left open and pays."""
    part = part_of(group)
    left_open = not any(isinstance(x, Tensor) for x in (part["lr"], *part["betas"])) and (
        (part["fused"], part["foreach"], part["capturable"], part["differentiable"]) == (None, None, False, False)
    )
    found: dict[Any, list[Tensor]] = {}
    for p in part["params"]:
        fused = True if left_open and _fits_fused(p, state[p]) else part["fused"]
        found.setdefault(fused, []).append(p)
    return [part | {"params": params, "fused": fused} for fused, params in found.items()]


def _fits_fused(p: Tensor, state: dict[str, Any]) -> bool:
    """Whether torch's fused step on the CPU serves: up to five times as fast as others, and equal but for the last bit.

    Of tensors that lie otherwise in memory than their parameter it makes something wrong without a word.
    """
    plain = type(p) in (Tensor, torch.nn.Parameter) and p.is_cpu and p.dtype in (torch.float32, torch.float64)
    return plain and all(x.is_contiguous() for x in (p, p.grad, *state.values()) if isinstance(x, Tensor))


def defaults_of(options: dict[str, Any], given: Any, capturable: bool) -> dict[str, Any]:
    """Options of torch's AdamW beside those of matrices, and its rate as a multiple of theirs."""
    lr = options["lr"]
    if not isinstance(given, dict | None):
        raise OptionError(f"adamw: expected a dict of options of torch.optim.AdamW, got {given!r}")
    shared = {"lr": lr, "maximize": options["maximize"], "capturable": capturable}
    defaults = checked_options(shared | (given or {}))
    factor = 1.0 if defaults["lr"] is lr or lr == 0 else float(defaults["lr"]) / float(lr)
    return {**defaults, "adamw_lr_factor": factor}


def checked_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options with their defaults; OptionError unless torch's AdamW takes them."""
    try:
        return dict(torch.optim.AdamW([torch.empty(0)], **options).defaults)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"adamw: expected options of torch.optim.AdamW, got {options!r}; {error}") from error


def state_of(group: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
    """State as torch's AdamW makes it for a parameter with a gradient."""
    inner, like = torch.optim.AdamW([torch.empty(0)]), p.detach()
    like.grad = p.detach()
    inner._init_group({**group, "params": [like]}, *([] for _ in range(6)))
    return dict(inner.state[like])


def check_step(inner: torch.optim.AdamW) -> None:
    """Have torch's AdamW raise what it would raise in its step."""
    for group in inner.param_groups:
        inner._init_group(group, *([] for _ in range(6)))
        _, _ = group["betas"]
        options = tuple((key, group[key]) for key in _FLAGS)
        for kind in {(p.dtype, p.device) for p in group["params"] if p.grad is not None}:
            _tried(options, isinstance(group["lr"], Tensor), *kind)


@cache
def _tried(options: tuple[tuple[str, Any], ...], tensor_lr: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Make a step without entries: what torch refuses depends on options, dtype and device, which change rarely."""
    p = torch.nn.Parameter(torch.empty(0, dtype=dtype, device=device))
    p.grad = torch.empty_like(p)
    lr = torch.zeros((), device=device) if tensor_lr else 0.0
    inner = torch.optim.AdamW([p], lr, **dict(options))
    step(inner)


def step(inner: torch.optim.AdamW) -> None:
    """Step without the hooks of all optimizers."""
    getattr(torch.optim.AdamW.step, "__wrapped__", torch.optim.AdamW.step)(inner)
