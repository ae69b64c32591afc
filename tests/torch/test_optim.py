"""What the optimizer classes are made of: routes, options, errors, what they count and note."""

import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_update import ALL, NAN, SHAPES, assert_close, decayed, gradients, parameters, random, run

from orthlin.errors import ArrayTypeError, DTypeError, OptionError, OrthlinError, RankError, ShapeError
from orthlin.torch import LowRankMSGD, LowRankMuon, MatrixView, Muon

LOW = (LowRankMSGD, LowRankMuon)
MIXED = [(12, 8), (8,), (), (12, 8), (5,)]


def matrix(*shape, **options):
    return torch.nn.Parameter(random(*(shape or (12, 8)), **options))


# Routes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_matrices_are_orthogonalized_and_the_rest_goes_to_adamw(kind):
    params = parameters(MIXED)
    optimizer = kind(params)
    [group] = optimizer.param_groups
    assert group["algorithm"] == "auto"
    assert all(p is q for p, q in zip(group["params"], params, strict=True))
    assert ["skipped" in optimizer.state[p] for p in params] == [True, False, False, True, False]
    assert ["exp_avg" in optimizer.state[p] for p in params] == [False, True, True, False, True]


def test_a_group_can_name_its_route():
    table, weight = parameters([(12, 8), (12, 8)])
    optimizer = Muon([{"params": [table], "algorithm": "adamw"}, {"params": [weight], "algorithm": "orthogonal"}])
    assert [group["algorithm"] for group in optimizer.param_groups] == ["adamw", "orthogonal"]
    run(optimizer, [table, weight], gradients([(12, 8)] * 2))
    assert "exp_avg" in optimizer.state[table]
    assert "momentum" in optimizer.state[weight]


