"""Steppers: every update against its formula in double precision, and what an optimizer must not do."""

import functools
import io
import itertools
import math

import jax
import numpy as np
import pytest
import torch
from conftest import BACKENDS
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import matrix
from test_direction import EAGER, condition, direction, drawn, error, length, weight
from test_rangefinder import RANK, SHAPE, gaussian, with_spectrum

from orthlin import _backend as be
from orthlin import schedules, steppers
from orthlin._direction import SCALES, Recipe
from orthlin.errors import (
    ArrayTypeError,
    DTypeError,
    NonFiniteError,
    OptionError,
    OrthlinError,
    RankError,
    ShapeError,
)

RECIPE = ("rank", "n_iter", "sketch", "warm_start", "tail", "scale", "schedule", "seed")
NAME = "layers.0.weight"
MADE = {}
eager = pytest.mark.parametrize("xp", EAGER, indirect=True)


@pytest.fixture(params=["numpy", "torch:cpu"])
def host(request):
    return BACKENDS[request.param]


# the reference -----------------------------------------------------------------------------------


class Reference:
    """The documented step of one matrix, in double precision; `omega` is the test matrix of a cold sketch."""

    def __init__(self, X, right, **options):
        self.o = {"momentum": 0.95, "nesterov": True, "rank": None, "scale": "none", "tail": 0.0} | options
        self.M, self.right, self.t = np.zeros_like(X), right, 0

    def step(self, G, X, omega):
        o, beta = self.o, self.o["momentum"]
        feedback, lr = o.get("error_feedback"), o["lr"](self.t) if callable(o["lr"]) else o["lr"]
        M = beta * self.M + (1 - beta) * G
        U = beta * M + (1 - beta) * G if o["nesterov"] else M
        if feedback:
            U = self.M + (1 - beta) * G
        omega = omega if self.right is None else self.right.conj().T
        O, part, W = direction(U, o["rank"], omega, n_iter=o.get("n_iter", 0), tail=o["tail"])
        self.M = U - (1 - beta) * part if feedback else M
        if self.right is not None:
            self.right = W + self.right - W @ W.conj().T @ self.right
        decayed = X * ((O.conj() * X).real > 0) if o.get("cautious") else X
        self.t += 1
        s = length(o["scale"], U, O, o["rank"], o["tail"])
        return -lr * s * O - lr * o.get("weight_decay", 0.0) * decayed


# the library -------------------------------------------------------------------------------------


def arrays(state):
    """What a state holds, by name, without the counter."""
    return {k: v for k, v in state._asdict().items() if k != "step" and v is not None}


@functools.cache
def compiled(update):
    return jax.jit(update, static_argnames="name")


def updates(xp, stepper, Gs, X, *, state=None, half=None):
    """(X, delta, state) of every step, NumPy's; asserts library, dtype and device, and that nothing is written to.

    `half` names a dtype that the parameter and the gradients have, of which NumPy may know nothing.
    """
    update = compiled(stepper.update) if xp.jit else stepper.update
    with xp.context():
        X, *Gs = (xp.asarray(x) for x in (X, *Gs))
        space = be.namespace(X)
        dtype = getattr(space, half) if half else X.dtype
        X, *Gs = (space.astype(x, dtype) for x in (X, *Gs))
        work = space.float32 if half else dtype
        state = stepper.init(X, name=NAME) if state is None else state
        kept, result = [], []
        for G in Gs:
            before = [X, G, *arrays(state).values()]
            kept.append((before, [wide(xp, x) for x in before]))
            delta, state = update(G, state, X, name=NAME)
            for x, expected in ((delta, dtype), (state.momentum, work), (state.right, work), (state.skipped, None)):
                if x is not None:
                    assert type(x).__module__ == type(G).__module__
                    assert x.dtype == (expected or space.int32)
                    assert be.device(x) == be.device(G)
            frozen_state = state._replace(**{k: wide(xp, v) for k, v in arrays(state).items()}, step=int(state.step))
            result.append((wide(xp, X), wide(xp, delta), frozen_state))
            X = X + delta
        for before, copies in kept:
            assert all(
                np.array_equal(wide(xp, x), copy, equal_nan=True) for x, copy in zip(before, copies, strict=True)
            )
    return result


def wide(xp, x):
    """A copy as a NumPy array; half precision in float32."""
    space = be.namespace(x)
    x = be.working(space, x) if space.isdtype(x.dtype, ("real floating", "complex floating")) else x
    return np.array(xp.to_numpy(x))


def sketches(xp, stepper, Gs, options, half=None):
    """The test matrices that a cold sketch draws, step by step, and the right factor that a warm one starts from."""
    recipe = Recipe(**{k: v for k, v in options.items() if k in RECIPE})
    with xp.context():
        G = xp.asarray(Gs[0])
        space = be.namespace(G)
        right = stepper.init(space.astype(G, getattr(space, half)) if half else G, name=NAME).right
        G = be.working(space, G)
        if recipe.width(G.shape) is None:
            return None, [None] * len(Gs)
        if right is not None:
            return wide(xp, right), [None] * len(Gs)
        return None, [wide(xp, drawn(recipe, G, t, NAME)) for t in range(len(Gs))]


