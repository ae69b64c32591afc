"""What is saved and loaded: every bit of it, or nothing at all."""

import copy
import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dsd
from test_protocol import every_kind, same, snapshot
from test_update import ALL, NAN, decayed, gradients, parameters, run

from orthlin.errors import OptionError
from orthlin.torch import MSGD, LowRankMuon, Muon

SHAPES = [(12, 8), (12, 8), (24, 8), (8,), ()]
STEPS = 6
HALVES = [torch.bfloat16, torch.float16]
VARIANTS = {
    "plain": {},
    "diagnostics": {"diagnostics": True},
    "no master": {"master_weights": False},
    "amsgrad": {"adamw": {"amsgrad": True}},
    "fused": {"adamw": {"fused": True}},
    "maximize": {"maximize": True, "adamw": {"maximize": True}},
}


def shrinking(step):
    return 4 - step // 2


def growing(step):
    return 1 + step // 2


def from_full(step):
    return 1.0 if step < 2 else 0.5


def made(kind, dtype=torch.float32, **options):
    """Fresh parameters, plain, fused and vectors, under names; and an optimizer of them."""
    params = parameters(SHAPES, dtype)
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    groups = [
        {"params": named[:2]},
        {"params": named[2:3], "view": {"splits": (16, 8)}, "lr": 0.05},
        {"params": named[3:]},
    ]
    return params, kind(groups, **decayed(**options))


def written_and_read(state, **options):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True, **options)


def bits(x):
    return x.detach().contiguous().flatten().view(torch.uint8)


