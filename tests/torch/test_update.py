"""Steps of the optimizers: those of `orthlin.steppers` and of torch's Muon, matrix by matrix."""

import inspect
import json
import math

import pytest
import torch
from test_views import CASES

from orthlin import schedules, steppers
from orthlin._direction import SCALES, Recipe
from orthlin.errors import NonFiniteError
from orthlin.torch import MSGD, LowRankMSGD, LowRankMuon, MatrixView, Muon

ALL = (MSGD, LowRankMSGD, Muon, LowRankMuon)
SHAPES = [(12, 8), (8, 12), (12, 8), (9, 9)]
STEPS = 5
NAN = float("nan")


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters(shapes=SHAPES, dtype=torch.float64):
    return [torch.nn.Parameter(random(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(shapes)]


def gradients(shapes=SHAPES, dtype=torch.float64, steps=STEPS, seed=100):
    """A list of gradients for each step, which do not depend on the parameters."""
    return [[random(*s, seed=seed + 50 * t + i, dtype=dtype) for i, s in enumerate(shapes)] for t in range(steps)]


def run(optimizer, params, all_gradients):
    for given in all_gradients:
        for p, g in zip(params, given, strict=True):
            p.grad = g
        optimizer.step()
    return params


def stepper_of(optimizer, **other):
    """The stepper with the options that the first group has."""
    group = {**optimizer.param_groups[0], **other}
    if group["schedule"] is not None:
        group["schedule"] = getattr(schedules, group["schedule"])()
    return steppers.muon(**{key: group[key] for key in inspect.signature(steppers.muon).parameters})


def by_stepper(stepper, X, gradients_of_X):
    """Parameter and state after steps under the name that the optimizers use; a gradient of None is no step."""
    X, name = X.detach().clone(), f"{X.shape[0]}x{X.shape[1]}"
    state = stepper.init(X, name)
    for t, G in enumerate(gradients_of_X):
        if G is not None:
            delta, state = stepper.update(G, state._replace(step=t), X, name)
            X = X + delta
    return X, state


def assert_close(found, expected, tol=1e-13):
    """Up to `tol` of the largest entry, or of one; the default is 450 eps, measured 27 at most."""
    assert found.dtype == expected.dtype
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=tol * max(1.0, largest))


def assert_same_as_stepper(optimizer, params, all_gradients, **other):
    stepper = stepper_of(optimizer, **other)
    sign = -1 if optimizer.param_groups[0]["maximize"] else 1
    expected = [
        by_stepper(stepper, p, [None if g[i] is None else sign * g[i] for g in all_gradients])
        for i, p in enumerate(params)
    ]
    run(optimizer, params, all_gradients)
    for p, (X, state) in zip(params, expected, strict=True):
        assert_close(p.detach(), X)
        mine = optimizer.state[p]
        assert int(mine["skipped"].sum()) == int(state.skipped)
        assert ("momentum" in mine) == (state.momentum is not None)
        if state.momentum is not None:
            assert_close(mine["momentum"], sign * state.momentum)
        if state.right is not None:
            r = min(mine["right_0"].shape[-2], state.right.shape[-2])
            assert_close(sign * mine["right_0"][0, :r], state.right[:r], 1e-12)


def decayed(**options):
    return {"lr": 0.1, "weight_decay": 0.3, **options}


FULL = [
    *({"scale": scale} for scale in SCALES),
    *({"schedule": name} for name in ("muon", "speedrun", "polar_express", None)),
    {"weight_decay": 0.0},
    {"cautious": True},
    {"maximize": True},
]
LOW = [
    *({"scale": scale} for scale in SCALES),
    *({"sketch": kind} for kind in ("columns", "sparse_sign")),
    *({"tail": tail} for tail in (0.0, 0.5, "auto")),
    {"rank": 3},
    {"rank": 8},
    {"rank": 100},
    {"rank": None},
    {"n_iter": 1},
    {"warm_start": True, "n_iter": 1},
    {"warm_start": False},
    {"cautious": True},
    {"seed": 7},
    {"maximize": True, "warm_start": False},
    {"rank": 8, "schedule": "muon"},
]
MOMENTUM = [{"momentum": 0.0}, {"momentum": 0.5, "nesterov": False}]
FEEDBACK = [
    {"error_feedback": True},
    {"error_feedback": True, "rank": 8},
    {"error_feedback": True, "momentum": 0.0},
    {"error_feedback": True, "warm_start": False, "tail": 0.0},
]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((MSGD, options) for options in FULL),
        *((Muon, options) for options in FULL + MOMENTUM),
        *((LowRankMSGD, options) for options in LOW),
        *((LowRankMuon, options) for options in LOW + MOMENTUM + FEEDBACK),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else " ".join(f"{k}={v}" for k, v in x.items()),
)
def test_steps_are_those_of_the_stepper(kind, options):
    params = parameters()
    exact = {"tol": None} if kind is LowRankMuon else {}
    assert_same_as_stepper(kind(params, **decayed(**exact, **options)), params, gradients())


