"""Layer of full orthogonalization: polar factor, matrix sign, polynomial schedules, and those who do the same."""

from typing import Any

import numpy as np

import orthlin
from orthlin import schedules

from . import peers
from .common import (
    DEVICES,
    LIBRARIES,
    SIZES,
    SLOW_SIZES,
    DeviceMemory,
    Library,
    Memory,
    Timed,
    Way,
    Ways,
    gaussian,
    gradient,
    shape,
    to_host,
)


def _orthogonalize(**options: Any) -> Way:
    return Way(lambda _, A: orthlin.orthogonalize(A, **options))


def two_products(_: Library, A: Any) -> Any:
    """A product of the short side with itself, and one of what comes of it with the matrix."""
    wide = A if A.shape[0] <= A.shape[1] else A.T
    return (wide @ wide.T) @ wide


WAYS = {
    "orthogonalize": _orthogonalize(),
    "orthogonalize tol=0.2": _orthogonalize(tol=0.2),
    "orthogonalize tol=0.01": _orthogonalize(tol=0.01),
    "orthogonalize muon": _orthogonalize(schedule=schedules.muon()),
    "polar": Way(lambda _, A: tuple(orthlin.polar(A))),
    "peer: torch.optim.Muon's iteration": Way(peers.muon_iteration, ("torch", "torch:cuda")),
    "peer: optax's Muon": Way(peers.optax_muon, ("jax",)),
    "peer: scipy.linalg.polar": Way(peers.scipy_polar, ("numpy",)),
    "peer: JAX's QDWH": Way(peers.jax_polar, ("jax",)),
    "peer: linalg.svd": Way(peers.svd_polar),
    "floor: two products": Way(two_products),
}
ANSWERS = [way for way in WAYS if not way.startswith("floor")]
FAST = ["orthogonalize", "orthogonalize tol=0.2", "peer: torch.optim.Muon's iteration", "floor: two products"]


class _Problem:
    ways = WAYS

    def arrays(self, lib: Library, size: str) -> tuple[Any]:
        return (lib.asarray(gradient(*shape(size))),)


class Time(_Problem, Timed):
    params = [LIBRARIES, list(WAYS), SIZES[:4]]


class Slow(_Problem, Timed):
    params = [LIBRARIES, FAST, [SIZES[4], *SLOW_SIZES]]


class Peak(_Problem, Memory):
    params = [LIBRARIES, FAST, ["1600x6400"]]


class DevicePeak(_Problem, DeviceMemory):
    params = [DEVICES, FAST, ["1600x6400"]]


class Accuracy(_Problem, Ways):
    """How far singular values are from one, for values from 1 to 1/100 and where there is a factor H, its residual."""

    params = [LIBRARIES, ANSWERS, ["768x768", "768x3072"]]

    def arrays(self, lib: Library, size: str) -> tuple[Any]:
        m, n = shape(size)
        U, _, Vh = np.linalg.svd(gaussian(m, n, 5).astype(np.float64), full_matrices=False)
        self.given = ((U * np.geomspace(1, 0.01, min(m, n))) @ Vh).astype(np.float32)
        return (lib.asarray(self.given),)

    def setup(self, name: str, way: str, size: str) -> None:
        super().setup(name, way, size)
        made = self.call()
        self.made = [to_host(x) for x in (made if isinstance(made, tuple) else (made,))]

    def track_error(self, *_: str) -> float:
        return float(np.abs(np.linalg.svd(self.made[0], compute_uv=False) - 1).max())

    def track_backward_error(self, *_: str) -> float:
        """Without a factor H, it is the Hermitian part of U^H A."""
        A, (U, *rest) = self.given.astype(np.float64), self.made
        right = U.shape[0] >= U.shape[1]
        H = rest[0] if rest else (U.T @ A if right else A @ U.T)
        product = U @ H if rest or right else H @ U
        return float(np.linalg.norm(A - product) / np.linalg.norm(A) / np.finfo(np.float32).eps)

    track_error.unit = "worst |s - 1|"
    track_backward_error.unit = "eps"


class Sign(Timed):
    """The matrix sign of a square matrix; the floor is one product, a Newton step is about an inverse."""

    ways = {
        "matrix_sign": Way(lambda _, A: orthlin.matrix_sign(A)),
        "matrix_sign newton_schulz": Way(lambda _, A: orthlin.matrix_sign(A, method="newton_schulz")),
        "peer: linalg.inv": Way(lambda lib, A: lib.xp.linalg.inv(A)),
        "floor: one product": Way(lambda _, A: A @ A),
    }
    params = [LIBRARIES, list(ways), ["16x16", "128x128", "768x768"]]

    def arrays(self, lib: Library, size: str) -> tuple[Any]:
        n = shape(size)[0]
        A = gaussian(n, n)
        return (lib.asarray((A + A.T) / n**0.5),)


class Stack(Timed):
    """Thousands of small matrices."""

    ways = {
        "polar": WAYS["polar"],
        "orthogonalize": WAYS["orthogonalize"],
        "orthogonalize tol=0.2": WAYS["orthogonalize tol=0.2"],
        "qr": Way(lambda _, A: tuple(orthlin.qr(A))),
        "peer: linalg.svd": WAYS["peer: linalg.svd"],
        "peer: linalg.qr": Way(lambda lib, A: tuple(lib.xp.linalg.qr(A))),
    }
    param_names = ["library", "way", "order"]
    params = [LIBRARIES, list(ways), ["16", "32"]]

    def arrays(self, lib: Library, size: str) -> tuple[Any]:
        n = int(size)
        return (lib.asarray(gaussian(4096 * n, n).reshape(4096, n, n)),)
