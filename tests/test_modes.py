"""What users set for their own code changes no result, and is as they set it afterwards."""

import threading
import warnings
from contextlib import ExitStack, contextmanager, nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import orthlin
from orthlin import _backend as be
from orthlin import metrics, sketch, steppers
from orthlin._backend import linalg
from orthlin.errors import OrthlinError
from orthlin.torch import MSGD, LowRankMuon, Muon

A = np.random.default_rng(0).standard_normal((2, 12, 5))
ONE = steppers.muon(0.1, rank=2, weight_decay=0.1, warm_start=True, tail="auto")


def stepped(stepper):
    def step(X):
        delta, state = stepper.update(X, stepper.init(X), X)
        return [delta, state.momentum]

    return step


ROUTINES = {
    "orthogonalize": orthlin.orthogonalize,
    "schedule": lambda A: orthlin.orthogonalize(A, schedule=orthlin.schedules.muon()),
    "tol": lambda A: orthlin.orthogonalize(A, tol=0.1, method="gram_newton_schulz"),
    "polar": lambda A: orthlin.polar(A, method="newton_schulz"),
    "matrix_sign": lambda A: orthlin.matrix_sign(A[..., :5, :]),
    "matrix_sign-newton_schulz": lambda A: orthlin.matrix_sign(
        A[..., :5, :] + A[..., :5, :].mT, method="newton_schulz"
    ),
    "qr": orthlin.qr,
    "cholesky2": lambda A: orthlin.qr(A, method="cholesky2"),
    "shifted_cholesky3": lambda A: orthlin.qr(A, method="shifted_cholesky3"),
    "lowrank_orth": lambda A: orthlin.lowrank_orth(A, 3, rng=0, n_iter=1),
    "lowrank_orth-tol": lambda A: orthlin.lowrank_orth(A, 3, rng=0, tol=0.1),
    "lowrank_orth_factors": lambda A: orthlin.lowrank_orth_factors(A, 2, rng=0, n_oversamples=2, sketch="sparse_sign"),
    "randomized_range_finder": lambda A: orthlin.randomized_range_finder(A, 2, rng=0, sketch="columns"),
    "adaptive_range_finder": lambda A: orthlin.adaptive_range_finder(A[0, ...], tol=1.0, block_size=2, rng=0),
    "gaussian": lambda A: sketch.gaussian(6, 3, like=A, rng=0),
    "sparse_sign": lambda A: sketch.sparse_sign(6, 3, like=A, rng=0),
    "columns": lambda A: sketch.columns(6, 3, like=A, rng=0),
    "nuclear_norm": metrics.nuclear_norm,
    "numerical_rank": metrics.numerical_rank,
    "stable_rank": metrics.stable_rank,
    "captured_nuclear_norm": lambda A: metrics.captured_nuclear_norm(A, A),
    "captured_fraction": lambda A: metrics.captured_fraction(A, A),
    "captured_energy": lambda A: metrics.captured_energy(A, A[..., :2]),
    "range_error": lambda A: metrics.range_error(A, A[..., :2]),
    "orthogonality": metrics.orthogonality,
    "polar_backward_error": lambda A: metrics.polar_backward_error(A, A, A[..., :5, :]),
    "qr_residual": lambda A: metrics.qr_residual(A, A, A[..., :5, :]),
    "hermitian_defect": lambda A: metrics.hermitian_defect(A[..., :5, :]),
    "psd_defect": lambda A: metrics.psd_defect(A[..., :5, :]),
    "muon": stepped(ONE),
    "msgd": stepped(steppers.msgd(0.1, scale="nuclear")),
}
NOT_HERE = {"hmt_frobenius_bound", "hmt_spectral_bound", "hmt_tail_bound", "posterior_factor", "TailBound"}  # no array
READS = ("adaptive_range_finder",)  # values, so that it cannot be traced


