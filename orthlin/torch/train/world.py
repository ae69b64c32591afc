"""The processes of a run, one or those that torchrun starts: every one takes its rows of every batch."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from orthlin.errors import OptionError, OrthlinError
from orthlin.torch._sharded import anywhere, is_sharded, whole

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others, which may be writing a checkpoint."""
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


class LostError(OrthlinError, RuntimeError):
    """Another process is gone, or does not answer."""


class World(NamedTuple):
    """A process among those of a run; alone it has all of everything, and sends nothing."""

    rank: int = 0
    size: int = 1
    shard: bool = False

    @classmethod
    def around(cls, shard: bool = False) -> "World":
        """Read off the environment what torchrun says of this process."""
        rank, size = (int(os.environ.get(name) or default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        return cls(rank, size, shard) if size > 1 else cls()

    def __str__(self) -> str:
        """Return the name under which this process writes to the error output."""
        return f"orthlin: process {self.rank} of {self.size}" if self.rank else "orthlin"

    @contextmanager
    def joined(self, device: str) -> Iterator[None]:
        """Find the others, and leave them at the end; LostError says that one is gone."""
        if self.size == 1:
            yield
            return
        if device == "cuda":
            _take_gpu(int(os.environ.get("LOCAL_RANK") or self.rank))
        try:
            distributed.init_process_group(BACKENDS[device], timeout=TIMEOUT)
            yield
        except RuntimeError as problem:
            lines = str(problem).splitlines() or [""]
            if isinstance(problem, distributed.DistError) or "gloo" in lines[0]:
                raise LostError(f"another process is gone or does not answer: {lines[0]}") from problem
            raise
        distributed.destroy_process_group()

    def spread(self, model: Any, device: str) -> Any:
        """Return what is called in place of a model: itself, a copy with averaged gradients, or itself in parts."""
        if self.size == 1:
            return model
        if not self.shard:
            from torch.nn.parallel import DistributedDataParallel

            return DistributedDataParallel(model)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device, (self.size,))
        for blocks in [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]:
            for block in blocks:
                fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def rows(self, batch: Any) -> Any:
        """Return the rows of a batch that are this process's."""
        share = len(batch) // self.size
        return batch[share * self.rank : share * (self.rank + 1)]

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over the processes, in place."""
        if self.size > 1:
            distributed.all_reduce(x)
            x /= self.size
        return x

    def agreed(self, flag: bool) -> bool:
        """Whether a flag is set on any process."""
        return bool(anywhere(torch.tensor([flag], dtype=torch.int32), [None])) if self.size > 1 else flag

    def gathered(self, tree: Any) -> Any:
        """Return whole tensors for those that are in parts, on the first process; all have to call it."""

        def gather(x: Tensor, _: Tensor) -> Tensor | None:
            if not is_sharded(x):
                return x
            full = whole(x)
            return full.cpu() if self.rank == 0 else None

        return mapped(gather, tree, tree)


ALONE = World()


def _take_gpu(number: int) -> None:
    if number >= torch.cuda.device_count():
        raise OptionError(f"--device cuda: {torch.cuda.device_count()} GPUs, none for process {number} of this machine")
    torch.cuda.set_device(number)


def mapped(call: Callable[[Tensor, Any], Any], tree: Any, like: Any) -> Any:
    """Return a tree of dicts and lists with `call` of every tensor and what is in its place in another tree."""
    if isinstance(tree, Tensor):
        return call(tree, like)
    if isinstance(tree, Mapping):
        return {key: mapped(call, value, like[key]) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(mapped(call, *pair) for pair in zip(tree, like, strict=True))
    return tree
