"""Directions of whole matrices: each goes to an owner, as a whole, and its direction comes back in parts."""

import heapq
import math
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch import distributed as dist

from orthlin import _backend as be
from orthlin._direction import Direction, Recipe
from orthlin.torch._pieces import Batch
from orthlin.torch._sharded import Part, chunk
from orthlin.torch._sums import added


def owners_of(stacks: list[tuple[Part, int, int | None]]) -> list[list[int]]:
    """Owners of the matrices of stacks, of a number and a rank, so that all have as much to do, on every process."""
    loads: dict[Any, list[tuple[int, int]]] = {}
    owners: list[list[int]] = [[] for _ in stacks]
    flops = [math.prod(part.shape) * (min(part.shape) if r is None else r) for part, _, r in stacks]
    for i in sorted(range(len(stacks)), key=lambda i: -flops[i]):
        part, count, _ = stacks[i]
        heap = loads.setdefault(part.group, [(0, rank) for rank in range(dist.get_world_size(part.group))])
        for _ in range(count):
            load, rank = heap[0]
            heapq.heapreplace(heap, (load + flops[i], rank))
            owners[i].append(rank)
    return owners


def assign(batches: Iterable[Batch]) -> None:
    """Tell the matrices of batches that need one their owners."""
    owned, stacks = [], []
    for batch in batches:
        part = batch.pieces[0].part
        if part is not None and part.whole and part.group is not None:
            owned.append(batch)
            r = batch.recipe.width(part.shape, batch.options["step"])
            stacks.append((part, sum(len(x.weight) for x in batch.pieces), r))
    for batch, owners in zip(owned, owners_of(stacks), strict=True):
        batch.pieces[:] = [piece._replace(owners=tuple(owners)) for piece in batch.pieces]


class Swap(NamedTuple):
    """Parts of a stack of matrices, on all processes of a group, and whole matrices with their owners."""

    part: Part
    owners: tuple[int, ...]

    def _places(self) -> tuple[int, list[tuple[int, int]], list[list[int]], int]:
        """Axis that is cut, bounds of all parts, the matrices of each owner, and the place of this process."""
        group = self.part.group
        axis, size = (-2 if self.part.over_rows is not None else -1), dist.get_world_size(group)
        bounds = [chunk(self.part.shape[axis], size, rank) for rank in range(size)]
        owned = [[i for i, owner in enumerate(self.owners) if owner == rank] for rank in range(size)]
        return axis, bounds, owned, dist.get_rank(group)

    @property
    def mine(self) -> list[int]:
        """The matrices of this process."""
        rank = dist.get_rank(self.part.group)
        return [i for i, owner in enumerate(self.owners) if owner == rank]

    def to_owners(self, parts: Tensor, notes: Tensor) -> tuple[Tensor, Tensor]:
        """Whole matrices of this process, and the sums of the notes (count, k) that processes have of them."""
        axis, bounds, owned, _ = self._places()
        count = len(self.mine)
        sent = [(_picked(parts, mine), _picked(notes, mine)) for mine in owned]
        other = parts.shape[-1 if axis == -2 else -2]
        shapes = [_cut(count, stop - start, other, axis) for start, stop in bounds]
        found = _swapped(sent, shapes, self.part.group)
        return torch.cat([x for x, _ in found], axis), torch.stack([x for _, x in found]).sum(0)

    def to_parts(self, matrices: Tensor, notes: Tensor) -> tuple[Tensor, Tensor]:
        """Parts of all matrices, and the notes of their owners."""
        axis, bounds, owned, rank = self._places()
        sent = [(matrices.narrow(axis, start, stop - start), notes) for start, stop in bounds]
        start, stop = bounds[rank]
        other = matrices.shape[-1 if axis == -2 else -2]
        shapes = [_cut(len(theirs), stop - start, other, axis) for theirs in owned]
        found = _swapped(sent, shapes, self.part.group)
        order = [i for theirs in owned for i in theirs]
        back = [order.index(i) for i in range(len(order))]
        return _picked(torch.cat([x for x, _ in found]), back), _picked(torch.cat([x for _, x in found]), back)