def test_every_routine_on_arrays_is_here():
    modules = {"errors", "metrics", "schedules", "sketch", "steppers"}
    functions = [name for name in orthlin.__all__ if name not in modules and name[0].islower()]
    functions += [name for name in (*metrics.__all__, *sketch.__all__) if name not in NOT_HERE]
    assert set(functions) <= set(ROUTINES)


# the modes -----------------------------------------------------------------------------------------


def torch_flags():
    """All that can be read, where a read may be refused."""

    def read(get):
        try:
            return get()
        except RuntimeError:
            return None

    return [
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.get_default_dtype(),
        torch.backends.fp32_precision,
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.mkldnn.matmul.fp32_precision,
        read(torch.get_float32_matmul_precision),
        read(lambda: torch.backends.cuda.matmul.allow_tf32),
    ]


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


@contextmanager
def products(owner, value):
    """Float32 products as the newer flag of a backend says, or the older one of all of them."""
    if owner is None:
        torch.set_float32_matmul_precision(value)
    else:
        owner.fp32_precision = value
    try:
        yield
    finally:
        for backend in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
            backend.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")


PRODUCTS = {
    "high": lambda: products(None, "high"),
    "medium": lambda: products(None, "medium"),
    "mkldnn": lambda: products(torch.backends.mkldnn.matmul, "bf16"),
    "every-backend": lambda: products(torch.backends, "tf32"),
}
TORCH = PRODUCTS | {
    "autocast-bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast-float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
}
JAX = {
    "strict": lambda: jax.numpy_dtype_promotion("strict"),
    "rank": lambda: jax.numpy_rank_promotion("raise"),
    "nans": lambda: jax.debug_nans(True),
    "infs": lambda: jax.debug_infs(True),
    "bfloat16": lambda: jax.default_matmul_precision("bfloat16"),
}


@contextmanager
def all_of(modes):
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode())
        yield


def arrays(result):
    return [np.asarray(x) for x in (result if isinstance(result, tuple | list) else (result,))]


def same(found, expected):
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("dtype", ["float32", "complex128"])
@pytest.mark.parametrize("name", ROUTINES)
def test_numpys_error_state_changes_nothing(name, dtype):
    X = (A * (1 + 1j)).astype(dtype) if dtype[0] == "c" else A.astype(dtype)
    for x in (X, np.ldexp(X.real, -100).astype(dtype), np.zeros_like(X)):
        expected = arrays(ROUTINES[name](x)) if name != "matrix_sign" or x.any() else None
        with np.errstate(all="raise"):
            if expected is not None:
                same(arrays(ROUTINES[name](x)), expected)
            assert set(np.geterr().values()) == {"raise"}


@pytest.mark.parametrize("mode", TORCH)
@pytest.mark.parametrize("name", ROUTINES)
def test_torchs_modes_change_nothing(name, mode):
    X = torch.from_numpy(A).float()
    expected = arrays(ROUTINES[name](X))
    with TORCH[mode](), np.errstate(all="raise"):
        before = torch_flags()
        same(arrays(ROUTINES[name](X)), expected)
        with pytest.raises(OrthlinError):
            orthlin.qr(X * torch.nan)
        assert torch_flags() == before


@pytest.mark.parametrize("mode", TORCH)
@pytest.mark.parametrize("kind", [Muon, LowRankMuon, MSGD])
def test_torchs_modes_change_no_step(kind, mode):
    def step():
        weights = [torch.nn.Parameter(torch.from_numpy(x).to(torch.float32)) for x in A]
        optimizer = kind(weights, lr=0.1)
        for _ in range(2):
            for p in weights:
                p.grad = p.detach().clone() + 1
            optimizer.step()
        return [p.detach().numpy() for p in weights]

    expected = step()
    with TORCH[mode]():
        before = torch_flags()
        same(step(), expected)
        assert torch_flags() == before


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("name", [name for name in ROUTINES if name not in READS])
def test_jaxs_modes_change_no_program(name, x64):
    """Traced under all of them at once, some of which refuse and others round; the same program, the same bits."""

    def program(X):
        return str(jax.make_jaxpr(ROUTINES[name])(X))

    with jax.enable_x64(x64):
        X = jnp.asarray(A, jnp.float64 if x64 else jnp.float32)
        expected = program(X)
        assert "precision=None" not in expected
        with all_of(JAX.values()):
            assert program(X) == expected
            assert jax.config.jax_numpy_dtype_promotion == "strict"
            assert jax.config.jax_default_matmul_precision == "bfloat16"