def test_a_tolerance_is_that_of_the_stepper():
    """Up to directions of the sketch that are rounding noise, which it leaves where they are: measured 3e-9."""
    params, given = parameters(), gradients()
    optimizer = LowRankMuon(params, **decayed(tol=0.01))
    stepper = stepper_of(optimizer)
    expected = [by_stepper(stepper, p, [g[i] for g in given])[0] for i, p in enumerate(params)]
    for p, X in zip(run(optimizer, params, given), expected, strict=True):
        assert_close(p.detach(), X, 1e-7)


def test_msgd_is_the_msgd_of_steppers():
    params, given = parameters(), gradients()
    stepper = steppers.msgd(0.1)
    expected = [by_stepper(stepper, p, [g[i] for g in given])[0] for i, p in enumerate(params)]
    for p, X in zip(run(MSGD(params, lr=0.1), params, given), expected, strict=True):
        assert_close(p.detach(), X)


@pytest.mark.parametrize("kind", ALL)
def test_parameters_without_a_gradient_are_passed_over(kind):
    given = gradients()
    for t, i in ((0, 0), (1, 0), (1, 1), (3, 2)):
        given[t][i] = None
    params = parameters()
    assert_same_as_stepper(kind(params, **decayed()), params, given)


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("ranks", [[2, 2, 4, 3, 5], [0.25, 0.5, 0.75, 1.0, 0.5], [5, 4, 3, 2, 1]])
def test_a_rank_schedule_is_that_of_the_stepper(ranks, warm):
    params = parameters()
    optimizer = LowRankMuon(params, **decayed(rank=ranks.__getitem__, warm_start=warm))
    assert_same_as_stepper(optimizer, params, gradients(), rank=ranks.__getitem__)
    assert optimizer.param_groups[0]["rank"] == ranks[-1]


def test_a_rank_that_falls_from_full_finds_a_warm_start():
    """The stepper starts it with all its rows, as the rank may fall."""
    params, ranks = parameters(), [1.0, 1.0, 0.5, 0.5, 0.25]
    optimizer = LowRankMuon(params, **decayed(rank=ranks.__getitem__))
    assert_same_as_stepper(optimizer, params, gradients(), rank=ranks.__getitem__)


def test_a_group_keeps_the_rank_of_its_own():
    first, second = parameters([(12, 8), (12, 8)])
    optimizer = LowRankMuon([{"params": [first], "rank": 2}, {"params": [second]}], rank=lambda step: 3 + step)
    run(optimizer, [first, second], gradients([(12, 8), (12, 8)], steps=3))
    assert [group["rank"] for group in optimizer.param_groups] == [2, 5]


# Views and stacks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(("view", "x", "by_hand"), CASES.values(), ids=CASES)
def test_a_view_steps_as_its_blocks_do_alone(kind, view, x, by_hand):
    def blocks(tensor):
        return [block.clone() for stack in by_hand(tensor.detach()) for block in stack]

    whole = torch.nn.Parameter(random(*x.shape))
    parts = [torch.nn.Parameter(block) for block in blocks(whole)]
    options = decayed(**({"rank": 2} if "LowRank" in kind.__name__ else {}))
    optimizer = kind([{"params": [whole], "view": view.as_dict()}], **options)
    given = [random(*x.shape, seed=t) for t in range(3)]
    run(optimizer, [whole], [[g] for g in given])
    run(kind(parts, **options), parts, map(blocks, given))
    assert not parts[0].numel() or not torch.equal(whole, random(*x.shape))
    for found, expected in zip(blocks(whole), parts, strict=True):
        assert_close(found, expected.detach())


