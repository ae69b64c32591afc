"""The matrix sign squares to one, commutes, follows the half-planes, and says where it does not exist."""

import numpy as np
import pytest
from conftest import BACKENDS
from gallery import DTYPES

import orthlin
from orthlin import schedules
from orthlin.errors import NonFiniteError, OptionError, ShapeError, SingularError

EPS = {"float32": 2.0**-23, "complex64": 2.0**-23, "float64": 2.0**-52, "complex128": 2.0**-52}
NAMES = ("numpy", "torch:cpu", "strict:device1")  # the last takes the device path


def gaussian(rng, shape, dtype):
    A = rng.standard_normal(shape)
    return A + 1j * rng.standard_normal(shape) if np.dtype(dtype).kind == "c" else A


def with_spectrum(rng, n, dtype, *, normal, spread=1.0):
    """A matrix with known sign: eigenvalues in both half-planes, between 10^-spread and 10^spread."""
    signs = rng.choice([-1.0, 1.0], n)
    sizes = 10.0 ** rng.uniform(-spread, spread, n)
    turned = np.exp(1j * rng.uniform(-1.3, 1.3, n)) if np.dtype(dtype).kind == "c" else 1.0
    V, W = (np.linalg.qr(gaussian(rng, (n, n), dtype)).Q for _ in range(2))
    cond = 1.0 if normal or n == 1 else 30.0
    V = (V * np.geomspace(1, 1 / cond, n)) @ W
    inverse = np.linalg.inv(V)
    return ((V * (signs * sizes * turned)) @ inverse).astype(dtype), (V * signs) @ inverse, cond


@pytest.mark.parametrize("normal", [True, False], ids=["normal", "nonnormal"])
@pytest.mark.parametrize("n", [1, 2, 5, 16, 50])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_square_is_one_and_it_commutes(name, dtype, n, normal):
    """||S^2 - I|| and ||A S - S A||/||A|| in units of n eps ||S||^2, by what one inverse and one product lose."""
    rng = np.random.default_rng(n)
    for _ in range(4):
        A, exact, cond = with_spectrum(rng, n, dtype, normal=normal)
        S = BACKENDS[name].call(orthlin.matrix_sign, A).astype(complex)
        unit = n * EPS[dtype] * np.linalg.norm(exact, 2) ** 2
        assert np.linalg.norm(S @ S - np.eye(n), 2) <= 4 * unit
        assert np.linalg.norm(S @ A - A @ S, 2) <= 4 * unit * np.linalg.norm(A, 2)
        # an eigenvalue is moved by eps cond(V) ||A||, and the sign by that over the smallest, times cond(V)
        assert np.linalg.norm(S - exact, 2) <= n * EPS[dtype] * cond**2 * np.linalg.cond(A)


