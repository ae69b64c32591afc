"""Layer of randomized bases."""

from typing import Any

import numpy as np

import orthlin

from . import peers
from .common import LIBRARIES, Library, Timed, Way, Ways, gaussian, gradient, rank, shape, to_host


def _ranged(**options: Any) -> Way:
    return Way(lambda _, A, omega: orthlin.randomized_range_finder(A, omega.shape[-1], test_matrix=omega, **options))


def drawn(_: Library, A: Any, omega: Any) -> Any:
    return orthlin.randomized_range_finder(A, omega.shape[-1], n_oversamples=0, rng=0)


def adaptive(_: Library, A: Any, omega: Any) -> Any:
    return orthlin.adaptive_range_finder(A, tol=1e-6, block_size=32, max_rank=omega.shape[-1], rng=0)


WAYS = {
    "randomized_range_finder": _ranged(),
    "randomized_range_finder n_iter=2": _ranged(n_iter=2),
    "randomized_range_finder rng=0": Way(drawn),
    "adaptive_range_finder": Way(adaptive, traced=False),
    "peer: scikit-learn": Way(peers.sklearn_range_finder, ("numpy",)),
    "floor: one product": Way(lambda _, A, omega: A @ omega),
}
ANSWERS = [way for way in WAYS if not way.startswith("floor")]


class _Problem:
    ways = WAYS

    def arrays(self, lib: Library, size: str) -> tuple[Any, Any]:
        return lib.asarray(gradient(*shape(size))), lib.asarray(gaussian(shape(size)[1], rank(size), 4))


class Time(_Problem, Timed):
    params = [LIBRARIES, list(WAYS), ["16x16", "768x768", "768x3072", "1600x6400"]]


class Accuracy(_Problem, Ways):
    params = [LIBRARIES, ANSWERS, ["768x3072"]]

    def setup(self, name: str, way: str, size: str) -> None:
        super().setup(name, way, size)
        self.Q = to_host(self.call())

    def track_missed_energy(self, _name: str, _way: str, size: str) -> float:
        G = gradient(*shape(size)).astype(np.float64)
        return 1 - float(np.linalg.norm(self.Q.T @ G) ** 2 / np.linalg.norm(G) ** 2)

    track_missed_energy.unit = "share"
