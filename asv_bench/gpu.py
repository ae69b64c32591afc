"""What a machine with a GPU must decide, in a few minutes: values, waiting, capture, and times.

    python asv_bench/gpu.py --json results/gpu-h100.json

Every routine on the device agrees with the CPU, never waits (torch's synchronisation debug mode), and is timed with
CUDA events as it is and as a CUDA graph, beside the bare products, torch.optim.Muon's iteration and its step, and fused
AdamW.  Times are medians in microseconds.  Parts that no time is left for are said.  Without CUDA it runs small sizes
on the CPU, to test itself.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import orthlin
from orthlin import schedules
from orthlin import torch as ot
from orthlin.torch import _filled

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
MUON = (3.4445, -4.7750, 2.0315)
# shape and rank: square, GPT-2's blocks alone and in stacks, and at the default rank
PROBLEMS = (
    [((4096, 4096), 256), ((768, 3072), 64), ((12, 768, 3072), 64), ((48, 768, 768), 64), ((48, 768, 768), 192)]
    if CUDA
    else [((96, 160), 16), ((3, 96, 160), 16)]
)
LOWRANK = {
    "lowrank_orth": {},
    "lowrank_orth tol=0.01": {"tol": 0.01},
    "lowrank_orth tol=0.1": {"tol": 0.1},
    "lowrank_orth tol=0.1 medium": {"tol": 0.1, "precision": "medium"},
}
ROUTINES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "lowrank_orth": lambda G, W, _: orthlin.lowrank_orth(G, 16, test_matrix=W),
    "lowrank_orth tol": lambda G, W, _: orthlin.lowrank_orth(G, 16, test_matrix=W, tol=0.1),
    "lowrank_orth n_iter": lambda G, W, _: orthlin.lowrank_orth(G, 16, test_matrix=W, n_iter=1),
    "lowrank_orth_factors": lambda G, W, _: abs(orthlin.lowrank_orth_factors(G, 16, test_matrix=W).W),
    "orthogonalize": lambda G, *_: orthlin.orthogonalize(G),
    "orthogonalize tol": lambda G, *_: orthlin.orthogonalize(G, tol=0.1),
    "orthogonalize muon": lambda G, *_: orthlin.orthogonalize(G, schedule=schedules.muon()),
    "polar": lambda G, *_: orthlin.polar(G).H,
    "matrix_sign": lambda _, __, S: orthlin.matrix_sign(S),
    "qr": lambda G, *_: abs(orthlin.qr(G.mT).Q),
    "qr cholesky2": lambda G, *_: abs(orthlin.qr(G.mT, method="cholesky2").Q),
    "range finder": lambda G, W, _: abs(orthlin.randomized_range_finder(G, 16, test_matrix=W)),
}
# matrices of convolutions: those of ResNet-20 for CIFAR, of ResNet-18 and of ResNet-50
CONVOLUTIONS = {
    "ResNet-20": [(16, 27), *6 * [(16, 144)], (32, 144), *5 * [(32, 288)], (64, 288), *5 * [(64, 576)]],
    "ResNet-18": [(64, 147), *4 * [(64, 576)]]
    + [shape for k in (64, 128, 256) for shape in ((2 * k, 9 * k), *3 * [(2 * k, 18 * k)], (2 * k, k))],
    "ResNet-50": [(64, 147), (64, 64), (256, 64)]
    + [
        shape
        for k, blocks in ((64, 3), (128, 4), (256, 6), (512, 3))
        for shape in (*blocks * [(k, 9 * k), (4 * k, k)], *(blocks - 1) * [(k, 4 * k)])
    ]
    + [shape for k in (256, 512, 1024) for shape in ((k // 2, k), (2 * k, k))],
}
DTYPES = ("float32", "bfloat16", "float16", "float64", "complex64")


class Facts:
    """Rows of facts, printed as they come, in a file that is complete after every one."""

    def __init__(self, seconds: float, path: Path | None) -> None:
        self.start, self.seconds, self.path, self.rows = time.monotonic(), seconds, path, list[dict[str, Any]]()

    def say(self, **fact: Any) -> None:
        """Note a fact."""
        self.rows.append(fact)
        print("  ".join(f"{key}: {value}" for key, value in fact.items()), flush=True)
        if self.path:
            content = {"command": f"python asv_bench/gpu.py --seconds {self.seconds:g}", "facts": self.rows}
            self.path.write_text(json.dumps(content, indent=1) + "\n")

    @contextmanager
    def part(self, **what: Any) -> Iterator[bool]:
        """Whether there is time for a part, whose errors are noted and stop nothing else."""
        try:
            yield time.monotonic() - self.start < self.seconds
        except Exception as error:
            self.say(**what, error=f"{type(error).__name__}: {str(error)[:300]}")


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error for whatever waits for the device."""
    if CUDA:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if CUDA:
            torch.cuda.set_sync_debug_mode("default")