def make(options, kind="muon"):
    """One stepper for the same options, so that it is compiled once."""
    key = kind, *sorted(options.items())
    if key not in MADE:
        MADE[key] = getattr(steppers, kind)(**options)
    return MADE[key]


def problem(shape=SHAPE, steps=3, dtype="float64", seed=0):
    """Gradients that vary a little, so that momenta have condition numbers below 5, and a parameter."""
    base = with_spectrum(np.linspace(1, 0.5, min(shape)), *shape, dtype, seed)
    noise = 0.2 / sum(math.sqrt(n) for n in shape)
    Gs = [base + (noise * gaussian(*shape, dtype=dtype, seed=seed + 10 + t)).astype(dtype) for t in range(steps)]
    return Gs, gaussian(*shape, dtype=dtype, seed=seed + 9)


def worst(xp, options, Gs, X, kind="muon", half=None):
    """Largest relative error of a delta, a momentum and a projector onto a warm start."""
    stepper = make(options, kind)
    right, omegas = sketches(xp, stepper, Gs, options, half)
    given = {"momentum": 0.0, "nesterov": False} if kind == "msgd" else {}
    wide_dtype = np.complex128 if X.dtype.kind == "c" else np.float64
    right = None if right is None else right.astype(wide_dtype)
    reference, errors = Reference(X.astype(wide_dtype), right, **given, **options), []
    for (x, delta, state), G, omega in zip(updates(xp, stepper, Gs, X, half=half), Gs, omegas, strict=True):
        errors.append(error(delta, reference.step(G.astype(wide_dtype), x.astype(wide_dtype), omega)))
        if state.momentum is not None:
            errors.append(error(state.momentum, reference.M))
        if state.right is not None:
            V, W = reference.right, state.right
            errors.append(error(W.conj().T @ W, V.conj().T @ V))
    return max(errors)


LOW = {"lr": 0.1, "rank": RANK}
MUON = {
    "full": {"lr": 0.1},
    "full-decay": {"lr": 0.1, "momentum": 0.8, "nesterov": False, "weight_decay": 0.3, "scale": "spectral"},
    "full-cautious": {"lr": lambda t: 0.1 / (1 + t), "cautious": True, "weight_decay": 0.5, "scale": "rms"},
    "full-nuclear": {"lr": 0.1, "scale": "nuclear"},
    "cold": LOW | {"weight_decay": 0.1, "seed": 5},
    "powers": LOW | {"n_iter": 1, "scale": "rms_rank", "nesterov": False},
    "sparse": LOW | {"sketch": "sparse_sign", "scale": "rms", "momentum": 0.5},
    "warm": LOW | {"warm_start": True, "scale": "nuclear"},
    "warm-tail": LOW | {"warm_start": True, "tail": "auto", "scale": "rms_rank", "weight_decay": 0.2, "cautious": True},
    "tail": LOW | {"tail": 1.0, "scale": "spectral"},
    "tail-nuclear": LOW | {"tail": 0.7, "scale": "nuclear", "n_iter": 1},
    "feedback": LOW | {"error_feedback": True, "weight_decay": 0.1, "cautious": True},
    "feedback-warm": LOW | {"error_feedback": True, "warm_start": True, "tail": 1.0, "momentum": 0.9, "scale": "rms"},
    "feedback-only": LOW | {"error_feedback": True, "warm_start": True, "momentum": 0.0},
}
MSGD = {
    "full": {"lr": 0.1, "weight_decay": 0.1},
    "cold": LOW | {"sketch": "columns"},
    "warm": LOW | {"warm_start": True, "tail": "auto", "scale": "nuclear", "weight_decay": 0.2},
}
EVERY = [("muon", name) for name in MUON] + [("msgd", name) for name in MSGD]
JITTED = [("muon", "full-cautious"), ("msgd", "cold")]


def options_of(kind, name):
    return {"muon": MUON, "msgd": MSGD}[kind][name]


def test_every_update_is_its_formula(xp):
    """1e4 eps cover the condition numbers of sketches and blocks over three steps; measured 400."""
    Gs, X = problem()
    for kind, name in JITTED if xp.jit else EVERY:
        assert worst(xp, options_of(kind, name), Gs, X, kind) <= 1e4 * np.finfo(float).eps, (kind, name)


