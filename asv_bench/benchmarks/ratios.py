"""What is compared call by call: ours over a peer or the floor, in one process, in turn.

A ratio of neighbouring calls does not move with the machine, as two times taken minutes apart do.  asv keeps the
median; `python asv_bench/ratios.py` prints it with its quartiles.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import orthlin

from . import lowrank, peers, polar, torch_optim
from .common import LIBRARIES, Library, Way, clock, gaussian, gradient, library

SECONDS = 2.0  # of calls, beyond the fewest
FEWEST, MOST = 5, 41
Calls = tuple[Callable[[], Any], Callable[[], Any]]
SHAPES = ((1024, 4096), (4096, 1024), (2048, 2048), (4096, 4096))
MEDIUM = {"lowrank_orth medium": lowrank.lowrank_orth("torch", "torch:cuda", precision="medium")}
WAYS = lowrank.WAYS | MEDIUM  # in bfloat16 where a CPU has units for it
KINDS: dict[str, Callable[[int, int], Any]] = {"gaussian": gaussian, "gradient": gradient}


class Spread(NamedTuple):
    """Quartiles of the ratios of neighbouring calls, median milliseconds of the reference and of ours."""

    low: float
    median: float
    high: float
    reference_ms: float
    ms: float


def race(reference: Callable[[], Any], ours: Callable[[], Any], now: Callable[[], float]) -> Spread:
    """Time two calls in turn after one warm-up, by the clock `now`."""
    times: tuple[list[float], list[float]] = ([], [])
    for call in (reference, ours):
        call()
    start = time.perf_counter()
    while len(times[0]) < FEWEST or (len(times[0]) < MOST and time.perf_counter() - start < SECONDS):
        for call, taken in zip((reference, ours), times, strict=True):
            before = now()
            call()
            taken.append(now() - before)
    quartiles = statistics.quantiles([b / a for a, b in zip(*times, strict=True)], n=4)
    return Spread(*quartiles, *(1e3 * statistics.median(t) for t in times))


def _lowrank(way: str, floor: str, shape: tuple[int, int], share: int, kind: str) -> Callable[[Library], Calls]:
    def calls(lib: Library) -> Calls:
        m, n = shape
        G, omega = lib.asarray(KINDS[kind](m, n)), lib.asarray(gaussian(n, min(shape) // share, 4))
        return WAYS[floor].of(lib, G, omega), WAYS[way].of(lib, G, omega)

    return calls


def _polar(way: str, peer: Way, make: Callable[[], Any], dtype: str = "float32") -> Callable[[Library], Calls]:
    def calls(lib: Library) -> Calls:
        if lib.name not in peer.libraries:
            raise NotImplementedError(f"not for {lib.name}")
        A = lib.asarray(make())
        if dtype != "float32":  # torch's
            A = A.to(getattr(lib.xp, dtype))
        return peer.of(lib, A), polar.WAYS[way].of(lib, A)

    return calls


def _stack(way: str, peer: str, n: int) -> Callable[[Library], Calls]:
    def calls(lib: Library) -> Calls:
        A = lib.asarray(gaussian(4096 * n, n).reshape(4096, n, n))
        return polar.Stack.ways[peer].of(lib, A), polar.Stack.ways[way].of(lib, A)

    return calls


def _step(ours: str, peer: str) -> Callable[[Library], Calls]:
    """Both on the same parameters, whose values do not matter."""

    def calls(lib: Library) -> Calls:
        if not lib.name.startswith("torch"):
            raise NotImplementedError("an optimizer of torch")
        given = torch_optim.parameters("cuda" if lib.name.endswith("cuda") else "cpu")

        def step(made: list[Any]) -> Callable[[], Any]:
            return lambda: ([optimizer.step() for optimizer in made], lib.wait(None))

        return step(torch_optim.optimizers(peer, *given)), step(torch_optim.optimizers(ours, *given))

    return calls


def cases() -> dict[str, Callable[[Library], Calls]]:
    """Every comparison by name; what it is compared with comes last."""
    found: dict[str, Callable[[Library], Calls]] = {}
    three, two = "floor: three products", "floor: two products"
    for shape in SHAPES:
        size = "x".join(map(str, shape))
        ways = [("lowrank_orth", share, three) for share in (16, 8, 4)]
        ways += [(way, 8, three) for way in ("lowrank_orth tol=0.01", "lowrank_orth sparse_sign")]
        ways += [("lowrank_orth medium", share, "lowrank_orth") for share in (16, 4)]
        for way, share, floor in [*ways, ("lowrank_orth_factors", 8, two)]:
            for kind in KINDS if size == "1024x4096" else ("gaussian",):
                name = f"{way}, {size}, k/{share}, {kind} / {floor.removeprefix('floor: ')}"
                found[name] = _lowrank(way, floor, shape, share, kind)
    muon, scipy = Way(peers.muon_iteration, ("torch", "torch:cuda")), Way(peers.scipy_polar, ("numpy",))
    for m, n in ((768, 768), (1024, 1024), (768, 3072), (3072, 768), (1024, 4096)):
        name = f"orthogonalize tol=0.2, {m}x{n} / torch.optim.Muon's iteration"
        found[name] = _polar("orthogonalize tol=0.2", muon, lambda m=m, n=n: gradient(m, n))
    for m, n in ((128, 512), (256, 256)):
        name = f"orthogonalize tol=0.2, {m}x{n}, bfloat16 / torch.optim.Muon's iteration"
        found[name] = _polar("orthogonalize tol=0.2", muon, lambda m=m, n=n: gradient(m, n), "bfloat16")
    for m, n in ((2048, 2048), (2048, 512), (512, 2048)):
        found[f"polar, {m}x{n} / scipy.linalg.polar"] = _polar("polar", scipy, lambda m=m, n=n: gaussian(m, n))
    for way, peer in (("polar", "linalg.svd"), ("orthogonalize", "linalg.svd"), ("qr", "linalg.qr")):
        found[f"{way}, 4096 of 16x16 / {peer}"] = _stack(way, f"peer: {peer}", 16)
    for kind in ("fused", "foreach"):
        ours = "LowRankMuon rank=64" + (" foreach" if kind == "foreach" else "")
        found[f"step of {ours}, GPT-2 124M / AdamW {kind}"] = _step(ours, f"peer: AdamW {kind}")
    floor = "floor: products, AdamW fused"
    found["step of LowRankMuon rank=64, GPT-2 124M / three products, AdamW fused"] = _step("LowRankMuon rank=64", floor)
    found["three products, AdamW fused, GPT-2 124M / AdamW fused"] = _step(floor, "peer: AdamW fused")
    return found


CASES = cases()
SMALL = {
    "polar": orthlin.polar,
    "orthogonalize": orthlin.orthogonalize,
    "orthogonalize tol=0.2": lambda A: orthlin.orthogonalize(A, tol=0.2),
    "lowrank_orth": lambda A: orthlin.lowrank_orth(A, 4, test_matrix=A[:, :4]),
    "qr": orthlin.qr,
    "randomized_range_finder": lambda A: orthlin.randomized_range_finder(A, 4, test_matrix=A[:, :4]),
}


def measured(name: str, case: str) -> Spread:
    return race(*CASES[case](library(name)), clock(name))


class Ratio:
    """Time of ours over that of the other."""

    version = "1"
    timeout = 300
    unit = "x"
    params = [LIBRARIES, list(CASES)]
    param_names = ["library", "case"]

    def setup(self, name: str, case: str) -> None:
        self.calls = CASES[case](library(name))

    def track_ratio(self, name: str, _: str) -> float:
        return race(*self.calls, clock(name)).median


class Small:
    """A call on a 16 x 16 matrix in float64: what it does before it computes."""

    version = "1"
    rounds = 1
    number = 20
    repeat = (5, 50, 1.0)
    params = [LIBRARIES, list(SMALL)]
    param_names = ["library", "routine"]

    def setup(self, name: str, routine: str) -> None:
        if not hasattr(self, "lib"):
            self.lib = library(name)
            self.A = self.lib.asarray(gaussian(16, 16).astype("float64"))
            self.time_call(name, routine)
            self.timer = clock(name)

    def time_call(self, _: str, routine: str) -> None:
        self.lib.wait(SMALL[routine](self.A))
