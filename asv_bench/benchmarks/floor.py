"""What the machine can do, and how it is set: the ceilings of the roofline, and what the other figures depend on."""

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .common import LIBRARIES, clock, gaussian, library, single, to_host

ORDER = 2048
STREAM = 2**26  # numbers, 256 MB: more than any cache


def best(call: Callable[[], Any], now: Callable[[], float], seconds: float = 1.0) -> float:
    """Seconds of the fastest call: a ceiling is what is possible."""
    call()
    times, start = [], time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 3:
        before = now()
        call()
        times.append(now() - before)
    return min(times)


class Ceilings:
    """Rate of a product of order 2048 and of an update x <- 2 x of 256 MB."""

    version = "1"
    timeout = 120
    params = [LIBRARIES, ["float32", "float64"]]
    param_names = ["library", "dtype"]

    def setup(self, name: str, dtype: str) -> None:
        if name == "jax" and dtype == "float64":
            raise NotImplementedError("JAX makes float32 of it, unless told otherwise")
        self.lib, self.now = library(name), clock(name)

    def track_product_rate(self, _: str, dtype: str) -> float:
        lib = self.lib
        A = lib.asarray(gaussian(ORDER, ORDER).astype(dtype))
        call = lib.compiled(lambda A: A @ A)
        return 2e-9 * ORDER**3 / best(lambda: lib.wait(call(A)), self.now)

    def track_bandwidth(self, name: str, dtype: str) -> float:
        lib = self.lib
        x = lib.asarray(np.ones(STREAM * 4 // np.dtype(dtype).itemsize, dtype=dtype))
        if name == "jax":
            import jax

            call = jax.jit(lambda x: 2 * x)
            return 2e-9 * 4 * STREAM / best(lambda: lib.wait(call(x)), self.now)

        def double() -> None:
            nonlocal x
            x *= 1

        return 2e-9 * 4 * STREAM / best(lambda: lib.wait(double()), self.now)

    track_product_rate.unit = "GFLOP/s"
    track_bandwidth.unit = "GB/s"


class Settings:
    """Threads, and the error of a product in float32: about 1 eps, thousands with TensorFloat-32 or bfloat16."""

    version = "1"
    params = LIBRARIES
    param_names = ["library"]

    def setup(self, name: str) -> None:
        self.lib = library(name)

    def track_threads(self, name: str) -> int:
        if name.startswith("torch"):
            import torch

            return torch.get_num_threads()
        if name == "jax":
            return 1 if single() else len(os.sched_getaffinity(0))
        from threadpoolctl import threadpool_info

        return max(pool["num_threads"] for pool in threadpool_info())

    def track_product_error(self, _: str) -> float:
        lib, A = self.lib, gaussian(256, 256)
        exact = A.astype(np.float64) @ A
        error = np.abs(to_host(lib.asarray(A) @ lib.asarray(A)) - exact).max() / np.abs(exact).max()
        return float(error / np.finfo(np.float32).eps)

    track_threads.unit = "threads"
    track_product_error.unit = "eps"