DTYPES = ["float32", "complex64", "complex128"]
SHAPES = [SHAPE, SHAPE[::-1], (30, 30), (400, 12)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("xp", ["numpy", "strict:device1", "torch:cpu"], indirect=True)
def test_every_update_is_its_formula_for_tall_and_wide_in_every_dtype(xp, dtype):
    for shape, (kind, name) in itertools.product(SHAPES if xp.host else SHAPES[1:2], EVERY):
        Gs, X = problem(shape, 2, dtype)
        assert worst(xp, options_of(kind, name), Gs, X, kind) <= 1e4 * np.finfo(dtype).eps, (shape, kind, name)


def test_every_update_is_its_formula_in_complex_single_precision_under_jit():
    Gs, X = problem(dtype="complex64")
    options = MUON["feedback-warm"] | {"cautious": True, "weight_decay": 0.1}
    assert worst(BACKENDS["jax:jit"], options, Gs, X) <= 1e4 * np.finfo("complex64").eps


HALVES = [
    ("numpy", "float16"),
    ("torch:cpu", "float16"),
    ("torch:cpu", "bfloat16"),
    ("jax:jit", "bfloat16"),
]


def rounded(x, half):
    """`x` in half precision, back in float32: what the library is given."""
    return torch.from_numpy(x).to(getattr(torch, half)).float().numpy()


@pytest.mark.parametrize(("library", "half"), HALVES)
def test_a_parameter_of_half_precision_is_updated_in_float32(library, half):
    """The momentum to 1e4 eps of float32; the delta to one rounding, half an eps of its own dtype an entry."""
    xp, (Gs, X) = BACKENDS[library], problem(dtype="float32")
    Gs, X = [rounded(G, half) for G in Gs], rounded(X, half)
    eps = float(torch.finfo(getattr(torch, half)).eps)
    for name in ("warm-tail",) if xp.jit else ("full-decay", "cold", "warm-tail", "feedback-warm"):
        assert worst(xp, MUON[name], Gs, X, half=half) <= eps, name


@pytest.mark.parametrize("name", MUON)
def test_a_stack_is_a_loop(host, name):
    """Bit for bit on NumPy, to 1e3 eps where batched products round differently, over three steps."""
    problems = [problem(seed=100 * i) for i in range(3)]
    stepper = make(MUON[name])
    Gs, X = [np.stack(G) for G in zip(*(p[0] for p in problems), strict=True)], np.stack([p[1] for p in problems])
    together = updates(host, stepper, Gs, X)
    for i, (gs, x) in enumerate(problems):
        for (_, delta, state), (_, d, s) in zip(together, updates(host, stepper, gs, x), strict=True):
            pairs = [(delta[i], d), *((arrays(state)[k][i], arrays(s)[k]) for k in arrays(s))]
            for a, b in pairs:
                if host.name == "numpy":
                    np.testing.assert_array_equal(a, b)
                assert np.linalg.norm(a - b) <= 1e3 * np.finfo(float).eps * np.linalg.norm(b)


def test_the_state_holds_what_its_options_need_and_nothing_else(host):
    X = gaussian(2, *SHAPE, dtype="float32")
    with host.context():
        x = host.asarray(X)
        for options, momentum, right in (
            ({"momentum": 0.0}, None, None),
            ({"momentum": 0.0, "error_feedback": True, "rank": RANK}, X.shape, None),
            ({"warm_start": True}, X.shape, None),
            ({"warm_start": True, "rank": 0.25}, X.shape, (2, 6, SHAPE[1])),
            ({"warm_start": True, "rank": lambda t: 24 - t}, X.shape, (2, 24, SHAPE[1])),
        ):
            state = steppers.muon(0.1, **options).init(x)
            assert state.step == 0
            assert (state.skipped.shape, int(state.skipped.sum())) == ((2, 1, 1), 0)
            for value, shape in ((state.momentum, momentum), (state.right, right)):
                assert (None if value is None else tuple(value.shape)) == shape
        state = steppers.msgd(0.1, rank=2).init(x)
        assert (state.momentum, state.right) == (None, None)


def test_msgd_is_muon_without_momentum(host):
    Gs, X = problem()
    for options in MSGD.values():
        runs = (
            updates(host, make(o, kind), Gs, X)
            for kind, o in (("msgd", options), ("muon", options | {"momentum": 0.0, "nesterov": False}))
        )
        for (_, delta, _), (_, other, _) in zip(*runs, strict=True):
            np.testing.assert_array_equal(delta, other)


@pytest.mark.parametrize("extra", [{}, {"error_feedback": True}, {"tail": 1.0}, {"warm_start": True}])
def test_a_rank_that_reaches_the_smaller_side_is_full(host, extra):
    Gs, X = problem()
    runs = [updates(host, make({"lr": 0.1, "rank": r} | extra), Gs, X) for r in (None, 24, 1.0, 99)]
    for (_, full, _), *others in zip(*runs, strict=True):
        for _, delta, _ in others:
            np.testing.assert_array_equal(delta, full)


def test_full_error_feedback_leaves_nothing_out_and_is_plain_momentum(host):
    """Q B is all of M + (1 - beta) G, hence U_t = beta U_(t-1) + (1 - beta) G_t: the momentum without Nesterov."""
    Gs, X = problem(steps=4)
    runs = (updates(host, steppers.muon(0.1, **o), Gs, X) for o in ({"error_feedback": True}, {"nesterov": False}))
    for (_, delta, _), (_, expected, _) in zip(*runs, strict=True):
        assert error(delta, expected) <= 1e3 * np.finfo(float).eps


def test_error_feedback_keeps_all_of_what_was_left_out(host):
    """G - what was taken, summed over the steps, is the momentum; without momentum it all comes back."""
    Gs, X = problem(steps=5)
    stepper = steppers.muon(0.1, rank=RANK, momentum=0.0, error_feedback=True, scale="nuclear")
    runs = updates(host, stepper, Gs, X)
    left = np.zeros(SHAPE)
    for (_, delta, state), G in zip(runs, Gs, strict=True):
        U = left + G
        Q = np.linalg.svd(delta)[0][:, :RANK]
        left = U - Q @ (Q.T @ U)
        assert error(state.momentum, left) <= 1e4 * np.finfo(float).eps


# the rank as a function of the step ----------------------------------------------------------------


@pytest.mark.parametrize("xp", ["numpy", "torch:cpu", "strict:device1"], indirect=True)
@pytest.mark.parametrize("warm", [False, True])
def test_a_rank_that_grows_and_shrinks_is_the_rank_of_every_step(xp, warm):
    ranks = [2, 6, 6, 24, 0.5, 3, 4]
    stepper = steppers.msgd(1.0, rank=lambda t: ranks[t], warm_start=warm)
    Gs, X = problem(steps=len(ranks))
    for (_, delta, state), rank in zip(updates(xp, stepper, Gs, X), ranks, strict=True):
        number = rank if isinstance(rank, int) else 12
        sigma = np.linalg.svd(delta, compute_uv=False)
        assert np.abs(sigma - (np.arange(24) < number)).max() <= 64 * np.finfo(float).eps
        if warm:
            assert state.right.shape[-2] in (number, 6)


def test_a_growing_warm_start_keeps_its_rows_and_adds_fresh_ones(host):
    """The captured range contains that of the rows kept, one power iteration on."""
    ranks = [3, 5]
    stepper = steppers.msgd(1.0, rank=lambda t: ranks[t], warm_start=True)
    (G, *_), X = problem()
    (_, _, first), (_, delta, second) = updates(host, stepper, [G, G], X)
    kept = np.linalg.qr(G @ first.right.T).Q
    Q = np.linalg.svd(delta)[0][:, :5]
    assert np.linalg.norm(kept - Q @ (Q.T @ kept)) <= 1e3 * np.finfo(float).eps
    assert np.linalg.norm(first.right - first.right @ second.right.T @ second.right) > 0.1  # not the same range again
    assert np.linalg.matrix_rank(second.right) == 5


# a warm start that has lost directions -------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_warm_start_finds_its_directions_again(host, rank, momentum):
    """After steps with gradients of rank 0, 1 or 3 the captured norm of G tends to that of its 5 leading directions.

    Singular values fall by 2, so a step brings the angle down by 4: 20 steps leave 1e-12.
    """
    sigma = 0.5 ** np.arange(24)
    G, X = with_spectrum(sigma, *SHAPE), np.zeros(SHAPE)
    poor = with_spectrum(np.ones(rank), *SHAPE, seed=50) if rank else np.zeros(SHAPE)
    stepper = steppers.muon(1.0, rank=RANK, momentum=momentum, nesterov=False, warm_start=True)
    runs = updates(host, stepper, [poor] * 3 + [G] * 200 if momentum else [poor] * 3 + [G] * 20, X)
    assert np.linalg.matrix_rank(runs[2][1], tol=0.5) == rank
    assert -np.vdot(runs[-1][1], G) == pytest.approx(sigma[:RANK].sum(), rel=1e-6)
    assert np.linalg.matrix_rank(runs[3][1], tol=0.5) == RANK  # at once, not after many steps


@eager
def test_a_zero_gradient_leaves_a_warm_start_as_it_is_and_decays_only(xp):
    X, zero = gaussian(*SHAPE), np.zeros(SHAPE)
    for base in MUON.values():
        options = base | {"cautious": False, "lr": 0.25, "weight_decay": 0.5}
        stepper = make(options)
        right, _ = sketches(xp, stepper, [X], options)
        for x, delta, state in updates(xp, stepper, [zero, zero], X):
            np.testing.assert_array_equal(delta, -0.125 * x)
            assert not state.momentum.any()
            if right is not None:
                np.testing.assert_array_equal(state.right, right)


# the same again ------------------------------------------------------------------------------------


def saved_and_loaded(xp, state):
    """A state through the bytes of an .npz file; None is left out."""
    file = io.BytesIO()
    np.savez(file, step=state.step, **{k: xp.to_numpy(v) for k, v in arrays(state).items()})
    file.seek(0)
    with np.load(file) as data:
        found = {k: xp.asarray(data[k]) for k in data.files if k != "step"}
        return steppers.State(**({"momentum": None, "right": None} | found), step=int(data["step"]))


def test_a_run_resumed_from_a_file_is_the_run_bit_for_bit(xp):
    Gs, X = problem(steps=4)
    for kind, name in JITTED[1:] if xp.jit else EVERY:
        stepper = make(options_of(kind, name), kind)
        whole = updates(xp, stepper, Gs, X)
        with xp.context():
            x, state = xp.asarray(X), stepper.init(xp.asarray(X), name=NAME)
            update = compiled(stepper.update) if xp.jit else stepper.update
            for G in Gs[:2]:
                delta, state = update(xp.asarray(G), state, x, name=NAME)
                x = x + delta
            state = saved_and_loaded(xp, state)
        rest = updates(xp, stepper, Gs[2:], np.array(xp.to_numpy(x)), state=state)
        for (_, delta, s), (_, again, t) in zip(whole[2:], rest, strict=True):
            np.testing.assert_array_equal(delta, again)
            assert s.step == t.step
            assert all(np.array_equal(arrays(s)[k], arrays(t)[k]) for k in arrays(s))


@pytest.mark.parametrize("warm", [False, True])
def test_seed_and_name_determine_a_run_and_each_matters(host, warm):
    (G, *_), X = problem()

    def first(seed=0, name="w"):
        stepper = steppers.muon(0.1, rank=RANK, seed=seed, warm_start=warm)
        with host.context():
            x, g = host.asarray(X), host.asarray(G)
            return host.to_numpy(stepper.update(g, stepper.init(x, name), x, name)[0])

    np.testing.assert_array_equal(first(), first())
    assert error(first(seed=1), first()) > 0.1
    assert error(first(name="v"), first()) > 0.1


def test_a_step_draws_afresh_unless_it_starts_warm(host):
    (G, *_), X = problem()
    cold, warm = (
        updates(host, steppers.msgd(0.1, rank=RANK, warm_start=w), [G, G], np.zeros_like(X)) for w in (False, True)
    )
    assert error(cold[1][1], cold[0][1]) > 0.1
    assert -np.vdot(warm[1][1], G) > -np.vdot(warm[0][1], G)  # a power iteration on


@pytest.mark.parametrize(("xp", "dtype"), [*((x, "float64") for x in EAGER), ("torch:cpu", "float32")], indirect=["xp"])
def test_a_power_of_two_in_the_gradients_changes_no_bit(xp, dtype):
    """But for nuclear scaling, which it multiplies."""
    Gs, X = problem(dtype=dtype)
    for name, base in MUON.items():
        if xp.name == "jax" and name not in ("full-nuclear", "feedback-warm"):
            continue
        options = base | {"weight_decay": 0.0, "lr": 0.25}
        runs = updates(xp, make(options), Gs, X)
        for exponent in (-60, 7, 50) if dtype == "float32" else (-800, -7, 40, 900):
            scaled = updates(xp, make(options), [np.ldexp(G, exponent) for G in Gs], X)
            for (_, delta, state), (_, other, after) in zip(runs, scaled, strict=True):
                expected = np.ldexp(delta, exponent) if options.get("scale") == "nuclear" else delta
                np.testing.assert_array_equal(other, expected, err_msg=f"{name} {exponent}")
                np.testing.assert_array_equal(after.momentum, np.ldexp(state.momentum, exponent))


# gradients that are not finite ---------------------------------------------------------------------

GUARDED = [name for name in BACKENDS if name != "jax"]  # the same code as under jit, compiled one by one


@pytest.mark.parametrize(
    ("xp", "bad"), [*((name, np.nan) for name in GUARDED), ("numpy", np.inf), ("torch:cpu", -np.inf)], indirect=["xp"]
)
def test_a_matrix_with_a_bad_gradient_is_left_as_it_is_and_counted(xp, bad):
    """In a stack the others go on bit for bit, and so does it itself with the next gradient."""
    problems = [problem(seed=100 * i) for i in range(2)]
    Gs, X = [np.stack(G) for G in zip(*(p[0] for p in problems), strict=True)], np.stack([p[1] for p in problems])
    spoiled = Gs[1].copy()
    spoiled[0, 3, 4] = bad
    for kind, name in [("muon", "feedback-warm")] if xp.jit else EVERY:
        stepper = make(options_of(kind, name), kind)
        good, hurt = (updates(xp, stepper, [Gs[0], G, Gs[2]], X) for G in (Gs[1], spoiled))
        (_, _, before), (x, delta, after), (y, last, final) = hurt
        assert not delta[0].any()
        np.testing.assert_array_equal(y[0], x[0])
        for key in set(arrays(before)) - {"skipped"}:
            np.testing.assert_array_equal(arrays(after)[key][0], arrays(before)[key][0])
            np.testing.assert_array_equal(arrays(after)[key][1], arrays(good[1][2])[key][1])
        np.testing.assert_array_equal(delta[1], good[1][1][1])
        np.testing.assert_array_equal(last[1], good[2][1][1])
        assert np.isfinite(last).all()
        assert last[0].any()
        assert (final.skipped.ravel().tolist(), final.step) == ([1, 0], 3)


@pytest.mark.parametrize("name", MUON)
def test_every_gradient_may_be_bad_from_the_first_on(host, name):
    X = gaussian(*SHAPE)
    runs = updates(host, make(MUON[name]), [np.full(SHAPE, np.nan)] * 2, X)
    for _, delta, state in runs:
        assert not delta.any()
        assert not state.momentum.any()
    assert runs[-1][2].skipped.item() == 2


@pytest.mark.parametrize("name", MUON)
def test_a_bad_gradient_can_be_an_error_that_changes_nothing(host, name):
    stepper = make(MUON[name] | {"nonfinite": "raise"})
    Gs, X = problem()
    with host.context():
        x = host.asarray(X)
        _, state = stepper.update(host.asarray(Gs[0]), stepper.init(x), x)
        before = [wide(host, v) for v in (x, *arrays(state).values())]
        for bad in (np.nan, np.inf):
            G = Gs[1].copy()
            G[0, 0] = bad
            with pytest.raises(NonFiniteError, match=r"^G: .*NaN or infinity; remove or replace"):
                stepper.update(host.asarray(G), state, x)
        assert all(np.array_equal(wide(host, v), b) for v, b in zip((x, *arrays(state).values()), before, strict=True))


def test_a_good_gradient_passes_where_a_bad_one_is_an_error(host):
    Gs, X = problem()
    runs = (updates(host, make(LOW | {"nonfinite": n}), Gs, X) for n in ("skip", "raise"))
    for (_, delta, _), (_, other, _) in zip(*runs, strict=True):
        np.testing.assert_array_equal(delta, other)


def test_no_tensor_is_written_to():
    """Its version counts every write, also one that restores what was there."""
    Gs, X = (torch.from_numpy(np.stack(a)) for a in (problem()[0], problem()[0]))
    for kind, name in EVERY:
        stepper = make(options_of(kind, name), kind)
        state = stepper.init(X)
        given = [Gs, X, *arrays(state).values()]
        _, after = stepper.update(Gs, state, X)
        given += list(arrays(after).values())
        stepper.update(Gs * torch.nan, after, X)
        assert not any(x._version for x in given), name


# bad arguments ---------------------------------------------------------------------------------------

BAD = [
    *(("lr", value, OptionError) for value in (-0.1, math.nan, math.inf, "fast", None, True)),
    *(("momentum", value, OptionError) for value in (1, 1.5, -0.1, math.nan, None)),
    *(("weight_decay", value, OptionError) for value in (-0.1, math.nan, math.inf, "some")),
    *(("rank", value, RankError) for value in (0, -3, 1.5, 0.0, math.nan, True, "8")),
    *(("tail", value, OptionError) for value in (-1, math.nan, "all", None)),
    *(("n_iter", value, RankError) for value in (-1, 1.5)),
    *(("seed", value, RankError) for value in (-1, 1.5)),
    *(("sketch", value, OptionError) for value in ("uniform", None)),
    *(("scale", value, OptionError) for value in ("adam", 2.0)),
    *(("nonfinite", value, OptionError) for value in ("ignore", None)),
    *(("warm_start", value, OptionError) for value in ("no", 1, None)),
    ("schedule", "muon", OptionError),
]
FLAGS = ("nesterov", "cautious", "error_feedback")


@pytest.mark.parametrize(("name", "value", "kind"), BAD)
@pytest.mark.parametrize("make", [steppers.muon, steppers.msgd])
def test_a_bad_option_is_refused_by_name_when_it_is_given(make, name, value, kind):
    if make is steppers.msgd and name == "momentum":
        return
    with pytest.raises(kind, match=rf"^{name}: ") as caught:
        make(**({"lr": 0.1} | {name: value}))
    assert isinstance(caught.value, OrthlinError | ValueError)


@pytest.mark.parametrize("xp", ["numpy", "torch:cpu", "jax:jit"], indirect=True)
@pytest.mark.parametrize("form", [np.asarray, np.float32, torch.tensor], ids=["array", "scalar", "tensor"])
def test_hyperparameters_may_be_arrays_of_any_dtype(xp, form):
    """They leave the dtype of the parameter, and give what the number gives."""
    Gs, X = problem(dtype="float32", steps=2)
    values = {"lr": 0.25, "momentum": 0.5, "weight_decay": 0.125}
    options = {"schedule": schedules.muon(), "cautious": True}
    runs = (steppers.muon(**v, **options) for v in (values, {k: form(v) for k, v in values.items()}))
    first, second = (updates(xp, stepper, Gs, X) for stepper in runs)
    for (_, delta, state), (_, again, after) in zip(first, second, strict=True):
        np.testing.assert_array_equal(delta, again)
        np.testing.assert_array_equal(state.momentum, after.momentum)


@pytest.mark.parametrize("value", [np.asarray(-0.1), np.asarray(np.nan), np.asarray([0.1]), torch.tensor(-1.0)])
@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay"])
def test_an_array_on_the_host_is_looked_at(name, value):
    with pytest.raises(OptionError, match=rf"^{name}: "):
        steppers.muon(**({"lr": 0.1} | {name: value}))


@pytest.mark.parametrize("value", ["no", 0, None])
@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_is_true_or_false(name, value):
    with pytest.raises(OptionError, match=rf"^{name}: expected True or False, got {value!r}$"):
        steppers.muon(0.1, **{name: value})


@pytest.mark.parametrize("warm_start", [False, True])
def test_a_name_is_a_string(xp, warm_start):
    stepper = steppers.muon(0.1, rank=2, warm_start=warm_start)
    X = xp.asarray(A)
    with pytest.raises(OptionError, match=r"^name: expected a str, got 3$"):
        stepper.update(X, stepper.init(X, 3), X, 3)


def test_a_seed_may_be_of_any_size(xp):
    stepper = steppers.muon(0.1, rank=2, seed=2**70)
    X = xp.asarray(A)
    first, again = (stepper.update(X, stepper.init(X), X)[0] for _ in range(2))
    assert np.array_equal(xp.to_numpy(first), xp.to_numpy(again))


def test_msgd_takes_no_momentum():
    with pytest.raises(TypeError, match="momentum"):
        steppers.msgd(0.1, momentum=0.9)


A = gaussian(6, 4)


@pytest.mark.parametrize(
    ("G", "X", "error", "words"),
    [
        (A, A[:5], ShapeError, ("G: ", "(5, 4)", "(6, 4)")),
        (A, A.T.copy(), ShapeError, ("G: ", "(4, 6)", "(6, 4)")),
        (A[None], A, ShapeError, ("G: ", "(6, 4)", "(1, 6, 4)")),
        (A[0], A, ShapeError, ("G: ", "(4,)")),
        (A, A[0], ShapeError, ("X: ", "(4,)")),
        (A.tolist(), A, ArrayTypeError, ("G: ", "list")),
        (A, A.tolist(), ArrayTypeError, ("X: ", "list")),
        (A.astype(int), A, DTypeError, ("G: ", "int64")),
        (A, A.astype(int), DTypeError, ("X: ", "int64")),
        (A, torch.from_numpy(A), ArrayTypeError, ("X: ", "torch.Tensor")),
        (torch.from_numpy(A), A, ArrayTypeError, ("X: ", "numpy.ndarray")),
        (A, A * 1j, DTypeError, ("complex128", "float64")),
        (A * 1j, A, DTypeError, ("complex128", "float64")),
    ],
)
def test_a_gradient_that_does_not_fit_its_parameter_is_refused_by_name(G, X, error, words):
    stepper = steppers.muon(0.1, rank=2)
    with pytest.raises(error) as caught:
        stepper.update(G, stepper.init(A), X)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("X", "error"), [(A[0], ShapeError), (A.astype(int), DTypeError), (A.tolist(), ArrayTypeError)]
)
def test_a_state_is_made_of_matrices_only(X, error):
    with pytest.raises(error, match=r"^X: "):
        steppers.muon(0.1).init(X)


