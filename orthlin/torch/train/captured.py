"""The step of the optimizers as a CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch

from orthlin.errors import OptionError
from orthlin.torch.train.config import Config

WARM_UP = 3
"""Steps that are taken one call after the other, in which libraries make their handles and optimizers their state."""


def graph_of(call: Callable[[], None]) -> Callable[[], None]:
    """Record a call, which is not made, and return what makes it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    replay: Callable[[], None] = graph.replay
    return replay


class Captured:
    """Steps of optimizers, from the fourth on by a graph; gradients and rates have to stay where they are."""

    def __init__(self, optimizers: list[Any], config: Config) -> None:
        self._optimizers, self._taken = optimizers, 0
        self._replay: Callable[[], None] | None = None
        self._groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group in self._groups:
            if "capturable" not in group:
                raise OptionError(f"--capture: {config.optimizer} is not capturable in this version of PyTorch")
            if group.get("rank") is not None and not group["warm_start"]:
                raise OptionError("--capture needs warm_start=True: a graph would draw the same sketch at every step")
        for group in self._groups:
            group["capturable"], group["lr"] = True, torch.tensor(float(group["lr"]), device=config.device)

    def step(self) -> None:
        """Take one step of every optimizer."""
        self._taken += 1
        if self._taken <= WARM_UP:
            self._call()
            return
        counters = [group for group in self._groups if "step" in group]
        steps = [group["step"] for group in counters]
        self._replay = self._replay or graph_of(self._call)
        self._replay()
        for group, step in zip(counters, steps, strict=True):  # counted on the host, where a replay changes nothing
            group["step"] = step + 1

    def _call(self) -> None:
        for optimizer in self._optimizers:
            optimizer.step()
