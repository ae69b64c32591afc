"""Directions of stacks of several shapes made together, the smaller matrices filled up with zeros.

A direction has zeros where its matrix has them, and to a tolerance a smaller rank where its warm start has rows of
zeros: up to rounding nothing changes.  What is saved are its calls, which cost a device more than small matrices.
"""

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from orthlin import _backend as be
from orthlin._direction import Direction, Recipe, Sizes
from orthlin._scaling import Seen
from orthlin.torch._pieces import Batch, stream_name

_MOST = 1 << 27  # entries of a stack of several shapes times their rank: 0.1 ms on an H200, less than the calls saved
_NARROW = 64  # rank below which passes over the entries take the time


class Stack(NamedTuple):
    """Matrices of one shape, zero where they were not finite, what was seen of them, and their warm start."""

    U: Tensor
    sight: Seen
    right: Tensor | None


def joined(batches: dict[Any, Batch]) -> list[list[Batch]]:
    """Batches, with those whose directions are made together in one list."""
    found: list[list[Batch]] = []
    last: dict[Any, list[Batch]] = {}
    for (kind, *others), batch in sorted(batches.items(), key=lambda item: item[1].pieces[0].weight.shape[1:].numel()):
        if not _can_be_filled_up(batch):
            found.append([batch])
            continue
        r = _rank(batch)
        # an exact basis has a direction for every row of a warm start, also for one of zeros
        key = kind[1:], *others, r if batch.recipe.tol is None else r is None
        if key in last and _size([*last[key], batch]) <= _MOST:
            last[key].append(batch)
        else:
            last[key] = [batch]
            found.append(last[key])
    return found


def _can_be_filled_up(batch: Batch) -> bool:
    draws = batch.recipe.n_iter or not (batch.recipe.warm_start or _rank(batch) is None)
    return not draws and not be.is_host(batch.pieces[0].weight) and _size([batch]) > 0


def _rank(batch: Batch) -> int | None:
    return batch.recipe.width(tuple(batch.pieces[0].weight.shape), batch.options["step"])


def _size(batches: list[Batch]) -> int:
    """Entries of a stack of all, times their rank."""
    counts, rows, columns = zip(*(piece.weight.shape for batch in batches for piece in batch.pieces), strict=True)
    rank = max(_rank(batch) or min(batch.pieces[0].weight.shape[1:]) for batch in batches)
    size: int = sum(counts) * max(rows) * max(columns) * max(rank, _NARROW)
    return size


def filled(stacks: list[Tensor]) -> Tensor:
    """Return one stack of all, with zeros below and to the right of the smaller matrices."""
    m, n = (max(x.shape[axis] for x in stacks) for axis in (1, 2))
    return torch.cat([x if x.shape[1:] == (m, n) else pad(x, (0, n - x.shape[2], 0, m - x.shape[1])) for x in stacks])


def sight_of(sights: list[Seen]) -> Seen:
    """Return what was seen of one stack of all."""
    return Seen(*(None if found[0] is None else filled(list(found)) for found in zip(*sights, strict=True)))


def directions(recipe: Recipe, stacks: list[Stack], step: Any) -> list[Direction]:
    """Directions of stacks, one or several of which all have a rank or none."""
    U, sight, right = stacks[0]
    xp = be.namespace(U)
    if len(stacks) == 1:
        return [recipe.direction(xp, U, right, step, stream_name(U.shape), sight)]
    sizes = [recipe.sizes(stack.U.shape, step) for stack in stacks]
    ranks = [size.r for size in sizes if size.r is not None]
    tail: Tensor | float = 0.0
    if ranks and recipe.tail:
        finite = [stack.sight.finite for stack in stacks]
        tail = filled(
            [torch.full_like(x, size.tail, dtype=U.real.dtype) for x, size in zip(finite, sizes, strict=True)]
        )
    together = Sizes(max(ranks, default=None), tail, 1.0)
    rights = [stack.right for stack in stacks if stack.right is not None]
    U, sight = filled([stack.U for stack in stacks]), sight_of([stack.sight for stack in stacks])
    d = recipe.direction(xp, U, filled(rights) if rights else None, step, "", sight, together)
    starts = accumulate((len(stack.U) for stack in stacks), initial=0)
    return [
        _cut(d, start, tuple(stack.U.shape), size) for start, stack, size in zip(starts, stacks, sizes, strict=False)
    ]


def _cut(d: Direction, start: int, shape: tuple[int, ...], size: Sizes) -> Direction:
    """The direction of one of the stacks."""
    (count, m, n), r = shape, size.r
    rows = slice(start, start + count)
    Q = None if d.Q is None else d.Q[rows, :m, :r]
    c, e = (None if x is None else x[rows, :, :n] for x in (d.c, d.e))
    V, right, B = (None if x is None else x[rows, :r, :n] for x in (d.V, d.right, d.B))
    length = d.length[rows] if isinstance(d.length, Tensor) else size.length
    return Direction(d.X[rows, :m, :n], c, Q, V, right, B, e, length, d.finite[rows])