ADAMW = [
    {},
    {"lr": 0.3, "betas": (0.5, 0.7), "eps": 1e-3, "weight_decay": 0.2},
    {"amsgrad": True},
    {"foreach": False},
    {"foreach": True},
    {"fused": True},
    {"maximize": True},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", ADAMW, ids=lambda x: " ".join(x) or "default")
def test_what_is_not_a_matrix_steps_as_by_the_adamw_of_torch_bit_for_bit(options, dtype):
    """With its own defaults for all but the learning rate, and on the CPU its fused step where none is asked for."""
    fused = {"fused": True} if dtype == torch.float32 and not {"foreach", "fused"} & options.keys() else {}
    mine, theirs = parameters(MIXED, dtype), parameters(MIXED, dtype)
    given = gradients(MIXED, dtype, steps=7)
    given[2][1] = given[3][4] = None
    optimizer = LowRankMuon(mine, lr=0.1, weight_decay=0.5, adamw=options)
    reference = torch.optim.AdamW([p for p in theirs if p.ndim < 2], **{"lr": 0.1, **options, **fused})
    run(optimizer, mine, given)
    run(reference, theirs, given)
    for p, q in zip(mine, theirs, strict=True):
        assert torch.equal(p, q) is (p.ndim < 2)
        if p.ndim < 2:
            assert optimizer.state[p].keys() == reference.state[q].keys()
            assert all(torch.equal(v, optimizer.state[p][key]) for key, v in reference.state[q].items())


LAYOUTS = {
    "as made": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("of_gradient", LAYOUTS)
@pytest.mark.parametrize("of_weight", LAYOUTS)
def test_tensors_that_lie_otherwise_in_memory_are_stepped_along_rightly(of_weight, of_gradient):
    """By the fused step of torch they are not."""
    mine, theirs = (torch.nn.Parameter(LAYOUTS[of_weight](matrix(6, 8).detach())) for _ in range(2))
    optimizer, reference = LowRankMuon([{"params": mine, "algorithm": "adamw"}], 0.1), torch.optim.AdamW([theirs], 0.1)
    for (g,) in gradients([(6, 8)], mine.dtype, steps=3):
        mine.grad = theirs.grad = LAYOUTS[of_gradient](g)
        optimizer.step(), reference.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_options_of_a_group_are_its_own():
    shapes = [(12, 8), (12, 8), (8,), (8,)]
    mine, theirs, given = parameters(shapes), parameters(shapes), gradients(shapes)
    first = {"lr": 0.01, "weight_decay": 0.0, "momentum": 0.3, "scale": "spectral", "schedule": "speedrun"}
    vector = {"lr": 0.2, "betas": (0.5, 0.6), "weight_decay": 0.4}
    options = [first, {}, vector, {}]
    optimizer = Muon([{"params": [p], **own} for p, own in zip(mine, options, strict=True)])
    alone = [
        Muon([theirs[0]], **first),
        Muon([theirs[1]]),
        torch.optim.AdamW([theirs[2]], **vector, fused=True),
        torch.optim.AdamW([theirs[3]], lr=1e-3, fused=True),
    ]
    run(optimizer, mine, given)
    for i, other in enumerate(alone):
        run(other, [theirs[i]], [[g[i]] for g in given])
        assert torch.equal(mine[i], theirs[i])


@pytest.mark.parametrize("kind", ALL)
def test_maximize_is_for_all_parameters(kind):
    """Of their sum, whose gradient is one."""
    params = parameters(MIXED)
    before = [p.detach().sum() for p in params]
    optimizer = kind(params, lr=0.01, weight_decay=0.0, maximize=True, adamw={"weight_decay": 0.0})
    run(optimizer, params, [[torch.ones_like(p) for p in params]])
    assert all(p.sum() > x for p, x in zip(params, before, strict=True))


def test_defaults_are_those_of_the_algorithms():
    keys = ("momentum", "nesterov", "rank", "scale", "tail")
    groups = {kind.__name__: kind([matrix()]).param_groups[0] for kind in ALL}
    assert all(group["lr"] == 1e-3 for group in groups.values())
    assert {name: [group[key] for key in keys] for name, group in groups.items()} == {
        "MSGD": [0.0, False, None, "none", 0.0],
        "LowRankMSGD": [0.0, False, 0.25, "none", 0.0],
        "Muon": [0.95, True, None, "rms", 0.0],
        "LowRankMuon": [0.95, True, 0.25, "rms", "auto"],
    }


@pytest.mark.parametrize("extra", ["fused", "foreach", "capturable", "initial_lr", "name"])
def test_keys_of_others_are_kept_and_change_nothing(extra):
    p, q = matrix(), matrix()
    optimizer = Muon([{"params": [p], extra: 0.5}])
    run(optimizer, [p], gradients(SHAPES[:1]))
    run(Muon([q]), [q], gradients(SHAPES[:1]))
    assert optimizer.param_groups[0][extra] == 0.5
    assert torch.equal(p, q)


GROUPS = [[5], [2, 3], [1, 1, 3]]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("sizes", GROUPS, ids=str)
@pytest.mark.parametrize("named", [True, False])
def test_a_group_of_the_caller_stays_one_group(kind, sizes, named):
    params = parameters(MIXED)
    items = iter([(f"p{i}", p) for i, p in enumerate(params)] if named else params)
    optimizer = kind([{"params": [next(items) for _ in range(size)], "lr": 0.1 * size} for size in sizes])
    assert [len(group["params"]) for group in optimizer.param_groups] == sizes
    assert [group["lr"] for group in optimizer.param_groups] == [0.1 * size for size in sizes]
    assert all(p is q for p, q in zip([p for g in optimizer.param_groups for p in g["params"]], params, strict=True))
    optimizer.add_param_group({"params": [("new", matrix()), ("bias", matrix(8))] if named else [matrix(), matrix(8)]})
    assert len(optimizer.param_groups) == len(sizes) + 1


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize(
    ("lr", "own", "factor"), [(0.5, 0.25, 0.5), (0.5, None, 1.0), (0.0, 0.25, 1.0), (0.0, None, 1.0)]
)
def test_the_rate_of_adamw_follows_that_of_the_group(lr, own, factor, tensor):
    """Also of groups that are added, with a rate of their own; but for those that are AdamW's."""
    first, later, other = matrix(8), matrix(8), matrix(8)
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in (first, later, other)]
    lr = torch.tensor(lr, dtype=torch.float64) if tensor else lr
    optimizer = Muon([first], lr, adamw={} if own is None else {"lr": own})
    optimizer.param_groups[0]["lr"] = 0.125
    optimizer.add_param_group({"params": later, "lr": 0.375})
    optimizer.add_param_group({"params": other, "algorithm": "adamw"})
    rates = [0.125 * factor, 0.375 * factor, lr if own is None else own]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(theirs, rates, strict=True)]
    reference = torch.optim.AdamW([group | {"fused": not isinstance(group["lr"], torch.Tensor)} for group in groups])
    given = gradients([(8,)] * 3)
    run(optimizer, [first, later, other], given)
    run(reference, theirs, given)
    assert all(torch.equal(p, q) for p, q in zip((first, later, other), theirs, strict=True))