PLAIN, WITH = steppers.msgd(0.1), steppers.muon(0.1)


@pytest.mark.parametrize(
    ("stepper", "state", "error", "words"),
    [
        (WITH, None, OptionError, ("state: ", "NoneType")),
        (WITH, (), OptionError, ("state: ", "tuple")),
        (WITH, WITH.init(A)._asdict(), OptionError, ("state: ", "dict")),
        (WITH, PLAIN.init(A), OptionError, ("state: ", "with momentum", "State")),
        (PLAIN, WITH.init(A), OptionError, ("state: ", "without momentum", "State")),
        (WITH, WITH.init(A.T.copy()), ShapeError, ("G: ", "state.momentum", "(6, 4)", "(4, 6)")),
        (WITH, WITH.init(A[None]), ShapeError, ("G: ", "state.momentum", "(6, 4)", "(1, 6, 4)")),
        (WITH, WITH.init(A + 0j), DTypeError, ("state.momentum: ", "complex128")),
        (WITH, WITH.init(torch.from_numpy(A)), ArrayTypeError, ("state.momentum: ", "numpy.ndarray", "torch.Tensor")),
    ],
)
def test_a_state_that_is_not_of_this_stepper_and_parameter_is_refused_by_name(stepper, state, error, words):
    with pytest.raises(error) as caught:
        stepper.update(A, state, A)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 4, 6)])
