"""Random numbers from an explicit source: native generators, or the host's."""

import itertools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import array_api_compat as compat
import numpy as np

from orthlin._backend.arrays import Array, DType, bits, device, namespace
from orthlin.errors import DeviceError, OptionError, RngError


class Source(NamedTuple):
    """Where random numbers come from: a namespace to compute in and two ways to draw."""

    xp: Any
    normal: Callable[[tuple[int, ...]], Array]
    uniform: Callable[[tuple[int, ...]], Array]


def random_source(rng: Any, like: Array) -> Source:
    """Source of random numbers that serves arrays like `like`; RngError or DeviceError if `rng` cannot."""
    if isinstance(rng, np.random.Generator):
        return Source(np, rng.standard_normal, rng.random)
    seed = _seed(rng)
    for owns, native in _NATIVE:
        if owns(like):
            return native(rng, seed, like)
    if seed is None:
        raise _rng_error(rng, "")
    return random_source(np.random.default_rng(rng), like)


def stream(seed: int, name: str, step: Any, like: Array) -> Any:
    """Source for `random_source` that is a function of seed, name and step alone; a traced step is fine on JAX."""
    if not isinstance(name, str):
        raise OptionError(f"name: expected a str, got {name!r}")
    tag = zlib.crc32(name.encode())
    if not compat.is_jax_array(like):
        return np.random.SeedSequence((seed, tag, int(step)))
    import jax

    return jax.random.fold_in(jax.random.fold_in(jax.random.key(_seed(seed)), tag), step)


def _seed(rng: Any) -> int | None:
    """32 bits, all that torch takes on the CPU, from None, an int or a SeedSequence; None from anything else."""
    if isinstance(rng, int | np.integer) and not isinstance(rng, bool):
        if rng < 0:
            raise RngError(f"rng: a seed must not be negative, got {rng}")
        if rng < 1 << 32:
            return int(rng)
        rng = np.random.SeedSequence(int(rng))
    elif rng is None:
        rng = np.random.SeedSequence()
    return int(rng.generate_state(1)[0]) if isinstance(rng, np.random.SeedSequence) else None


def _rng_error(rng: Any, native: str) -> RngError:
    kind = f"{type(rng).__module__}.{type(rng).__qualname__}"
    return RngError(
        f"rng: expected None, an int, a numpy.random.SeedSequence or a numpy.random.Generator{native}, got {kind}"
    )


def _real(like: Array) -> tuple[Any, DType]:
    """Namespace of `like`, and the dtype to draw in: single precision unless `like` is double."""
    xp = namespace(like)
    return xp, xp.float64 if bits(xp, like) == 64 else xp.float32


def _torch_source(rng: Any, seed: int | None, like: Array) -> Source:
    import torch

    where = torch.device("cpu") if like.is_meta else like.device  # meta has no generators, it takes any other's
    if seed is not None:
        rng = torch.Generator(where).manual_seed(seed)
    if not isinstance(rng, torch.Generator):
        raise _rng_error(rng, " or a torch.Generator")
    if rng.device.type != where.type or (where.index or 0) != (rng.device.index or 0):
        raise DeviceError(f"rng: the torch.Generator lives on {rng.device}, the array on {where}; make it there")
    xp, dtype = _real(like)
    options = {"dtype": dtype, "device": like.device, "generator": rng}
    return Source(xp, lambda shape: torch.randn(shape, **options), lambda shape: torch.rand(shape, **options))


def _cupy_source(rng: Any, seed: int | None, like: Array) -> Source:
    import cupy

    if seed is not None:
        rng = cupy.random.default_rng(seed)
    if not isinstance(rng, cupy.random.Generator):
        raise _rng_error(rng, " or a cupy.random.Generator")
    xp, dtype = _real(like)
    return Source(xp, lambda shape: rng.standard_normal(shape, dtype), lambda shape: rng.random(shape, dtype))


def _jax_source(rng: Any, seed: int | None, like: Array) -> Source:
    import jax

    if rng is None and isinstance(like, jax.core.Tracer):
        raise RngError("rng: None draws fresh numbers, which a traced function cannot; pass a key or an int")
    if seed is not None:
        rng = jax.random.key(seed)
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


_NATIVE: tuple[tuple[Callable[[Array], bool], Callable[[Any, int | None, Array], Source]], ...] = (
    (compat.is_torch_array, _torch_source),
    (compat.is_cupy_array, _cupy_source),
    (compat.is_jax_array, _jax_source),
)


def transfer(xp: Any, values: Array, like: Array) -> Array:
    """Return `values`, drawn by a source for `like`, in its library, on its device, with its dtype unless integers."""
    if isinstance(values, np.ndarray) and not isinstance(like, np.ndarray):
        if values.dtype.kind in "fc" and bits(xp, like) < 64:  # a library without float64 would refuse or warn
            values = values.astype(np.complex64 if values.dtype.kind == "c" else np.float32)
        if values.dtype.kind == "i":  # the indices are small, and a device may lack int64
            values = values.astype(np.int32)
        values = xp.asarray(values, device=device(like))
    return values if xp.isdtype(values.dtype, "integral") else xp.astype(values, like.dtype)
