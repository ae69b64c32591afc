"""What torch and its users expect of every `torch.optim.Optimizer`."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from test_update import ALL, NAN, SHAPES, STEPS, assert_close, decayed, gradients, parameters, random, run
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR

from orthlin.torch import LowRankMuon, Muon

MIXED = [(12, 8), (12, 8), (8,), ()]
every_kind = pytest.mark.parametrize("kind", ALL)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).to(dtype)


def batch(step=0, dtype=torch.float32):
    return random(10, 6, seed=step, dtype=dtype), random(10, 4, seed=step + 1, dtype=dtype)


def loss_of(model, step=0, dtype=torch.float32):
    x, y = batch(step, dtype)
    return (model(x) - y).square().mean()


def train(model, optimizer, steps=STEPS, start=0):
    for t in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(model, t).backward()
        optimizer.step()
    return model


def same(params, others):
    return all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def snapshot(optimizer):
    """Every bit of the state as bytes."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    return file.getvalue()


# Learning rates --------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_learning_rate_can_be_a_tensor(kind, dtype, shape):
    """Of one element, in whatever precision the parameters are."""
    for precision in (torch.float32, torch.float64):
        plain, mine = parameters(MIXED, precision), parameters(MIXED, precision)
        given = gradients(MIXED, precision)
        run(kind(plain, **decayed(lr=0.125)), plain, given)
        run(kind(mine, **decayed(lr=torch.full(shape, 0.125, dtype=dtype))), mine, given)
        for p, q in zip(mine, plain, strict=True):
            assert_close(p.detach(), q.detach(), 100 * torch.finfo(torch.float32).eps)


@every_kind
def test_a_tensor_that_is_written_to_changes_the_learning_rate(kind):
    """As schedulers and captured graphs do."""
    lr, plain, mine = torch.tensor(0.5), parameters(MIXED), parameters(MIXED)
    optimizer, reference, given = kind(mine, lr), kind(plain, 0.5), gradients(MIXED)
    for t, gs in enumerate(given):
        lr.fill_(0.5**t)
        for group in reference.param_groups:
            group["lr"] = 0.5**t
        run(optimizer, mine, [gs])
        run(reference, plain, [gs])
    for p, q in zip(mine, plain, strict=True):
        assert_close(p.detach(), q.detach(), 1e-6)


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.5**t),
    "LambdaLR of each group": lambda o: lr_scheduler.LambdaLR(o, [lambda t: 0.5**t, lambda t: 1 / (1 + t)]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, STEPS),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min=0.01),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.4, STEPS + 1),
    "OneCycleLR of each group": lambda o: lr_scheduler.OneCycleLR(o, [0.4, 0.1], STEPS + 1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.4, 2),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, min_lr=[0.0, 0.01]),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 3)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: SWALR(o, [0.05, 0.02], anneal_epochs=3),
}