def test_a_convolution_is_a_matrix_without_being_told():
    plain, given = parameters([(4, 3, 2, 2)]), gradients([(4, 3, 2, 2)])
    flat = [torch.nn.Parameter(plain[0].detach().reshape(4, 12).clone())]
    run(Muon(plain, lr=0.1), plain, given)
    run(Muon(flat, lr=0.1), flat, [[g.reshape(4, 12) for g in gs] for gs in given])
    assert torch.equal(plain[0].reshape(4, 12), flat[0])


@pytest.mark.parametrize("kind", ALL)
def test_matrices_of_one_shape_are_one_batch(kind, monkeypatch):
    """Counted where directions are made: a call a shape, in all groups of the same options; alone, one a parameter."""
    calls, original = [], Recipe.direction

    def counted(self, xp, U, *rest):
        calls.append(tuple(U.shape))
        return original(self, xp, U, *rest)

    monkeypatch.setattr(Recipe, "direction", counted)
    stacked, alone = parameters(), parameters()
    run(kind(stacked, **decayed()), stacked, gradients(steps=1))
    assert sorted(calls) == [(1, 8, 12), (1, 9, 9), (2, 12, 8)]
    calls.clear()
    run(kind([{"params": [p]} for p in alone], **decayed()), alone, gradients(steps=1))
    assert sorted(calls) == [(1, 8, 12), (1, 9, 9), (2, 12, 8)]
    calls.clear()
    alone = parameters()
    for p, g in zip(alone, gradients(steps=1)[0], strict=True):
        run(kind([p], **decayed()), [p], [[g]])
    assert len(calls) == 4
    for p, q in zip(stacked, alone, strict=True):
        assert_close(p.detach(), q.detach())


def test_blocks_of_fused_parameters_join_the_batch(monkeypatch):
    calls, original = [], Recipe.direction
    monkeypatch.setattr(Recipe, "direction", lambda self, xp, U, *r: calls.append(U.shape) or original(self, xp, U, *r))
    qkv, experts, plain = parameters([(24, 8), (4, 8, 8), (8, 8)])
    groups = {"params": [qkv], "view": MatrixView(splits=3).as_dict()}, {"params": [plain]}
    run(Muon(groups), [qkv, plain], gradients([(24, 8), (8, 8)], steps=1))
    assert [tuple(shape) for shape in calls] == [(4, 8, 8)]
    calls.clear()
    run(Muon([{"params": [experts], "view": {"batch_ndim": 1}}]), [experts], gradients([(4, 8, 8)], steps=1))
    assert [tuple(shape) for shape in calls] == [(4, 8, 8)]