NUMPY = {
    "lr": np.logspace(-3, -1, 3)[1],
    "rank": np.int64(2),
    "momentum": np.float32(0.5),
    "tail": np.float64(1),
    "seed": np.int64(1),
    "n_iter": np.uint8(1),
    "weight_decay": np.asarray(0.5),
    "nesterov": np.bool_(False),
    "adamw": {"lr": np.float64(1e-3), "betas": (np.float32(0.5), np.float64(0.5)), "amsgrad": np.bool_(True)},
    "view": {"splits": np.int64(2), "transposed": np.bool_(False)},
}


@pytest.mark.parametrize("where", ["constructor", "group", "rank function"])
@pytest.mark.parametrize("name", NUMPY)
def test_numbers_of_numpy_are_stored_as_pythons(name, where):
    """So that a checkpoint is read with weights_only=True."""
    options = {name: NUMPY[name]}
    params = parameters([(12, 8), (8,)])
    if where == "rank function":
        optimizer = LowRankMuon(
            params, rank=lambda t: np.clip(np.float32(0.5) if name == "lr" else np.int64(6 - t), 0, 4)
        )
    elif where == "group" or name == "view":
        optimizer = LowRankMuon([{"params": params, **(NUMPY["adamw"] if name == "adamw" else options)}])
    else:
        optimizer = LowRankMuon(params, **options)
    run(optimizer, params, gradients([(12, 8), (8,)]))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    optimizer.load_state_dict(state)
    if name in state["param_groups"][0] and where == "constructor":
        assert state["param_groups"][0][name] == pytest.approx(options[name]) or name == "view"


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("algorithm", ["auto", "orthogonal", "adamw"])
def test_a_parameter_without_a_shape_says_to_run_the_model_once(kind, algorithm):
    with pytest.raises(ShapeError, match="run the model once"):
        kind([{"params": torch.nn.UninitializedParameter(), "algorithm": algorithm}])


# Arguments -------------------------------------------------------------------------------------------------------

BAD = [
    *(({"lr": bad}, OptionError) for bad in (-1, NAN, float("inf"), "fast", None, True)),
    *(({"lr": bad}, OptionError) for bad in (torch.ones(2), torch.tensor(-1.0), torch.tensor(NAN))),
    *(({"weight_decay": bad}, OptionError) for bad in (-0.1, "much", None)),
    *(({"scale": bad}, OptionError) for bad in ("big", None, 1.0)),
    *(({name: 1}, OptionError) for name in ("nesterov", "cautious", "warm_start", "error_feedback", "maximize")),
    *(({name: "no"}, OptionError) for name in ("master_weights", "diagnostics")),
    *(({"schedule": bad}, OptionError) for bad in ("cubic", 5)),
    *(({"nonfinite": bad}, OptionError) for bad in ("ignore", None)),
    *(({"momentum": bad}, OptionError) for bad in (-0.1, 1.0, NAN, "heavy", None)),
    *(({"rank": bad}, RankError) for bad in (0, -1, 0.0, 1.5, -0.5, NAN, True, "4")),
    *(({"tail": bad}, OptionError) for bad in (-1, NAN, "long", None)),
    *(({"n_iter": bad}, RankError) for bad in (-1, 0.5, None)),
    *(({"seed": bad}, RankError) for bad in (-1, 0.5, None)),
    *(({"sketch": bad}, OptionError) for bad in ("rows", None)),
]
every_bad = pytest.mark.parametrize(
    ("options", "error"), BAD, ids=lambda x: " ".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else ""
)