def test_an_empty_parameter_has_an_empty_update(host, shape):
    for options in MUON.values():
        ((_, delta, _),) = updates(host, make(options), [np.zeros(shape)], np.zeros(shape))
        assert delta.shape == shape


@pytest.mark.parametrize(("parameter", "gradient"), [("float32", "float64"), ("float64", "float32")])
def test_a_gradient_may_have_another_precision_than_its_parameter(host, parameter, gradient):
    """The delta has the dtype of the parameter; 1e4 eps of the less precise one."""
    Gs, X = problem()
    eps = float(np.finfo(np.float32).eps)
    for name in ("full-decay", "cold", "feedback-warm", "warm-tail"):
        stepper = make(MUON[name])
        with host.context():
            x = host.asarray(X.astype(parameter))
            state = stepper.init(x, name=NAME)
            _, omegas = sketches(host, stepper, [G.astype(parameter) for G in Gs], MUON[name])
            right = None if state.right is None else wide(host, state.right).astype(float)
            reference = Reference(X, right, **MUON[name])
            for G, omega in zip(Gs, omegas, strict=True):
                delta, state = stepper.update(host.asarray(G.astype(gradient)), state, x, name=NAME)
                assert delta.dtype == x.dtype
                assert error(wide(host, delta), reference.step(G, wide(host, x).astype(float), omega)) <= 1e4 * eps


