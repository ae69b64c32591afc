"""Steps on many devices without one: nothing waits, and what goes over the network, of large models and worlds."""

import fakedevice
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
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
    "low rank": ("low rank", LowRankMuon, {"rank": 16}),
    "gathered": ("gathered", LowRankMuon, {"rank": 16, "n_iter": 1, "error_feedback": True, "nesterov": False}),
    "full": ("owners", Muon, {}),
    "low rank by owners": ("owners", LowRankMuon, {"rank": 16, "n_iter": 1, "scale": "nuclear"}),
}


@pytest.fixture
def sums(monkeypatch):
    """The tensors of all sums."""
    found, plain = [], dist.all_reduce

    def all_reduce(x, *args, **kwargs):
        found.append(x)
        return plain(x, *args, **kwargs)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return found


def lie(x, mesh, axis):
    """A tensor of which x is a part on a mesh."""
    shape = [n * mesh.size() if i == axis else n for i, n in enumerate(x.shape)]
    return DTensor.from_local(
        x, mesh, [Shard(axis)], run_check=False, shape=torch.Size(shape), stride=(shape[1], 1)
    )  # fmt: skip


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("way", WAYS)
def test_no_step_of_parts_waits(world, way, axis):
    name, make, options = WAYS[way]
    mesh = DeviceMesh(fakedevice.DEVICE.type, list(range(world)))
    plans = []

    def prepare(empty):
        params = [nn.Parameter(lie(empty(96, 160), mesh, axis)) for _ in range(3)]
        for p in params:
            p.grad = lie(empty(96, 160), mesh, axis)
        optimizer = make(params, **options)
        plans.append(optimizer.explain())
        return optimizer.step

    assert not fakedevice.record(prepare).faults
    assert {row.way for row in plans[0].rows} == {name}


def test_no_step_of_copies_waits_and_gpt2_sends_a_ninth(world, sums):
    plans = []

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


@pytest.mark.parametrize("rank", [RANK, 700, 768], ids=["copies", "averaged", "full"])
def test_no_step_of_copies_in_parts_waits(world, sums, rank):
    """Rows on four processes or two, with as many copies as there is room for: two sums a shape for each side."""
    kind = fakedevice.DEVICE.type
    mesh = init_device_mesh(kind, (world // 4, 4) if world > 4 else (2, 2), mesh_dim_names=("copies", "parts"))
    plans = []

    def prepare(empty):
        parts = mesh["parts"]
        params = [nn.Parameter(lie(empty(m // parts.size(), n), parts, 0)) for _ in range(2) for m, n in LAYER]
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer = LowRankMuon(params, rank=rank, tail=0.0, replicate_group=mesh["copies"])
        plans.append(optimizer.explain())
        return optimizer.step

    assert not fakedevice.record(prepare).faults
    rows = plans[0].rows
    assert {row.way for row in rows} == {"low rank, copies" if rank == RANK else "averaged, owners"}
    exchanges = 0 if rank == RANK else 2
    assert [row.collectives for row in rows] == [exchanges + (4 if rank == RANK else 1)] * len(LAYER)
    assert len(sums) == sum(row.collectives - exchanges for row in rows)
    if not exchanges:
        assert sum(x.numel() * x.element_size() for x in sums) == sum(row.sent for row in rows)


@pytest.mark.parametrize("options", [{}, {"tail": 0.0}, {"warm_start": False}, {"rank": 0.25}])
def test_what_sends_the_least_is_chosen(world, options):
    """A sum is twice what is sent for it around a ring; owners get a share of m n and give a warm start back to all."""
    mesh, ring = DeviceMesh("cpu", list(range(world))), 2 * (world - 1) / world
    params = [nn.Parameter(lie(torch.zeros(m // world, n), mesh, 0)) for _ in range(2) for m, n in LAYER]
    optimizer = LowRankMuon(params, **{"rank": RANK, "tail": "auto", "warm_start": True, **options})
    group = optimizer.param_groups[0]
    for (m, n), row in zip(LAYER, optimizer.explain().rows, strict=True):
        r = group["rank"] if group["rank"] >= 1 else min(m, n) // 4
        low = ring * (8 * (r * r + (n if group["tail"] else 1) + 2) + 4 * (r * r + r * n))
        owners = ring / 2 * 4 * (2 * m * n / world + (r * n if group["warm_start"] else 0) + 5)
        least, other = sorted([(2 * low, "low rank"), (2 * owners, "owners")])
        assert (row.volume, row.way) == (pytest.approx(least[0]), least[1])
        assert row.instead == ((other[1], pytest.approx(other[0])),)
        assert f"{other[1]} {other[0]:.0f}" in str(optimizer.explain())


def test_owners_have_as_much_to_do(world):
    group = dist.group.WORLD
    stacks = [(Part((m, n), 0, n, over_rows=group), 48, None) for m, n in LAYER]
    loads = [0] * world
    flops = [m * n * min(m, n) for m, n in LAYER]
    for work, owners in zip(flops, owners_of(stacks), strict=True):
        assert len(owners) == 48
        for rank in owners:
            loads[rank] += work
    assert max(loads) - min(loads) <= max(flops)
    assert sum(loads) == 48 * sum(flops)
