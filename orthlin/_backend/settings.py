"""Settings that users make for their own code, and that the precision of a result must not depend on."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, wraps
from threading import Lock
from types import FunctionType
from typing import Any, ParamSpec, TypeVar, cast

import array_api_compat as compat
import numpy as np

from orthlin._backend.arrays import Array

P = ParamSpec("P")
R = TypeVar("R")


def settings(x: Array) -> AbstractContextManager[Any]:
    """Context in which the operations on arrays of the library of `x` are done as they are written.

    NumPy: no floating-point error state, since some results overflow or underflow on purpose.  torch: no autocast
    on the device of `x`, full float32 products.  JAX: products of the highest precision, the usual promotion, and
    no check for NaN and infinity, which stand for a breakdown and are selected away.  CuPy: the device of `x` is the
    current one, on which constants are made.  Everything is as before afterwards, after errors too.

    The precision of torch's float32 products is one for all threads: while any is inside, it is full in all of them.
    Code under ``torch.compile`` cannot change it, and has that of the moment when it runs.
    """
    if isinstance(x, np.ndarray):
        return np.errstate(all="ignore")
    if compat.is_torch_array(x):
        return _torch(x)
    if compat.is_cupy_array(x):
        return cast("AbstractContextManager[Any]", x.device)
    return _jax() if compat.is_jax_array(x) else np.errstate(all="ignore")


def own_settings(function: Callable[P, R]) -> Callable[P, R]:
    """`function` inside `settings` of its argument `like`, else of its first argument, which may be no array."""
    enter = settings

    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with enter(kwargs["like"] if "like" in kwargs else (args or (*kwargs.values(), None))[0]):
            return function(*args, **kwargs)

    # doctest finds the examples of functions whose globals are those of the module
    home = FunctionType(inside.__code__, function.__globals__, closure=inside.__closure__)
    return wraps(function)(cast("Callable[P, R]", home))


@contextmanager
def _jax() -> Iterator[None]:
    import jax

    with (
        jax.default_matmul_precision("highest"),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.debug_nans(False),
        jax.debug_infs(False),
    ):
        yield


def _torch(x: Array) -> AbstractContextManager[Any]:
    import torch

    device = x.device.type
    cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    plain = torch.autocast(device, enabled=False) if cast else nullcontext()
    if torch.compiler.is_compiling() or not _PRODUCTS.enter(device):
        return plain
    return _both(plain)


@contextmanager
def _both(plain: AbstractContextManager[Any]) -> Iterator[None]:
    try:
        with plain:
            yield
    finally:
        _PRODUCTS.leave()


class _Products:
    """Full float32 products of torch for as long as a thread is inside: the flags are global, so threads are counted.

    torch has a flag for each backend, and an older one for all of them that raises where it contradicts those.
    """

    def __init__(self) -> None:
        self.lock, self.inside = Lock(), 0
        self.before: tuple[str | None, ...] = ()

    def enter(self, device: str) -> bool:
        """Make products full; whether there was anything to do, so that `leave` must follow."""
        with self.lock:
            if not self.inside:
                if _backend(device).fp32_precision not in _REDUCED:
                    return False
                self.before = _precision(), *(_backend(name).fp32_precision for name in _BACKENDS)
                _set_precision(self.before[0] and "highest", *("ieee" for _ in _BACKENDS))
            self.inside += 1
            return True

    def leave(self) -> None:
        """Give the flags back as they were, unless somebody has set them meanwhile."""
        with self.lock:
            self.inside -= 1
            if not self.inside and all(_backend(name).fp32_precision == "ieee" for name in _BACKENDS):
                _set_precision(*self.before)


_REDUCED = ("tf32", "bf16")
_BACKENDS = ("cuda", "mkldnn")
_PRODUCTS = _Products()


@cache
def _backend(device: str) -> Any:
    import torch

    return torch.backends.cuda.matmul if device == "cuda" else torch.backends.mkldnn.matmul


def _precision() -> str | None:
    import torch

    try:
        return str(torch.get_float32_matmul_precision())
    except RuntimeError:
        return None


def _set_precision(precision: str | None, *backends: str | None) -> None:
    import torch

    if precision is not None:
        torch.set_float32_matmul_precision(precision)
    for name, value in zip(_BACKENDS, backends, strict=True):
        if _backend(name).fp32_precision != value:
            _backend(name).fp32_precision = "none"  # which takes the value of a flag above, if that is it
        if _backend(name).fp32_precision != value:
            _backend(name).fp32_precision = value