# any run -----------------------------------------------------------------------------------------


@st.composite
def runs(draw):
    """Options of Muon, three gradients of rank down to k - 3 and a parameter."""
    shape = draw(st.tuples(st.integers(1, 16), st.integers(1, 16)))
    k = min(shape)
    options = {
        "lr": draw(st.sampled_from([0.02, 1.0])),
        "rank": draw(st.one_of(st.none(), st.integers(1, k + 1))),
        "momentum": draw(st.sampled_from([0.0, 0.5, 0.95])),
        "nesterov": draw(st.booleans()),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        "cautious": draw(st.booleans()),
        "scale": draw(st.sampled_from(SCALES)),
        "n_iter": draw(st.integers(0, 1)),
        "warm_start": draw(st.booleans()),
        "error_feedback": draw(st.booleans()),
        "tail": draw(st.sampled_from([0.0, 1.0, "auto"])),
        "seed": draw(st.integers(0, 9)),
    }
    seed, rank = draw(st.integers(0, 2**32 - 4)), max(1, k - draw(st.integers(0, 3)))
    dtype = draw(st.sampled_from(["float32", "float64", "complex128"]))
    Gs = [matrix(shape, dtype, seed + t, rank=rank, exponent=draw(st.integers(-6, 6))) for t in range(3)]
    return options, Gs, matrix(shape, dtype, seed + 3)


