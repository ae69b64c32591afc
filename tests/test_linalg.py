"""Products that may be fused or halved, and factorizations that never raise."""

import numpy as np
import pytest
from gallery import gram_defect

from orthlin import _backend as be

MANY_SHAPES = ("numpy", "strict", "torch:cpu", "torch:cuda", "cupy")  # JAX compiles each


def sample(dtype, shape=(2, 5, 5), seed=0):
    real, imaginary = np.random.default_rng(seed).standard_normal((2, *shape))
    return (real + 1j * imaginary if np.dtype(dtype).kind == "c" else real).astype(dtype)


@pytest.mark.parametrize("alpha", [1, -0.75])
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
@pytest.mark.parametrize("shape", [(5, 5), (2, 5, 5), (2, 1, 5, 5)])
@pytest.mark.parametrize("xp", MANY_SHAPES, indirect=True)
def test_a_fused_product_is_the_formula(xp, shape, dtype, alpha):
    C, X, Y = (sample(dtype, shape, seed) for seed in range(3))
    S = X + X.conj().swapaxes(-1, -2)
    fused = xp.call(lambda c, a, b: be.add_product(be.namespace(c), 0.5, c, alpha, a, b), C, X, Y)
    square = xp.call(lambda c, s: be.add_product(be.namespace(c), 0.5, c, alpha, s, s, hermitian=True), C, S)
    for got, product, size in ((fused, X @ Y, np.abs(X) @ np.abs(Y)), (square, S @ S, np.abs(S) @ np.abs(S))):
        # each entry is a sum of five products and one more term
        assert np.all(np.abs(got - (0.5 * C + alpha * product)) <= 8 * np.finfo(dtype).eps * (size + np.abs(C)))


@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_a_gram_matrix_and_an_adjoint_are_their_formulas(xp, dtype):
    X = sample(dtype)
    S = xp.call(lambda x: be.gram(be.namespace(x), x), X)
    assert np.all(np.abs(S - X @ X.conj().mT) <= 8 * np.finfo(dtype).eps * (np.abs(X) @ np.abs(X).mT))
    np.testing.assert_array_equal(xp.call(lambda x: be.adjoint(be.namespace(x), x), X), X.conj().mT)


@pytest.mark.parametrize("n", [256, 601])  # from 256 rows on torch multiplies one triangle, by halves
@pytest.mark.parametrize("xp", MANY_SHAPES, indirect=True)
def test_a_large_gram_product_is_right(xp, n):
    X = sample("complex64", (1, n, 40))
    S = xp.call(lambda x: be.gram(be.namespace(x), x), X)
    # a sum of 40 complex products
    assert np.all(np.abs(S - X @ X.conj().mT) <= 80 * np.finfo("float32").eps * (np.abs(X) @ np.abs(X).mT))
    C, S = sample("complex64", (1, n, n), 1), S / n
    square = xp.call(lambda c, s: be.add_product(be.namespace(c), 0.5, c, 2.0, s, s, hermitian=True), C, S)
    exact = 0.5 * C + 2 * (S.astype("complex128") @ S)
    assert np.linalg.norm(square - exact) <= n * np.finfo("float32").eps * np.linalg.norm(exact)


@pytest.mark.parametrize("n", [16, 64, 300])  # multiplied as it is, in single precision, and by halves
def test_products_of_half_precision_are_rounded_once(n):
    torch = pytest.importorskip("torch")
    c, a, b = (torch.from_numpy(sample("float32", (1, n, n), seed)).bfloat16() for seed in range(3))
    s = a + a.mT
    unit = 2.0**-8
    for got, terms in (
        (be.gram(be.namespace(a), a), (0.0, c, 1.0, a, a.mT)),
        (be.add_product(be.namespace(c), 0.5, c, -0.75, a, b), (0.5, c, -0.75, a, b)),
        (be.add_product(be.namespace(c), 0.5, c, 2.0, s, s, hermitian=True), (0.5, c, 2.0, s, s)),
    ):
        beta, *arrays = terms
        C, alpha, A, B = arrays[0].double(), arrays[1], arrays[2].double(), arrays[3].double()
        exact, size = beta * C + alpha * A @ B, abs(beta) * C.abs() + abs(alpha) * A.abs() @ B.abs()
        assert got.dtype == torch.bfloat16
        # one rounding to half precision, and those of a sum of n products in single precision
        assert bool(((got.double() - exact).abs() <= unit * exact.abs() + n * 2.0**-23 * size).all())


def test_every_matrix_of_a_stack_takes_its_own_route_and_no_route_is_taken_in_vain():
    ok, calls = np.array([True, False]).reshape(2, 1, 1), []

    def route(value):
        return calls.append(value) or (np.full((2, 3, 3), value),)

    for good, expected, called in ((ok, [1, 2], [1, 2]), (ok | True, [1, 1], [1]), (ok & False, [2, 2], [2])):
        calls.clear()
        (chosen,) = be.choose(np, good, lambda: route(1), lambda: route(2))
        np.testing.assert_array_equal(chosen[:, 0, 0], expected)
        assert calls == called


