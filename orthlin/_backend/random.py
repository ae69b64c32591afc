"""Random numbers from an explicit source: native generators, or the host's."""

import itertools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from orthlin._backend.arrays import Array, DType, bits, convert, device, kind, library, namespace
from orthlin.errors import DeviceError, OptionError, RngError

_INTEGERS = (int, np.integer)


class Source(NamedTuple):
    """Where random numbers come from: a namespace to compute in and two ways to draw."""

    xp: Any
    normal: Callable[[tuple[int, ...]], Array]
    uniform: Callable[[tuple[int, ...]], Array]


def random_source(rng: Any, like: Array) -> Source:
    """Source of random numbers that serves arrays like `like`; RngError or DeviceError if `rng` cannot."""
    if isinstance(rng, np.random.Generator):
        return Source(np, rng.standard_normal, rng.random)
    native = _NATIVE.get(library(like), _host_source)
    return native(rng, like)


def stream(seed: int, name: str, step: Any, like: Array) -> Any:
    """Source for `random_source` that is a function of seed, name and step alone; a traced step is fine on JAX."""
    if not isinstance(name, str):
        raise OptionError(f"name: expected a str, got {name!r}")
    tag = zlib.crc32(name.encode())
    if library(like) != "jax":
        return np.random.SeedSequence((seed, tag, int(step)))
    import jax

    return jax.random.fold_in(jax.random.fold_in(jax.random.key(_seed(seed)), tag), step)


def _is_seed(rng: Any) -> bool:
    """Whether a generator can be made from `rng`: None, an int or a SeedSequence; RngError if it is negative."""
    if not isinstance(rng, _INTEGERS) or isinstance(rng, bool):
        return rng is None or isinstance(rng, np.random.SeedSequence)
    if rng < 0:
        raise RngError(f"rng: a seed must not be negative, got {rng}")
    return True


def _seed(rng: Any) -> int:
    """32 bits, all that torch takes on the CPU."""
    if isinstance(rng, _INTEGERS) and rng < 1 << 32:
        return int(rng)
    sequence = rng if isinstance(rng, np.random.SeedSequence) else np.random.SeedSequence(rng)
    return int(sequence.generate_state(1)[0])


def _rng_error(rng: Any, native: str) -> RngError:
    kind = f"{type(rng).__module__}.{type(rng).__qualname__}"
    return RngError(
        f"rng: expected None, an int, a numpy.random.SeedSequence or a numpy.random.Generator{native}, got {kind}"
    )


def _real(like: Array) -> tuple[Any, DType]:
    """Namespace of `like`, and the dtype to draw in: single precision unless `like` is double."""
    xp = namespace(like)
    return xp, xp.float64 if bits(xp, like) == 64 else xp.float32


def _host_source(rng: Any, like: Array) -> Source:
    if not _is_seed(rng):
        raise _rng_error(rng, "")
    return random_source(np.random.default_rng(rng), like)


def _torch_source(rng: Any, like: Array) -> Source:
    import torch

    where = torch.device("cpu") if like.is_meta else like.device  # meta has no generators, it takes any other's
    if _is_seed(rng):
        rng = torch.Generator(where).manual_seed(_seed(rng))
    if not isinstance(rng, torch.Generator):
        raise _rng_error(rng, " or a torch.Generator")
    if rng.device.type != where.type or (where.index or 0) != (rng.device.index or 0):
        raise DeviceError(f"rng: the torch.Generator lives on {rng.device}, the array on {where}; make it there")
    xp, dtype = _real(like)
    options = {"dtype": dtype, "device": like.device, "generator": rng}
    return Source(xp, lambda shape: torch.randn(shape, **options), lambda shape: torch.rand(shape, **options))


def _cupy_source(rng: Any, like: Array) -> Source:
    import cupy

    if _is_seed(rng):
        rng = cupy.random.default_rng(_seed(rng))
    if not isinstance(rng, cupy.random.Generator):
        raise _rng_error(rng, " or a cupy.random.Generator")
    xp, dtype = _real(like)
    return Source(xp, lambda shape: rng.standard_normal(shape, dtype), lambda shape: rng.random(shape, dtype))


def _jax_source(rng: Any, like: Array) -> Source:
    import jax

    if rng is None and isinstance(like, jax.core.Tracer):
        raise RngError("rng: None draws fresh numbers, which a traced function cannot; pass a key or an int")
    if _is_seed(rng):
        rng = jax.random.key(_seed(rng))
    try:
        jax.random.fold_in(rng, 0)
    except (TypeError, ValueError):
        raise _rng_error(rng, " or a JAX key (one, not a stack)") from None
    xp, dtype = _real(like)
    keys = (jax.random.fold_in(rng, i) for i in itertools.count())
    return Source(
        xp,
        lambda shape: jax.random.normal(next(keys), shape, dtype),
        lambda shape: jax.random.uniform(next(keys), shape, dtype),
    )


_NATIVE = {"torch": _torch_source, "cupy": _cupy_source, "jax": _jax_source}


def transfer(xp: Any, values: Array, like: Array) -> Array:
    """Return `values`, drawn by a source for `like`, in its library, on its device, with its dtype unless integers."""
    if isinstance(values, np.ndarray) and not isinstance(like, np.ndarray):
        if values.dtype.kind in "fc" and bits(xp, like) < 64:  # a library without float64 would refuse or warn
            values = values.astype(np.complex64 if values.dtype.kind == "c" else np.float32)
        if values.dtype.kind == "i":  # the indices are small, and a device may lack int64
            values = values.astype(np.int32)
        values = xp.asarray(values, device=device(like))
    return values if kind(xp, values.dtype) is None else convert(xp, values, like.dtype)
