"""Full steps follow the gradient alone: what it does not reach stays where it is."""

import pytest
import torch

from orthlin.torch import MSGD, LowRankMSGD, LowRankMuon, Muon

KINDS = {
    "msgd": (MSGD, {}),
    "muon": (Muon, {"schedule": None, "scale": "none"}),
    "muon by polynomials": (Muon, {"scale": "none"}),
    "lowrank msgd": (LowRankMSGD, {"rank": 64}),
    "lowrank muon": (LowRankMuon, {"rank": 64, "scale": "none"}),
    "below": (LowRankMuon, {"rank": 7, "scale": "none"}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "options"), KINDS.values(), ids=KINDS)
def test_a_rank_one_gradient_makes_a_rank_one_step_and_dead_rows_rest(kind, options, dtype):
    rng = torch.Generator().manual_seed(0)
    u, v = (torch.randn(*shape, generator=rng, dtype=dtype) for shape in ((8, 1), (1, 12)))
    u[3] = 0
    exact = u @ v / (u.norm() * v.norm())
    w = torch.nn.Parameter(torch.zeros(8, 12, dtype=dtype))
    w.grad = u @ v
    kind([w], lr=1.0, weight_decay=0.0, **options).step()
    step = w.detach()
    assert (step * exact).sum() ** 2 >= 0.99 * step.norm() ** 2
    assert step[3].norm() <= 1e-6


@pytest.mark.parametrize(("kind", "options"), KINDS.values(), ids=KINDS)
def test_a_zero_gradient_makes_no_step(kind, options):
    w = torch.nn.Parameter(torch.zeros(8, 12))
    w.grad = torch.zeros(8, 12)
    kind([w], lr=1.0, weight_decay=0.0, **options).step()
    assert not w.detach().any()
