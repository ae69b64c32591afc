"""Layer of test matrices."""

from typing import Any

from orthlin import sketch

from .common import LIBRARIES, Library, Timed, Way, shape


def _drawn(kind: str) -> Way:
    return Way(lambda _, like, widths: getattr(sketch, kind)(len(widths), len(widths[0]), like=like, rng=0))


class Time(Timed):
    """An integer seeds the library's own generator, which is part of the time."""

    ways = {kind: _drawn(kind) for kind in ("gaussian", "sparse_sign", "columns")}
    params = [LIBRARIES, list(ways), ["3072x96", "6400x200"]]

    def arrays(self, lib: Library, size: str) -> tuple[Any, Any]:
        zeros = lib.xp.zeros(shape(size), dtype=lib.xp.float32)
        return zeros if not lib.name.endswith("cuda") else zeros.to("cuda"), zeros