@pytest.mark.parametrize(
    ("A", "sign"),
    [
        ([[3.0, 1.0], [0.0, -2.0]], [[1.0, 0.4], [0.0, -1.0]]),
        ([[2.0, 1.0], [0.0, 2.0]], [[1.0, 0.0], [0.0, 1.0]]),
        ([[-3.0, 1.0, 0.0], [0.0, -3.0, 1.0], [0.0, 0.0, -3.0]], -np.eye(3)),
        ([[0.0, 1.0], [1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]),
        ([[1.0, -5.0], [5.0, 1.0]], np.eye(2)),  # 1 +- 5i
        ([[1.0, 100.0], [0.0, -1.0]], [[1.0, 100.0], [0.0, -1.0]]),  # an involution is its own sign
        ([[4.0]], [[1.0]]),
        ([[-1e-3]], [[-1.0]]),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_known_examples(name, A, sign):
    bound = 32 * 2.0**-52 * np.linalg.norm(sign) ** 3
    np.testing.assert_allclose(BACKENDS[name].call(orthlin.matrix_sign, np.asarray(A)), sign, atol=bound)


NO_SIGN = {
    "zero": np.zeros((3, 3)),
    "ones": np.ones((4, 4)),
    "one zero eigenvalue": np.diag([1.0, 0.0, -1.0]),
    "below eps": np.diag([1.0, 1e-200]),
    "rotation": np.asarray([[0.0, 1.0], [-1.0, 0.0]]),
    "rotation and more": np.asarray([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 2.0]]),
    "nilpotent": np.diag([1.0, 1.0], 1),
}


@pytest.mark.parametrize("A", NO_SIGN.values(), ids=NO_SIGN)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", [*NAMES, "strict"])
def test_no_sign_next_to_the_imaginary_axis(name, dtype, A):
    """As it stands and in a basis that hides it behind rounding errors."""
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal(A.shape)).Q
    for given in (A.astype(dtype), (Q @ A @ Q.T).astype(dtype)):
        xp = BACKENDS[name]
        if xp.host:
            with pytest.raises(SingularError, match="A: has an eigenvalue on the imaginary axis"):
                xp.call(orthlin.matrix_sign, given)
        else:
            assert np.isnan(xp.call(orthlin.matrix_sign, given)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["numpy", "torch:cpu"])
def test_a_batch_equals_a_loop_bit_for_bit(name, dtype):
    """Though the matrices converge after different numbers of steps."""
    rng = np.random.default_rng(0)
    A = np.stack([with_spectrum(rng, 6, dtype, normal=False, spread=i / 4)[0] for i in range(6)]).reshape(2, 3, 6, 6)
    S = BACKENDS[name].call(orthlin.matrix_sign, A)
    for i in np.ndindex(2, 3):
        np.testing.assert_array_equal(S[i], BACKENDS[name].call(orthlin.matrix_sign, A[i]))


@pytest.mark.parametrize("k", [-140, -60, 0, 60, 120])
@pytest.mark.parametrize("method", ["newton", "newton_schulz"])
def test_powers_of_two_change_no_bit(method, k):
    A = np.asarray([[3.0, 1.0, 0.0], [1.0, -2.0, 1.0], [0.0, 1.0, 5.0]], dtype="float32")
    expected = orthlin.matrix_sign(A, method=method)
    np.testing.assert_array_equal(orthlin.matrix_sign(np.ldexp(A, k), method=method), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["newton", "newton_schulz"])
def test_hermitian_sign_is_the_polar_factor(method, dtype):
    """A = S (A^2)^(1/2) is the polar decomposition of a Hermitian matrix."""
    A, _, _ = with_spectrum(np.random.default_rng(0), 12, np.zeros(1, dtype).real.dtype, normal=True)
    A = ((A + A.T) / 2).astype(dtype)
    bound = 32 * EPS[dtype] * np.linalg.cond(A)
    S = orthlin.matrix_sign(A, method=method)
    np.testing.assert_allclose(S, orthlin.polar(A, method="svd").U, atol=bound)


def test_newton_schulz_serves_real_spectra_and_keeps_zero():
    rng = np.random.default_rng(3)
    A, exact, cond = with_spectrum(rng, 8, "float64", normal=False)
    S = orthlin.matrix_sign(A, method="newton_schulz")
    assert np.linalg.norm(S - exact) <= 1e3 * 2.0**-52 * cond**2 * np.linalg.cond(A)
    singular = orthlin.matrix_sign(np.diag([2.0, 0.0, -3.0]), method="newton_schulz")
    np.testing.assert_allclose(singular, np.diag([1.0, 0.0, -1.0]), atol=2.0**-50)


def test_a_schedule_drives_it(xp):
    A = np.diag([1.0, -0.5, 0.25, -0.1, 0.05]).astype("float32")
    schedule = schedules.muon()
    S = xp.call(orthlin.matrix_sign, A, method="newton_schulz", schedule=schedule)
    x = np.diag(A).astype(float) / np.linalg.norm(A)
    np.testing.assert_allclose(S, np.diag([schedule(v) for v in x]), atol=2.0**-23 * schedule.slope)


def test_every_library_agrees(xp):
    A, exact, cond = with_spectrum(np.random.default_rng(1), 5, "float32", normal=False)
    bound = 5 * EPS["float32"] * cond**2 * np.linalg.cond(A)
    np.testing.assert_allclose(xp.call(orthlin.matrix_sign, A), exact, atol=bound)


@pytest.mark.parametrize("shape", [(0, 0), (0, 3, 3), (2, 0, 0)])
@pytest.mark.parametrize("method", ["newton", "newton_schulz"])
def test_empty(shape, method):
    for name in (*NAMES, "strict"):
        assert BACKENDS[name].call(orthlin.matrix_sign, np.zeros(shape), method=method).shape == shape


def test_half_precision_is_worked_on_in_single():
    A = np.asarray([[3.0, 1.0], [0.0, -2.0]], dtype="float16")
    S = orthlin.matrix_sign(A)
    assert S.dtype == A.dtype
    np.testing.assert_allclose(S, [[1.0, 0.4], [0.0, -1.0]], atol=2.0**-11)


def test_bad_arguments():
    with pytest.raises(ShapeError, match="A: expected square matrices"):
        orthlin.matrix_sign(np.ones((2, 3)))
    with pytest.raises(OptionError, match="method: expected one of"):
        orthlin.matrix_sign(np.eye(2), method="schur")
    with pytest.raises(OptionError, match="method 'newton' takes none"):
        orthlin.matrix_sign(np.eye(2), schedule=schedules.muon())
    with pytest.raises(NonFiniteError, match="A: holds NaN"):
        orthlin.matrix_sign(np.full((2, 2), np.nan))
