"""Full directions of matrices in parts: each matrix goes to an owner, as a whole, and comes back in parts."""

import heapq
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch import distributed as dist

from orthlin import _backend as be
from orthlin._direction import Direction, Recipe
from orthlin.torch._pieces import Batch
from orthlin.torch._sharded import Part, chunk


def owners_of(stacks: list[tuple[Part, int]]) -> list[list[int]]:
    """Owners of the matrices of stacks, so that all have as much to do: the same way on every process."""
    loads: dict[Any, list[tuple[int, int]]] = {}
    owners: list[list[int]] = [[] for _ in stacks]
    flops = [part.shape[0] * part.shape[1] * min(part.shape) for part, _ in stacks]
    for i in sorted(range(len(stacks)), key=lambda i: -flops[i]):
        part, count = stacks[i]
        heap = loads.setdefault(part.group, [(0, rank) for rank in range(dist.get_world_size(part.group))])
        for _ in range(count):
            load, rank = heap[0]
            heapq.heapreplace(heap, (load + flops[i], rank))
            owners[i].append(rank)
    return owners


def assign(batches: Iterable[Batch]) -> None:
    """Tell the matrices of batches that need one their owners."""
    owned = [batch for batch in batches if batch.pieces[0].part is not None and batch.pieces[0].part.whole]
    stacks = [(cast(Part, batch.pieces[0].part), sum(len(x.weight) for x in batch.pieces)) for batch in owned]
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

    def to_owners(self, parts: Tensor, notes: Tensor) -> tuple[Tensor, Tensor]:
        """Whole matrices of this process, and the sums of the notes (count, k) that processes have of them."""
        axis, bounds, owned, rank = self._places()
        count = len(owned[rank])
        sent = [(_picked(parts, mine), _picked(notes, mine)) for mine in owned]
        other = self.part.shape[-1 if axis == -2 else -2]
        shapes = [_cut(count, stop - start, other, axis) for start, stop in bounds]
        found = _swapped(sent, shapes, self.part.group)
        return torch.cat([x for x, _ in found], axis), torch.stack([x for _, x in found]).sum(0)

    def to_parts(self, matrices: Tensor, notes: Tensor) -> tuple[Tensor, Tensor]:
        """Parts of all matrices, and the notes of their owners."""
        axis, bounds, owned, rank = self._places()
        sent = [(matrices.narrow(axis, start, stop - start), notes) for start, stop in bounds]
        start, stop = bounds[rank]
        other = self.part.shape[-1 if axis == -2 else -2]
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
        (x[: len(x) - shape[0] * k].reshape(shape), x[len(x) - shape[0] * k :].reshape(-1, k).real)
        for x, shape in zip(found.split(lengths), shapes, strict=True)
    ]


def by_owners(
    U: Tensor, recipe: Recipe, swap: Swap, step: int, given: Tensor, moved: Tensor | None
) -> tuple[Direction, Tensor, Tensor | None]:
    """Part of the full direction of matrices of which U is a part, and which gradients are there and not zero."""
    flags = [x.reshape(-1) for x in (given, moved) if x is not None]
    V, notes = swap.to_owners(U, torch.stack(flags, 1))
    V.masked_fill_(notes[:, 0].view(-1, 1, 1) == 0, torch.nan)  # without a gradient on any process nothing moves
    d = recipe.direction(be.namespace(V), V, None, step, "")
    O, notes = swap.to_parts(d.X, torch.cat([notes, d.finite.view(-1, 1).to(notes.dtype)], 1))
    given, *others, finite = (x.view(-1, 1, 1) > 0 for x in notes.unbind(1))
    found = Direction(O, None, None, None, None, None, None, d.length, finite)
    return found, given, others[0] if others else None