@every_bad
def test_bad_arguments_are_an_error_that_names_them(options, error):
    with pytest.raises(error, match=next(iter(options))):
        LowRankMuon([matrix()], **options)


@every_bad
def test_bad_options_of_a_group_too(options, error):
    with pytest.raises(error, match=next(iter(options))):
        Muon([{"params": [matrix()], **options}])


@pytest.mark.parametrize("kind", ALL)
def test_every_class_checks_its_arguments(kind):
    with pytest.raises(OptionError, match="scale"):
        kind([matrix()], scale="big")
    with pytest.raises(TypeError, match="ranks"):
        kind([matrix()], ranks=3)


@pytest.mark.parametrize("kind", LOW)
def test_a_bad_rank_of_a_function_is_an_error(kind):
    with pytest.raises(RankError, match="rank"):
        kind([matrix()], rank=lambda _: 0)
    optimizer = kind([matrix()], rank=lambda step: 3 - step)
    params = optimizer.param_groups[0]["params"]
    with pytest.raises(RankError, match="rank"):
        run(optimizer, params, gradients(SHAPES[:1]))


@pytest.mark.parametrize("kind", LOW)
def test_a_function_as_the_rank_of_a_group_is_refused_wherever_it_is_put(kind):
    """One step counts for all groups, and a checkpoint cannot hold it."""
    group = {"params": [matrix(8)], "rank": lambda step: 3 - step}
    with pytest.raises(OptionError, match=r"rank: expected a number in a group, got .*constructor"):
        kind([group])
    optimizer = kind([matrix()])
    with pytest.raises(OptionError, match="rank: expected a number in a group"):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0]["rank"] = group["rank"]
    params = optimizer.param_groups[0]["params"]
    before = [p.detach().clone() for p in params]
    with pytest.raises(OptionError, match="rank: expected a number in a group"):
        run(optimizer, params, gradients(SHAPES[:1]))
    assert all(map(torch.equal, params, before))


@pytest.mark.parametrize("options", [{"beta": 0.9}, {"betas": (2.0, 2.0)}, {"lr": -1}, {"eps": "small"}, 3])
def test_bad_options_for_adamw_are_an_error_that_names_them(options):
    with pytest.raises(OptionError, match="adamw"):
        Muon([matrix(8)], adamw=options)


@pytest.mark.parametrize("kind", ALL)
def test_a_learning_rate_is_checked_when_there_are_vectors_only(kind):
    with pytest.raises(OptionError, match="lr"):
        kind([matrix(8)], lr=-1)
    with pytest.raises(OptionError, match="lr"):
        kind([{"params": [matrix(8)], "lr": -1}])


@pytest.mark.parametrize(
    ("view", "error", "words"),
    [
        ({"rows": 2}, OptionError, "view"),
        ("transposed", OptionError, "view"),
        (3, OptionError, "view"),
        ({"splits": 0}, RankError, "splits"),
        ({"splits": 5}, ShapeError, "splits"),
        ({"batch_ndim": 1}, ShapeError, "batch"),
        ({"split_axis": "rows"}, OptionError, "split_axis"),
    ],
)
def test_a_bad_view_is_an_error(view, error, words):
    with pytest.raises(error, match=words):
        Muon([{"params": [matrix()], "view": view}])


@pytest.mark.parametrize("shape", [(2, 3, 4), (2,) * 6])
def test_a_shape_that_does_not_tell_its_matrices_asks_for_a_view(shape):
    with pytest.raises(ShapeError, match="give a view"):
        Muon([matrix(*shape)])
    Muon([{"params": [matrix(*shape)], "view": MatrixView(batch_ndim=len(shape) - 2).as_dict()}])


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool])
def test_matrices_that_are_not_numbers_to_compute_with_are_an_error(kind, dtype):
    with pytest.raises(DTypeError, match=rf"params.*{dtype}.*adamw"):
        kind([torch.zeros(4, 3, dtype=dtype)])


