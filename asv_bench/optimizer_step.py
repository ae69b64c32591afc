"""Time of an optimizer step on the parameters of GPT-2 124M, over AdamW's.

    python asv_bench/optimizer_step.py --threads 2 --json optimizer_step.json

Parameters and gradients are random; each optimizer runs in a process of its own, after the first step, which makes
AdamW's state.  `torch.optim.Muon` multiplies in bfloat16, which takes minutes a step on a CPU
without such units: --repeat does not apply to it, one step is timed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

SPECS = {
    "AdamW": {},
    "LowRankMuon, rank 64": {"rank": 64},
    "LowRankMuon, rank 64, as in the paper": {"rank": 64, "warm_start": False, "tail": 0.0},
    "AdamW, fused": {"fused": True},
    "LowRankMuon, rank 64, AdamW fused": {"rank": 64, "adamw": {"fused": True}},
    "Muon, float32": {},
    "torch.optim.Muon": {},
}
BLOCK = {"qkv": (2304, 768), "projection": (768, 768), "up": (3072, 768), "down": (768, 3072)}
LAYERS, WIDTH, VOCABULARY, CONTEXT = 12, 768, 50257, 1024


def parameters() -> tuple[list[Any], list[Any]]:
    """Matrices of the blocks, and everything else, each with a gradient."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def parameter(*shape: int) -> Any:
        p = torch.nn.Parameter(0.02 * torch.randn(*shape, generator=generator))
        left, right = (torch.randn(size, 32, generator=generator) for size in (shape[0], shape[-1]))
        p.grad = 1e-3 * torch.randn(*shape, generator=generator) + (left @ right.T * 1e-3 if len(shape) > 1 else 0)
        return p

    matrices = [parameter(*shape) for _ in range(LAYERS) for shape in BLOCK.values()]
    vectors = [parameter(n) for _ in range(LAYERS) for n in (2304, 768, 3072, 768, 768, 768, 768, 768)]
    return matrices, [parameter(VOCABULARY, WIDTH), parameter(CONTEXT, WIDTH), *vectors]


def optimizers(name: str, matrices: list[Any], others: list[Any]) -> list[Any]:
    """Optimizers that together step everything."""
    import torch

    from orthlin.torch import LowRankMuon, Muon

    if name.startswith("AdamW"):
        return [torch.optim.AdamW(matrices + others, **SPECS[name])]
    if name == "torch.optim.Muon":
        return [torch.optim.Muon(matrices), torch.optim.AdamW(others)]
    qkv = {"splits": 3}
    groups = [
        {"params": [p for p in matrices if p.shape[0] == 2304], "algorithm": "orthogonal", "view": qkv},
        {"params": [p for p in matrices if p.shape[0] != 2304], "algorithm": "orthogonal"},
        {"params": others, "algorithm": "adamw"},
    ]
    return [Muon(groups) if name.startswith("Muon") else LowRankMuon(groups, **SPECS[name])]


def measure(name: str, repeat: int) -> dict[str, Any]:
    """Seconds of a step."""
    chosen = optimizers(name, *parameters())
    if name != "torch.optim.Muon":
        for optimizer in chosen:
            optimizer.step()
    taken = []
    for _ in range(1 if name == "torch.optim.Muon" else repeat):
        start = time.perf_counter()
        for optimizer in chosen:
            optimizer.step()
        taken.append(time.perf_counter() - start)
    return {"seconds": round(statistics.median(taken), 3), "all": [round(t, 3) for t in taken]}


def main() -> None:
    """Measure each optimizer in a fresh process, AdamW first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--only", nargs="+", default=list(SPECS), choices=list(SPECS), metavar="NAME")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--in-process", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_process:
        print(json.dumps(measure(args.in_process, args.repeat)))
        return
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
    figures: dict[str, Any] = {"threads": args.threads, "torch": version("torch"), "steps": {}}
    for name in args.only:
        command = [sys.executable, __file__, "--in-process", name, "--repeat", str(args.repeat)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        row = figures["steps"][name] = json.loads(done.stdout)
        base = figures["steps"].get("AdamW", row)["seconds"]
        print(f"{name:40} {row['seconds']:9.3f} s  {row['seconds'] / base:7.2f} x AdamW", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
