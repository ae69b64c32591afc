"""The `xp` fixture: one test, every array library on this machine, in its strictest form."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# One thread a process: the tests run in several, whose threads would wait for each other's cores.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
# Where a test wants more, those that wait leave the core to others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# XLA compiles for longer than its programs run here.  Set to 0 it gives what users get; processes that a test starts
# inherit it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Equal programs of different functions are compiled once.  Every process has its own, as JAX writes them in steps that
# another could see.
COMPILED = tempfile.TemporaryDirectory(prefix="orthlin-jax-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import array_api_strict
import jax
import numpy as np
import pytest
import torch
import units
from hypothesis import HealthCheck, settings

jax.config.update("jax_enable_x64", True)
PROPERTIES = 9
"""How many `test_properties.py` has, among which a long run divides its examples."""
WORDS = "in the beginning was the word and the word was with all of us. "
settings.register_profile(
    "ci",
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
settings.register_profile("long", settings.get_profile("ci"), derandomize=False, max_examples=-(-100_000 // PROPERTIES))
settings.load_profile(os.environ.get("ORTHLIN_HYPOTHESIS", "ci"))


@dataclass(frozen=True)
class Backend:
    """How a test enters an array library, calls a function on its arrays, and leaves it."""

    name: str
    asarray: Callable[[np.ndarray], Any]
    to_numpy: Callable[[Any], np.ndarray]
    context: Callable[[], Any] = nullcontext
    jit: bool = False
    host: bool = False  # whether values can be looked at, so that bad ones are an error

    def call(self, function: Callable[..., Any], *arrays: np.ndarray, **options: Any) -> Any:
        """`function(*arrays, **options)` inside the library; results as NumPy arrays."""
        with self.context():
            native = [self.asarray(a) if isinstance(a, np.ndarray) else a for a in arrays]
            options = {k: self.asarray(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
            if self.jit:
                given = [a for a in native if isinstance(a, jax.Array)]
                traced = {k: v for k, v in options.items() if isinstance(v, jax.Array)}

                def run(given: list[Any], traced: dict[str, Any]) -> Any:
                    rest = iter(given)
                    filled = [next(rest) if isinstance(a, jax.Array) else a for a in native]
                    return function(*filled, **{**options, **traced})

                result = jax.jit(run)(given, traced)
            else:
                result = function(*native, **options)
            self._check(result, native)
            if isinstance(result, tuple):
                return getattr(type(result), "_make", tuple)(map(self.to_numpy, result))
            return self.to_numpy(result)

    @staticmethod
    def _check(result: Any, native: list[Any]) -> None:
        """Dtype, library and device of every result are those of the first array."""
        for x in result if isinstance(result, tuple) else (result,):
            assert type(x).__module__ == type(native[0]).__module__
            assert x.dtype == native[0].dtype
            assert getattr(x, "device", None) == getattr(native[0], "device", None)


def _readonly(a: np.ndarray) -> np.ndarray:
    a = a.copy(order="K")
    a.flags.writeable = False
    return a


def _strict(device: str = "CPU_DEVICE") -> dict[str, Any]:
    where = array_api_strict.Device(device)
    return {
        "asarray": lambda a: array_api_strict.asarray(a, device=where),
        "to_numpy": lambda x: np.from_dlpack(x.to_device(array_api_strict.Device("CPU_DEVICE"))),
        "host": device == "CPU_DEVICE",
    }


@contextmanager
def _strictest() -> Iterator[None]:
    with array_api_strict.ArrayAPIStrictFlags(
        boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=("linalg",)
    ):
        yield


_JAX = {"asarray": jax.numpy.asarray, "to_numpy": np.asarray}
_TORCH = {"to_numpy": lambda x: x.detach().cpu().numpy()}

BACKENDS = {
    b.name: b
    for b in (
        Backend("numpy", np.asarray, np.asarray, host=True),
        Backend("numpy:readonly", _readonly, np.asarray, host=True),
        Backend("strict", **_strict()),
        Backend("strict:strictest", **_strict(), context=_strictest),
        Backend("strict:device1", **_strict("device1")),
        Backend("torch:cpu", lambda a: torch.from_numpy(np.array(a)), **_TORCH, host=True),
        Backend("jax", **_JAX),
        Backend("jax:jit", **_JAX, jit=True),
        Backend("torch:cuda", lambda a: torch.from_numpy(np.array(a)).cuda(), **_TORCH),
        Backend("cupy", lambda a: __import__("cupy").asarray(a), lambda x: x.get()),
    )
}


def _why_missing(name: str) -> str | None:
    if name == "torch:cuda" and not torch.cuda.is_available():
        return "torch is installed, but no CUDA device is available"
    if name == "cupy":
        try:
            import cupy
        except ImportError:
            return "CuPy is not installed"
        if not cupy.cuda.is_available():
            return "CuPy is installed, but no CUDA device is available"
    return None


def found(name: str) -> Backend:
    """The backend, if it is there; else its test is skipped, or fails where ORTHLIN_REQUIRE_BACKENDS names it."""
    reason = _why_missing(name)
    if reason is not None:
        if name in os.environ.get("ORTHLIN_REQUIRE_BACKENDS", "").split(","):
            pytest.fail(f"required backend {name}: {reason}")
        pytest.skip(reason)
    return BACKENDS[name]


@pytest.fixture
def feigned_units():
    with units.feigned():
        yield


@pytest.fixture(params=BACKENDS)
def xp(request: pytest.FixtureRequest) -> Backend:
    """Every backend in turn."""
    return found(request.param)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file to train on."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(WORDS * 40)
    return path
