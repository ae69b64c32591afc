"""What a machine with several GPUs must decide, in a few minutes: steps of GPT-2 124M under FSDP2.

    torchrun --nproc-per-node 4 asv_bench/many_gpus.py --json results/gpus-4xh100.json

For each optimizer: the largest difference of its first step from that of one process with the same gradients; medians
over iterations, in microseconds, of forward and backward pass, of the step, and of both as they follow each other, less
than the sum by what overlaps; bytes that a process gives to collectives in a step, and their number; peak memory.
Without CUDA a tiny model runs on CPUs over gloo, to test itself.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

from orthlin import torch as ot
from orthlin.torch import gpt2

CUDA = torch.cuda.is_available()
SIZES = {"n_embd": 768, "n_layer": 12, "n_head": 12} if CUDA else {"n_embd": 32, "n_layer": 2, "n_head": 2}
CONTEXT, BATCH, ITERATIONS, RANK = (1024, 8, 20, 64) if CUDA else (16, 2, 3, 4)
FUSED = {"fused": True}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW fused": lambda model: torch.optim.AdamW(model.parameters(), **FUSED),
    f"LowRankMuon r={RANK}": lambda model: ot.LowRankMuon(gpt2.param_groups(model), rank=RANK, adamw=FUSED),
    "LowRankMuon r=k/4": lambda model: ot.LowRankMuon(gpt2.param_groups(model), adamw=FUSED),
    "Muon": lambda model: ot.Muon(gpt2.param_groups(model), adamw=FUSED),
}


class Collectives(TorchDispatchMode):
    """Number of collectives, and the bytes that this process gives to them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            self.count += 1
            self.bytes += max((x.nbytes for x in given), default=0)
        return func(*args, **(kwargs or {}))


def make_model(device: str) -> Any:
    torch.manual_seed(0)
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(vocab_size=256, n_positions=CONTEXT, **SIZES, **off, bos_token_id=None, eos_token_id=None)
    return GPT2LMHeadModel(config).to(device)


def shard(model: Any, mesh: Any) -> Any:
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()
    dist.barrier()


def median(call: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> float:
    times = []
    for _ in range(ITERATIONS):
        before()
        wait()
        start = time.perf_counter()
        call()
        if CUDA:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return round(statistics.median(times) * 1e6, 1)


def largest_difference(model: Any, device: str, make: Callable[[Any], torch.optim.Optimizer], step: Any) -> float:
    """Of parameters after a step from those of one process with the same gradients, over the largest of that step."""
    alone = make_model(device)
    for p, sharded in zip(alone.parameters(), model.parameters(), strict=True):
        p.grad = sharded.grad.full_tensor()
    before = [p.detach().clone() for p in alone.parameters()]
    make(alone).step()
    step()
    pairs = zip(alone.parameters(), model.parameters(), before, strict=True)
    found = [((p - q.full_tensor()).abs().max(), (p - old).abs().max()) for p, q, old in pairs]
    return float(max(off for off, _ in found) / max(moved for _, moved in found))


def measure(make: Callable[[Any], torch.optim.Optimizer], device: str, mesh: Any) -> dict[str, Any]:
    model = shard(make_model(device), mesh)
    optimizer = make(model)
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    tokens = torch.randint(256, (BATCH, CONTEXT), generator=generator).to(device)

    def passes() -> None:
        with torch.autocast(device.partition(":")[0], torch.bfloat16):
            model(input_ids=tokens, labels=tokens).loss.backward()

    def both() -> None:
        passes()
        optimizer.step()
        optimizer.zero_grad()

    passes()
    off = largest_difference(model, device, make, optimizer.step)
    with Collectives() as moved:
        optimizer.step()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    step = median(optimizer.step)
    optimizer.zero_grad()
    return {
        "difference": float(f"{off:.2g}"),
        "passes": median(passes, optimizer.zero_grad),
        "step": step,
        "both": median(both),
        "collectives": moved.count,
        "bytes": moved.bytes,
        "peak_mb": torch.cuda.max_memory_allocated() // 2**20 if CUDA else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for all facts")
    options = parser.parse_args()
    local = int(os.environ["LOCAL_RANK"])
    device = f"cuda:{local}" if CUDA else "cpu"
    if CUDA:
        torch.cuda.set_device(local)
    mesh = init_device_mesh(device.partition(":")[0], (int(os.environ["WORLD_SIZE"]),))
    facts: dict[str, Any] = {
        "command": shlex.join(["torchrun", "--nproc-per-node", str(mesh.size()), "asv_bench/many_gpus.py"]),
        "machine": torch.cuda.get_device_name() if CUDA else "cpu",
        "processes": mesh.size(),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
    }
    for name, make in OPTIMIZERS.items():
        try:
            facts[name] = measure(make, device, mesh)
        except Exception as error:  # what one optimizer cannot do, others can
            facts[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        if dist.get_rank() == 0:
            print(name, *(f"{key}: {value}" for key, value in facts[name].items()), sep="  ", flush=True)
    if options.json and dist.get_rank() == 0:
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