@pytest.mark.parametrize("bad", [1.0, "weight", None, [1.0]])
@pytest.mark.parametrize("group", [{}, {"algorithm": "orthogonal"}, {"algorithm": "adamw"}])
def test_what_is_not_a_tensor_is_an_error(bad, group):
    with pytest.raises(TypeError, match=r"[Tt]ensors"):
        Muon([{"params": [matrix(), bad], **group}])


@pytest.mark.parametrize("kind", ALL)
def test_a_sparse_gradient_is_an_error_and_nothing_moves(kind):
    params = parameters()
    optimizer = kind(params)
    before = [p.detach().clone() for p in params]
    given = gradients(steps=1)
    given[0][-1] = given[0][-1].to_sparse()
    with pytest.raises(ArrayTypeError, match="sparse"):
        run(optimizer, params, given)
    assert all(torch.equal(p, x) for p, x in zip(params, before, strict=True))


def test_parameters_are_a_list_that_is_not_empty():
    with pytest.raises(TypeError, match="iterable"):
        Muon(matrix())
    with pytest.raises(ValueError, match="empty"):
        Muon([])


def test_a_set_in_a_group_is_refused_as_torch_refuses_it():
    with pytest.raises(TypeError, match="ordered"):
        Muon([{"params": {matrix(), matrix()}}])


# add_param_group -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_a_group_added_later_steps_with_its_state_from_the_start(kind):
    shapes = [(12, 8), (8,), (8, 12), (12,)]
    params, given = parameters(shapes), gradients(shapes)
    optimizer = kind(params[:2], **decayed())
    run(optimizer, params[:2], [g[:2] for g in given[:2]])
    optimizer.add_param_group({"params": iter(params[2:]), "lr": 0.3})
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.3]
    assert optimizer.state[params[2]].keys() == optimizer.state[params[0]].keys()
    run(optimizer, params, given[2:])
    fresh = parameters(shapes)
    run(kind(fresh[2:], **decayed(lr=0.3)), fresh[2:], [g[2:] for g in given[2:]])
    run(kind(fresh[:2], **decayed()), fresh[:2], [g[:2] for g in given])
    assert all(torch.equal(p, q) for p, q in zip(params, fresh, strict=True))


def test_the_dict_of_the_caller_is_not_written_to():
    group = {"params": (matrix(), matrix(8))}
    Muon([matrix()]).add_param_group(group)
    assert list(group) == ["params"]
    assert isinstance(group["params"], tuple)


def refused(w, b):
    """Groups that cannot join a matrix w and a vector b; nearly all begin with a matrix that could."""
    new = matrix(9, 5)
    return {
        "a matrix twice": {"params": [new, w]},
        "a vector twice": {"params": [new, b]},
        "a bad learning rate": {"params": [new, matrix(8)], "lr": -1},
        "a bad rank": {"params": [new], "rank": 0},
        "a bad view": {"params": [new], "view": {"splits": 7}},
        "a bad route": {"params": [new], "algorithm": "sgd"},
        "a matrix of integers": {"params": [new, torch.zeros(3, 3, dtype=torch.int64)]},
        "three axes": {"params": [new, matrix(2, 3, 4)]},
        "names where there were none": {"params": [("weight", new), ("bias", matrix(8))]},
        "a vector without a name": {"params": [("weight", new), matrix(8)]},
        "a matrix that is not a leaf": {"params": [new, 2 * matrix()]},
        "a vector that is not a leaf": {"params": [new, 2 * matrix(8)]},
        "not a tensor": {"params": [new, "bias"]},
        "a set": {"params": {new}},
        "a list": [new],
    }


@pytest.mark.parametrize("reason", refused(matrix(), matrix(8)))
def test_a_refused_group_leaves_the_optimizer_as_it_was(reason):
    w, b = matrix(), matrix(8)
    optimizer = LowRankMuon([w, b])
    before = repr(optimizer), list(optimizer.state)
    with pytest.raises((OrthlinError, ValueError, TypeError)):
        optimizer.add_param_group(refused(w, b)[reason])
    assert repr(optimizer) == before[0]
    assert all(p is q for p, q in zip(optimizer.state, before[1], strict=True))
    run(optimizer, [w, b], gradients([(12, 8), (8,)], steps=1))


# What is counted and noted ---------------------------------------------------------------------------------------


