"""Arrays: their library, namespace, device and dtype."""

import sys
from collections.abc import Callable
from functools import cache
from numbers import Real
from typing import Any, NamedTuple, cast

import array_api_compat as compat
import numpy as np

Array = Any
DType = Any

namespace = compat.array_namespace
_OF_NUMPY = (np.ndarray, np.generic)


def library(x: Any) -> str:
    """Name of the library of `x`: "numpy", "torch", "jax" or "cupy", empty for others and for what is no array."""
    kind: Any = type(x)  # hashable, which mypy does not know of every class
    return _library(kind)


@cache
def _library(kind: type) -> str:
    # Written here because in a global tuple `torch.compile` looks up every name by a pass over all loaded modules.
    known = (("numpy", "ndarray"), ("torch", "Tensor"), ("jax", "Array"), ("jax.core", "Tracer"), ("cupy", "ndarray"))
    for module, name in known:
        if module in sys.modules and issubclass(kind, getattr(sys.modules[module], name)):
            return module.partition(".")[0]
    return ""


def device(x: Array) -> Any:
    """Device to make arrays on that go with `x`; None, the choice of JAX, if `x` is traced or sharded."""
    where = getattr(x, "device", None)
    return None if hasattr(where, "device_set") else where


def bound_device(x: Array) -> Any:
    """Device that `x` must be used on, None if its library moves it to others (JAX, unless it was put there)."""
    where = device(x)
    return None if where is None or not getattr(x, "committed", True) else where


def filled(x: Array) -> Array:
    """Zeros in place of a bare shape and dtype of JAX, from which a state can be made as well; else `x`."""
    if type(x).__name__ != "ShapeDtypeStruct":
        return x
    from jax.numpy import zeros

    return zeros(x.shape, x.dtype, device=x.sharding)


def counter(xp: Any, x: Array) -> Any:
    """Zero to count from: an array if the library of `x` traces what it counts, else an int."""
    return xp.zeros((), dtype=xp.int32) if library(x) == "jax" else 0


def is_number(x: Any) -> bool:
    """Whether `x` is an array that holds one real number."""
    return bool(
        compat.is_array_api_obj(x) and x.ndim == 0 and namespace(x).isdtype(x.dtype, ("integral", "real floating"))
    )


def factor(xp: Any, value: Any, x: Array) -> Any:
    """Real number, or array that holds one, as a factor of `x` that does not change its dtype."""
    if isinstance(value, Real):
        return float(value)
    return xp.asarray(value, dtype=x.dtype, device=device(x))


def is_dense(x: Array) -> bool:
    """Whether `x` is an ordinary array, not one of the sparse, nested or opaque tensors of torch."""
    if library(x) != "torch":
        return True
    import torch

    return bool(x.layout == torch.strided and not x.is_nested)


def is_host(x: Array) -> bool:
    """Whether the values of `x` can be read without waiting for a device and without a tracer."""
    if isinstance(x, np.ndarray):
        return True
    if library(x) == "torch":
        import torch

        return bool(
            type(x) in (torch.Tensor, torch.nn.Parameter)
            and x.is_cpu
            and not torch.compiler.is_compiling()
            and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        )
    return not library(x) and bool(device(x) == namespace(x).__array_namespace_info__().default_device())


def numbers(x: Array) -> Array:
    """A host array as one of NumPy, which is fastest with a few numbers; any other array as it is."""
    if isinstance(x, np.ndarray) or not is_host(x):
        return x
    return (x.detach() if x.requires_grad else x).numpy() if library(x) == "torch" else np.asarray(x)


def from_numbers(xp: Any, values: Array, x: Array) -> Array:
    """What was computed from `numbers` of arrays like `x` in the library of `x`."""
    foreign = isinstance(values, _OF_NUMPY) and library(x) != "numpy"
    return xp.asarray(values, device=device(x)) if foreign else values


def scalar(x: Array) -> float:
    """Read one number from its device, outside the graph of torch."""
    return float(x.detach() if library(x) == "torch" else x)


# dtypes ------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """What a floating-point dtype is: real or complex, bits and epsilon of a real part."""

    is_complex: bool
    bits: int
    eps: float


@cache
def kind(xp: Any, dtype: DType) -> Kind | None:
    """Facts of a dtype, None unless `xp` knows it as real or complex floating-point."""
    if compat.is_cupy_namespace(xp) and dtype == "bfloat16":  # which CuPy computes with and cannot describe
        return Kind(False, 16, 2.0**-7)
    try:
        if xp.isdtype(dtype, ("real floating", "complex floating")):
            info = xp.finfo(dtype)
            return Kind(bool(xp.isdtype(dtype, "complex floating")), int(info.bits), float(info.eps))
    except (TypeError, ValueError):
        pass  # a dtype of another library, such as ml_dtypes.bfloat16 on NumPy
    return None


_checked = cast("Callable[[Any, DType], Kind]", kind)


def is_complex(xp: Any, x: Array) -> bool:
    """Whether `x` has a complex dtype."""
    return _checked(xp, x.dtype).is_complex


def bits(xp: Any, x: Array) -> int:
    """Bits of a real part of the entries of `x`."""
    return _checked(xp, x.dtype).bits


def is_half(xp: Any, x: Array) -> bool:
    """Whether `x` has 16 bits an entry, which no factorization supports."""
    return _checked(xp, x.dtype).bits == 16


def is_single(xp: Any, x: Array) -> bool:
    """Whether `x` has single precision."""
    return _checked(xp, x.dtype).bits == 32


def eps(xp: Any, x: Array) -> float:
    """Machine epsilon of the dtype of `x`."""
    return _checked(xp, x.dtype).eps


def working(xp: Any, x: Array) -> Array:
    """Return `x`, in float32 if it is of half precision."""
    return xp.astype(x, xp.float32) if is_half(xp, x) else x


def convert(xp: Any, x: Array, dtype: DType) -> Array:
    """Return `x` in `dtype`, `x` itself if it has it already."""
    return x if x.dtype == dtype else xp.astype(x, dtype)


def wide_dtype(xp: Any, x: Array, *, fast: bool = False) -> DType | None:
    """Twice as precise dtype of the same kind as single-precision `x`, None where there is none, or no `fast` one."""
    if bits(xp, x) > 32:
        return None
    name, available = library(x), True
    if name == "torch":
        available = x.device.type != "mps" and not (fast and x.device.type == "cuda" and _slow_double(x.device.index))
    elif name == "jax":
        import jax

        available = bool(jax.config.jax_enable_x64)
    elif not name:
        info = xp.__array_namespace_info__()
        available = "float64" in info.dtypes(device=device(x), kind="real floating")
    if not available:
        return None
    return xp.complex128 if is_complex(xp, x) else xp.float64


# CUDA C++ Programming Guide, table of arithmetic throughput: half the rate of single precision on P100, V100, A100,
# H100 and H200, B200; 1/32 or 1/64 on everything else, GeForce, L4, L40, T4 and B300 (capability 10.3) among them.
_FAST_DOUBLE = frozenset({(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)})
_FAST_DOUBLE_HIP = 9  # major version of AMD's CDNA and the Instinct cards before it


@cache
def _slow_double(index: int | None) -> bool:
    import torch

    facts = torch.cuda.get_device_properties(index)  # which torch.compile can ask for
    major, minor = facts.major, facts.minor
    return major != _FAST_DOUBLE_HIP if torch.version.hip else (major, minor) not in _FAST_DOUBLE