def equal(a, b):
    """Whether two states are the same in every key, type, dtype and bit."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(bits(a), bits(b))
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def assert_resumes(kind, dtype, through, **options):
    """N steps are N/2, a save, new objects that load it, and N/2 more; bit for bit."""
    given = gradients(SHAPES, dtype, steps=STEPS)
    given[1][0] = None
    given[4][1] = given[4][1].clone()
    given[4][1][0, 0] = NAN
    params, optimizer = made(kind, dtype, **options)
    run(optimizer, params, given)
    first, half = made(kind, dtype, **options)
    run(half, first, given[: STEPS // 2])
    second, resumed = made(kind, dtype, **options)
    weights, state = through((list(first), half.state_dict()))
    with torch.no_grad():
        for p, x in zip(second, weights, strict=True):
            p.copy_(x)
    resumed.load_state_dict(state)
    assert equal(resumed.state_dict(), half.state_dict())
    run(resumed, second, given[STEPS // 2 :])
    assert same(second, params)
    assert equal(resumed.state_dict(), optimizer.state_dict())


def as_accelerate(pair):
    """State moved as a tree of tensors, tuples and lists, as accelerate does it."""
    moved = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to("cpu", copy=True), pair)
    return written_and_read(moved, map_location=torch.device("cpu"))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_a_resumed_run_is_the_run(kind, dtype):
    assert_resumes(kind, dtype, written_and_read)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_also_after_its_state_was_moved(kind, dtype):
    assert_resumes(kind, dtype, as_accelerate)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_also_with_other_options(kind, dtype, options):
    assert_resumes(kind, dtype, written_and_read, **options)


@pytest.mark.parametrize("options", [{"error_feedback": True}, {"warm_start": False}, {"tail": 0.0, "n_iter": 1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_also_with_other_directions(options, dtype):
    assert_resumes(LowRankMuon, dtype, written_and_read, **options)


@pytest.mark.parametrize("warm_start", [True, False])
@pytest.mark.parametrize("rank", [shrinking, growing, from_full])
def test_also_with_a_rank_schedule(rank, warm_start):
    """Whose warm start has more or fewer rows when it is saved than at the start."""
    assert_resumes(LowRankMuon, torch.float32, written_and_read, rank=rank, warm_start=warm_start)


@every_kind
def test_also_into_the_optimizer_that_saved_it(kind):
    """Loading copies: what is saved does not change with the optimizer."""
    params, optimizer = made(kind)
    given = gradients(SHAPES, torch.float32)
    run(optimizer, params, given[:2])
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(params)
    loaded = copy.deepcopy(saved)
    optimizer.load_state_dict(loaded)
    run(optimizer, params, given[2:])
    end = copy.deepcopy(params)
    assert equal(loaded, saved)
    with torch.no_grad():
        for p, x in zip(params, weights, strict=True):
            p.copy_(x)
    optimizer.load_state_dict(saved)
    run(optimizer, params, given[2:])
    assert same(params, end)


# What it holds ---------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_parameters_have_a_state_in_single_precision(kind, dtype):
    params, optimizer = made(kind, dtype)
    for state in [optimizer.state[p] for p in params[:3]]:
        kinds = {key: value.dtype for key, value in state.items()}
        assert kinds.pop("skipped") == torch.int32
        assert set(kinds.values()) == {torch.float32}
    run(optimizer, params, gradients(SHAPES, dtype))
    other = made(kind, dtype)[1]
    other.load_state_dict(written_and_read(optimizer.state_dict()))
    for a, b in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert {key: value.dtype for key, value in a.items()} == {key: value.dtype for key, value in b.items()}


@every_kind
def test_the_counter_of_steps_is_an_int_of_the_group(kind):
    params, optimizer = made(kind)
    run(optimizer, params, gradients(SHAPES, torch.float32))
    groups = written_and_read(optimizer.state_dict())["param_groups"]
    steps = [group["step"] for group in groups]
    assert steps == [5, 5, 5]
    assert all(type(step) is int for step in steps)


@every_kind
def test_the_keys_of_a_state_are_those_of_its_algorithm(kind):
    params, optimizer = made(kind, torch.bfloat16)
    expected = {"skipped", "master"}
    expected |= {"momentum", "fading"} if "Muon" in kind.__name__ else set()
    assert set(optimizer.state[params[0]]) == expected | ({"right_0"} if kind is LowRankMuon else set())
    assert set(optimizer.state[params[2]]) == expected | ({"right_0", "right_1"} if kind is LowRankMuon else set())
    assert set(optimizer.state[params[3]]) == {"step", "exp_avg", "exp_avg_sq"}


@every_kind
def test_a_state_is_plain(kind):
    """No function, class or object of ours, also with a rank schedule."""
    plain = (int, float, str, bool, type(None), torch.Tensor)

    def leaves(x):
        if isinstance(x, dict | list | tuple):
            assert type(x) in (dict, list, tuple)
            for value in x.values() if isinstance(x, dict) else x:
                yield from leaves(value)
        else:
            yield x

    for options in ({}, {"rank": shrinking}) if "LowRank" in kind.__name__ else ({},):
        params, optimizer = made(kind, **options)
        run(optimizer, params, gradients(SHAPES, torch.float32))
        assert all(type(x) in plain for x in leaves(optimizer.state_dict()))


def test_a_state_without_names_fits_and_the_other_way_round():
    params, given = parameters(), gradients()
    plain, named = Muon(params), Muon([(f"p{i}", p) for i, p in enumerate(parameters())])
    run(plain, params, given)
    saved = copy.deepcopy(plain.state_dict())
    named.load_state_dict(saved)
    assert named.param_groups[0]["param_names"] == ["p0", "p1", "p2", "p3"]
    plain.load_state_dict(named.state_dict())
    assert equal(plain.state_dict()["state"], saved["state"])


def test_other_options_are_loaded_with_the_state():
    """As by torch: the groups that were saved replace those of the new optimizer."""
    optimizer, other = made(Muon, weight_decay=0.7, momentum=0.3)[1], made(Muon)[1]
    other.load_state_dict(optimizer.state_dict())
    assert [group["weight_decay"] for group in other.param_groups] == [0.7] * 3
    assert [group["momentum"] for group in other.param_groups] == [0.3] * 3


CHANGED = [
    *[("rank", value) for value in (None, 1.0, 100, 1, 3, 0.9)],
    *[("warm_start", False), ("momentum", 0.0), ("momentum", 0.5), ("error_feedback", True), ("diagnostics", True)],
    *[("tail", 0.0), ("tol", None), ("n_iter", 1), ("schedule", "muon"), ("master_weights", False), ("seed", 9)],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("key", "value"), CHANGED)
def test_options_that_were_changed_between_steps_are_saved_and_loaded(key, value, dtype):
    """Also where the state has more than they need."""
    params, optimizer = made(LowRankMuon, dtype, rank=2)
    given = gradients(SHAPES, steps=4, dtype=dtype)
    run(optimizer, params, given[:2])
    for group in optimizer.param_groups:
        group[key] = value
    run(optimizer, params, given[2:3])
    others, loaded = made(LowRankMuon, dtype, rank=2)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p)
    loaded.load_state_dict(written_and_read(optimizer.state_dict()))
    for some, stepped in ((params, optimizer), (others, loaded)):
        run(stepped, some, given[3:])
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@pytest.mark.parametrize("value", ["x", 3, [], True])
def test_a_schedule_that_is_not_known_is_refused_by_the_step(value):
    params, optimizer = made(LowRankMuon)
    given = gradients(SHAPES, steps=2, dtype=torch.float32)
    run(optimizer, params, given[:1])
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[0]["schedule"] = value
    with pytest.raises(OptionError, match=r"^schedule: expected one of 'muon', .*, got "):
        run(optimizer, params, given[1:])
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_before_the_first_step_too():
    for kind in ALL:
        optimizer, other = made(kind)[1], made(kind)[1]
        other.load_state_dict(written_and_read(optimizer.state_dict()))
        assert equal(other.state_dict(), optimizer.state_dict())


# What does not fit -----------------------------------------------------------------------------------------------


def entry(state, i=0):
    return state["state"][i]


def put(where, **values):
    where.update(values)


MISMATCHES = {
    # groups
    "one group less": lambda s: s["param_groups"].pop(),
    "one group more": lambda s: s["param_groups"].append(s["param_groups"][0]),
    "one parameter less": lambda s: s["param_groups"][0]["params"].pop(),
    "one parameter more": lambda s: s["param_groups"][0]["params"].append(7),
    "a parameter twice": lambda s: put(s["param_groups"][0], params=[0, 0]),
    "no parameters": lambda s: s["param_groups"][0].pop("params"),
    "an option of another kind": lambda s: put(s["param_groups"][0], lr="fast"),
    "an option out of range": lambda s: put(s["param_groups"][0], momentum=1.5),
    "an option that is no choice": lambda s: put(s["param_groups"][0], scale="big"),
    "a counter of another kind": lambda s: put(s["param_groups"][0], step="ten"),
    "another algorithm": lambda s: put(s["param_groups"][0], algorithm="adamw"),
    "another view": lambda s: put(s["param_groups"][1], view={"splits": 3}),
    "no view": lambda s: put(s["param_groups"][1], view=None),
    "other names": lambda s: put(s["param_groups"][0], param_names=["p1", "p0"]),
    # matrices
    "state of a stranger": lambda s: put(s["state"], **{"9": entry(s)}),
    "a key missing": lambda s: entry(s).pop("momentum"),
    "a key more": lambda s: put(entry(s), exp_avg=entry(s)["momentum"]),
    "a momentum of another shape": lambda s: put(entry(s), momentum=entry(s)["momentum"][:, 1:]),
    "a momentum that is transposed": lambda s: put(entry(s), momentum=entry(s)["momentum"].mT),
    "a momentum in double": lambda s: put(entry(s), momentum=entry(s)["momentum"].double()),
    "a momentum in half": lambda s: put(entry(s), momentum=entry(s)["momentum"].bfloat16()),
    "a momentum of integers": lambda s: put(entry(s), momentum=entry(s)["momentum"].int()),
    "a momentum that is a list": lambda s: put(entry(s), momentum=entry(s)["momentum"].tolist()),
    "a warm start of another width": lambda s: put(entry(s), right_0=entry(s)["right_0"][..., 1:]),
    "a counter of floats": lambda s: put(entry(s), skipped=entry(s)["skipped"].float()),
    "the state of another matrix": lambda s: s["state"].update({0: entry(s, 2)}),
    # vectors
    "a vector of another shape": lambda s: put(entry(s, 3), exp_avg=entry(s, 3)["exp_avg"][1:]),
    "a vector in double": lambda s: put(entry(s, 3), exp_avg=entry(s, 3)["exp_avg"].double()),
    "a vector of integers": lambda s: put(entry(s, 3), exp_avg=entry(s, 3)["exp_avg"].int()),
    "a vector without its squares": lambda s: entry(s, 3).pop("exp_avg_sq"),
    "a vector without its counter": lambda s: entry(s, 3).pop("step"),
    "a vector with a word for its counter": lambda s: put(entry(s, 3), step="ten"),
    "a vector with a counter for each entry": lambda s: put(entry(s, 3), step=torch.ones(8)),
    "a vector with a key more": lambda s: put(entry(s, 3), momentum=entry(s, 3)["exp_avg"]),
    # the whole
    "no state": lambda s: s.pop("state"),
    "no groups": lambda s: s.pop("param_groups"),
    "state that is a list": lambda s: put(s, state=[]),
    "groups that are a number": lambda s: put(s, param_groups=3),
    "a group that is a list": lambda s: s["param_groups"].__setitem__(0, [1]),
    "parameters that are a number": lambda s: put(s["param_groups"][0], params=2),
    "parameters that are lists": lambda s: put(s["param_groups"][0], params=[[0], [1]]),
    "a state that is a tensor": lambda s: s["state"].update({0: torch.zeros(3)}),
    "a state that is a list": lambda s: s["state"].update({0: ["momentum", "right_0", "skipped"]}),
    "a state that is None": lambda s: s["state"].update({0: None}),
}


def assert_refused(optimizer, params, state):
    weights, before, keys = copy.deepcopy(params), snapshot(optimizer), list(optimizer.state)
    groups = copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(OptionError, match="state_dict"):
        optimizer.load_state_dict(state)
    assert same(params, weights)
    assert equal(optimizer.state_dict()["param_groups"], groups)
    assert snapshot(optimizer) == before
    assert all(p is q for p, q in zip(optimizer.state, keys, strict=True))


@pytest.mark.parametrize("change", MISMATCHES.values(), ids=MISMATCHES)
def test_a_state_that_does_not_fit_is_refused_before_anything_is_written(change):
    """By a new optimizer, and by one that has a state of its own to lose."""
    given = gradients(SHAPES, torch.float32)
    params, optimizer = made(LowRankMuon)
    run(optimizer, params, given)
    state = copy.deepcopy(optimizer.state_dict())
    change(state)
    params, optimizer = made(LowRankMuon)
    assert_refused(optimizer, params, state)
    run(optimizer, params, given[:2])
    assert_refused(optimizer, params, state)


@pytest.mark.parametrize("state", [None, 3, [], "state", {}, torch.zeros(3)], ids=str)
def test_what_is_no_state_is_refused(state):
    params, optimizer = made(Muon)
    assert_refused(optimizer, params, state)


@pytest.mark.parametrize(
    ("saved", "loading"),
    [
        ((Muon, {"dtype": torch.bfloat16}), (Muon, {})),
        ((Muon, {"dtype": torch.float64}), (Muon, {})),
        ((LowRankMuon, {"rank": shrinking}), (LowRankMuon, {})),
        ((LowRankMuon, {}), (LowRankMuon, {"rank": shrinking})),
    ],
)
def test_the_state_of_other_parameters_or_without_its_rank_function_is_refused(saved, loading):
    source, target = (made(kind, **options) for kind, options in (saved, loading))
    assert_refused(target[1], target[0], source[1].state_dict())


def test_the_state_of_torch_optimizers_is_refused():
    params, optimizer = parameters(), Muon(parameters())
    for theirs in (torch.optim.Muon(params), torch.optim.AdamW(params), torch.optim.SGD(params, 0.1, 0.9)):
        run(theirs, params, gradients(steps=1))
        assert_refused(optimizer, optimizer.param_groups[0]["params"], theirs.state_dict())


OTHERS = [
    ((Muon, {}), (MSGD, {})),
    ((MSGD, {}), (Muon, {})),
    ((LowRankMuon, {}), (Muon, {})),
    ((LowRankMuon, {"warm_start": False}), (LowRankMuon, {})),
    ((LowRankMuon, {"momentum": 0.0}), (LowRankMuon, {})),
    ((Muon, {"diagnostics": True}), (Muon, {})),
    ((Muon, {"adamw": {"amsgrad": True}}), (Muon, {})),
    ((Muon, {}), (Muon, {"adamw": {"amsgrad": True}})),
    ((Muon, {"dtype": torch.bfloat16}), (Muon, {"dtype": torch.bfloat16, "master_weights": False})),
]


@pytest.mark.parametrize(("saved", "loading"), [*OTHERS, *(pair[::-1] for pair in OTHERS)])
def test_options_are_those_of_the_state_and_so_are_its_tensors(saved, loading):
    """Whatever options an optimizer was made with, as for torch's: the groups that were saved replace its own."""
    given = gradients(SHAPES, saved[1].get("dtype", torch.float32))
    (params, source), (others, target) = (made(kind, **options) for kind, options in (saved, loading))
    run(source, params, given[:2])
    run(target, others, given[3:])
    with torch.no_grad():
        for p, x in zip(others, params, strict=True):
            p.copy_(x)
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    assert equal(target.state_dict(), source.state_dict())
    run(source, params, given[2:])
    run(target, others, given[2:])
    assert same(others, params)