def timed(call: Callable[[], Any], repeat: int) -> float:
    call()
    wait()
    times = []
    for _ in range(repeat):
        if CUDA:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            call()
            after.record()
            wait()
            times.append(before.elapsed_time(after) * 1e3)
        else:
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e6)
    return round(statistics.median(times), 1)


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """Replay of a CUDA graph of a call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def race(facts: Facts, label: str, calls: dict[str, Callable[[], Any]], repeat: int = 10) -> None:
    """Time every call as it is and captured."""
    for name, call in calls.items():
        with facts.part(time=label, of=name) as there_is_time:
            if there_is_time:
                eager = timed(call, repeat)
                facts.say(time=label, of=name, eager=eager, graph=timed(captured(call), repeat) if CUDA else None)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def check_values(facts: Facts) -> None:
    """Largest difference of every routine from the CPU, in eps, and that it does not wait."""
    host32 = [
        torch.from_numpy(np.random.default_rng(i).standard_normal(s))
        for i, s in enumerate(((2, 96, 160), (160, 16), (64, 64)))
    ]
    for name in DTYPES:
        dtype = getattr(torch, name)
        for routine, call in ROUTINES.items():
            with facts.part(values=routine, dtype=name) as there_is_time:
                if there_is_time:
                    host = [x.to(dtype) for x in host32]
                    device = [x.to(DEVICE) for x in host]
                    call(*device)
                    with no_waiting():
                        found = call(*device)
                    expected, found = (x.to("cpu", torch.complex128) for x in (call(*host), found))
                    off = float((found - expected).abs().max() / expected.abs().max())
                    facts.say(values=routine, dtype=name, eps=round(off / torch.finfo(dtype).eps, 1))


def time_routines(facts: Facts) -> None:
    """Low rank and full orthogonalization beside what they could cost and what they replace."""
    from torch.optim._muon import _zeropower_via_newtonschulz as muon_iteration

    for shape, r in PROBLEMS:
        for dtype in (torch.float32, torch.bfloat16):
            G, W = normal(*shape, dtype=dtype), normal(shape[-1], r, dtype=dtype)
            calls: dict[str, Callable[[], Any]] = {
                "three products": lambda G=G, W=W: (G @ W) @ ((G @ W).mT @ G),
                **{
                    name: lambda G=G, W=W, r=r, options=options: orthlin.lowrank_orth(G, r, test_matrix=W, **options)
                    for name, options in LOWRANK.items()
                },
                "orthogonalize tol=0.2": lambda G=G: orthlin.orthogonalize(G, tol=0.2),
            }
            if len(shape) == 2:
                calls["torch.optim.Muon's iteration"] = lambda G=G: muon_iteration(G.clone(), MUON, 5, 1e-7)
            race(facts, f"{'x'.join(map(str, shape))}, r = {r}, {str(dtype)[6:]}", calls)


def parameters() -> list[tuple[str, torch.nn.Parameter]]:
    """Names, parameters and gradients of GPT-2 124M."""
    width, layers, vocabulary, context = (768, 12, 50257, 1024) if CUDA else (32, 2, 64, 16)
    named = []

    def add(name: str, *shape: int) -> None:
        p = torch.nn.Parameter(0.02 * normal(*shape))
        p.grad = 0.01 * normal(*shape)
        named.append((name, p))

    add("wte", vocabulary, width)
    add("wpe", context, width)
    for i in range(layers):
        for name, shape in {"attn": (3, 1), "proj": (1, 1), "up": (4, 1), "down": (1, 4)}.items():
            add(f"{i}.{name}.weight", *(n * width for n in shape))
            add(f"{i}.{name}.bias", shape[0] * width)
        for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
            add(f"{i}.{name}", width)
    return named


def groups(named: list[tuple[str, torch.nn.Parameter]]) -> list[dict[str, Any]]:
    """Matrices of the blocks, query, key and value apart, and the rest for AdamW."""
    blocks = [(name, p) for name, p in named if p.ndim == 2 and name[0].isdigit()]
    fused = [(name, p) for name, p in blocks if "attn" in name]
    return [
        {"params": fused, "algorithm": "orthogonal", "view": ot.MatrixView(splits=3).as_dict()},
        {"params": [pair for pair in blocks if pair not in fused], "algorithm": "orthogonal"},
        {"params": [pair for pair in named if pair not in blocks], "algorithm": "adamw"},
    ]


def optimizers() -> dict[str, Callable[[Any], list[torch.optim.Optimizer]]]:
    """Optimizers by name, each made for named parameters."""
    fused = {"fused": True, "capturable": CUDA}

    def torch_muon(named: Any) -> list[torch.optim.Optimizer]:
        matrices, *others, rest = groups(named)
        blocks = [p for group in (matrices, *others) for _, p in group["params"]]
        return [torch.optim.Muon(blocks), torch.optim.AdamW([p for _, p in rest["params"]], **fused)]

    def low_rank(rank: float, compiled: bool = False) -> Callable[[Any], list[torch.optim.Optimizer]]:
        def make(named: Any) -> list[torch.optim.Optimizer]:
            made = ot.LowRankMuon(groups(named), rank=rank, adamw=fused, capturable=compiled and CUDA)
            if compiled:
                made.step()  # which makes its state
                made.step = torch.compile(made.step)
            return [made]

        return make

    r = 64 if CUDA else 8
    return {
        "AdamW fused": lambda named: [torch.optim.AdamW([p for _, p in named], **fused)],
        "torch.optim.Muon, AdamW fused": torch_muon,
        "LowRankMuon r=64": low_rank(r),
        "LowRankMuon r=k/4": low_rank(0.25),
        "Muon": lambda named: [ot.Muon(groups(named), adamw=fused)],
        "LowRankMuon r=64, compiled": low_rank(r, compiled=True),
        "LowRankMuon r=k/4, compiled": low_rank(0.25, compiled=True),
    }


def time_step(facts: Facts, name: str, make: Callable[[], list[torch.optim.Optimizer]]) -> None:
    """A step: that it does not wait, its time, the host's part of it, its memory."""
    with facts.part(step=name) as there_is_time:
        if not there_is_time:
            return
        made = make()
        step = lambda: [optimizer.step() for optimizer in made]  # noqa: E731
        step()
        wait()
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        with no_waiting():
            step()
        start = time.perf_counter()
        step()
        host = round((time.perf_counter() - start) * 1e6)
        peak = torch.cuda.max_memory_allocated() // 2**20 if CUDA else None
        facts.say(step=name, eager=timed(step, 5), host=host, peak_mb=peak)
        if CUDA:
            facts.say(step=name, graph=timed(captured(step), 10))


