"""Sums over the processes that hold the other parts of matrices, one collective each."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from orthlin._shards import Shards, here
from orthlin.torch._sharded import Part


class Exchange:
    """The sums of a batch; whether a part of a gradient is not zero rides with the first of each side."""

    def __init__(self, moved: Tensor | None) -> None:
        self._moved = moved if moved is None else moved.to(torch.float64)

    def shards(self, part: Part) -> Shards:
        """Sums over the processes of a part."""
        return Shards(part.shape, part.columns[1], self._over(part.over_rows), self._over(part.over_columns))

    def moved(self) -> Tensor | None:
        """Which gradients are not zero, in any part."""
        return self._moved if self._moved is None else self._moved > 0

    def _over(self, group: Any) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]:
        if group is None:
            return here
        riding = self._moved is not None

        def summed(arrays: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            nonlocal riding
            if not riding:
                return added(arrays, group)
            riding = False
            *sums, self._moved = added((*arrays, self._moved), group)
            return tuple(sums)

        return summed


def added(arrays: tuple[Tensor, ...], group: Any) -> tuple[Tensor, ...]:
    """Sums of tensors of one precision over a group, in one collective, the same on all of its processes."""
    flat = [(torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).reshape(-1) for x in arrays]
    buffer = torch.cat(flat)
    dist.all_reduce(buffer, group=group)
    sums = zip(buffer.split([x.numel() for x in flat]), arrays, strict=True)
    return tuple(
        torch.view_as_complex(x.reshape(*like.shape, 2)) if like.is_complex() else x.reshape(like.shape)
        for x, like in sums
    )