def test_a_refused_state_says_what_differs():
    optimizer = made(Muon)[1]
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][1]["momentum"] = torch.zeros(3, 3)
    with pytest.raises(OptionError, match=r"momentum of parameter 1 of group 0 is \(3, 3\).*\(12, 8\)"):
        optimizer.load_state_dict(state)
    state["param_groups"][0]["params"] = [0]
    del state["state"][1]
    with pytest.raises(OptionError, match=r"groups of \[1, 1, 2\] parameters.*\[2, 1, 2\]"):
        optimizer.load_state_dict(state)


# What torch's rules allow ----------------------------------------------------------------------------------------


def renamed(state, prefix):
    for group in state["param_groups"]:
        group["param_names"] = [f"{prefix}{name}" for name in group["param_names"]]


def by_name(state):
    """As torch.distributed.checkpoint hands it over."""
    names = {i: f"p{i}" for i in range(len(SHAPES))}
    state["state"] = {names[i]: value for i, value in state["state"].items()}
    for group in state["param_groups"]:
        group["params"] = [names[i] for i in group["params"]]


def plain_steps(state):
    for i in (3, 4):
        put(entry(state, i), step=float(entry(state, i)["step"]))


def without(*keys):
    return lambda s: [group.pop(key) for group in s["param_groups"] for key in keys]


