"""Worlds of processes on this machine, and what goes between them."""

import multiprocessing
import os
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.multiprocessing as mp
import units  # noqa: F401, none in any process
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


def _context():
    context = multiprocessing.get_context("forkserver")
    models = ["transformers.models.gpt2.modeling_gpt2", "orthlin.torch.train.__main__"]
    context.set_forkserver_preload(
        ["torch", "torch.distributed.fsdp", "torch.distributed.checkpoint", "orthlin.torch", *models]
    )
    return context


def results_of(work, worlds, folder):
    """What `work(world, folder)` returns on every process of every world."""
    _context()
    found = {}
    for world in worlds:
        mp.start_processes(_work, (world, folder, work), world, start_method="forkserver")
        found[world] = [torch.load(Path(folder, f"result{world}.{i}")) for i in range(world)]
    return found


def _train(rank, surroundings, errors, arguments, prepare):
    from orthlin.torch.train.__main__ import main

    os.environ.update(surroundings, RANK=str(rank), LOCAL_RANK=str(rank))
    sys.stderr = sys.stdout = Path(errors.format(rank)).open("w")  # noqa: SIM115, open to the end
    if prepare is not None:
        prepare(rank)
    sys.exit(main(arguments))


def train(arguments, world, errors, prepare=None):
    """Exit codes and outputs of the training command on several processes, which nobody looks after."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    surroundings = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    given = (surroundings, str(errors / "errors{}"), [str(x) for x in arguments], prepare)
    processes = [_context().Process(target=_train, args=(rank, *given)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
        process.kill()  # if it still waits
        process.join()
    return [(p.exitcode, Path(given[1].format(rank)).read_text()) for rank, p in enumerate(processes)]