@pytest.mark.parametrize("mode", JAX)
@pytest.mark.parametrize("name", ["shifted_cholesky3", "captured_energy", "gaussian"])
def test_jaxs_modes_change_nothing_eagerly(name, mode):
    X = jnp.asarray(A * (1 + 1j), jnp.complex64) if name == "gaussian" else jnp.asarray(A)
    expected = arrays(ROUTINES[name](X))
    with JAX[mode]():
        same(arrays(ROUTINES[name](X)), expected)


def test_nothing_is_compiled_again_in_jaxs_modes():
    X, compilations = jnp.asarray(A), []

    def listener(event, _, **__):
        compilations.append(event) if "backend_compile" in event else None

    orthlin.qr(X, method="cholesky2")
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        with all_of([JAX["strict"], JAX["rank"], JAX["bfloat16"]]):
            orthlin.qr(X, method="cholesky2")
            orthlin.qr(X, method="cholesky2")
    finally:
        jax.monitoring.clear_event_listeners()
    assert compilations == []


# the door itself -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", PRODUCTS)
def test_products_are_full_inside_and_as_they_were_outside(mode):
    x = torch.ones(2, 2)
    for error in (None, ZeroDivisionError):
        with PRODUCTS[mode]():
            before = torch_flags()
            with nullcontext() if error is None else pytest.raises(error), be.settings(x), be.settings(x):
                assert torch.get_float32_matmul_precision() == "highest"
                assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
                if error:
                    raise error
            assert torch_flags() == before


def test_products_stay_full_while_any_thread_is_inside():
    x, inside, go = torch.ones(2, 2), threading.Event(), threading.Event()

    def other():
        with be.settings(x):
            inside.set()
            go.wait(10)

    with PRODUCTS["high"]():
        thread = threading.Thread(target=other)
        with be.settings(x):
            thread.start()
            assert inside.wait(10)
        assert torch.get_float32_matmul_precision() == "highest"
        go.set()
        thread.join()
        assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.usefixtures("feigned_units")
def test_products_are_short_where_asked_unless_another_thread_is_inside():
    x, inside, go = torch.ones(2, 2), threading.Event(), threading.Event()

    def other():
        with be.settings(x):
            inside.set()
            go.wait(10)

    def flag():
        with be.settings(x), be.settings(x), linalg.products(x, "medium"):
            return torch.backends.mkldnn.matmul.fp32_precision

    for mode in (nullcontext, PRODUCTS["high"], PRODUCTS["mkldnn"]):
        with mode():
            before = torch_flags()
            assert flag() == "bf16"
            inside.clear(), go.clear()
            thread = threading.Thread(target=other)
            thread.start()
            assert inside.wait(10)
            assert flag() != "bf16"
            go.set()
            thread.join()
            assert flag() == "bf16"
            assert torch_flags() == before


def test_what_is_set_meanwhile_stays():
    with PRODUCTS["high"]():
        with be.settings(torch.ones(1)):
            torch.set_float32_matmul_precision("medium")
        assert torch.get_float32_matmul_precision() == "medium"


def test_a_compiled_routine_is_out_of_autocast_too():
    X = torch.from_numpy(A).float()
    qr = torch.compile(lambda X: orthlin.qr(X, method="cholesky2"), fullgraph=True, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch says of caches that it traces through
        expected = arrays(qr(X))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            same(arrays(qr(X)), expected)
