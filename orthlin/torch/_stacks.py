"""Stacks of a batch: blends of gradients and momenta, warm starts, and of which matrices there is a gradient."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from orthlin import _backend as be
from orthlin._direction import Recipe
from orthlin.torch._pieces import Piece, stream_name

_CACHE = 1 << 24  # bytes of a stack that stays in the cache of a host, on pages that have been written before


def cached(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Parts of a batch whose stack the host's cache holds; all of it on devices, and if others have a share in it."""
    size = math.prod(pieces[0].weight.shape[1:]) * _dtype(pieces[0]).itemsize
    together = pieces[0].part is not None or not be.is_host(pieces[0].weight)
    if together or size * sum(len(p.weight) for p in pieces) <= _CACHE:
        yield pieces
        return
    part: list[Piece] = []
    for piece in pieces:
        if part and size * (sum(len(p.weight) for p in part) + len(piece.weight)) > _CACHE:
            yield part
            part = []
        part.append(piece)
    yield part


def _dtype(piece: Piece) -> torch.dtype:
    """Of what is orthogonalized."""
    dtype = piece.gradient.dtype if piece.momentum is None else piece.momentum.dtype
    return torch.float32 if dtype.itemsize < 4 else dtype


def blend_of(piece: Piece, group: dict[str, Any], out: Tensor | None = None) -> Tensor:
    """What is orthogonalized: a gradient, or its blend with the momentum."""
    g, m, beta = piece.gradient, piece.momentum, group["momentum"]
    if m is None:
        return g.to(_dtype(piece)) if out is None else out.copy_(g)
    if group["error_feedback"]:
        return torch.add(m, g, alpha=1 - beta, out=out)
    # beta (beta M + (1 - beta) G) + (1 - beta) G for Nesterov's momentum
    return torch.lerp(g.to(_dtype(piece)), m, beta**2 if group["nesterov"] else beta, out=out)


def blended(pieces: list[Piece], group: dict[str, Any]) -> Tensor:
    """Stack of what is orthogonalized."""
    first, beta = pieces[0], group["momentum"]
    counts, (m, n) = [len(p.weight) for p in pieces], first.weight.shape[1:]
    U = torch.empty((sum(counts), m, n), dtype=_dtype(first), device=first.weight.device)
    if first.weight.stride(-2) < first.weight.stride(-1):
        U = U.view(-1, n, m).mT
    parts = list(U.split(counts))
    if be.is_host(U):  # where passes cost more than calls
        for piece, out in zip(pieces, parts, strict=True):
            blend_of(piece, group, out)
    else:
        torch._foreach_copy_(parts, [p.gradient for p in pieces])
        momenta = [p.momentum for p in pieces if p.momentum is not None]
        if group["error_feedback"]:
            torch._foreach_mul_(parts, 1 - beta)
            torch._foreach_add_(parts, momenta)
        elif momenta:
            torch._foreach_lerp_(parts, momenta, beta**2 if group["nesterov"] else beta)
    return U


def warm_starts(
    pieces: list[Piece], recipe: Recipe, shape: tuple[int, ...], step: Any, columns: Any = None
) -> Tensor | None:
    """Warm starts in a stack; of `columns` of a matrix that has that shape."""
    r, xp = recipe.width(shape, step), be.namespace(pieces[0].weight)
    if r is None or not recipe.warm_start:
        return None
    return torch.cat([recipe.resized(xp, p.state[p.right], r, step, stream_name(shape), columns) for p in pieces])


def which_given(pieces: list[Piece]) -> Tensor | None:
    """Which matrices have a gradient, (..., 1, 1), None where all must have one."""
    return None if pieces[0].given is None else torch.cat([p.given for p in pieces])


def which_moved(pieces: list[Piece]) -> Tensor | None:
    """Which gradients are not zero, (..., 1, 1), where that is needed."""
    if pieces[0].fading is None:
        return None
    if not be.is_host(pieces[0].weight):
        return _sizes(pieces) != 0
    return torch.cat([be.nonzero(be.namespace(p.gradient), p.gradient) for p in pieces])


def _sizes(pieces: list[Piece]) -> Tensor:
    """Sizes of gradients on a device, (..., 1, 1), zero for zero."""
    if torch.compiler.is_compiling() and pieces[0].gradient.numel():  # along columns, as the norms in the same pass
        return torch.cat([p.gradient.abs().amax(-2, keepdim=True).amax(-1, keepdim=True) for p in pieces])
    matrices = [g for p in pieces for g in p.gradient.unbind()]
    # the 1-norm, as the largest entry of nothing is an error
    return torch.stack(torch._foreach_norm(matrices, 1)).view(-1, 1, 1)
