"""The array libraries on this machine."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

Array = Any


class Library(NamedTuple):
    """An array library on one device: how to enter it, to leave it and to wait for it."""

    name: str
    asarray: Callable[[np.ndarray], Array]
    to_numpy: Callable[[Array], np.ndarray]
    wait: Callable[[Array], Any]


def installed() -> Iterator[Library]:
    """Every supported array library found on this machine, on each kind of device it can use."""
    yield Library("numpy", np.asarray, np.asarray, lambda x: x)
    if find_spec("torch"):
        import torch

        for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            yield Library(
                f"torch:{kind}",
                lambda a, kind=kind: torch.asarray(a, device=kind),  # type: ignore[misc]
                lambda x: x.cpu().numpy(),
                lambda x: torch.cuda.synchronize() if x.is_cuda else None,
            )
    if find_spec("jax"):
        import jax

        yield Library(f"jax:{jax.default_backend()}", jax.numpy.asarray, np.asarray, lambda x: x.block_until_ready())
    if find_spec("cupy"):
        import cupy

        if cupy.cuda.is_available():
            yield Library("cupy", cupy.asarray, cupy.asnumpy, lambda _: cupy.cuda.get_current_stream().synchronize())
