"""Worlds of processes on this machine, and what goes between them."""

import multiprocessing
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

SIZE = 2.0**-12  # of the noise that tells a condition


def matrix(shape, seed):
    """Singular values that fall to 1/50."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64).flatten(1)
    U, _, V = torch.linalg.svd(x, full_matrices=False)
    return (U * torch.logspace(0, -1.7, U.shape[-1]) @ V).reshape(shape)


def whole(x):
    return (x.full_tensor() if isinstance(x, DTensor) else x).clone()


def distance(found, expected):
    return max(torch.linalg.vector_norm((a - b).abs().double()).item() for a, b in zip(found, expected, strict=True))


def reduced(record, gathers=None):
    """Have every sum note its bytes, every exchange those that go to others, every gathering those of this process."""
    plain, exchange, gather = dist.all_reduce, dist.all_to_all_single, funcol.all_gather_single

    def all_gather_single(x, *args, **kwargs):
        gathers.append(x.numel() * x.element_size())
        return gather(x, *args, **kwargs)

    if gathers is not None:
        funcol.all_gather_single = all_gather_single

    def all_to_all_single(found, sent, lengths, splits, group):
        mine = splits[dist.get_rank(group)]
        record.append((sent.numel() - mine * sent[0].numel() if len(sent) else 0) * sent.element_size())
        return exchange(found, sent, lengths, splits, group=group)

    dist.all_to_all_single = all_to_all_single

    def all_reduce(x, *args, **kwargs):
        record.append(x.numel() * x.element_size())
        return plain(x, *args, **kwargs)

    dist.all_reduce = all_reduce


def _work(rank, world, folder, work):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    torch.save(work(world, folder), f"{folder}/result{world}.{rank}")
    dist.destroy_process_group()


def results_of(work, worlds, folder):
    """What `work(world, folder)` returns on every process of every world."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "torch.distributed.checkpoint", "orthlin.torch"])
    found = {}
    for world in worlds:
        mp.start_processes(_work, (world, folder, work), world, start_method="forkserver")
        found[world] = [torch.load(Path(folder, f"result{world}.{i}")) for i in range(world)]
    return found
