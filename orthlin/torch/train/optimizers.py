"""Optimizers by name, and the learning-rate schedule."""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from orthlin.errors import OptionError
from orthlin.torch.train.config import Config, Spec

ADAMW: dict[str, Any] = {"betas": (0.9, 0.99), "fused": True}
MATCH = {"adjust_lr_fn": "match_rms_adamw"}
ADAMW_LR = 1e-3
"""Of what is not a matrix, beside an orthogonal optimizer."""
CLASSES = {"msgd": "MSGD", "lowrank_msgd": "LowRankMSGD", "muon": "Muon", "lowrank_muon": "LowRankMuon"}
PREFIX = "adamw_"


def build_optimizers(model: Any, spec: Spec, config: Config) -> list[Any]:
    """Return the optimizers that a specification names; together they hold every parameter once."""
    build = {"adamw": _adamw, "torch_muon": _torch_muon}.get(spec.name, _orthlin)
    try:
        optimizers: list[Any] = build(model, spec, config)
    except (TypeError, ValueError) as problem:  # what orthlin and torch raise for bad options
        raise OptionError(f"optimizer {spec}: {problem}") from problem
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def _accepted(cls: Any) -> list[str]:
    return [name for name in inspect.signature(cls).parameters if name not in {"params", "adamw", "replicate_group"}]


def _options(cls: Any, given: Mapping[str, Any], config: Config, more: Sequence[str] = ()) -> dict[str, Any]:
    """Return options for a class, those `given` before those of the command line."""
    accepted = _accepted(cls)
    for key in given:
        if key not in accepted:
            raise OptionError(f"no option {key!r}; accepted are {', '.join([*accepted, *more])}")
    common = {"lr": config.lr, "weight_decay": config.weight_decay, "seed": config.seed}
    return {key: value for key, value in common.items() if key in accepted} | dict(given)


def _split(cls: Any, spec: Spec, config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of an orthogonal optimizer and, written with a prefix, those of the AdamW beside it."""
    beside = {k.removeprefix(PREFIX): v for k, v in spec.options.items() if k.startswith(PREFIX)}
    own = {key: value for key, value in spec.options.items() if not key.startswith(PREFIX)}
    options = _options(cls, own, config, [PREFIX + name for name in _accepted(torch.optim.AdamW)])
    return options, ADAMW | _options(torch.optim.AdamW, {"lr": ADAMW_LR} | beside, config)


def _adamw_groups(named: list[tuple[str, Any]], decay: float) -> list[dict[str, Any]]:
    matrices = [(name, p) for name, p in named if p.ndim >= 2]
    vectors = [(name, p) for name, p in named if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _adamw(model: Any, spec: Spec, config: Config) -> list[Any]:
    options = ADAMW | _options(torch.optim.AdamW, spec.options, config)
    groups = _adamw_groups(list(model.named_parameters()), options.pop("weight_decay"))
    return [torch.optim.AdamW(groups, **options)]


def _torch_muon(model: Any, spec: Spec, config: Config) -> list[Any]:
    """PyTorch's Muon for the matrices of the blocks, its AdamW for the rest."""
    options, beside = _split(torch.optim.Muon, spec, config)
    named = list(model.named_parameters())
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    inside = {id(p) for module in lists for p in module.parameters() if p.ndim == 2}
    groups = _adamw_groups([(name, p) for name, p in named if id(p) not in inside], beside.pop("weight_decay"))
    return [
        torch.optim.Muon([(name, p) for name, p in named if id(p) in inside], **MATCH | options),
        torch.optim.AdamW(groups, **beside),
    ]


def _orthlin(model: Any, spec: Spec, config: Config) -> list[Any]:
    import orthlin.torch
    from orthlin.torch import gpt2

    cls = getattr(orthlin.torch, CLASSES[spec.name])
    options, beside = _split(cls, spec, config)
    groups = gpt2.param_groups(model, split_qkv=config.split_qkv, per_head=config.per_head)
    return [cls(groups, options.pop("lr"), adamw=beside, **options)]


def schedule(step: int, config: Config) -> float:
    """Return the factor on the learning rate for the step with this number, counted from zero.

    Linear from ``1 / (warmup + 1)``, then half a cosine from one down to ``final_lr``.
    """
    if step < config.warmup:
        return (step + 1) / (config.warmup + 1)
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


def set_learning_rate(optimizers: list[Any], factor: float) -> None:
    """Set every group's learning rate to `factor` times the one it was built with; a tensor is written into."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            lr = group["initial_lr"] * factor
            group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], torch.Tensor) else lr
