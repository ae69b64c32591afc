"""Matrices of several shapes, filled up with zeros to one stack on a device, step as they do shape by shape."""

import pytest
import torch
from fakedevice import record
from test_forced_device import forced
from test_update import NAN, assert_close, gradients, random, run

from orthlin import _backend as be
from orthlin.torch import MSGD, LowRankMSGD, LowRankMuon, Muon, _filled

SHAPES = [(12, 8), (8, 12), (5, 30), (12, 8), (9, 9), (2, 40), (1, 7), (0, 6)]
KINDS = {
    "low rank": (LowRankMuon, {"rank": 0.5}),
    "one rank, full for the smallest": (LowRankMuon, {"rank": 4, "diagnostics": True}),
    "exact": (LowRankMuon, {"rank": 2, "tol": None, "precision": "highest", "cautious": True}),
    "no tail": (LowRankMuon, {"rank": 0.5, "tail": 0.0, "weight_decay": 0.0, "maximize": True}),
    "feedback": (LowRankMuon, {"rank": 0.5, "tail": 0.0, "error_feedback": True}),
    "nuclear": (LowRankMSGD, {"rank": 2, "warm_start": True, "scale": "nuclear", "tail": "auto"}),
    "of the rank": (LowRankMuon, {"rank": 0.5, "scale": "rms_rank"}),
    "spectral": (MSGD, {"scale": "spectral"}),
    "growing": (LowRankMuon, {"rank": lambda t: 2 + 2 * int(t)}),
    "nuclear, full": (MSGD, {"scale": "nuclear"}),
    "schedule": (Muon, {"precision": "highest", "diagnostics": True}),
    "capturable": (LowRankMuon, {"rank": 0.25, "capturable": True, "adamw": {"capturable": False}}),
}
APART = {
    "power iterations": (LowRankMuon, {"rank": 4, "n_iter": 1}),
    "fresh sketches": (LowRankMSGD, {"rank": 4}),
    "exact, of two ranks": (LowRankMuon, {"rank": 0.25, "tol": None}),
}


def entries(x, dtype):
    return torch.complex(x, x.flip(-1)) if dtype.is_complex else x.to(dtype)


def stepped(kind, options, *, apart, dtype=torch.float64, shapes=SHAPES, steps=4):
    """Optimizer, parameters and the number of directions made in the last step."""
    params = [torch.nn.Parameter(entries(random(*shape, seed=i), dtype)) for i, shape in enumerate(shapes)]
    given = [[entries(g, dtype) for g in gs] for gs in gradients(shapes, steps=steps)]
    given[1 % steps][0][0, 0] = NAN
    given[2 % steps][1].zero_()
    with pytest.MonkeyPatch.context() as patch, forced():
        if apart:
            patch.setattr(_filled, "_MOST", 0)
        optimizer = kind(params, 0.1, **options)
        run(optimizer, params, given)
    return optimizer, params


@pytest.mark.parametrize(
    ("dtype", "doubles"),
    [(torch.float64, True), (torch.complex128, True), (torch.float32, True), (torch.float32, False)],
    ids=["double", "complex", "single", "single without double"],
)
@pytest.mark.parametrize("name", KINDS)
def test_a_step_is_that_of_each_shape(monkeypatch, name, dtype, doubles):
    tol = 2e-5 if dtype is torch.float32 else 1e-11
    if not doubles:
        monkeypatch.setattr(be, "wide_dtype", lambda *_, **__: None)
    kind, options = KINDS[name]
    (mine, params), (reference, expected) = (stepped(kind, options, apart=x, dtype=dtype) for x in (False, True))
    for p, q in zip(params, expected, strict=True):
        assert_close(p.detach(), q.detach(), tol)
        assert mine.state[p].keys() == reference.state[q].keys()
        for key, value in reference.state[q].items():
            torch.testing.assert_close(mine.state[p][key], value, rtol=10 * tol, atol=10 * tol, equal_nan=True)
    assert int(mine.skipped()) == int(reference.skipped()) == 1


def products(kind, options, shapes):
    """How many a step makes on a device."""

    def prepare(A):
        params = [torch.nn.Parameter(A(*shape)) for shape in shapes]
        for p in params:
            p.grad = A(*p.shape)
        return kind(params, 0.1, **options).step

    return sum(call.name in ("bmm", "baddbmm", "mm", "addmm") for call in record(prepare).calls)


@pytest.mark.parametrize("name", ["low rank", "schedule", "feedback"])
def test_small_matrices_share_their_products(name):
    kind, options = KINDS[name]
    one, three = (products(kind, options, shapes) for shapes in ([(30, 20)], [(30, 20), (20, 30), (24, 24)]))
    assert three <= one + 6  # what is left of each is its last product


@pytest.mark.parametrize("name", APART)
def test_what_needs_its_own_shape_or_rank_is_not_shared(name):
    kind, options = APART[name]
    one, two = (products(kind, options, shapes) for shapes in ([(30, 20)], [(30, 20), (30, 28)]))
    assert two == 2 * one


def test_nothing_is_filled_up_beyond_what_pays():
    kind, options = KINDS["low rank"]
    apart, together = ([[(30, 20)], [(1500, 1500)]], [(30, 20), (1500, 1500)])
    assert products(kind, options, together) == sum(products(kind, options, shapes) for shapes in apart)


def test_nothing_is_filled_up_on_the_host(monkeypatch):
    monkeypatch.setattr(_filled, "filled", None)
    kind, options = KINDS["low rank"]
    params = [torch.nn.Parameter(random(*shape)) for shape in SHAPES]
    run(kind(params, 0.1, **options), params, gradients(SHAPES))