def time_filling_up(facts: Facts) -> None:
    """Steps on the matrices of small convolutional networks, in few stacks filled up with zeros and shape by shape."""
    for network, shapes in list(CONVOLUTIONS.items())[: None if CUDA else 1]:
        for rank in (0.25, 0.5):
            for way, most in {"filled up": _filled._MOST, "by shape": 0}.items():

                def make(shapes: list[tuple[int, int]] = shapes, rank: float = rank) -> list[torch.optim.Optimizer]:
                    params = [torch.nn.Parameter(0.02 * normal(*shape)) for shape in shapes]
                    for p in params:
                        p.grad = 0.01 * normal(*p.shape)
                    return [ot.LowRankMuon(params, rank=rank)]

                with mock.patch.object(_filled, "_MOST", most):
                    time_step(facts, f"LowRankMuon r={rank:g} k, {network}, {way}", make)


def time_steps(facts: Facts) -> None:
    """Steps on the shapes of GPT-2 124M."""
    for name, make in optimizers().items():
        time_step(facts, name, lambda make=make: make(parameters()))


def table(rows: list[dict[str, Any]]) -> str:
    """Times of the routines and of the steps."""
    lines = [("what", "eager us", "graph us")]
    lines += [
        (f"{row['time']}: {row['of']}", str(row.get("eager", row.get("error"))), str(row.get("graph")))
        for row in rows
        if "time" in row
    ]
    lines += [
        (f"step: {row['step']}", str(row.get("eager", "")), str(row.get("graph", row.get("error", ""))))
        for row in rows
        if "step" in row
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="begin no part later than this")
    parser.add_argument("--json", type=Path, help="file for all facts")
    options = parser.parse_args()
    facts = Facts(options.seconds, options.json)
    name = torch.cuda.get_device_name() if CUDA else "cpu"
    facts.say(
        device=name,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        python=sys.version.split()[0],
        cpus=os.cpu_count(),
    )
    normal(64, 64) @ normal(64, 64)
    for part in (check_values, time_routines, time_filling_up, time_steps):
        part(facts)
    print(table(facts.rows))


if __name__ == "__main__":
    main()