@pytest.mark.parametrize("given", ["some", "all", "none"])
@pytest.mark.parametrize("xp", MANY_SHAPES, indirect=True)
def test_a_selection_is_a_where_by_what_numbers_say(xp, given):
    values = {"some": [1.0, -1.0], "all": [1.0, 1.0], "none": [-1.0, -1.0]}[given]
    A, B, size = sample("float32", (2, 3, 3)), sample("float32", (2, 3, 3), 1), np.reshape(values, (2, 1, 1))
    for other in (B, np.nan):

        def chosen(a, s, *b):
            space = be.namespace(a)
            return be.select(space, be.numbers(s) > 0, a, b[0] if b else space.nan)

        arrays = (A, size.astype("float32"), *((other,) if other is B else ()))
        np.testing.assert_array_equal(xp.call(chosen, *arrays), np.where(size > 0, A, other))


BAD = {"indefinite": -np.eye(5), "singular": np.zeros((5, 5)), "nan": np.full((5, 5), np.nan)}


@pytest.mark.parametrize("dtype", ["float32", "complex128"])
@pytest.mark.parametrize("bad", BAD)
def test_cholesky_never_raises_and_spoils_the_bad_matrix_alone(xp, bad, dtype):
    X = sample(dtype)
    S = X @ X.conj().mT + np.eye(5, dtype=dtype)
    S[1] = BAD[bad]
    L = xp.call(lambda s: be.cholesky(be.namespace(s), s), S)
    assert not np.isfinite(L[1]).all()
    assert not np.triu(L[0], 1).any()
    assert np.linalg.norm(L[0] @ L[0].conj().T - S[0]) <= 32 * np.finfo(dtype).eps * np.linalg.norm(S[0])


@pytest.mark.parametrize("dtype", ["float32", "complex128"])
@pytest.mark.parametrize("bad", ["singular", "nan"])
def test_an_inverse_never_raises_and_spoils_the_bad_matrix_alone(xp, bad, dtype):
    X = sample(dtype)
    X[1] = BAD[bad]
    Y = xp.call(lambda x: be.inv(be.namespace(x), x), X)
    assert not np.isfinite(Y[1]).any()
    residual = np.linalg.norm(X[0] @ Y[0] - np.eye(5))
    assert residual <= 32 * np.finfo(dtype).eps * np.linalg.norm(X[0]) * np.linalg.norm(Y[0])


@pytest.mark.parametrize("xp", MANY_SHAPES, indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
@pytest.mark.parametrize("n", [1, 32, 33, 100])  # the recursion ends at 32
def test_a_triangular_inverse_is_triangular_and_accurate(xp, n, dtype):
    L = np.tril(sample(dtype, (2, n, n))) + n * np.eye(n, dtype=dtype)
    Y = xp.call(lambda x: be.inv_lower(be.namespace(x), x), L)
    assert not np.triu(Y, 1).any()
    size = np.abs(L) @ np.abs(Y)  # the residual bound of a triangular inverse, entry by entry
    assert np.all(np.abs(L @ Y - np.eye(n)) <= 2 * n * np.finfo(dtype).eps * size)
    L[1, n // 2, n // 2] = 0
    Y = xp.call(lambda x: be.inv_lower(be.namespace(x), x), L)
    assert np.isfinite(Y[0]).all()
    assert not np.isfinite(Y[1]).all()


@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_eigenvalues_never_raise_and_spoil_the_bad_matrix_alone(xp, dtype):
    X = sample(dtype)
    S = X + X.conj().mT
    S[1] = np.nan

    def both(s):
        values, vectors = be.eigh(be.namespace(s), s)
        return be.namespace(s).astype(values, s.dtype), vectors

    s, V = xp.call(both, S)
    assert np.isnan(s[1]).all()
    assert np.isnan(V[1]).all()
    tol = 32 * np.finfo(dtype).eps
    assert gram_defect(V[0]) <= tol
    assert np.linalg.norm(S[0] @ V[0] - V[0] * s[0]) <= tol * np.linalg.norm(S[0])


def svd(x):
    U, s, Vh = be.svd(be.namespace(x), x)
    return U, be.namespace(x).astype(s, x.dtype), Vh


@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_singular_values_never_raise_and_spoil_the_bad_matrix_alone(xp, dtype):
    X = sample(dtype)
    X[1] = np.nan
    U, s, Vh = xp.call(svd, X)
    assert all(np.isnan(part[1]).all() for part in (U, s, Vh))
    tol = 64 * np.finfo(dtype).eps  # cuSOLVER's Jacobi method came to 48 in complex128
    assert max(gram_defect(U[0]), gram_defect(Vh[0])) <= tol
    assert np.linalg.norm((U[0] * s[0]) @ Vh[0] - X[0]) <= tol * np.linalg.norm(X[0])


@pytest.mark.parametrize("xp", ["numpy", "torch:cpu"], indirect=True)
def test_no_rank_one_matrix_is_refused(xp):
    """MKL, inside torch, gives up on one in thirty of these complex64 matrices."""
    for seed in range(300):
        shape = np.random.default_rng(seed).integers(7, 21, 2)
        row = sample("complex64", shape[1:], seed)
        A = np.ascontiguousarray(np.broadcast_to(row, shape))
        U, s, Vh = xp.call(svd, A)
        assert np.linalg.norm((U * s) @ Vh - A) <= 32 * np.finfo("float32").eps * np.linalg.norm(A)