def test_every_scheduler_of_torch_is_among_them():
    there = {
        name
        for name, cls in vars(lr_scheduler).items()
        if isinstance(cls, type) and issubclass(cls, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert there - {"LRScheduler"} <= set(SCHEDULERS)


def advance(scheduler, t):
    scheduler.step(*([1.0 + t] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))


@every_kind
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_drive_matrices_and_vectors(kind, make, tensor):
    """Learning rates are those that SGD is given; each step is one with the values that the groups hold."""
    mine, other, given = parameters(MIXED), parameters(MIXED), gradients(MIXED)
    lr = torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1
    optimizer, reference = (
        kind([{"params": mine[::2]}, {"params": mine[1::2]}], lr, adamw={"lr": 0.025}),
        torch.optim.SGD([{"params": other[::2]}, {"params": other[1::2]}], lr.clone() if tensor else lr, 0.9),
    )
    scheduler, other_scheduler = make(optimizer), make(reference)
    for t, gs in enumerate(given):
        rates = [[float(group["lr"]) for group in o.param_groups] for o in (optimizer, reference)]
        assert rates[0] == pytest.approx(rates[1])
        before = copy.deepcopy((mine, optimizer))
        for group in before[1].param_groups:
            group["lr"] = float(group["lr"])
        # AdamW by hand, at a quarter of the rate of the matrices in the group
        vectors = [p.detach().clone().requires_grad_() for p in mine[2:]]
        adamw = torch.optim.AdamW([{"params": [p], "lr": r / 4} for p, r in zip(vectors, rates[1], strict=True)])
        state = {i: copy.deepcopy(optimizer.state[p]) for i, p in enumerate(mine[2:])}
        adamw.load_state_dict({**adamw.state_dict(), "state": state})
        run(adamw, vectors, [gs[2:]])
        run(optimizer, mine, [gs])
        run(before[1], before[0], [gs])
        for p, q in zip([*mine, *mine[2:]], [*before[0], *vectors], strict=True):
            assert_close(p.detach(), q.detach())
        other_scheduler.optimizer.step()
        advance(scheduler, t)
        advance(other_scheduler, t)


@every_kind
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_state_from_before_a_scheduler_is_loaded_after_it_was_made(kind, make):
    """Which adds keys to the groups, as do rate finders; and goes on in step with it."""

    def made():
        params = parameters(MIXED)
        return params, kind([{"params": params[::2]}, {"params": params[1::2]}], 0.1)

    saved = copy.deepcopy(made()[1].state_dict())
    params, optimizer = made()
    scheduler = make(optimizer)
    keys = [set(group) for group in optimizer.param_groups]
    run(optimizer, params, gradients(MIXED, steps=1))
    optimizer.load_state_dict(saved)
    assert [set(group) for group in optimizer.param_groups] == keys
    run(optimizer, params, gradients(MIXED, steps=1))
    advance(scheduler, 0)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_one_cycle_cycles_the_momentum():
    params = parameters(MIXED)
    optimizer = LowRankMuon(params, lr=0.1)
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.4, STEPS + 1, base_momentum=0.5, max_momentum=0.9)
    seen = []
    for gs in gradients(MIXED):
        momentum = optimizer.param_groups[0]["momentum"]
        old = optimizer.state[params[0]]["momentum"].clone()
        run(optimizer, params, [gs])
        assert_close(optimizer.state[params[0]]["momentum"], momentum * old + (1 - momentum) * gs[0])
        seen.append(momentum)
        scheduler.step()
    assert max(seen) == pytest.approx(0.9)
    assert min(seen) == pytest.approx(0.5, abs=0.05)


def test_a_scheduler_goes_on_where_it_was_saved():
    def made():
        params = parameters(MIXED)
        optimizer = Muon(params, lr=0.1)
        return params, optimizer, lr_scheduler.CosineAnnealingLR(optimizer, 2 * STEPS)

    def go(params, optimizer, scheduler, given):
        for gs in given:
            run(optimizer, params, [gs])
            scheduler.step()

    given = gradients(MIXED, steps=2 * STEPS)
    whole, part, resumed = made(), made(), made()
    go(*whole, given)
    go(*part, given[:STEPS])
    with torch.no_grad():
        for p, q in zip(resumed[0], part[0], strict=True):
            p.copy_(q)
    resumed[1].load_state_dict(part[1].state_dict())
    resumed[2].load_state_dict(part[2].state_dict())
    go(*resumed, given[STEPS:])
    assert same(resumed[0], whole[0])


# step and gradients ----------------------------------------------------------------------------------------------


@every_kind
def test_a_closure_is_called_once_with_gradients_on_and_its_loss_returned(kind):
    model, plain = network(), network()
    optimizer, calls = kind(model.parameters(), lr=0.01), []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        calls.append(loss)
        return loss

    assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1
    train(plain, kind(plain.parameters(), lr=0.01), 1)
    assert same(model.parameters(), plain.parameters())
    assert optimizer.step() is None


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_never_written_to(kind, dtype):
    """Nor replaced; through every view, precision and option that reads them."""
    shapes = [(12, 8), (24, 8), (4, 3, 2, 2), (8,)]
    params = parameters(shapes, dtype)
    groups = [{"params": [params[0]]}, {"params": [params[1]], "view": {"splits": 3}}, {"params": params[2:]}]
    extra = [{}, {"maximize": True}, {"diagnostics": True}, {"cautious": True}, {"master_weights": False}]
    extra += [{"nesterov": False}, {"error_feedback": True}, {"momentum": 0.0}] if kind is LowRankMuon else []
    for options in extra:
        optimizer = kind(copy.deepcopy(groups), **decayed(**options))
        mine = [p for group in optimizer.param_groups for p in group["params"]]
        for gs in gradients([tuple(p.shape) for p in mine], dtype):
            for p, g in zip(mine, gs, strict=True):
                p.grad = g
            kept, where, versions = [g.clone() for g in gs], [p.grad for p in mine], [g._version for g in gs]
            optimizer.step()
            assert same(gs, kept)
            assert all(p.grad is g for p, g in zip(mine, where, strict=True))
            assert [g._version for g in gs] == versions


@every_kind
def test_parameters_without_a_gradient_are_untouched(kind):
    """No decay, no state."""
    params = parameters(MIXED)
    optimizer = kind(params, **decayed())
    given = gradients(MIXED)
    run(optimizer, params, given[:2])
    before, state = copy.deepcopy(params), copy.deepcopy([optimizer.state[p] for p in params])
    run(optimizer, params, [[None] * len(params)] * 2)
    assert same(params, before)
    for p, kept in zip(params, state, strict=True):
        assert all(torch.equal(optimizer.state[p][key], value) for key, value in kept.items())


@every_kind
def test_zero_grad_sets_to_none_or_zero(kind):
    params = parameters(MIXED)
    optimizer = kind(params)
    run(optimizer, params, gradients(MIXED, steps=1))
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


def test_a_gradient_that_can_be_differentiated_is_fine():
    model = network()
    optimizer = LowRankMuon(model.parameters(), lr=0.01)
    params = list(model.parameters())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using backward.* with create_graph=True")
        loss_of(model).backward(create_graph=True)
    optimizer.step()
    assert all(p.is_leaf and p.requires_grad and p.grad_fn is None for p in params)
    assert not any(value.requires_grad for p in params for value in optimizer.state[p].values())


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autograd_sees_that_a_parameter_was_written_to(kind, dtype):
    p = torch.nn.Parameter(random(12, 8, dtype=dtype))
    optimizer, loss = kind([p]), (p**2).sum()
    run(optimizer, [p], [[random(12, 8, dtype=dtype)]])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_kind
def test_training_lowers_the_loss(kind):
    model = network()
    before = float(loss_of(model).detach())
    optimizer = kind(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert float(loss_of(model).detach()) < 0.5 * before


# Hooks and names -------------------------------------------------------------------------------------------------


@every_kind
def test_hooks_of_a_step_are_called_once_a_step(kind):
    """Also those of all optimizers, whatever runs inside."""
    params, calls = parameters(MIXED), []
    optimizer = kind(params)
    handles = [
        optimizer.register_step_pre_hook(lambda o, *_: calls.append(("before", o))),
        optimizer.register_step_post_hook(lambda o, *_: calls.append(("after", o))),
        register_optimizer_step_pre_hook(lambda o, *_: calls.append(("before all", o))),
        register_optimizer_step_post_hook(lambda o, *_: calls.append(("after all", o))),
    ]
    try:
        run(optimizer, params, gradients(MIXED, steps=2))
    finally:
        for handle in handles:
            handle.remove()
    assert [name for name, _ in calls] == ["before all", "before", "after", "after all"] * 2
    assert all(o is optimizer for _, o in calls)


def test_hooks_of_the_state_dict_can_add_to_it_and_change_it():
    source, target = (Muon([p]) for p in parameters([(12, 8)] * 2))
    source.register_state_dict_post_hook(lambda _, state: {**state, "note": 5})
    saved = source.state_dict()
    assert saved["note"] == 5
    seen = []
    target.register_load_state_dict_pre_hook(lambda _, state: seen.append(state["note"]))
    target.register_load_state_dict_post_hook(lambda _: seen.append("after"))
    target.load_state_dict(saved)
    assert seen == [5, "after"]


def test_what_a_hook_makes_of_a_state_is_what_is_checked_and_loaded():
    """The use that torch names for it: a state with other keys."""
    p, q = parameters([(12, 8)] * 2)
    source, target = Muon([p]), Muon([q])
    run(source, [p], gradients([(12, 8)]))
    old = source.state_dict()
    old["state"] = {0: {"buf" if key == "momentum" else key: value for key, value in old["state"][0].items()}}

    def renamed(_, state):
        return {**state, "state": {0: {"momentum" if k == "buf" else k: 2 * v for k, v in state["state"][0].items()}}}

    target.register_load_state_dict_pre_hook(renamed)
    target.load_state_dict(old)
    assert torch.equal(target.state[q]["momentum"], 2 * source.state[p]["momentum"])


def test_a_hook_after_loading_has_the_last_word():
    p, q = parameters([(12, 8)] * 2)
    source, target = Muon([p]), Muon([q])
    run(source, [p], gradients([(12, 8)]))
    target.register_load_state_dict_post_hook(lambda o: o.state[q].update(momentum=torch.ones_like(q.detach())))
    target.load_state_dict(source.state_dict())
    assert target.state[q]["momentum"].eq(1).all()


@every_kind
def test_names_go_with_their_parameters(kind):
    model, plain = network(), network()
    optimizer = kind(model.named_parameters(), lr=0.01)
    assert [group["param_names"] for group in optimizer.param_groups] == [["0.weight", "0.bias", "2.weight", "2.bias"]]
    train(model, optimizer)
    train(plain, kind(plain.parameters(), lr=0.01))
    assert same(model.parameters(), plain.parameters())


# Copies ----------------------------------------------------------------------------------------------------------


def shrinking(step):
    """A rank schedule that can be pickled."""
    return 4 if step < 3 else 2


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}


@every_kind
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_with_its_parameters_goes_on_alone_and_alike(kind, copied):
    params, given = parameters(MIXED), gradients(MIXED)
    options = {"rank": shrinking} if "LowRank" in kind.__name__ else {}
    optimizer = kind(params, **decayed(**options))
    run(optimizer, params, given[:2])
    others, other = copied((params, optimizer))
    assert same(others, params)
    assert snapshot(other) == snapshot(optimizer) or copied is not copy.deepcopy
    run(other, others, given[2:])
    assert not same(others, params)
    run(optimizer, params, given[2:])
    assert same(others, params)
    assert repr(other) == repr(optimizer)
    other.add_param_group({"params": parameters([(3, 4), (3,)])})
    assert (len(optimizer.param_groups), len(other.param_groups)) == (1, 2)


def test_a_shallow_copy_shares_parameters_and_state():
    params = parameters(MIXED)
    optimizer = LowRankMuon(params, rank=shrinking)
    other = copy.copy(optimizer)
    assert other.param_groups is optimizer.param_groups
    assert other.state is optimizer.state
    run(other, params, gradients(MIXED))
    assert int(optimizer.param_groups[0]["step"]) == STEPS


def test_an_optimizer_can_be_changed_by_hand():
    """Groups are read at every step."""
    mine, other, given = parameters(MIXED), parameters(MIXED), gradients(MIXED)
    optimizer = LowRankMuon(mine, lr=0.1)
    for group in optimizer.param_groups:
        group.update(lr=0.3, weight_decay=0.2, momentum=0.5, scale="spectral", betas=(0.5, 0.6))
    run(optimizer, mine, given)
    options = {"lr": 0.3, "weight_decay": 0.2, "adamw": {"betas": (0.5, 0.6)}}
    run(LowRankMuon(other, **options, momentum=0.5, scale="spectral"), other, given)
    assert same(mine, other)


# Machinery of torch ----------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("options", [{}, {"fused": True}])
def test_a_grad_scaler_unscales_and_leaves_out_steps_with_infinities(kind, options):
    model, plain = network(), network()
    optimizer, reference = (kind(m.parameters(), lr=0.01, adamw=options) for m in (model, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for t in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, t) * (float("inf") if t == 2 else 1.0)
        scaler.scale(loss).backward()
        before, state = copy.deepcopy(list(model.parameters())), snapshot(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if t == 2:
            assert same(model.parameters(), before)
            assert snapshot(optimizer) == state
        else:
            train(plain, reference, 1, t)
            assert same(model.parameters(), plain.parameters())
    assert scaler.get_scale() == 2.0**9
    assert int(optimizer.skipped()) == 0


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_a_compiled_step_is_the_same_up_to_rounding():
    """Of matrices and of vectors."""
    torch._dynamo.reset()
    shapes = [(12, 8), (8,)]
    plain, mine, given = parameters(shapes), parameters(shapes), gradients(shapes, steps=2)
    run(Muon(plain, **decayed()), plain, given)
    optimizer = Muon(mine, **decayed())
    step = torch.compile(optimizer.step, backend="eager")
    for gs in given:
        for p, g in zip(mine, gs, strict=True):
            p.grad = g
        step()
    for p, q in zip(mine, plain, strict=True):
        assert_close(p.detach(), q.detach(), 1e-6)


@every_kind
@pytest.mark.parametrize("strides", ["transposed", "every other", "expanded gradient", "transposed gradient"])
def test_strides_change_nothing(kind, strides):
    """Of parameters and gradients, bit for bit."""
    plain, given = parameters([(12, 8)]), gradients([(12, 8)])
    if strides == "expanded gradient":
        given = [[g[0][:1].expand(12, 8)] for g in given]
    X = plain[0].detach().clone()
    layouts = {
        "transposed": lambda: X.t().contiguous().t(),
        "every other": lambda: torch.stack([X, X], -1).flatten(1)[:, ::2],
    }
    p = torch.nn.Parameter(layouts.get(strides, X.clone)())
    run(kind(plain, **decayed()), plain, [[g[0].contiguous()] for g in given])
    flip = strides == "transposed gradient"
    run(kind([p], **decayed()), [p], [[g[0].t().contiguous().t() if flip else g[0]] for g in given])
    assert p.is_contiguous() is (strides not in ("transposed", "every other"))
    assert_close(p.detach(), plain[0].detach())


@every_kind
def test_a_channels_last_gradient_of_a_plain_convolution_is_fine(kind):
    shapes = [(4, 3, 2, 2)]
    plain, mine, given = parameters(shapes), parameters(shapes), gradients(shapes)
    run(kind(plain), plain, given)
    run(kind(mine), mine, [[g.contiguous(memory_format=torch.channels_last) for g in gs] for gs in given])
    assert_close(mine[0].detach(), plain[0].detach())


def reversed_axes(x):
    return x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))


LAYOUTS = {
    "channels_last": ((4, 3, 2, 2), None, lambda x: x.contiguous(memory_format=torch.channels_last)),
    "channels_last_3d": ((4, 3, 2, 2, 2), None, lambda x: x.contiguous(memory_format=torch.channels_last_3d)),
    "experts, the other way round": (
        (3, 6, 5),
        {"batch_ndim": 1},
        lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    ),
    "split columns": ((4, 6, 2), {"splits": 2, "split_axis": "in"}, lambda x: x.mT.contiguous().mT),
}


@every_kind
@pytest.mark.parametrize("when", ["before", "after", "between"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "view", "laid"), LAYOUTS.values(), ids=LAYOUTS)
def test_parameters_without_a_view_as_matrices_step_as_their_contiguous_copies(kind, when, dtype, shape, view, laid):
    """Laid out anew before the optimizer is made, after it, or after a step; bit for bit, also when it goes on."""
    plain, mine, given = parameters([shape], dtype), parameters([shape], dtype), gradients([shape], dtype, steps=4)

    def made(params):
        return kind([{"params": params, "view": view}], **decayed())

    def lay_out():
        mine[0].data = laid(mine[0].data)

    if when == "before":
        lay_out()
    reference, optimizer = made(plain), made(mine)
    if when == "between":
        run(reference, plain, given[:1])
        run(optimizer, mine, given[:1])
    if when != "before":
        lay_out()
    assert not mine[0].is_contiguous()
    run(reference, plain, given[1:3])
    run(optimizer, mine, [[laid(gs[0])] for gs in given[1:3]])
    assert same(mine, plain)
    resumed = made(mine)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(resumed, mine, given[3:])
    run(reference, plain, given[3:])
    assert same(mine, plain)
    assert not mine[0].is_contiguous()


@every_kind
def test_on_the_meta_device_there_is_all_but_values(kind):
    with torch.device("meta"):
        params = [torch.nn.Parameter(torch.empty(shape)) for shape in MIXED]
    optimizer = kind(params)
    real = kind(parameters(MIXED, torch.float32))
    shapes = [{k: (v.shape, v.dtype) for k, v in state.items()} for state in optimizer.state.values()]
    assert shapes == [{k: (v.shape, v.dtype) for k, v in state.items()} for state in real.state.values()]
    assert all(v.is_meta for state in optimizer.state.values() for key, v in state.items() if key != "step")
    run(optimizer, params, [[torch.empty_like(p) for p in params]])


@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_real_precision_trains(kind, dtype):
    shapes = [(12, 8), (4, 3, 2, 2), (8,)]
    params = parameters(shapes, dtype)
    optimizer, before = kind(params, lr=0.01), copy.deepcopy(params)
    run(optimizer, params, gradients(shapes, dtype))
    for p, q in zip(params, before, strict=True):
        assert p.dtype == dtype
        assert p.isfinite().all()
        assert not torch.equal(p, q)


@every_kind
def test_two_precisions_in_a_group_are_two_batches(kind):
    both = [*parameters([(12, 8)], torch.float32), *parameters([(12, 8)], torch.float64)]
    given = [[a[0].float(), a[0]] for a in gradients([(12, 8)])]
    run(kind(both, **decayed()), both, given)
    for i in range(2):
        alone = parameters([(12, 8)], both[i].dtype)
        run(kind(alone, **decayed()), alone, [[gs[i]] for gs in given])
        assert torch.equal(both[i], alone[0])


def test_inference_after_a_step_is_not_disturbed():
    model = network()
    optimizer = Muon(model.parameters())
    train(model, optimizer)
    with torch.inference_mode():
        assert loss_of(model).isfinite()
    train(model, optimizer)


def test_the_printed_form_tells_route_and_options():
    text = repr(LowRankMuon(parameters(MIXED), rank=3))
    assert text.startswith("LowRankMuon (")
    assert "algorithm: auto" in text
    assert "rank: 3" in text


def test_a_step_of_a_nan_loss_leaves_the_matrices():
    model = network()
    optimizer = Muon(model.parameters())
    before = copy.deepcopy([p for p in model.parameters() if p.ndim > 1])
    (loss_of(model) * NAN).backward()
    optimizer.step()
    assert same([p for p in model.parameters() if p.ndim > 1], before)
    assert int(optimizer.skipped()) == 2


def test_state_is_there_from_the_start_and_has_its_keys_for_good():
    params = parameters(SHAPES)
    for kind in ALL:
        optimizer = kind(params)
        keys = [set(optimizer.state[p]) for p in params]
        run(optimizer, params, gradients())
        assert [set(optimizer.state[p]) for p in params] == keys
        assert set(optimizer.state) == set(params)


# A step is whole or nothing --------------------------------------------------------------------------------------


def without_state(optimizer):
    optimizer.state.clear()


def another_dict(optimizer):
    optimizer.state = {}


def replaced(optimizer):
    for group in optimizer.param_groups:
        group["params"][:] = [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]


def appended(optimizer):
    optimizer.param_groups[0]["params"] += parameters([(5, 4), (3,)])


def more_momentum(optimizer):
    optimizer.param_groups[0].update(momentum=0.9, diagnostics=True, amsgrad=True)


@every_kind
@pytest.mark.parametrize("change", [without_state, another_dict, replaced, appended, more_momentum])
@pytest.mark.parametrize("saved", [False, True])
def test_state_that_is_missing_is_made_when_a_step_needs_it(kind, change, saved):
    """And before it is saved, so that it can be loaded."""
    params = parameters(MIXED)
    optimizer = kind(params)
    run(optimizer, params, gradients(MIXED, steps=2))
    change(optimizer)
    params = optimizer.param_groups[0]["params"]
    if saved:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = copy.deepcopy(params)
    run(optimizer, params, gradients([tuple(p.shape) for p in params], steps=2))
    assert not any(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    fresh = kind(parameters([tuple(p.shape) for p in params]), diagnostics=optimizer.param_groups[0]["diagnostics"])
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert int(fresh.skipped()) == 0


@every_kind
@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("second", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("stepped", [False, True])
def test_parameters_that_are_cast_later_train_on_with_their_small_steps(kind, first, second, stepped):
    """As if they had been made so, when the optimizer has not yet stepped; and the state goes into such a one."""
    given = gradients(MIXED, second, steps=30)
    params = parameters(MIXED, first)
    optimizer = kind(params, lr=1e-4, weight_decay=0.0)
    if stepped:
        run(optimizer, params, gradients(MIXED, first, steps=1))
    for p in params:
        p.grad, p.data = None, p.data.to(second)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = kind(others, lr=1e-4, weight_decay=0.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, params, given)
    run(other, others, given)
    assert same(params, others)
    assert all(p.dtype == second for p in params)


def spoiled(reason, optimizer):
    """Something that AdamW or the matrices refuse, in the last group."""
    matrix, vector = optimizer.param_groups[-1]["params"]
    if reason == "sparse matrix":
        matrix.grad = matrix.grad.to_sparse()
    elif reason == "sparse vector":
        vector.grad = vector.grad.to_sparse()
    elif reason == "gradient of another dtype":
        vector.data = vector.data.double()
    elif reason == "matrix of another dtype than its gradient":
        matrix.data = matrix.data.double()
    elif reason == "moment of another shape":
        optimizer.state[vector]["exp_avg"] = torch.zeros(3)
    elif reason == "momentum of another shape":
        optimizer.state[matrix]["momentum"] = torch.zeros(3, 3)
    elif reason == "tensor rate with foreach":
        optimizer.param_groups[-1].update(lr=torch.tensor(0.1), foreach=True)
    elif reason == "capturable on the host":
        optimizer.param_groups[-1]["capturable"] = True
    elif reason == "rank":
        optimizer.param_groups[-1]["rank"] = 0
    elif reason == "view":
        optimizer.param_groups[-1]["view"] = {"splits": 7}
    elif reason == "not finite":
        optimizer.param_groups[-1]["nonfinite"] = "raise"
        matrix.grad[0, 0] = NAN


REASONS = [
    "sparse matrix", "sparse vector", "gradient of another dtype", "matrix of another dtype than its gradient",
    "moment of another shape", "momentum of another shape", "tensor rate with foreach", "capturable on the host",
    "rank", "view", "not finite",
]  # fmt: skip


@every_kind
@pytest.mark.parametrize("reason", REASONS)
def test_a_step_that_is_refused_has_changed_nothing(kind, reason):
    shapes = [(12, 8), (8,)]
    first, second = parameters(shapes, torch.float32), parameters(shapes, torch.float32)
    optimizer = kind([{"params": first}, {"params": second}])
    given = gradients(shapes + shapes, torch.float32)
    run(optimizer, first + second, given[:2])
    for p, g in zip(first + second, given[2], strict=True):
        p.grad = g
    spoiled(reason, optimizer)
    weights = copy.deepcopy(first + second)
    state = copy.deepcopy([dict(optimizer.state[p]) for p in first + second])
    with pytest.raises((RuntimeError, TypeError, ValueError, AssertionError)):
        optimizer.step()
    assert same(first + second, weights)
    assert [group["step"] for group in optimizer.param_groups] == [2, 2]
    for p, kept in zip(first + second, state, strict=True):
        assert all(torch.equal(optimizer.state[p][key], value) for key, value in kept.items())


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_under_autocast_is_the_step_outside(kind, dtype):
    plain, mine, given = parameters(MIXED, dtype), parameters(MIXED, dtype), gradients(MIXED, dtype)
    run(kind(plain), plain, given)
    with torch.autocast("cpu", torch.bfloat16):
        run(kind(mine), mine, given)
    assert same(mine, plain)
