"""Compiled and captured steps."""

import pytest
import torch
from test_forced_device import forced
from test_update import NAN, assert_close, gradients, parameters
from torch._dynamo.testing import CompileCounter

from orthlin.errors import OptionError
from orthlin.torch import MSGD, LowRankMSGD, LowRankMuon, Muon

KINDS = {
    "low rank": (LowRankMuon, {"rank": 4}),
    "feedback": (LowRankMuon, {"rank": 4, "error_feedback": True, "cautious": True, "diagnostics": True}),
    "no tail": (LowRankMuon, {"rank": 4, "tail": 0.0, "weight_decay": 0.0, "maximize": True}),
    "half": (LowRankMuon, {"rank": 4}),
    "full": (Muon, {"precision": "highest"}),  # which on a CPU compiling means anyway
    "no momentum": (LowRankMSGD, {"rank": 4, "warm_start": True}),
}


def model(dtype=torch.float32):
    return [torch.nn.Parameter(p.detach().to(dtype)) for p in parameters([(24, 16), (24, 16), (16, 20), (5,)])]


def stepped(params, optimizer, step, steps=3):
    """Steps at changing rates, with NaN in the second gradient of the second step."""
    given = gradients([tuple(p.shape) for p in params], steps=steps)
    given[1][1][0, 0] = NAN
    with forced():
        for t, gs in enumerate(given):
            for p, g in zip(params, gs, strict=True):
                p.grad = g.to(p.dtype)
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (t + 1)
            step()
    return [p.detach() for p in params]


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.parametrize("name", KINDS)
def test_a_compiled_step_is_the_step_up_to_rounding(name):
    """It is one graph, traced anew once, when a rate turns out to change."""
    torch._dynamo.reset()
    kind, options = KINDS[name]
    plain, mine = (model(torch.bfloat16 if name == "half" else torch.float32) for _ in range(2))
    reference, optimizer = (kind(params, 0.1, **options) for params in (plain, mine))
    expected = stepped(plain, reference, reference.step)
    counter = CompileCounter()
    found = stepped(mine, optimizer, torch.compile(optimizer.step, backend=counter))
    assert counter.frame_count <= 2
    assert int(optimizer.skipped()) == int(reference.skipped()) == 1
    for x, y in zip(found, expected, strict=True):
        assert_close(x, y, 1e-6)
    for p, q in zip(mine, plain, strict=True):
        for key, value in reference.state[q].items():
            assert_close(optimizer.state[p][key], value, 1e-5)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_a_compiled_step_of_matrices_without_entries():
    torch._dynamo.reset()
    p = torch.nn.Parameter(torch.zeros(0, 3))
    optimizer = LowRankMuon([p], 0.1, rank=2)
    p.grad = torch.zeros(0, 3)
    torch.compile(optimizer.step, backend="eager")()
    assert int(optimizer.skipped()) == 0


@pytest.mark.parametrize(
    ("kind", "options"),
    [(LowRankMuon, {"rank": 4}), (Muon, {}), (MSGD, {}), (LowRankMSGD, {"rank": 4, "warm_start": True})],
)
def test_a_capturable_step_writes_in_place_and_reads_rates_where_they_are(kind, options):
    """With rate and decay as tensors that are changed in place, as a replayed graph sees them."""
    params, plain = model()[:2], model()[:2]
    lr, decay = torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    optimizer = kind(params, lr, weight_decay=decay, capturable=True, **options)
    reference = kind(plain, 0.1, weight_decay=0.3, **options)
    for t, gs in enumerate(gradients([(24, 16)] * 2, steps=3)):
        lr.fill_(0.1 / (t + 1))
        decay.fill_(0.3 / (t + 1))
        reference.param_groups[0].update(lr=0.1 / (t + 1), weight_decay=0.3 / (t + 1))
        with forced():
            for given, made in ((params, optimizer), (plain, reference)):
                for p, g in zip(given, gs, strict=True):
                    p.grad = g.to(p.dtype)
                before = [x.data_ptr() for p in given for x in made.state[p].values()]
                made.step()
                assert [x.data_ptr() for p in given for x in made.state[p].values()] == before
    for p, q in zip(params, plain, strict=True):
        assert_close(p.detach(), q.detach(), 1e-6)


@pytest.mark.parametrize(
    "options", [{"rank": 4, "warm_start": False}, {"rank": lambda t: 4}, {"rank": 4, "capturable": 1}]
)
def test_what_cannot_be_captured_is_refused(options):
    with pytest.raises(OptionError, match="capturable: "):
        LowRankMuon(model(), **{"capturable": True, **options})


def test_an_option_of_adamw_makes_the_matrices_capturable_too():
    with pytest.raises(OptionError, match=r"capturable: .* warm_start=True"):
        LowRankMSGD(model(), rank=4, adamw={"capturable": True})
    assert LowRankMuon(model(), adamw={"capturable": True}).param_groups[0]["capturable"]


def test_a_stack_of_no_matrices_is_stepped():
    p = torch.nn.Parameter(torch.zeros(0, 6, 5))
    optimizer = LowRankMuon([{"params": [p], "view": {"batch_ndim": 1}}], rank=2)
    p.grad = torch.zeros(0, 6, 5)
    optimizer.step()
    assert int(optimizer.skipped()) == 0
