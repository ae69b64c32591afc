"""Copies of matrices whose gradients are not averaged: what that goes with, and momenta that differ."""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from orthlin.errors import ArrayTypeError, OptionError
from orthlin.torch._adamw import is_matrix
from orthlin.torch._sharded import is_sharded, local, sides


def group_of(given: Any) -> Any:
    """Return the processes with the copies."""
    if given is None:
        return None
    if not dist.is_available():
        raise OptionError("replicate_group: this torch has no torch.distributed")
    if isinstance(given, dist.device_mesh.DeviceMesh) and given.ndim == 1:
        return given.get_group()
    if not isinstance(given, dist.ProcessGroup):
        raise OptionError(
            f"replicate_group: expected a ProcessGroup, a DeviceMesh of one dimension or None, got {given!r}"
        )
    return given


def check_copies(copies: Any, group: dict[str, Any], params: list[Tensor]) -> None:
    """Check that the directions of a group can be made of two averaged products."""
    if copies is None or group["algorithm"] == "adamw":
        return
    ranks = set(dist.get_process_group_ranks(copies))
    others = [side for mesh in {p.device_mesh for p in params if is_sharded(p)} for side in sides(mesh)]
    if any(len(ranks.intersection(dist.get_process_group_ranks(side))) > 1 for side in others):
        raise ArrayTypeError(
            "replicate_group: expected processes with the same parts, got some on the mesh of a DTensor; make it on a "
            "mesh of one copy alone"
        )
    cold = not group["warm_start"] and group["sketch"] != "gaussian"
    for key, refused, accepted in (
        ("tail", group["tail"] != 0, "0.0, as a tail is made of the average itself"),
        ("n_iter", group["n_iter"] > 0, "0"),
        ("sketch", cold, "'gaussian', or a warm start"),
        ("scale", group["scale"] == "nuclear", "another"),
        ("diagnostics", group["diagnostics"], "False"),
        ("capturable", group["capturable"], "False"),
    ):
        if refused:
            raise OptionError(f"{key}: with replicate_group expected {accepted}, got {group[key]!r}")


@torch.no_grad()  # type: ignore[untyped-decorator]
def average_momenta(copies: Any, groups: list[dict[str, Any]], state: dict[Any, Any]) -> None:
    """Give all copies the average of their momenta, which is all that directions are made of."""
    if copies is None:
        return
    size = dist.get_world_size(copies)
    for group in groups:
        for p in group["params"]:
            if is_matrix(group, p) and "momentum" in state[p]:
                momentum = local(state[p]["momentum"])
                part = torch.view_as_real(momentum) if momentum.is_complex() else momentum
                dist.all_reduce(part, group=copies)
                part /= size