LIBRARIES = st.sampled_from(["numpy", "torch:cpu"]).map(BACKENDS.get)


@given(runs(), LIBRARIES)
def test_a_step_is_finite_and_no_longer_than_its_learning_rate_allows(run, xp):
    """||delta|| <= lr (s sqrt(r + alpha^2 (k - r)) + weight_decay ||X||)."""
    options, Gs, X = run
    k, eps = min(X.shape), float(np.finfo(X.dtype).eps)
    r = min(options["rank"] or k, k)
    size = math.sqrt(r + weight(options["tail"], r, k) ** 2 * (k - r))
    for x, delta, state in updates(xp, make(options), Gs, X):
        assert np.isfinite(delta).all()
        assert all(np.isfinite(v).all() for v in arrays(state).values())
        if options["scale"] != "nuclear":
            s = length(options["scale"], x, x, options["rank"], options["tail"])
            bound = options["lr"] * (s * size + options["weight_decay"] * np.linalg.norm(x))
            assert np.linalg.norm(delta) <= bound * (1 + 1e6 * eps)


@given(runs(), LIBRARIES)
def test_a_run_is_its_formula_wherever_that_is_well_conditioned(run, xp):
    """Errors in what is orthogonalized grow by the condition numbers of each step; 100 eps times their product."""
    options, Gs, X = run
    eps, stepper = float(np.finfo(X.dtype).eps), make(options)
    kind = np.result_type(X, float)
    right, omegas = sketches(xp, stepper, Gs, options)
    reference = Reference(X.astype(kind), None if right is None else right.astype(kind), **options)
    product = 1.0
    for (x, delta, _), G, omega in zip(updates(xp, stepper, Gs, X), Gs, omegas, strict=True):
        M, before = reference.M.copy(), reference.right
        expected = reference.step(G.astype(kind), x.astype(kind), None if omega is None else omega.astype(kind))
        product *= step_condition(options, M, G.astype(kind), before, omega)
        assume(product < 1e-3 / eps)
        if options["cautious"] and options["weight_decay"]:
            continue  # a decay is on or off entry by entry
        assert error(delta, expected) <= 100 * eps * product


