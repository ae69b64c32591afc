"""Derivatives of every routine: forward and reverse mode, all orders, where singular values coincide too."""

from functools import cache

import numpy as np
import pytest

import orthlin
from orthlin import schedules

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

# torch's own, where forward mode is first used
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

SQUARE, TALL, WIDE = (4, 4), (6, 4), (4, 6)
ALL = (SQUARE, TALL, WIDE)
KINDS = ("generic", "stack", "tiny", "equal", "orthonormal", "identity")
TOLERANCE = 1e-8  # of a difference quotient of order h^4 with h = 2e-5, in float64


def low(width=0, **options):
    """lowrank_orth of rank 2 with the same test matrix on every library."""
    return lambda X: orthlin.lowrank_orth(X, 2, n_oversamples=width, rng=np.random.default_rng(5), **options)


def factors(X, width=0):
    return orthlin.lowrank_orth_factors(X, 2, n_oversamples=width, rng=np.random.default_rng(5))


def product(X):
    Q, W = factors(X, 2)
    return Q @ W


def hermitian(X):
    return X + (X.mT.conj() if hasattr(X, "mT") else np.conj(X.mT))


ROUTINES = {
    "orthogonalize": (orthlin.orthogonalize, ALL, KINDS),
    "orthogonalize svd": (lambda X: orthlin.orthogonalize(X, method="svd"), ALL, KINDS),
    "orthogonalize products": (lambda X: orthlin.orthogonalize(X, method="newton_schulz"), ALL, KINDS),
    "orthogonalize muon": (lambda X: orthlin.orthogonalize(X, schedule=schedules.muon()), ALL, KINDS),
    "orthogonalize tol": (lambda X: orthlin.orthogonalize(X, tol=1e-3), ALL, KINDS),
    "orthogonalize gram": (lambda X: orthlin.orthogonalize(X, tol=1e-3, method="gram_newton_schulz"), ALL, KINDS),
    "polar U": (lambda X: orthlin.polar(X).U, ALL, KINDS),
    "polar H": (lambda X: orthlin.polar(X).H, ALL, KINDS),
    "polar H left": (lambda X: orthlin.polar(X, side="left").H, ALL, KINDS),
    "matrix_sign": (orthlin.matrix_sign, (SQUARE,), KINDS[:5]),
    "matrix_sign products": (lambda X: orthlin.matrix_sign(hermitian(X), method="newton_schulz"), (SQUARE,), KINDS[:4]),
    "qr Q": (lambda X: orthlin.qr(X).Q, ALL, KINDS[:5]),
    "qr R": (lambda X: orthlin.qr(X).R, ALL, KINDS[:5]),
    "qr cholesky2": (lambda X: orthlin.qr(X, method="cholesky2").Q, (SQUARE, TALL), KINDS),
    "lowrank_orth": (low(), ALL, KINDS),
    "lowrank_orth exact": (low(method="exact"), ALL, KINDS),
    "lowrank_orth tol": (low(tol=0.1), ALL, KINDS),
    "lowrank_orth columns": (low(sketch="columns"), ALL, KINDS[:5]),
    "lowrank_orth n_iter": (low(n_iter=1), ALL, KINDS),
    "lowrank_orth wider": (low(1, n_iter=1), ALL, KINDS[:3]),
    "lowrank_orth widest": (low(2), ALL, KINDS[:4]),
    "lowrank_orth widest exact": (low(2, method="exact"), ALL, KINDS[:4]),
    "lowrank_orth_factors Q": (lambda X: factors(X).Q, ALL, KINDS),
    "lowrank_orth_factors W": (lambda X: factors(X).W, ALL, KINDS),
    "lowrank_orth_factors product": (product, ALL, KINDS[:4]),
    "randomized_range_finder": (
        lambda X: orthlin.randomized_range_finder(X, 2, n_oversamples=1, rng=np.random.default_rng(5)), ALL, KINDS,
    ),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", ROUTINES)


def gaussian(rng, shape, dtype):
    A = rng.standard_normal(shape)
    return A + 1j * rng.standard_normal(shape) if dtype == "complex128" else A


def sample(kind, shape, dtype, seed=0):
    rng = np.random.default_rng([seed, *shape])
    A = gaussian(rng, (2, *shape) if kind == "stack" else shape, dtype)
    if kind == "tiny":
        return A * 2.0**-60
    if kind == "identity":
        return np.eye(*shape, dtype=dtype)
    if kind in ("equal", "orthonormal"):
        U, _, Vh = np.linalg.svd(A, full_matrices=False)
        return (U * ([3.0, 3.0, 1.0, 1.0] if kind == "equal" else [1.0] * 4)) @ Vh
    return A


def quotient(f, A, D):
    """Difference quotient along D, of order h^4."""
    h = 2e-5
    near, far = f(A + h * D) - f(A - h * D), f(A + 2 * h * D) - f(A - 2 * h * D)
    return (8 * near - far) / (12 * h)


def by_torch(f, A, D, C):
    """Derivative along D, and the derivative of Re <C, f>."""
    X, D, C = map(torch.asarray, (A, D, C))
    forward = torch.func.jvp(f, (X,), (D,))[1]
    leaf = X.clone().requires_grad_()
    (reverse,) = torch.autograd.grad((f(leaf) * C.conj()).real.sum(), leaf)
    return forward.numpy(), reverse.numpy()


@cache
def compiled(f):
    """Both modes in one program, as JAX would compile every single operation of every shape otherwise."""

    def both(X, D, C):
        return jax.jvp(f, (X,), (D,))[1], jax.grad(lambda X: (f(X) * C.conj()).real.sum())(X).conj()

    return jax.jit(both)


def by_jax(f, A, D, C):
    with jax.enable_x64(True):
        return tuple(map(np.asarray, compiled(f)(A, D, C)))


def error(name, library, shape, dtype, kind):
    """Largest relative error of forward and reverse mode against the difference quotient of NumPy's values."""
    f = ROUTINES[name][0]
    rng = np.random.default_rng(1)
    A = sample(kind, shape, dtype)
    D = gaussian(rng, A.shape, dtype) * np.linalg.norm(A) / 10
    expected = quotient(f, A, D)
    C = gaussian(rng, expected.shape, dtype)
    forward, reverse = library(f, A, D, C)
    scalar, size = np.vdot(C, expected).real, np.linalg.norm(expected)
    worst = np.linalg.norm(forward - expected) / size
    return max(worst, abs(np.vdot(reverse, D).real - scalar) / (np.linalg.norm(C) * size))


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@EVERY
def test_torch_agrees_with_difference_quotients(name, dtype):
    _, shapes, kinds = ROUTINES[name]
    errors = {(shape, kind): error(name, by_torch, shape, dtype, kind) for shape in shapes for kind in kinds}
    assert max(errors.values()) < TOLERANCE, errors


JAX = (
    ("orthogonalize", TALL, "float64"),
    ("orthogonalize muon", WIDE, "float64"),
    ("polar H", SQUARE, "complex128"),
    ("matrix_sign", SQUARE, "float64"),
    ("qr Q", TALL, "complex128"),
    ("qr R", WIDE, "float64"),
    ("lowrank_orth", TALL, "complex128"),
    ("lowrank_orth widest", WIDE, "float64"),
    ("lowrank_orth_factors W", WIDE, "float64"),
)


@pytest.mark.parametrize(("name", "shape", "dtype"), JAX)
def test_jax_agrees_with_difference_quotients(name, shape, dtype):
    errors = {kind: error(name, by_jax, shape, dtype, kind) for kind in ROUTINES[name][2]}
    assert max(errors.values()) < TOLERANCE, errors


ORDERS = ("orthogonalize", "polar H", "matrix_sign", "qr R", "lowrank_orth", "lowrank_orth widest")


@pytest.mark.parametrize("kind", ["generic", "equal"])
@pytest.mark.parametrize("name", ORDERS)
def test_torch_checks_both_modes_in_batches_and_the_second_order(name, kind):
    f, shapes, _ = ROUTINES[name]
    X = torch.asarray(sample(kind, shapes[-1], "float64")).requires_grad_()
    options = {"check_batched_grad": True, "fast_mode": True}
    assert torch.autograd.gradcheck(f, X, check_forward_ad=True, **options)
    assert torch.autograd.gradgradcheck(f, X, **options)


@pytest.mark.parametrize("name", ["orthogonalize", "qr R", "lowrank_orth widest"])
def test_jax_checks_both_modes_to_the_second_order(name):
    from jax.test_util import check_grads

    f, shapes, _ = ROUTINES[name]
    with jax.enable_x64(True):
        check_grads(f, (jax.numpy.asarray(sample("equal", shapes[-1], "float64")),), 2, rtol=1e-5, atol=1e-5)


def test_a_map_over_gradients_is_a_loop():
    def loss(X):
        return (orthlin.orthogonalize(X) ** 3).sum()

    A = sample("stack", TALL, "float64")
    loop = np.stack([torch.func.grad(loss)(torch.asarray(X)).numpy() for X in A])
    np.testing.assert_allclose(torch.func.vmap(torch.func.grad(loss))(torch.asarray(A)).numpy(), loop, atol=1e-13)
    with jax.enable_x64(True):
        np.testing.assert_allclose(jax.vmap(jax.grad(loss))(jax.numpy.asarray(A)), loop, atol=1e-13)
        np.testing.assert_allclose(jax.jit(jax.grad(loss))(jax.numpy.asarray(A[0])), loop[0], atol=1e-13)


@pytest.mark.parametrize("name", ["orthogonalize", "orthogonalize muon", "polar H", "qr R", "lowrank_orth"])
@pytest.mark.parametrize("rank", [0, 1])
def test_where_there_is_no_derivative_it_is_finite(name, rank):
    f = ROUTINES[name][0]
    X = torch.ones(TALL, dtype=torch.float64).mul_(rank).requires_grad_()
    (gradient,) = torch.autograd.grad(f(X).sum(), X)
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize(("dtype", "unit"), [("float32", 2.0**-23), ("bfloat16", 2.0**-7)])
@pytest.mark.parametrize("name", ["orthogonalize", "polar H", "matrix_sign", "qr R", "lowrank_orth"])
def test_lower_precision_keeps_its_dtype_and_its_digits(name, dtype, unit):
    f, shapes, _ = ROUTINES[name]
    X = torch.asarray(sample("equal", shapes[-1], "float64")).to(getattr(torch, dtype))
    C = torch.asarray(np.random.default_rng(2).standard_normal(f(X).shape)).to(X.dtype)

    def gradient(X):
        leaf = X.clone().requires_grad_()
        return torch.autograd.grad((f(leaf) * C.to(X.dtype)).sum(), leaf)[0]

    low, high = gradient(X), gradient(X.double())
    assert low.dtype == X.dtype
    assert torch.linalg.norm(low.double() - high) <= 32 * unit * torch.linalg.norm(high)


def test_a_layer_with_an_orthogonal_matrix_trains_on_both_libraries():
    rng = np.random.default_rng(3)
    goal, inputs = np.linalg.qr(rng.standard_normal((5, 3))).Q, rng.standard_normal((40, 5))
    start = goal + 0.5 * rng.standard_normal((5, 3))
    outputs = inputs @ goal

    def train(gradient, X):
        for _ in range(60):
            X = X - 0.3 * gradient(X)
        return X

    def loss(X, inputs, outputs):
        return ((inputs @ orthlin.orthogonalize(X) - outputs) ** 2).mean()

    data = [torch.asarray(x) for x in (inputs, outputs)]
    trained = train(lambda X: torch.func.grad(loss)(X, *data), torch.asarray(start))
    assert float(loss(trained, *data)) < 1e-3 * float(loss(torch.asarray(start), *data))
    with jax.enable_x64(True):
        data = [jax.numpy.asarray(x) for x in (inputs, outputs)]
        step = jax.jit(jax.grad(loss))
        same = train(lambda X: step(X, *data), jax.numpy.asarray(start))
    np.testing.assert_allclose(np.asarray(same), trained.numpy(), atol=1e-10)


def test_exact_scaling_is_a_constant_and_its_tangent_does_not_overflow_on_the_way():
    from orthlin import _backend as be

    for e in (-200, -60, 0, 60, 200):
        scale, x = jax.numpy.asarray(e), jax.numpy.asarray(np.float32(2.0 ** (-e // 2)))
        value, tangent = jax.jvp(lambda x, e=scale: be.ldexp(jax.numpy, x, e), (x,), (x,))
        assert float(tangent) == float(value) == 2.0 ** (-e // 2 + e)