def _picked(x: Tensor, places: list[int]) -> Tensor:
    """Entries at some places, without an index that would have to be sent to a device."""
    return torch.cat([x[:0], *(x[i : i + 1] for i in places)])


def _cut(count: int, length: int, other: int, axis: int) -> tuple[int, int, int]:
    return (count, length, other) if axis == -2 else (count, other, length)


def _swapped(sent: list[tuple[Tensor, Tensor]], shapes: list[tuple[int, int, int]], group: Any) -> list[Any]:
    """What all processes have sent to this one, matrices of these shapes and notes of them, in one collective."""
    flat = [torch.cat([x.reshape(-1), notes.to(x.dtype).reshape(-1)]) for x, notes in sent]
    k = sent[0][1].shape[1]
    lengths = [count * (m * n + k) for count, m, n in shapes]
    buffer = torch.cat(flat)
    found = buffer.new_empty(sum(lengths))
    pair = [torch.view_as_real(x) if x.is_complex() else x for x in (found, buffer)]
    dist.all_to_all_single(*pair, lengths, [len(x) for x in flat], group=group)
    return [
        (x[: len(x) - shape[0] * k].reshape(shape), x[len(x) - shape[0] * k :].reshape(-1, k))
        for x, shape in zip(found.split(lengths), shapes, strict=True)
    ]


def by_owners(
    U: Tensor,
    right: Tensor | None,
    recipe: Recipe,
    swap: Swap,
    step: int,
    name: str,
    given: Tensor,
    moved: Tensor | None,
) -> tuple[Direction, Tensor, Tensor | None]:
    """Part of the direction of matrices of which U is a part, and which gradients are there and not zero.

    Of copies U becomes the mean.  Without other parts the direction is made here.
    """
    part = swap.part
    notes = torch.stack([x.reshape(-1) for x in (given, moved) if x is not None], 1).to(U.real.dtype)
    if part.over_copies is not None:
        mean, notes = added((U, notes), part.over_copies, mean=True)
        U.copy_(mean)
    alone, by_rows = part.group is None, part.over_rows is not None
    V = U
    if not alone:
        rides = right is not None and not by_rows
        V, notes = swap.to_owners(torch.cat([U, cast(Tensor, right)], -2) if rides else U, notes)
        notes = notes.real
        if right is not None:
            V, right = V.split([part.shape[0], right.shape[-2]], -2) if rides else (V, _picked(right, swap.mine))
    V.masked_fill_(notes[:, 0].view(-1, 1, 1) == 0, torch.nan)  # without a gradient on any process nothing moves
    d = recipe.direction(be.namespace(V), V, right, step, name)
    if not alone:
        d, notes = _returned(d, notes, swap, V, recipe)
    given, *others = (x.view(-1, 1, 1) > 0 for x in notes.unbind(1))
    return d, given, others[0] if others else None


def _returned(d: Direction, notes: Tensor, swap: Swap, V: Tensor, recipe: Recipe) -> tuple[Direction, Tensor]:
    """Parts of the directions of all owners, with their next warm starts, and the notes of them."""
    with be.products(V, recipe.precision):
        O = d.dense().to(V.dtype)  # in which lengths and warm starts go with it
    shape, k, by_rows = None if d.right is None else d.right.shape[1:], notes.shape[1], swap.part.over_rows is not None
    more = [notes, d.finite.view(-1, 1), *([d.length.view(-1, 1)] if isinstance(d.length, Tensor) else [])]
    plain = sum(x.shape[1] for x in more)
    if d.right is not None and by_rows:
        more.append(d.right.flatten(1))
    elif d.right is not None:
        O = torch.cat([O, d.right], -2)
    O, back = swap.to_parts(O, torch.cat([x.to(O.dtype) for x in more], 1))
    notes, finite, length = back[:, :k].real, back[:, k].real.view(-1, 1, 1) > 0, d.length
    if isinstance(length, Tensor):
        length = back[:, k + 1].real.view(-1, 1, 1)
    right = None
    if shape is not None:
        O, right = (O, back[:, plain:].reshape(-1, *shape)) if by_rows else O.split([swap.part.shape[0], shape[0]], -2)
    return Direction(O, None, None, None, right, None, None, length, finite), notes
