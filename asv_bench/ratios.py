"""Speed as ratios, each measured in one run against the floor or the peer it is held to.

    python asv_bench/ratios.py --threads 2 --json ratios.json

Three questions, each library in a process of its own, the compared calls in turn, medians:

- `lowrank_orth` in float32 with a given test matrix, over the three matrix products it cannot avoid;
- `orthogonalize(tol=0.2)` over the iteration of `torch.optim.Muon` (five quintic steps), both given the same
  matrix in float32 and, up to order 256, in bfloat16, with the errors of both;
- the time of a call on a 16 x 16 matrix, in microseconds.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import orthlin

Row = dict[str, Any]


def interleaved(calls: list[Callable[[], Any]], repeat: int) -> list[list[float]]:
    """Seconds of each call, `repeat` times each, in turn after one warm-up."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeat):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return times


def ratio(reference: list[float], taken: list[float]) -> Row:
    """Median of the ratios of neighbouring calls, with its quartiles, and the median times."""
    low, median, high = statistics.quantiles([b / a for a, b in zip(reference, taken, strict=True)], n=4)
    return {
        "reference_ms": round(1e3 * statistics.median(reference), 2),
        "ms": round(1e3 * statistics.median(taken), 2),
        "ratio": round(median, 3),
        "quartiles": [round(low, 3), round(high, 3)],
    }


def spectrum(m: int, n: int, kind: str) -> np.ndarray:
    """Gaussian matrix, or one with random singular vectors and singular values 1/i."""
    rng = np.random.default_rng(0)
    A = rng.standard_normal((m, n))
    if kind == "1/i":
        U, s, Vh = np.linalg.svd(A, full_matrices=False)
        A = (U / np.arange(1, len(s) + 1)) @ Vh
    return A.astype(np.float32)


def lowrank(asarray: Callable[[np.ndarray], Any], repeat: int) -> Iterator[Row]:
    """`lowrank_orth` over its three products."""
    rng = np.random.default_rng(1)
    for shape in ((1024, 4096), (4096, 1024)):
        for kind in ("gaussian", "1/i"):
            G = asarray(spectrum(*shape, kind))
            for r in (128, 256):
                factors = [asarray(rng.standard_normal(s).astype(np.float32)) for s in ((shape[0], r), (r, shape[1]))]
                omega = asarray(rng.standard_normal((shape[1], r)).astype(np.float32))
                Q, W = factors
                calls = [
                    lambda: (G @ omega, Q.T @ G, Q @ W),  # noqa: B023 - called before the next turn
                    lambda: orthlin.lowrank_orth(G, r, test_matrix=omega),  # noqa: B023
                ]
                yield {"shape": shape, "spectrum": kind, "r": r, **ratio(*interleaved(calls, repeat))}


def muon_iteration(G: Any) -> Any:
    """Do to a matrix what torch.optim.Muon does, with products in the dtype of G."""
    import torch

    X = G.T if G.shape[0] > G.shape[1] else G
    X = X / X.norm().clamp(min=1e-7)
    for _ in range(5):
        A = X @ X.T
        X = torch.addmm(X, torch.addmm(A, A, A, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
    return X.T if G.shape[0] > G.shape[1] else X


def against_muon(repeat: int) -> Iterator[Row]:
    """`orthogonalize(tol=0.2)` over Muon's iteration."""
    import torch

    large = ((768, 768), (768, 3072), (3072, 768), (1024, 1024), (1024, 4096))
    small = ((128, 128), (128, 512), (512, 128), (256, 256))
    for dtype, shape in ((d, s) for d, shapes in (("float32", large), ("bfloat16", small)) for s in shapes):
        for kind in ("gaussian", "1/i"):
            G = torch.from_numpy(spectrum(*shape, kind)).to(getattr(torch, dtype))
            exact = orthlin.polar(G.double()).U
            calls = [lambda: muon_iteration(G), lambda: orthlin.orthogonalize(G, tol=0.2)]  # noqa: B023
            errors = [round(float((c().double() - exact).norm()) / min(shape) ** 0.5, 3) for c in calls]
            yield {
                "dtype": dtype,
                "shape": shape,
                "spectrum": kind,
                "errors": errors,
                **ratio(*interleaved(calls, repeat)),
            }


def overhead(asarray: Callable[[np.ndarray], Any], repeat: int) -> Iterator[Row]:
    """Microseconds of a call on a 16 x 16 matrix."""
    A = asarray(np.random.default_rng(0).standard_normal((16, 16)))
    schedule = orthlin.schedules.muon()
    for name, call in {
        "polar": lambda: orthlin.polar(A),
        "orthogonalize": lambda: orthlin.orthogonalize(A),
        "orthogonalize(tol)": lambda: orthlin.orthogonalize(A, tol=0.2),
        "orthogonalize(schedule)": lambda: orthlin.orthogonalize(A, schedule=schedule),
        "lowrank_orth": lambda: orthlin.lowrank_orth(A, 4, test_matrix=A[:, :4]),
        "qr": lambda: orthlin.qr(A),
        "randomized_range_finder": lambda: orthlin.randomized_range_finder(A, 4, test_matrix=A[:, :4]),
    }.items():
        (taken,) = interleaved([call], 20 * repeat)
        yield {"call": name, "us": round(1e6 * statistics.median(taken), 1)}


def measure(library: str, repeat: int) -> Row:
    """Every figure of one library; run in a process that imports no other."""
    asarray: Callable[[np.ndarray], Any] = np.asarray
    if library == "torch":
        import torch

        asarray = torch.from_numpy
    result: Row = {
        "version": version(library),
        "lowrank_orth": list(lowrank(asarray, repeat)),
        "overhead": list(overhead(asarray, repeat)),
    }
    if library == "torch":
        result["orthogonalize"] = list(against_muon(max(repeat // 2, 3)))
    return result


def main() -> None:
    """Measure each library in a fresh process and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads of the linear algebra libraries")
    parser.add_argument("--repeat", type=int, default=15, help="calls of each kind")
    parser.add_argument("--libraries", nargs="+", default=["numpy", "torch"], choices=["numpy", "torch"])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--in-process", choices=["numpy", "torch"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_process:
        print(json.dumps(measure(args.in_process, args.repeat)))
        return
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(args.threads))
    figures: Row = {"machine": platform.machine(), "threads": args.threads, "python": platform.python_version()}
    for library in args.libraries:
        command = [sys.executable, __file__, "--in-process", library, "--repeat", str(args.repeat)]
        done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True, check=True)
        figures[library] = json.loads(done.stdout)
        for part, rows in figures[library].items():
            for row in rows if isinstance(rows, list) else ():
                print(library, part, *(f"{k}={v}" for k, v in row.items()), flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
