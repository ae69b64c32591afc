"""Layer of the basis: thin QR of tall matrices, the sketches of the low-rank layer."""

from typing import Any

import numpy as np

import orthlin

from . import peers
from .common import LIBRARIES, Library, Timed, Way, Ways, gaussian, shape, to_host


def two_products(_: Library, Y: Any, S: Any) -> Any:
    return Y.T @ Y, Y @ S


WAYS = {
    "qr": Way(lambda _, Y, _S: tuple(orthlin.qr(Y))),
    "qr cholesky2": Way(lambda _, Y, _S: tuple(orthlin.qr(Y, method="cholesky2"))),
    "qr shifted_cholesky3": Way(lambda _, Y, _S: tuple(orthlin.qr(Y, method="shifted_cholesky3"))),
    "peer: linalg.qr": Way(lambda lib, Y, _: tuple(lib.xp.linalg.qr(Y))),
    "peer: Dion's randomized Cholesky QR": Way(lambda lib, Y, _: (peers.randomized_cholesky_qr(lib, Y),)),
    "floor: two products": Way(two_products),
}
ANSWERS = [way for way in WAYS if not way.startswith("floor")]


class _Problem:
    ways = WAYS

    def arrays(self, lib: Library, size: str) -> tuple[Any, Any]:
        m, n = shape(size)
        return lib.asarray(gaussian(m, n)), lib.asarray(gaussian(n, n))


class Time(_Problem, Timed):
    params = [LIBRARIES, list(WAYS), ["16x16", "768x96", "3072x96", "4096x256", "6400x200"]]


class Accuracy(_Problem, Ways):
    params = [LIBRARIES, ANSWERS, ["3072x96"]]

    def setup(self, name: str, way: str, size: str) -> None:
        super().setup(name, way, size)
        self.Q = to_host(self.call()[0])

    def track_orthogonality(self, *_: str) -> float:
        """The norm of Q^H Q - I, in eps sqrt(n)."""
        n = self.Q.shape[1]
        return float(np.linalg.norm(self.Q.T @ self.Q - np.eye(n)) / n**0.5 / np.finfo(np.float32).eps)

    track_orthogonality.unit = "eps"
