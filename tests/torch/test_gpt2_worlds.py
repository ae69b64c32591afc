"""A GPT-2 trained on one process, on shards and as copies: the same losses."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from worlds import results_of

from orthlin.torch import LowRankMuon, Muon
from orthlin.torch.gpt2 import param_groups

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
WORLDS, STEPS, ROWS = (4, 2), 16, 8
ADAMW = {"lr": 1e-2, "eps": 1e-4}
BOTH = {"low rank", "owners"}  # whichever sends less, shape by shape
MAKERS = {
    "low rank": (LowRankMuon, {"lr": 0.02, "rank": 8}),
    "no tail": (LowRankMuon, {"lr": 0.02, "rank": 8, "tail": 0.0}),
    "full": (Muon, {"lr": 0.02, "schedule": None}),
}


def model():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=48,
        bos_token_id=None,
        eos_token_id=None,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return transformers.GPT2LMHeadModel(config)


def tokens(step):
    """Sentences with something to learn: every token follows from the one before, but for some noise."""
    g = torch.Generator().manual_seed(step)
    start = torch.randint(48, (ROWS, 1), generator=g)
    noise = torch.randint(2, (ROWS, 16), generator=g)
    return (start + 5 * torch.arange(16) + noise) % 48


def losses(net, optimizer, rank=0, world=1, noise=0.0):
    """Mean loss of every step."""
    found = []
    for step in range(STEPS):
        rows = tokens(step)[ROWS * rank // world : ROWS * (rank + 1) // world]
        loss = net(input_ids=rows, labels=rows).loss
        loss.backward()
        for p in net.parameters() if noise else ():
            p.grad.add_(noise * p.grad.square().mean().sqrt() * torch.randn(p.shape))
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        found.append(mean.item() / world)
    return found


def sharded(name, world):
    net, mesh = model(), init_device_mesh("cpu", (world,))
    for block in net.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    make, options = MAKERS[name]
    optimizer = make(param_groups(net), adamw=ADAMW, **options)
    ways = {row.way for row in optimizer.explain().rows}
    return ways, losses(net, optimizer, dist.get_rank(), world)


def copies(world):
    net = model()
    groups = param_groups(net)
    matrices = {id(p) for group in groups if group["algorithm"] == "orthogonal" for _, p in group["params"]}
    names = [name for name, p in net.named_parameters() if id(p) in matrices]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, names)
    wrapped = DistributedDataParallel(net)
    make, options = MAKERS["no tail"]
    optimizer = make(groups, adamw=ADAMW, replicate_group=dist.group.WORLD, **options)
    ways = {row.way for row in optimizer.explain().rows}
    return ways, losses(wrapped, optimizer, dist.get_rank(), world)


def work(world, folder):
    return {name: sharded(name, world) for name in MAKERS} | {"copies": copies(world)}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of(work, WORLDS, str(tmp_path_factory.mktemp("gpt2")))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(
    ("name", "ways"),
    [("low rank", BOTH), ("no tail", BOTH), ("full", {"owners"}), ("copies", {"copies"})],
)
def test_losses_are_those_of_one_process(results, name, ways, world):
    make, options = MAKERS["no tail" if name == "copies" else name]

    def run(noise=0.0):
        net = model()
        torch.manual_seed(1)
        return torch.tensor(losses(net, make(param_groups(net), adamw=ADAMW, **options), noise=noise))

    expected, size = run(), 2.0**-12
    condition = max((run(noise) - expected).abs().max().item() for noise in (size, -size)) / size
    assert expected[-1] < expected[0] - 0.3
    for result in results[world]:
        found, values = result[name]
        assert found == ways
        # Gradients and losses are averages of other parts: each is off by some eps of its own size.
        change = (torch.tensor(values) - expected).abs().max().item()
        assert change <= 16 * torch.finfo(torch.float32).eps * (condition + expected.max().item())