def peak(step, path):
    """Bytes that torch's allocator holds at most above what it held before, by its profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    found.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e["name"] == "[memory]"]
    first, *_ = events = [e["args"] for e in sorted(events, key=lambda e: e["ts"])]
    return max(e["Total Allocated"] for e in events) - (first["Total Allocated"] - first["Bytes"])


@pytest.mark.parametrize(
    ("options", "matrices"),
    [
        ({"tail": 0.0}, 0),
        # the squares of a tail's columns, matrix by matrix
        *(
            (options, 1)
            for options in ({}, {"scale": "nuclear", "n_iter": 1}, {"momentum": 0.0}, {"diagnostics": True})
        ),
        ({"error_feedback": True}, 1),
        ({"cautious": True}, 2),
    ],
    ids=str,
)
def test_one_stack_is_the_only_large_temporary(options, matrices, tmp_path):
    """Four matrices of 384 x 384 at rank 8; all that has r rows or columns comes to 0.2 stacks, one matrix to 0.25."""
    shapes = [(384, 384)] * 4 + [(96, 64)]
    params = parameters(shapes, torch.float32)
    optimizer = LowRankMuon(params, rank=8, **options)
    run(optimizer, params, gradients(shapes, torch.float32, steps=1))
    assert peak(optimizer.step, tmp_path / "trace.json") <= (4 + 1 + matrices) * 4 * 384**2


# Values that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ALL)
def test_one_bad_entry_leaves_its_matrix_and_that_alone(kind, bad):
    shapes = [(12, 8), (12, 8), (8, 12)]
    params, given = parameters(shapes), gradients(shapes)
    optimizer = kind(params, **decayed())
    run(optimizer, params, given[:2])
    before, state = params[1].detach().clone(), {k: v.clone() for k, v in optimizer.state[params[1]].items()}
    given[2][1][3, 4] = bad
    run(optimizer, params, given[2:3])
    assert torch.equal(params[1], before)
    assert state.keys() == optimizer.state[params[1]].keys()
    assert all(torch.equal(v, optimizer.state[params[1]][k]) for k, v in state.items() if k != "skipped")
    assert int(optimizer.skipped()) == 1
    run(optimizer, params, given[3:])
    assert int(optimizer.skipped()) == 1
    fresh = parameters(shapes)
    assert_same_as_stepper(kind(fresh, **decayed()), fresh, given)
    assert all(torch.equal(p, q) for p, q in zip(params, fresh, strict=True))


@pytest.mark.parametrize("kind", ALL)
def test_one_bad_expert_leaves_the_others(kind):
    params, given = parameters([(4, 6, 5)]), gradients([(4, 6, 5)], steps=2)
    optimizer = kind([{"params": params, "view": {"batch_ndim": 1}}], **decayed())
    given[1][0][2, 0, 0] = NAN
    run(optimizer, params, given[:1])
    before = params[0].detach().clone()
    run(optimizer, params, given[1:])
    assert [torch.equal(a, b) for a, b in zip(params[0], before, strict=True)] == [False, False, True, False]
    assert optimizer.state[params[0]]["skipped"].tolist() == [0, 0, 1, 0]
    assert params[0].isfinite().all()


@pytest.mark.parametrize("kind", ALL)
def test_a_bad_value_raises_before_anything_is_written_if_asked_to(kind):
    params, given = parameters(), gradients(steps=2)
    optimizer = kind(params, nonfinite="raise")
    run(optimizer, params, given[:1])
    before = [p.detach().clone() for p in params]
    state = {i: {k: v.clone() for k, v in optimizer.state[p].items()} for i, p in enumerate(params)}
    given[1][-1][0, 0] = NAN
    with pytest.raises(NonFiniteError, match="grad"):
        run(optimizer, params, given[1:])
    assert all(torch.equal(p, x) for p, x in zip(params, before, strict=True))
    assert all(torch.equal(v, optimizer.state[params[i]][k]) for i, s in state.items() for k, v in s.items())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", ALL)
def test_a_zero_gradient_is_no_step(kind, scale):
    """The momentum decays by its factor, the parameter not at all."""
    params = parameters()
    optimizer = kind(params, lr=0.1, scale=scale, weight_decay=0.0)
    before = [p.detach().clone() for p in params]
    run(optimizer, params, [[torch.zeros_like(p) for p in params]] * 2)
    assert all(torch.equal(p, x) for p, x in zip(params, before, strict=True))
    if "Muon" in kind.__name__:
        run(optimizer, params, gradients(steps=1))
        M = [optimizer.state[p]["momentum"].clone() for p in params]
        run(optimizer, params, [[torch.zeros_like(p) for p in params]])
        for p, m in zip(params, M, strict=True):
            assert_close(optimizer.state[p]["momentum"], 0.95 * m)


FADING = [{}, {"momentum": 0.5}, {"nesterov": False}, {"momentum": 0.0}, {"scale": "nuclear"}, {"rank": 8}]


@pytest.mark.parametrize("options", [*FADING, {"error_feedback": True}, {"warm_start": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_a_matrix_whose_gradient_has_become_zero_comes_to_rest(options, dtype):
    """It still goes less than 1/(1 - beta) steps of the length of the last one; an idle expert among others too."""
    w, experts = parameters([(8, 8), (3, 8, 6)], dtype)
    groups = [{"params": [w]}, {"params": [experts], "view": {"batch_ndim": 1}}]
    optimizer = LowRankMuon(groups, **{"lr": 0.01, "weight_decay": 0.0, "rank": 4, **options})
    given = gradients([(8, 8), (3, 8, 6)], dtype, steps=3)
    run(optimizer, [w, experts], given[:2])
    before = [w.detach().clone(), experts[2].detach().clone()]
    run(optimizer, [w, experts], given[2:])
    start = [w.detach().clone(), experts[2].detach().clone()]
    lengths = [torch.linalg.matrix_norm(b - a) for a, b in zip(before, start, strict=True)]
    dead = [torch.zeros_like(w), torch.cat([given[0][1][:2], torch.zeros_like(experts[2:])])]
    run(optimizer, [w, experts], [dead] * 40)
    middle = [w.detach().clone(), experts[2].detach().clone()]
    run(optimizer, [w, experts], [dead] * 40)
    most = 1 / (1 - optimizer.param_groups[0]["momentum"])
    for x, m, a, one in zip([w, experts[2]], middle, start, lengths, strict=True):
        # the direction may be a little longer than the last one: its singular values are all about one
        assert torch.linalg.matrix_norm(x.detach() - a) <= 1.05 * most * one
        assert torch.linalg.matrix_norm(x.detach() - m) <= 0.2 * most * one  # 0.95^40 = 0.13
    alive = experts[:2].detach().clone()
    run(optimizer, [w, experts], [dead])
    assert not torch.equal(experts[:2], alive)


@pytest.mark.parametrize("gradient", ["zero", "one entry", "smallest", "dead first row"])
@pytest.mark.parametrize("options", [{}, {"error_feedback": True}, {"momentum": 0.0}], ids=str)
def test_fading_is_that_of_the_stepper(gradient, options):
    """Also that no gradient is taken for zero that is not."""
    params, given = parameters(dtype=torch.float64), gradients()
    last = {
        "zero": torch.zeros_like,
        "one entry": lambda g: torch.zeros_like(g).index_put(
            (torch.tensor(-1), torch.tensor(-1)), torch.tensor(1.0).double()
        ),
        "smallest": lambda g: torch.zeros_like(g).fill_(5e-324),
        "dead first row": lambda g: g * (torch.arange(g.shape[0]) > 0)[:, None],
    }[gradient]
    given[3:] = [[last(g) for g in gs] for gs in given[3:]]
    optimizer = LowRankMuon(params, **decayed(tol=None, **options))
    assert_same_as_stepper(optimizer, params, given)
    if "momentum" not in options:
        beta = torch.tensor(0.95, dtype=torch.float32)
        expected = float(beta**2) if gradient == "zero" else 1.0
        assert all(float(optimizer.state[p]["fading"]) == pytest.approx(expected, rel=1e-6) for p in params)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("options", [{}, {"cautious": True}, {"diagnostics": True}, {"maximize": True}], ids=str)
def test_complex_matrices_are_stepped_and_real_ones_among_them_as_real_ones(kind, dtype, options):
    """A gradient with a phase gives the real step with that phase, by every optimizer with an exact direction."""
    shapes = [(12, 8), (8,)]
    real = torch.float32 if dtype == torch.complex64 else torch.float64
    options = decayed(
        **options, **({"rank": 8, "schedule": None} if "LowRank" in kind.__name__ else {"schedule": None})
    )
    plain, mine = parameters(shapes, real), [torch.nn.Parameter(1j * p.detach()) for p in parameters(shapes, real)]
    given = gradients(shapes, real)
    run(kind(plain, **options), plain, given)
    optimizer = kind(mine, **options)
    run(optimizer, mine, [[1j * g for g in gs] for gs in given])
    assert mine[0].dtype == dtype
    assert_close(mine[0].detach(), 1j * plain[0].detach(), 1e3 * torch.finfo(real).eps)
    assert_close(mine[1].detach(), 1j * plain[1].detach(), 1e3 * torch.finfo(real).eps)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", [MSGD, LowRankMuon])
def test_empty_matrices_are_harmless(kind, scale):
    shapes = [(0, 6), (6, 0), (0, 0)]
    params = parameters(shapes)
    run(kind(params, scale=scale), params, gradients(shapes, steps=2))
    assert [tuple(p.shape) for p in params] == shapes


@pytest.mark.parametrize("kind", ALL)
def test_the_scale_of_a_gradient_does_not_matter(kind):
    """From 2^-100 to 2^100 in float32: bit for bit, but for gradients around one, which are not scaled at all."""

    def stepped(factor):
        params = parameters(dtype=torch.float32)
        given = gradients(dtype=torch.float32)
        return run(kind(params, **decayed()), params, [[g * factor for g in gs] for gs in given])

    small, plain, large = stepped(2.0**-100), stepped(1.0), stepped(2.0**100)
    for p, q, r in zip(small, plain, large, strict=True):
        assert torch.equal(p, r)
        assert_close(p.detach(), q.detach(), 1e-4)


# Precisions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "units"), [(torch.float16, STEPS), (torch.bfloat16, STEPS), (torch.float32, 100)])
@pytest.mark.parametrize("kind", ALL)
def test_without_a_master_copy_steps_are_those_of_the_stepper_in_that_precision(kind, dtype, units):
    """Half precision: a unit a step, as weight decay and step are rounded one by one here."""
    params, given = parameters(dtype=dtype), gradients(dtype=dtype)
    optimizer = kind(params, **decayed(master_weights=False))
    stepper = stepper_of(optimizer)
    expected = [by_stepper(stepper, p, [g[i] for g in given])[0] for i, p in enumerate(params)]
    for p, X in zip(run(optimizer, params, given), expected, strict=True):
        assert p.dtype == dtype
        assert_close(p.detach().float(), X.float(), units * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ALL)
def test_a_master_copy_is_the_run_in_single_precision(kind, dtype):
    half, given = parameters(dtype=dtype), gradients(dtype=dtype, steps=20)
    single = [torch.nn.Parameter(p.detach().float()) for p in half]
    optimizer = kind(half, **decayed(lr=1e-3))
    run(optimizer, half, given)
    run(kind(single, **decayed(lr=1e-3)), single, [[g.float() for g in gs] for gs in given])
    for p, q in zip(half, single, strict=True):
        assert torch.equal(optimizer.state[p]["master"], q)
        assert torch.equal(p, q.to(dtype))


@pytest.mark.parametrize("master_weights", [True, False])
@pytest.mark.parametrize("kind", ALL)
def test_a_parameter_changed_from_outside_is_stepped_from_where_it_is(kind, master_weights):
    """As when weights are loaded, averaged or swapped after the optimizer is made."""
    params, given = parameters(dtype=torch.bfloat16), gradients(dtype=torch.bfloat16, steps=1)
    optimizer = kind(params, lr=1e-3, master_weights=master_weights)
    with torch.no_grad():
        for p in params:
            p.fill_(100.0)
    run(optimizer, params, given)
    assert all(((p - 100).abs() <= 1).all() for p in params)


# torch's Muon ----------------------------------------------------------------------------------------------------


def quintic(grad, coefficients, steps, eps):
    """The iteration of torch.optim.Muon in the precision of the gradient, started from its Schatten 4-norm."""
    a, b, c = coefficients
    X = grad.mT if grad.shape[0] > grad.shape[1] else grad
    X = X / (X @ X.mT).norm().sqrt()
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if grad.shape[0] > grad.shape[1] else X


PARITY = [
    ("spectral", {"adjust_lr_fn": "original"}, {}),
    ("rms", {"adjust_lr_fn": "match_rms_adamw"}, {}),
    ("rms", {"adjust_lr_fn": "match_rms_adamw"}, {"nesterov": False}),
    ("spectral", {"adjust_lr_fn": None}, {"momentum": 0.5, "weight_decay": 0.5}),
    ("spectral", {}, {"momentum": 0.0, "weight_decay": 0.0}),
]


@pytest.mark.parametrize(("scale", "theirs", "both"), PARITY)
def test_muon_is_the_muon_of_torch(scale, theirs, both, monkeypatch):
    """Which orthogonalizes in bfloat16 from the Frobenius norm, here in float64 and from the Schatten 4-norm."""
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", quintic)
    mine, other, options = parameters(), parameters(), {"lr": 0.1, "weight_decay": 0.1, **both}
    ours, reference = Muon(mine, scale=scale, **options), torch.optim.Muon(other, **theirs, **options)
    for given in gradients():
        run(ours, mine, [given])
        run(reference, other, [given])
        for p, q in zip(mine, other, strict=True):
            assert_close(p.detach(), q.detach())
            if options.get("momentum") != 0:
                assert_close(ours.state[p]["momentum"], reference.state[q]["momentum_buffer"])


def test_unpatched_the_muon_of_torch_goes_the_same_way():
    """Both have the singular vectors of the momentum and values in [0.68, 1.14], hence a cosine above 0.88."""
    shapes = [(24, 8), (8, 24)]
    mine, other = parameters(shapes, torch.float32), parameters(shapes, torch.float32)
    given = gradients(shapes, torch.float32)
    ours = Muon(mine, lr=0.1, scale="spectral", weight_decay=0.0)
    reference = torch.optim.Muon(other, lr=0.1, weight_decay=0.0)
    for gs in given:
        before = [p.detach().clone() for p in mine], [p.detach().clone() for p in other]
        run(ours, mine, [gs])
        run(reference, other, [gs])
        for i in range(len(shapes)):
            a, b = mine[i].detach() - before[0][i], other[i].detach() - before[1][i]
            assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) >= 0.88
            assert 0.68 / 1.14 <= a.norm() / b.norm() <= 1.14 / 0.68
