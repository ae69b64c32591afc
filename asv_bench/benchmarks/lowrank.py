"""Layer of low rank: rank an eighth of the short side, test matrix given, so a warm start."""

from typing import Any

import numpy as np

import orthlin

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
    rank,
    shape,
    to_host,
)


def lowrank_orth(*libraries: str, **options: Any) -> Way:
    """Way of libraries, by default of all."""

    def call(_: Library, G: Any, omega: Any) -> Any:
        return orthlin.lowrank_orth(G, omega.shape[-1], test_matrix=omega, **options)

    return Way(call, libraries or LIBRARIES)


def three_products(_: Library, G: Any, omega: Any) -> Any:
    Y = G @ omega
    return Y @ (Y.T @ G)


def two_products(_: Library, G: Any, omega: Any) -> tuple[Any, Any]:
    Y = G @ omega
    return Y, Y.T @ G


def factors(_: Library, G: Any, omega: Any) -> tuple[Any, Any]:
    return tuple(orthlin.lowrank_orth_factors(G, omega.shape[-1], test_matrix=omega))


def sparse_sign(_: Library, G: Any, omega: Any) -> Any:
    return orthlin.lowrank_orth(G, omega.shape[-1], sketch="sparse_sign", rng=0)


WAYS = {
    "lowrank_orth": lowrank_orth(),
    "lowrank_orth tol=0.01": lowrank_orth(tol=0.01),
    "lowrank_orth tol=0.1": lowrank_orth(tol=0.1),
    "lowrank_orth n_iter=1": lowrank_orth(n_iter=1),
    "lowrank_orth sparse_sign": Way(sparse_sign),
    "lowrank_orth_factors": Way(factors),
    "peer: torch.svd_lowrank": Way(peers.svd_lowrank, ("torch", "torch:cuda")),
    "peer: Dion's direction": Way(peers.dion),
    "floor: three products": Way(three_products),
    "floor: two products": Way(two_products),
}
ANSWERS = [way for way in WAYS if not way.startswith("floor")]


class _Problem:
    ways = WAYS

    def arrays(self, lib: Library, size: str) -> tuple[Any, Any]:
        return lib.asarray(gradient(*shape(size))), lib.asarray(gaussian(shape(size)[1], rank(size), 4))


class Time(_Problem, Timed):
    params = [LIBRARIES, list(WAYS), SIZES]


class Slow(_Problem, Timed):
    params = [LIBRARIES, list(WAYS), SLOW_SIZES]


class Peak(_Problem, Memory):
    params = [LIBRARIES, ["lowrank_orth", "lowrank_orth_factors", "floor: three products"], ["1600x6400"]]


class DevicePeak(_Problem, DeviceMemory):
    params = [DEVICES, ["lowrank_orth", "lowrank_orth_factors", "floor: three products"], ["1600x6400"]]


class Accuracy(_Problem, Ways):
    """How far the r leading singular values are from one, and what a step of spectral norm one fails to gain.

    What is missed is a share of the nuclear norm of the best r directions: for asv less is better, whatever it is.
    """

    params = [LIBRARIES, ANSWERS, ["768x3072", "3072x768"]]

    def setup(self, name: str, way: str, size: str) -> None:
        super().setup(name, way, size)
        made = self.call()
        self.made = to_host(made[0]) @ to_host(made[1]) if isinstance(made, tuple) else to_host(made)
        self.sigma = np.linalg.svd(self.made, compute_uv=False)[: rank(size)]

    def track_error(self, *_: str) -> float:
        return float(np.abs(self.sigma - 1).max())

    def track_missed(self, _name: str, _way: str, size: str) -> float:
        G = gradient(*shape(size)).astype(np.float64)
        best = np.linalg.svd(G, compute_uv=False)[: rank(size)].sum()
        return 1 - float(np.vdot(G, self.made) / self.sigma[0] / best)

    track_error.unit = "worst |s - 1|"
    track_missed.unit = "share"