def test_nothing_skipped_is_zero():
    for optimizer in (Muon([matrix()]), Muon([matrix(8)])):
        assert int(optimizer.skipped()) == 0
        assert not optimizer.skipped().is_floating_point()


@pytest.mark.parametrize("note", [1, "text", 2.5, None, torch.ones(2), [1, 2]])
def test_what_a_hook_leaves_in_the_state_disturbs_nothing(note):
    params = parameters(MIXED)
    optimizer = Muon(params)
    optimizer.state["note"] = note
    if isinstance(note, int | float | str):
        optimizer.state[params[0]]["note"] = note
    run(optimizer, params, gradients(MIXED))
    assert int(optimizer.skipped()) == 0
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state["note"] is note or torch.equal(torch.tensor(optimizer.state["note"]), torch.tensor(note))
    assert optimizer.state[params[0]].get("note", note) is note


def test_skipped_matrices_of_all_groups_are_counted():
    params = parameters([(4, 6, 5), (12, 8), (8,)])
    optimizer = Muon([{"params": params[:1], "view": {"batch_ndim": 1}}, {"params": params[1:]}])
    given = gradients([(4, 6, 5), (12, 8), (8,)])
    for g in given[:3]:
        g[0][1:3, 0, 0] = NAN
    given[4][1][:] = NAN
    run(optimizer, params, given)
    assert int(optimizer.skipped()) == 3 * 2 + 1
    assert optimizer.state[params[0]]["skipped"].tolist() == [0, 3, 3, 0]


@pytest.mark.parametrize("kind", ALL)
def test_diagnostics_are_off_unless_asked_for(kind):
    params = parameters()
    optimizer = kind(params)
    run(optimizer, params, gradients())
    assert optimizer.diagnostics() == {}
    assert all("diagnostics" not in state for state in optimizer.state.values())


@pytest.mark.parametrize("kind", ALL)
def test_diagnostics_change_no_step(kind):
    plain, noted = parameters(), parameters()
    run(kind(plain, **decayed()), plain, gradients())
    run(kind(noted, **decayed(diagnostics=True)), noted, gradients())
    assert all(torch.equal(p, q) for p, q in zip(plain, noted, strict=True))


@pytest.mark.parametrize("kind", ALL)
def test_the_update_ratio_is_that_of_the_norms(kind):
    """In float32, as they are noted; without decay, which it leaves out."""
    params = parameters()
    optimizer = kind([(f"layer{i}", p) for i, p in enumerate(params)], lr=0.1, weight_decay=0.0, diagnostics=True)
    before = [p.detach().clone() for p in params]
    run(optimizer, params, gradients(steps=1))
    found = optimizer.diagnostics()
    assert list(found) == [f"layer{i}" for i in range(len(params))]
    for name, p, x in zip(found, params, before, strict=True):
        assert list(found[name]) == ["captured", "stable_rank", "update_ratio"]
        ratio = float((p.detach() - x).norm() / x.norm())
        assert float(found[name]["update_ratio"]) == pytest.approx(ratio, rel=1e-6)
        assert bool(found[name]["captured"].isnan()) is bool(found[name]["stable_rank"].isnan()) is (kind not in LOW)


