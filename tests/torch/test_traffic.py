"""Steps on many devices without one: nothing waits, and what goes over the network, of large models and worlds."""

import fakedevice
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from orthlin.torch import LowRankMuon, Muon
from orthlin.torch._owners import owners_of
from orthlin.torch._sharded import Part

LAYER = ((768, 2304), (768, 768), (768, 3072), (3072, 768))  # of GPT-2 124M
RANK = 64


@pytest.fixture(params=[4, 32])
def world(request):
    """Processes that are not there; sums and exchanges leave what they are given."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    dist.destroy_process_group()


WAYS = {
    "low rank": (LowRankMuon, {"rank": 16}),
    "gathered": (LowRankMuon, {"rank": 16, "n_iter": 1}),
    "owners": (Muon, {}),
}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("way", WAYS)
def test_no_step_of_parts_waits(world, way, axis):
    make, options = WAYS[way]
    mesh = DeviceMesh(fakedevice.DEVICE.type, list(range(world)))
    plans = []

    def prepare(empty):
        def lie(x):
            shape = [n * world if i == axis else n for i, n in enumerate(x.shape)]
            return DTensor.from_local(
                x, mesh, [Shard(axis)], run_check=False, shape=torch.Size(shape), stride=(shape[1], 1)
            )

        params = [nn.Parameter(lie(empty(96, 160))) for _ in range(3)]
        for p in params:
            p.grad = lie(empty(96, 160))
        optimizer = make(params, **options)
        plans.append(optimizer.explain())
        return optimizer.step

    assert not fakedevice.record(prepare).faults
    assert {row.way for row in plans[0].rows} == {way}


def test_no_step_of_copies_waits_and_gpt2_sends_a_ninth(world, monkeypatch):
    sums, plans = [], []
    plain = dist.all_reduce

    def all_reduce(x, *args, **kwargs):
        sums.append(x)
        return plain(x, *args, **kwargs)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)

    def prepare(empty):
        params = [nn.Parameter(empty(m, n)) for _ in range(12) for m, n in LAYER]
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer = LowRankMuon(params, rank=RANK, tail=0.0, replicate_group=dist.group.WORLD)
        plans.append(optimizer.explain())
        return optimizer.step

    assert not fakedevice.record(prepare).faults
    assert len(sums) == sum(row.collectives for row in plans[0].rows) == 2 * len(LAYER)
    assert sum(x.numel() * x.element_size() for x in sums) == sum(row.sent for row in plans[0].rows)
    products, notes = 12 * sum(RANK * (m + n) for m, n in LAYER), 3 * 12 * len(LAYER)
    assert sum(x.numel() for x in sums) == products + notes
    assert products * 9 == 12 * sum(m * n for m, n in LAYER)


def test_owners_have_as_much_to_do(world):
    group = dist.group.WORLD
    stacks = [(Part((m, n), 0, n, over_rows=group), 48) for m, n in LAYER]
    loads = [0] * world
    flops = [m * n * min(m, n) for m, n in LAYER]
    for work, owners in zip(flops, owners_of(stacks), strict=True):
        assert len(owners) == 48
        for rank in owners:
            loads[rank] += work
    assert max(loads) - min(loads) <= max(flops)
    assert sum(loads) == 48 * sum(flops)
