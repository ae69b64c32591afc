"""CuPy without CuPy: NumPy behind a wall through which no value can be read, with CuPy's silent failures.

In single precision subnormal numbers are zero wherever CuPy computes entry by entry: it compiles with ``-ftz=true``.
What array-api-compat makes of CuPy runs as it is.  An array knows its device; results and constants are made on the
current device, as CuPy's are, and mixing devices is an error.  Where CuPy would wait, `Waits` is raised.
"""

import sys
from contextlib import contextmanager
from types import ModuleType
from typing import ClassVar
from unittest import mock

import array_api_compat
import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin


class Waits(AssertionError):
    """A value is read."""


class Device:
    """As CuPy's: not hashable, and a context."""

    current: ClassVar = [0]
    __hash__ = None

    def __init__(self, device=None):
        self.id = getattr(device, "id", self.current[-1] if device is None else device)

    def __eq__(self, other):
        return self.id == other.id

    def __enter__(self):
        self.current.append(self.id)
        return self

    def __exit__(self, *_):
        self.current.pop()


def _open(x):
    """NumPy arrays in place of those of the device, which must be the current one."""
    if isinstance(x, list | tuple):
        return type(x)(map(_open, x))
    if isinstance(x, ndarray):
        assert x.device.id == Device.current[-1], "an array of another device than the current one"
        return x.values
    return x


def _closed(x):
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*map(_closed, x))
    if isinstance(x, list | tuple):
        return type(x)(map(_closed, x))
    return ndarray(x) if isinstance(x, np.ndarray | np.generic) else x


def on_device(function):
    """`function` of NumPy on arrays of the device, without its warnings."""

    @np.errstate(all="ignore")
    def call(*args, **kwargs):
        return _closed(function(*_open(args), **{k: _open(v) for k, v in kwargs.items()}))

    return call


MOVE = {
    *("matmul", "svd", "qr", "eigh"),
    *("where", "take", "concatenate", "stack", "broadcast_to", "reshape", "swapaxes", "expand_dims", "real", "imag"),
}
"""Functions of cuBLAS and cuSOLVER, and those that compute nothing: they flush nothing."""


def _flushed(x):
    """Zero in place of what is subnormal in single precision."""
    if isinstance(x, ndarray) and x.dtype in ("float32", "complex64"):
        parts = np.ascontiguousarray(x.values[..., None]).view("float32")
        parts = np.where(np.abs(parts) < np.finfo("float32").tiny, np.float32(0), parts)
        return ndarray(parts.view(x.dtype)[..., 0])
    return getattr(type(x), "_make", type(x))(map(_flushed, x)) if isinstance(x, list | tuple) else x


def _waits(*_):
    raise Waits


def _computed(name, function, args, kwargs):
    calls.append(name)
    if name in MOVE:
        return on_device(function)(*args, **kwargs)
    return _flushed(on_device(function)(*_flushed(args), **kwargs))


def _index(key):
    """CuPy counts what an index of booleans selects."""
    if any(isinstance(k, ndarray) and k.dtype.kind == "b" for k in (key if isinstance(key, tuple) else (key,))):
        raise Waits


class ndarray(NDArrayOperatorsMixin):
    """An array whose values cannot be read."""

    __array_priority__ = 100
    __bool__ = __float__ = __int__ = __complex__ = __index__ = item = tolist = __array__ = _waits

    def __init__(self, values):
        self.values, self.device = np.asarray(values), Device()

    def __array_ufunc__(self, ufunc, method, *args, **kwargs):
        return _computed(ufunc.__name__, getattr(ufunc, method), args, kwargs)

    def __array_function__(self, function, types, args, kwargs):
        return _computed(function.__name__, function, args, kwargs)

    def __getattr__(self, name):  # the methods of a NumPy array
        if name.startswith("__"):
            raise AttributeError(name)
        found = getattr(self.values, name)
        return on_device(found) if callable(found) else _closed(found)

    def __getitem__(self, key):
        _index(key)
        return on_device(self.values.__getitem__)(key)

    def __setitem__(self, key, value):
        _index(key)
        self.values[_open(key)] = _open(value)

    def __len__(self):
        return len(self.values)