ALLOWED = {
    "names as keys": by_name,
    "names of a wrapped model": lambda s: renamed(s, "module."),
    "names of a compiled model": lambda s: renamed(s, "_orig_mod."),
    "no names": without("param_names"),
    "steps as numbers": plain_steps,
    "steps in double": lambda s: [put(entry(s, i), step=entry(s, i)["step"].double()) for i in (3, 4)],
    "steps as integers": lambda s: [put(entry(s, i), step=entry(s, i)["step"].long()) for i in (3, 4)],
    "no maximize": without("maximize", "adamw_maximize"),
    "fewer options of AdamW": without("foreach", "fused", "capturable", "differentiable", "amsgrad"),
    "no algorithm, view or counter": without("algorithm", "view", "scheduled_rank"),
    "views of before interleaving": lambda s: [
        group["view"].pop("interleave") for group in s["param_groups"] if group.get("view")
    ],
    "no options at all but the counter": lambda s: put(
        s, param_groups=[{key: group[key] for key in ("params", "step")} for group in s["param_groups"]]
    ),
    "more options": lambda s: [put(group, swa_lr=0.1, initial_lr=0.1) for group in s["param_groups"]],
    "no fading": lambda s: [entry(s, i).pop("fading") for i in range(3)],
}


@every_kind
@pytest.mark.parametrize("change", ALLOWED.values(), ids=ALLOWED)
def test_what_torch_allows_is_loaded_and_goes_on_bit_for_bit(kind, change):
    given = gradients(SHAPES, torch.float32)
    params, optimizer = made(kind)
    run(optimizer, params, given[:3])
    state = copy.deepcopy(optimizer.state_dict())
    if change is not ALLOWED["no fading"] or "Muon" in kind.__name__:
        change(state)
    others, other = made(kind)
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    other.load_state_dict(state)
    assert [group["params"] for group in other.state_dict()["param_groups"]] == [[0, 1], [2], [3, 4]]
    run(other, others, given[3:])
    run(optimizer, params, given[3:])
    assert same(others, params)