def step_condition(options, M, G, right, omega):
    beta = options["momentum"]
    U = M + (1 - beta) * G if options["error_feedback"] else beta * M + (1 - beta) * G
    if options["nesterov"] and not options["error_feedback"]:
        U = beta * U + (1 - beta) * G
    k = min(G.shape)
    if options["rank"] is None or options["rank"] >= k:
        return np.linalg.cond(U)
    test = omega if right is None else right.conj().T
    return condition(U, test, options["n_iter"], weight(options["tail"], options["rank"], k))


@pytest.mark.parametrize("options", [{}, {"nesterov": False}, {"error_feedback": True}], ids=str)
@pytest.mark.parametrize("rank", [2, None])
def test_a_gradient_that_has_become_zero_brings_a_matrix_to_rest(options, rank):
    """Matrix by matrix of a stack: it still goes beta + beta^2 + ... < 1/(1 - beta) full steps, the others theirs."""
    G = np.random.default_rng(0).standard_normal((2, 8, 6))
    stepper, beta = steppers.muon(0.1, rank=rank, momentum=0.8, **options), np.float32(0.8)
    X = np.zeros_like(G)
    state = stepper.init(X)
    for t in range(1, 60):
        delta, state = stepper.update(G, state, X)
        X = X + delta
        if t == 3:
            G[1], start = 0.0, X[1].copy()
        fading = 1.0 if t <= 3 else beta ** np.float32(t - 3)
        np.testing.assert_allclose(state.fading[:, 0, 0], [1.0, fading], rtol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(delta, 2, axis=(-2, -1)), 0.1 * state.fading[:, 0, 0], rtol=1e-6)
    assert np.linalg.norm(X[1] - start, 2) < 0.1 / (1 - 0.8)
