"""Layer of steppers: the second update of one matrix."""

from collections.abc import Callable
from typing import Any

from orthlin import steppers

from .common import LIBRARIES, Library, Timed, Way, gaussian, gradient, rank, shape


def _updated(make: Callable[..., Any], low: bool = True, **options: Any) -> Way:
    def call(_: Library, G: Any, X: Any) -> Any:
        given = {"rank": rank("x".join(map(str, G.shape)))} if low else {}
        stepper = make(0.1, **given, **options)
        return stepper.update(G, stepper.init(X, "w"), X, "w")[0]

    return Way(call)


def optax_muon(_: Library, G: Any, X: Any) -> Any:
    import optax.contrib

    transformation = optax.contrib.muon(0.1)
    return transformation.update(G, transformation.init(X), X)[0]


class Time(Timed):
    ways = {
        "muon": _updated(steppers.muon, low=False),
        "muon low rank": _updated(steppers.muon),
        "muon warm, tail": _updated(steppers.muon, warm_start=True, tail="auto", tol=0.1),
        "muon error feedback": _updated(steppers.muon, error_feedback=True, nesterov=False),
        "msgd": _updated(steppers.msgd, low=False),
        "msgd low rank": _updated(steppers.msgd),
        "peer: optax's Muon": Way(optax_muon, ("jax",)),
        "floor: a copy": Way(lambda _, G, __: G + 0),
    }
    params = [LIBRARIES, list(ways), ["16x16", "768x3072"]]

    def arrays(self, lib: Library, size: str) -> tuple[Any, Any]:
        return lib.asarray(gradient(*shape(size))), lib.asarray(gaussian(*shape(size)))
