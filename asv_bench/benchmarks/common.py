"""What benchmarks share: the array library as a parameter, matrices, and ways to do one thing.

A way is orthlin's, a peer's, or the floor, the least that must be computed.  All ways of a module take the same arrays,
in float32.  JAX's are compiled, as their users would have them.
"""

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

LIBRARIES = ("numpy", "torch", "jax", "torch:cuda", "cupy")
DEVICES = LIBRARIES[3:]
SIZES = ("16x16", "128x128", "768x768", "768x3072", "1600x6400")
"""Small ones, and matrices of GPT-2, small and XL."""
SLOW_SIZES = ("4096x4096", "4096x11008")
"""Matrices of a LLaMA of 7B parameters."""
KNOWN = 64  # directions of a gradient that stand above its noise


class Library(NamedTuple):
    """An array library on a device."""

    name: str
    xp: Any
    asarray: Callable[[np.ndarray], Any]
    wait: Callable[[Any], Any] = lambda x: x
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda f: f


def library(name: str) -> Library:
    """The library of that name, or NotImplementedError, by which asv skips, where it or its device is missing."""
    module, _, device = name.partition(":")
    if find_spec(module) is None or (name in DEVICES and not Path("/dev/nvidiactl").exists()):
        raise NotImplementedError(f"{name} is not here")
    if module == "torch":
        import torch

        if not device:
            return Library(name, torch, torch.from_numpy)
        return Library(name, torch, lambda x: torch.from_numpy(x).to(device), lambda _: torch.cuda.synchronize())
    if module == "jax":
        if single():
            os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
        import jax

        return Library(name, jax.numpy, jax.numpy.asarray, jax.block_until_ready, jax.jit)
    if module == "cupy":
        import cupy

        return Library(name, cupy, cupy.asarray, lambda _: cupy.cuda.get_current_stream().synchronize())
    return Library(name, np, np.asarray)


def single() -> bool:
    """Whether libraries are held to one thread."""
    return os.environ.get("OMP_NUM_THREADS") == "1"


def clock(name: str) -> Callable[[], float]:
    """The processor's time for one thread of the host, which does not see other work there; else the wall's."""
    return time.process_time if single() and name not in DEVICES else time.perf_counter


def to_host(x: Any) -> np.ndarray:
    """Values in float64."""
    return np.asarray(x.get() if hasattr(x, "get") else x.cpu() if hasattr(x, "cpu") else x, dtype=np.float64)


def shape(size: str) -> tuple[int, int]:
    m, n = map(int, size.split("x"))
    return m, n


def gaussian(m: int, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((m, n), dtype=np.float32)


def gradient(m: int, n: int) -> np.ndarray:
    """Matrix with about what a gradient has: singular values like 1/i for some dozens, then noise."""
    known = min(m, n, KNOWN)
    left, right = gaussian(m, known, 1), gaussian(known, n, 2)
    weights = np.arange(1, known + 1, dtype=np.float32) ** -1
    return (left * weights) @ right + 0.1 * gaussian(m, n, 3)


def rank(size: str, share: int = 8) -> int:
    """Rank of low-rank ways, a `share`-th of the short side."""
    return max(min(shape(size)) // share, 2)


class Way(NamedTuple):
    """How something is computed: a function of a library and arrays, and which libraries have it."""

    call: Callable[..., Any]
    libraries: tuple[str, ...] = LIBRARIES
    traced: bool = True

    def of(self, lib: Library, *arrays: Any) -> Callable[[], Any]:
        """The call to be timed, which returns when the result is there."""
        if lib.name not in self.libraries:
            raise NotImplementedError(f"not for {lib.name}")
        function = lib.compiled(lambda *given: self.call(lib, *given)) if self.traced else lambda *x: self.call(lib, *x)

        def call() -> Any:
            result = function(*arrays)
            lib.wait(result)
            return result

        return call


class Ways(ABC):
    """Base of benchmarks whose parameters are library, way and size."""

    version = "1"
    timeout = 300
    rounds = 1
    repeat = (2, 20, 1.0)
    warmup_time = 0
    param_names: ClassVar = ["library", "way", "size"]
    ways: ClassVar[dict[str, Way]]
    ready: tuple[str, ...] = ()

    @abstractmethod
    def arrays(self, lib: Library, size: str) -> tuple[Any, ...]:
        """What a way is given."""

    def setup(self, name: str, way: str, size: str) -> None:
        """Make `call`, called once; asv comes here before every sample."""
        if self.ready != (name, way, size):
            if name not in self.ways[way].libraries:
                raise NotImplementedError(f"not for {name}")
            lib = library(name)
            self.call = self.ways[way].of(lib, *self.arrays(lib, size))
            self.call()
            self.timer = clock(name)
            self.ready = (name, way, size)


class Timed(Ways):
    """Seconds of a way."""

    def time_way(self, *_: str) -> None:
        self.call()


class Memory(Ways):
    """Peak of the process, in which the library itself counts too."""

    def peakmem_way(self, *_: str) -> None:
        self.call()


class DeviceMemory(Ways):
    """Peak of what a call adds to the device's memory."""

    unit = "bytes"

    def track_device_peak(self, name: str, *_: str) -> int:
        if name == "cupy":
            import cupy

            pool = cupy.get_default_memory_pool()
            pool.free_all_blocks()
            before = pool.used_bytes()
            self.call()
            return pool.total_bytes() - before
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.call()
        return torch.cuda.max_memory_allocated() - before