def test_the_captured_share_is_that_of_the_columns_stepped_in():
    """Without a tail the step is Q W, whose columns span what was captured."""
    p, G = matrix(24, 16), random(24, 16, seed=3)
    before = p.detach().clone()
    optimizer = LowRankMSGD([p], lr=1.0, rank=4, diagnostics=True)
    run(optimizer, [p], [[G]])
    Q = torch.linalg.svd(before - p.detach())[0][:, :4]
    expected = float((Q.mT @ G).square().sum() / G.square().sum())
    assert float(optimizer.diagnostics()["0.0"]["captured"]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("spectrum", ["equal", "polynomial", "exponential", "gaussian"])
def test_the_stable_rank_is_that_of_the_svd_once_warm(spectrum):
    """Never below, as a projection has no larger norm; 10 % above after six steps on one matrix, measured 5.2 %."""
    j = torch.arange(32.0)
    U, s, Vh = torch.linalg.svd(random(48, 32, dtype=torch.float32), full_matrices=False)
    s = {"equal": torch.ones(32), "polynomial": 1 / (1 + j), "exponential": 0.7**j, "gaussian": s}[spectrum]
    p = matrix(48, 32, dtype=torch.float32)
    optimizer = LowRankMuon([p], lr=1e-3, rank=8, momentum=0.0, diagnostics=True)
    run(optimizer, [p], [[(U * s) @ Vh]] * 6)
    ratio = float(optimizer.diagnostics()["0.0"]["stable_rank"] * s.max() ** 2 / s.square().sum())
    assert 1 - 1e-5 <= ratio <= 1.1


@pytest.mark.parametrize("exponent", [-90, -30, 30, 90])
def test_diagnostics_do_not_depend_on_the_scale_of_a_gradient(exponent):
    """In float32, whose smallest and largest squares are those of 2^-63 and 2^63."""

    def noted(factor):
        p = matrix(dtype=torch.float32)
        optimizer = LowRankMuon([p], diagnostics=True)
        run(optimizer, [p], [[factor * random(12, 8, seed=3, dtype=torch.float32)]])
        return torch.stack(list(optimizer.diagnostics()["0.0"].values()))

    assert_close(noted(2.0**exponent), noted(1.0), 1e-5)


def test_diagnostics_have_an_entry_for_each_matrix():
    params = parameters([(4, 6, 5), (24, 8)])
    groups = [{"params": params[:1], "view": {"batch_ndim": 1}}, {"params": params[1:], "view": {"splits": [8, 16]}}]
    optimizer = LowRankMuon(groups, diagnostics=True)
    run(optimizer, params, gradients([(4, 6, 5), (24, 8)], steps=1))
    found = optimizer.diagnostics()
    assert {name: len(values["captured"]) for name, values in found.items()} == {"0.0": 4, "1.0": 2}
    assert all(value.isfinite().all() for values in found.values() for value in values.values())


# Determinism -----------------------------------------------------------------------------------------------------


def digest():
    """Of parameters and state after steps of matrices, fused ones and vectors by every optimizer."""
    shapes, found = [(96, 64), (96, 64), (64, 96), (64,)], hashlib.sha256()
    for kind in ALL:
        params = parameters(shapes, torch.float32)
        optimizer = kind([{"params": params[:1], "view": {"splits": 3}}, {"params": params[1:]}], **decayed())
        run(optimizer, params, gradients(shapes, torch.float32))
        for p in params:
            for x in (p, *(optimizer.state[p][key] for key in sorted(optimizer.state[p]))):
                found.update(x.detach().numpy().tobytes())
    return found.hexdigest()


def test_three_runs_have_one_hash():
    """One of them in a process of its own, with other hashes of strings and another global seed."""
    code = "import units, torch; torch.manual_seed(5); from test_optim import digest; print(digest())"
    path = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1])))
    env = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "17", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    other = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    first = digest()
    torch.rand(3)
    assert digest() == first == other.stdout.strip()


def test_two_threads_give_the_same_up_to_rounding():
    """Not bit for bit everywhere: products may be split, and summed, in another way."""

    def stepped(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            shapes = [(96, 64), (64, 96)]
            params = parameters(shapes)
            return run(LowRankMuon(params, **decayed()), params, gradients(shapes))
        finally:
            torch.set_num_threads(before)

    for p, q in zip(stepped(1), stepped(2), strict=True):
        assert_close(p.detach(), q.detach(), 1e-11)


def test_the_global_random_state_is_neither_read_nor_written():
    state = torch.get_rng_state()
    params = parameters()
    run(LowRankMuon(params, warm_start=False), params, gradients())
    assert torch.equal(torch.get_rng_state(), state)


def test_what_others_do_changes_no_random_numbers():
    """Matrices of a shape share the draw of a step, whichever of them have a gradient."""
    alone, among = parameters(), parameters()
    given = gradients()
    run(LowRankMuon(alone[:1], warm_start=False), alone[:1], [g[:1] for g in given])
    run(LowRankMuon(among[::-1], warm_start=False), among, [[g[0], None, g[2], g[3]] for g in given])
    assert_close(among[0].detach(), alone[0].detach())
