"""Settings that users make for their own code, and that the precision of a result must not depend on."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, wraps
from threading import RLock, get_ident
from types import FunctionType
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np

from orthlin._backend.arrays import Array, is_host, library

P = ParamSpec("P")
R = TypeVar("R")


def settings(x: Array) -> AbstractContextManager[Any]:
    """Context in which the operations on arrays of the library of `x` are done as they are written.

    NumPy: no floating-point error state, since some results overflow or underflow on purpose.  torch: that of NumPy,
    which decides on its numbers, no autocast on the device of `x`, full float32 products.  JAX: products of the highest
    precision, the usual promotion, and no check for NaN and infinity, which stand for a breakdown and are selected
    away.  CuPy: the device of `x` is the current one, on which constants are made.  Everything is as before afterwards,
    after errors too.

    The precision of torch's float32 products is one for all threads: while any is inside, it is full in all of them.
    Code under ``torch.compile`` cannot change it, and has that of the moment when it runs.
    """
    name = library(x)
    if name == "torch":
        return _torch(x)
    if name == "cupy":
        return cast("AbstractContextManager[Any]", x.device)
    return _jax() if name == "jax" else np.errstate(all="ignore")


def products(x: Array, precision: str) -> AbstractContextManager[Any]:
    """Context, inside `settings`, in which products of float32 may be done in TensorFloat-32, but for "highest".

    torch on CUDA: unless another thread is inside, whose products must be full; on a CPU with units for bfloat16 in it,
    at "medium".  JAX: its precision "high".
    """
    if precision == "highest":
        return nullcontext()
    if library(x) == "torch":
        import torch

        device = x.device.type
        short = device in _SHORT and not torch.compiler.is_compiling() and attained(x, precision) != "highest"
        return _PRODUCTS.short(device) if short else nullcontext()
    if library(x) == "jax":
        import jax

        return cast("AbstractContextManager[Any]", jax.default_matmul_precision("high"))
    return nullcontext()


def attained(x: Array, precision: str) -> str:
    """Precision that large products have where `x` is: full on a CPU, but for single precision its bfloat16 units."""
    host = is_host(x)
    if not (host or _compiled_for_host(x)):
        return precision
    short = host and precision == "medium" and library(x) == "torch" and str(x.dtype) in _SINGLE
    return precision if short and units("torch.bfloat16") else "highest"


def _compiled_for_host(x: Array) -> bool:
    """Whether `torch.compile` traces operations of a CPU, which runs the device path then."""
    if library(x) != "torch":
        return False
    import torch

    return bool(x.device.type == "cpu" and torch.compiler.is_compiling())


@cache
def units(dtype: str) -> bool:
    """Whether this CPU multiplies in a half precision, and torch by it, as far as torch can say."""
    import torch

    found = getattr(torch.cpu, "get_capabilities", dict[str, bool])()
    return torch.backends.mkldnn.is_available() and any(found.get(name, False) for name in _UNITS[dtype])


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

    device, compiling = x.device.type, torch.compiler.is_compiling()
    # Some versions cannot trace the question, whose answer differs on exotic devices only.
    available = compiling or torch.amp.is_autocast_available(device)
    cast = available and torch.is_autocast_enabled(device)
    plain = torch.autocast(device, enabled=False) if cast else nullcontext()
    return plain if compiling else _full(device, plain)


@contextmanager
def _full(device: str, plain: AbstractContextManager[Any]) -> Iterator[None]:
    _PRODUCTS.enter(device)
    try:
        with np.errstate(all="ignore"), plain:
            yield
    finally:
        _PRODUCTS.leave()


class _Products:
    """Full float32 products of torch for as long as a thread is inside: the flags are global, so threads are counted.

    torch has a flag for each backend, and an older one for all of them that raises where it contradicts those.
    """

    def __init__(self) -> None:
        self.lock, self.inside = RLock(), dict[int, int]()  # how often each thread has entered
        self.before: tuple[str | None, ...] | None = None

    def enter(self, device: str) -> None:
        """Make products full, if they are not."""
        with self.lock:
            if self.before is None and _backend(device).fp32_precision in _REDUCED:
                self.before = _precision(), *(_backend(name).fp32_precision for name in _BACKENDS)
                _set_precision(self.before[0] and "highest", *("ieee" for _ in _BACKENDS))
            self.inside[get_ident()] = self.inside.get(get_ident(), 0) + 1

    def leave(self) -> None:
        """Give the flags back as they were, unless somebody has set them meanwhile."""
        with self.lock:
            left = self.inside.pop(get_ident()) - 1
            if left:
                self.inside[get_ident()] = left
            if not self.inside and self.before is not None:
                if all(_backend(name).fp32_precision == "ieee" for name in _BACKENDS):
                    _set_precision(*self.before)
                self.before = None

    @contextmanager
    def short(self, device: str) -> Iterator[None]:
        """Short in place of full products for as long as this thread, alone inside, is in here."""
        with self.lock:
            alone = not self.inside.keys() - {get_ident()}
            before = _backend(device).fp32_precision
            try:
                _set_backend(device, _SHORT[device] if alone else before)
                yield
            finally:
                _set_backend(device, before)


_REDUCED = ("tf32", "bf16")
_BACKENDS = ("cuda", "mkldnn")
_SHORT = {"cuda": "tf32", "cpu": "bf16"}  # what short products of float32 are
_UNITS = {  # as x86 and ARM call them
    "torch.bfloat16": ("amx_bf16", "avx512_bf16", "bf16"),
    "torch.float16": ("amx_fp16", "avx512_fp16", "fp16_arith"),
}
_SINGLE = ("torch.float32", *_UNITS)
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
        _set_backend(name, value)


def _set_backend(device: str, value: str | None) -> None:
    backend = _backend(device)
    if backend.fp32_precision != value:
        backend.fp32_precision = "none"  # which takes the value of a flag above, if that is it
    if backend.fp32_precision != value:
        backend.fp32_precision = value
