"""Layer of the ruler, on what the routines above it return."""

from typing import Any

import numpy as np

from orthlin import metrics

from .common import LIBRARIES, Library, Timed, Way, gradient, shape

WAYS = {
    "nuclear_norm": Way(lambda _, A, *__: metrics.nuclear_norm(A)),
    "numerical_rank": Way(lambda _, A, *__: metrics.numerical_rank(A)),
    "stable_rank": Way(lambda _, A, *__: metrics.stable_rank(A)),
    "captured_nuclear_norm": Way(lambda _, A, U, __: metrics.captured_nuclear_norm(A, U)),
    "captured_fraction": Way(lambda _, A, U, __: metrics.captured_fraction(A, U)),
    "captured_energy": Way(lambda _, A, U, __: metrics.captured_energy(A, U[:, : U.shape[0] // 8])),
    "range_error": Way(lambda _, A, U, __: metrics.range_error(A, U[:, : U.shape[0] // 8])),
    "orthogonality": Way(lambda _, __, U, ___: metrics.orthogonality(U)),
    "polar_backward_error": Way(lambda _, A, U, H: metrics.polar_backward_error(A, U, H)),
    "qr_residual": Way(lambda _, A, U, H: metrics.qr_residual(A, U, H)),
    "hermitian_defect": Way(lambda _, __, ___, H: metrics.hermitian_defect(H)),
    "psd_defect": Way(lambda _, __, ___, H: metrics.psd_defect(H)),
}


class Time(Timed):
    ways = WAYS
    params = [LIBRARIES, list(WAYS), ["512x512"]]

    def arrays(self, lib: Library, size: str) -> tuple[Any, ...]:
        A = gradient(*shape(size))
        U, s, Vh = np.linalg.svd(A)
        return tuple(map(lib.asarray, (A, U @ Vh, (Vh.T * s) @ Vh)))