@pytest.mark.parametrize("missing", [[0], [3], [2, 3, 4], [0, 1, 2, 3, 4]], ids=str)
def test_state_that_is_missing_is_made_anew(missing):
    given = gradients(SHAPES, torch.float32)
    params, optimizer = made(LowRankMuon)
    fresh = copy.deepcopy(optimizer.state_dict())["state"]
    run(optimizer, params, given[:2])
    state = copy.deepcopy(optimizer.state_dict())
    for i in missing:
        del state["state"][i]
    optimizer.load_state_dict(state)
    after = optimizer.state_dict()["state"]
    assert equal(after, {i: fresh[i] if i in missing else state["state"][i] for i in range(len(SHAPES))})
    run(optimizer, params, given[2:])


def test_every_tensor_of_a_state_is_checked():
    """Each key: missing, in another dtype, without values and in another shape."""
    params, optimizer = made(LowRankMuon, torch.bfloat16, diagnostics=True, adamw={"amsgrad": True})
    run(optimizer, params, gradients(SHAPES, torch.bfloat16))
    whole = copy.deepcopy(optimizer.state_dict())
    anew = {"fading", "master", "diagnostics", "max_exp_avg_sq"}
    for i in (0, 2, 3):
        for key, value in whole["state"][i].items():
            for bad in (None, value.to(torch.int16), value.to("meta"), torch.zeros(*value.shape, 2, dtype=value.dtype)):
                state = copy.deepcopy(whole)
                if bad is None:
                    del state["state"][i][key]
                else:
                    state["state"][i][key] = bad
                fine = key in anew if bad is None else key == "step" and bad.dtype == torch.int16
                if fine:
                    optimizer.load_state_dict(state)
                    assert optimizer.state[params[i]][key].dtype == value.dtype
                else:
                    assert_refused(optimizer, params, state)
    optimizer.load_state_dict(whole)
    assert equal(optimizer.state_dict(), whole)