calls = []


def _cholesky(s):
    """LAPACK's, which leaves what it has where a pivot is not positive."""
    calls.append("cholesky")
    L = np.array(s)
    for matrix in L.reshape(-1, *L.shape[-2:]):
        for j in range(matrix.shape[0]):
            pivot = (matrix[j, j] - np.vdot(matrix[j, :j], matrix[j, :j])).real
            if not pivot > 0:
                break
            matrix[j, j] = pivot**0.5
            matrix[j + 1 :, j] -= matrix[j + 1 :, :j] @ matrix[j, :j].conj()
            matrix[j + 1 :, j] /= matrix[j, j]
    return np.tril(L)


def _inv(a):
    """CUBLAS's, which leaves what it finds where a pivot is zero."""
    calls.append("inv")
    with np.errstate(all="ignore"):
        regular = np.isfinite(np.linalg.cond(np.where(np.isfinite(a), a, 0)))[..., None, None]
        one = np.eye(a.shape[-1], dtype=a.dtype)
        return np.where(regular, np.linalg.inv(np.where(regular, a, one)), a.dtype.type(7))


def _spoiled(name):
    """CuSOLVER's, which makes NaN of a stack with one bad matrix."""

    def decomposition(x, **options):
        calls.append(name)
        parts = getattr(np.linalg, name)(np.where(np.isfinite(x), x, 0), **options)
        return tuple(part if np.isfinite(x).all() else part * np.nan for part in parts)

    return on_device(decomposition)


class Generator:
    """Draws on the current device."""

    def __init__(self, seed=None):
        self.rng, self.device = np.random.default_rng(seed), Device()

    def _draw(self, name, shape, dtype):
        assert self.device.id == Device.current[-1]
        return ndarray(getattr(self.rng, name)(shape, dtype))

    def standard_normal(self, shape, dtype):
        return self._draw("standard_normal", shape, dtype)

    def random(self, shape, dtype):
        return self._draw("random", shape, dtype)


def _module(name, source, **own):
    module = ModuleType(name)
    public = {k: v for k, v in vars(source).items() if not k.startswith("_")}
    vars(module).update({**public, **own, "__all__": [*public, *own], "__path__": []})
    return module


MADE = ("arange", "asarray", "array", "empty", "eye", "full", "linspace", "ones", "zeros")
_NOTHING = ModuleType("nothing")
_DEVICE = _module("cupy.cuda.device", _NOTHING, Device=Device)
_CUDA = _module("cupy.cuda", _NOTHING, Device=Device, device=_DEVICE)
_OWN = {"cholesky": on_device(_cholesky), "inv": on_device(_inv), **{name: _spoiled(name) for name in ("eigh", "svd")}}
_LINALG = _module("cupy.linalg", np.linalg, **_OWN)
_RANDOM = _module("cupy.random", _NOTHING, default_rng=Generator, Generator=Generator)
_FFT = _module("cupy.fft", np.fft)
PARTS = {"cuda": _CUDA, "linalg": _LINALG, "random": _RANDOM, "fft": _FFT}
cupy = _module("cupy", np, **{k: on_device(getattr(np, k)) for k in MADE}, **PARTS, ndarray=ndarray)


@contextmanager
def standing_in():
    """CuPy is this module."""
    ours = {"cupy": cupy, "cupy.cuda.device": _DEVICE, **{f"cupy.{name}": part for name, part in PARTS.items()}}
    others = {k: v for k, v in sys.modules.items() if k.startswith("array_api_compat.cupy")}
    before = vars(array_api_compat).pop("cupy", None)
    with mock.patch.dict(sys.modules, ours):
        for name in others:
            del sys.modules[name]
        try:
            yield cupy
        finally:
            for name in [k for k in sys.modules if k.startswith("array_api_compat.cupy")]:
                del sys.modules[name]
            vars(array_api_compat).pop("cupy", None)
            if before is not None:
                array_api_compat.cupy = before
            sys.modules.update(others)
