"""Sums over the processes that hold the other parts of matrices, one collective each."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from orthlin._shards import Shards, here
from orthlin.torch._sharded import Part


class Exchange:
    """The sums of a batch; whether parts of a gradient are there, and not zero, rides with the first of each side.

    Matrices without a gradient on any process come out as if it were not finite: nothing of them moves.
    """

    def __init__(self, given: Tensor, moved: Tensor | None) -> None:
        self._flags = [x.to(torch.float64) for x in (given, moved) if x is not None]
        self._to_come = 0

    def shards(self, part: Part) -> Shards:
        """Sums over the processes of a part."""
        rows, columns = self._over(part.over_rows), self._over(part.over_columns)
        return Shards(part.shape, part.columns[1], rows, columns, self._over(part.over_copies, mean=True))

    def given(self) -> Tensor:
        """Which gradients are there, in any part."""
        return self._flags[0] > 0

    def moved(self) -> Tensor | None:
        """Which gradients are not zero, in any part."""
        return self._flags[1] > 0 if len(self._flags) > 1 else None

    def _over(self, group: Any, *, mean: bool = False) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]:
        if group is None:
            return here
        self._to_come += 1
        riding = True

        def summed(arrays: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            nonlocal riding
            if not riding:
                return added(arrays, group, mean=mean)
            riding = False
            self._to_come -= 1
            sums = added((*arrays, *self._flags), group, mean=mean)
            sums, self._flags = sums[: len(arrays)], list(sums[len(arrays) :])
            return sums if self._to_come else tuple(x.masked_fill(~self.given(), torch.nan) for x in sums)

        return summed


def added(arrays: tuple[Tensor, ...], group: Any, *, mean: bool = False) -> tuple[Tensor, ...]:
    """Sums or means of tensors of one precision over a group, in one collective, the same on all of its processes."""
    flat = [(torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).reshape(-1) for x in arrays]
    buffer = torch.cat(flat)
    dist.all_reduce(buffer, group=group)
    if mean:
        buffer /= dist.get_world_size(group)
    sums = zip(buffer.split([x.numel() for x in flat]), arrays, strict=True)
    return tuple(
        torch.view_as_complex(x.reshape(*like.shape, 2)) if like.is_complex() else x.reshape(like.shape)
        for x, like in sums
    )