FORMS = {
    "default": {},
    "full": {"full_state_dict": True},
    "full, on the host": {"full_state_dict": True, "cpu_offload": True},
    "flat": {"flatten_optimizer_state_dict": True},
}


@every_kind
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("saved", ["in memory", "on disk"])
@pytest.mark.filterwarnings("ignore")  # torch's own, of torch.distributed without processes
def test_distributed_checkpoints(kind, form, saved, tmp_path):
    """Without processes: got, saved and loaded in place, and set in a fresh model; it goes on bit for bit."""
    options = dsd.StateDictOptions(**form)

    def fresh():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 4))
        groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 0.05}]
        return model, kind(groups, **decayed())

    def train(model, optimizer, start):
        for t in range(start, start + 3):
            optimizer.zero_grad()
            model(torch.randn(5, 6, generator=torch.Generator().manual_seed(t))).square().mean().backward()
            optimizer.step()
        optimizer.zero_grad()

    model, optimizer = fresh()
    train(model, optimizer, 0)
    state = dsd.get_optimizer_state_dict(model, optimizer, options=options)
    other, target = fresh()
    other.load_state_dict(model.state_dict())
    if saved == "on disk":
        dcp.save({"o": state}, checkpoint_id=tmp_path, no_dist=True)
        there = {"o": dsd.get_optimizer_state_dict(other, target, options=options)}
        dcp.load(there, checkpoint_id=tmp_path, no_dist=True)
        state = there["o"]
    dsd.set_optimizer_state_dict(other, target, copy.deepcopy(state), options=options)
    assert equal(target.state_dict()["state"], optimizer.state_dict()["state"])
    train(model, optimizer, 3)
    train(other, target, 3)
    assert same(other.parameters(), model.parameters())


@every_kind
@pytest.mark.parametrize("tensor", [False, True])
def test_an_initializing_step_changes_and_counts_nothing(kind, tensor):
    """Rates and gradients of zero, by which tools have state made."""
    params, optimizer = made(kind)
    run(optimizer, params, gradients(SHAPES, torch.float32))
    weights, before = copy.deepcopy(params), copy.deepcopy(optimizer.state_dict())
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.0) if tensor else 0.0
    run(optimizer, params, [[torch.zeros_like(p) for p in params]])
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    assert same(params, weights)
    assert equal(optimizer.state_dict(), before)
