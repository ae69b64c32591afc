"""The polar decomposition meets its residuals on the whole gallery, at every scale, layout and batch."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import BACKENDS
from gallery import DTYPES, cases, geometric, judge_polar, ldexp, prescribed, scaled, within
from gallery import Spec as GallerySpec
from strategies import LAYOUTS

import orthlin
from orthlin import schedules
from orthlin.errors import NonFiniteError, OptionError, ScheduleError

HOSTS = ("numpy", "torch:cpu")


def failures(xp, given, **options):
    """The figures of the cases that do not keep `gallery.LIMITS`."""
    found = {}
    for c in given:
        U, H = xp.call(orthlin.polar, c.A, **options)
        figures = judge_polar(c.A, U, H, options.get("side", "right"))
        if not within(figures):
            found[c.id] = figures
    return found


def spectrum(cond, shape=(24, 16), dtype="float32", seed=0):
    spec = GallerySpec(np.random.default_rng(seed), *shape, np.dtype(dtype))
    return prescribed(spec, geometric(spec, cond))[0].astype(dtype)


def isometry_defect(U):
    U = U if U.shape[-2] >= U.shape[-1] else U.swapaxes(-1, -2).conj()
    return np.linalg.norm(U.swapaxes(-1, -2).conj() @ U - np.eye(U.shape[-1]), axis=(-2, -1)).max(initial=0.0)


# the gallery ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "side"),
    [
        *itertools.product(HOSTS, DTYPES, ["right"]),
        *itertools.product(["numpy"], DTYPES, ["left"]),
        ("torch:cpu", "float32", "left"),
        ("torch:cpu", "complex128", "left"),
        # products only, as on every device
        *itertools.product(["strict:device1"], ["float32", "float64"], ["right"]),
        ("strict:device1", "float32", "left"),
    ],
)
def test_every_gallery_case(name, dtype, side):
    assert failures(BACKENDS[name], cases(dtypes=(dtype,)), side=side) == {}


@pytest.mark.parametrize("method", ["svd", "newton_schulz"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_gallery_case_by_a_named_method(method, dtype):
    given = list(cases(dtypes=(dtype,)))
    assert sum(c.promised for c in given) > len(given) / 2  # judged on the whole matrix; the rest on its range
    assert failures(BACKENDS["numpy"], given, method=method) == {}


@pytest.mark.parametrize("name", ["jax", "jax:jit"])
def test_every_family_on_jax(name):
    """In one batch, which is compiled once.  XLA flushes subnormal numbers, so H loses those: it is zero there."""
    given = list(cases(shapes=((32, 32),), dtypes=("float32",)))
    U, H = BACKENDS[name].call(orthlin.polar, np.stack([c.A for c in given]))
    for c, u, h in zip(given, U, H, strict=True):
        assert within(judge_polar(*with_exact_hermitian_factor(c.A, u))), c.id
        assert c.norm is None or c.norm < 1e-36 or within(judge_polar(c.A, u, h)), c.id


def with_exact_hermitian_factor(A, U):
    """A, U, and the Hermitian factor of U in double precision, all free of subnormal numbers."""
    A = scaled(A)[0]
    H = ldexp(U, 0).conj().T @ A
    return A.astype(U.dtype), U, (H + H.conj().T) / 2


@pytest.mark.parametrize("factor", np.linspace(1, 2.2, 7))
@pytest.mark.parametrize("method", ["newton_schulz", "gram_newton_schulz"])
def test_no_norm_makes_it_converge_to_the_wrong_sign(method, factor):
    """The cubic sends 1.75 to -1: perfectly orthogonal, and U^H A indefinite."""
    A = spectrum(3.0, dtype="float64") * factor
    U = orthlin.orthogonalize(A, method=method, schedule=schedules.newton_schulz(40))
    assert isometry_defect(U) <= 1e-12
    assert np.linalg.eigvalsh(U.T @ A)[0] > 0


@pytest.mark.parametrize("cond", [1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("method", ["auto", "svd", "newton_schulz", "gram_newton_schulz"])
def test_forward_error_is_that_of_the_condition_number(method, cond):
    """|dU| <= |dA| / sigma_n for rectangular A; dA of 64 eps |A| is the promised backward error."""
    A = spectrum(cond)
    exact = orthlin.orthogonalize(A.astype(float), method="svd")
    # the Gram form squares the condition number, restarts bound that at 1e-2 of the factor
    bound = 64 * np.finfo("float32").eps * cond * 4 + (1e-2 if method[0] == "g" else 0)
    assert np.linalg.norm(orthlin.orthogonalize(A, method=method) - exact) <= bound


# sides, shapes, batches, layouts -------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_side_says_where_the_hermitian_factor_stands(xp, shape):
    if xp.name.startswith("jax") and shape != (5, 5):
        pytest.skip("a shape is compiled for seconds")
    A = np.random.default_rng(0).standard_normal(shape).astype("float32")
    right, left = (xp.call(orthlin.polar, A, side=side) for side in ("right", "left"))
    assert right.H.shape == (shape[1],) * 2
    assert left.H.shape == (shape[0],) * 2
    assert right.P is right.H
    np.testing.assert_array_equal(left.U, right.U)
    np.testing.assert_allclose(right.U @ right.H, A, atol=1e-5)
    np.testing.assert_allclose(left.H @ left.U, A, atol=1e-5)
    # by products only the two iterations differ, as they do with null directions
    np.testing.assert_allclose(xp.call(orthlin.orthogonalize, A), right.U, rtol=0, atol=0 if xp.host else 1e-5)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (0, 3, 3), (2, 0, 4, 3), (2, 3, 0)])
@pytest.mark.parametrize("name", [*HOSTS, "strict", "strict:device1"])
def test_empty_matrices_and_batches(name, shape):
    A, xp = np.zeros(shape, dtype="complex64"), BACKENDS[name]
    for side, n in (("right", shape[-1]), ("left", shape[-2])):
        U, H = xp.call(orthlin.polar, A, side=side)
        assert (U.shape, H.shape) == (shape, (*shape[:-2], n, n))
        assert not H.any()
    for options in ({}, {"schedule": schedules.muon()}, {"tol": 0.1}, {"method": "svd"}):
        assert xp.call(orthlin.orthogonalize, A, **options).shape == shape


@pytest.mark.parametrize("options", [{}, {"schedule": schedules.muon()}, {"tol": 1e-3}])
def test_zero_gives_zero(xp, options):
    A = np.zeros((5, 5), dtype="float32")
    assert not xp.call(orthlin.orthogonalize, A, **options).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HOSTS)
def test_a_batch_equals_a_loop_bit_for_bit(name, dtype):
    """Well and ill-conditioned matrices mixed, so that one call takes both routes, and a zero matrix."""
    conds = (1.0, 1e6, 1e2, 10.0, 1e5, 1e3)
    A = np.stack([spectrum(c, dtype=dtype, seed=i) for i, c in enumerate(conds)]).reshape(2, 3, 24, 16)
    A[1, 2] = 0
    xp = BACKENDS[name]
    for side in ("right", "left"):
        U, H = xp.call(orthlin.polar, A, side=side)
        for i in np.ndindex(2, 3):
            one = xp.call(orthlin.polar, A[i], side=side)
            np.testing.assert_array_equal(U[i], one.U)
            np.testing.assert_array_equal(H[i], one.H)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"schedule": schedules.polar_express()}], ids=["auto", "schedule"])
def test_every_layout_equals_the_contiguous_copy(layout, options):
    """Up to 4 eps: products of transposed operands are summed in another order."""
    A = LAYOUTS[layout](np.random.default_rng(0).standard_normal((3, 9, 5)).astype("float32"))
    copy = np.ascontiguousarray(A)
    given = orthlin.orthogonalize(A, **options)
    np.testing.assert_allclose(given, orthlin.orthogonalize(copy, **options), rtol=0, atol=4 * 2.0**-23)
    np.testing.assert_array_equal(A, copy)


# scale ---------------------------------------------------------------------------------------------

OPTIONS = {
    "auto": {},
    "svd": {"method": "svd"},
    "newton_schulz": {"method": "newton_schulz"},
    "muon": {"schedule": schedules.muon()},
    "muon_plain": {"schedule": schedules.muon(), "method": "newton_schulz"},
    "muon_gram": {"schedule": schedules.muon(), "method": "gram_newton_schulz"},
    "tol": {"tol": 0.05},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "complex64", "float64"])
def test_powers_of_two_change_no_bit(dtype, options):
    """Integers up to 8 times every power of two that can hold them, from the smallest subnormal number on."""
    info, rng = np.finfo(dtype), np.random.default_rng(0)
    A = rng.integers(-8, 9, (4, 7)).astype(dtype)
    A = A + 1j * rng.integers(-8, 9, (4, 7)).astype("float32") if np.dtype(dtype).kind == "c" else A
    A = A.astype(dtype)
    expected = orthlin.orthogonalize(A, **options)
    low, high = info.minexp - info.nmant, info.maxexp - 4
    step = 1 if info.bits < 64 else 29  # 2,094 binary orders take a minute
    for k in {low, low + 1, info.minexp, 0, high, *range(low, high, step)}:
        factor = np.ldexp(np.ones(2, dtype=info.dtype), [k // 2, k - k // 2])
        np.testing.assert_array_equal(orthlin.orthogonalize(A * factor[0] * factor[1], **options), expected, str(k))


@pytest.mark.parametrize("decade", range(-45, 39))
def test_right_at_every_power_of_ten(decade):
    """All 84 that float32 holds; H is allowed one unit in the last place of the smallest subnormal numbers."""
    A = (np.random.default_rng(decade + 45).standard_normal((12, 8)) * float(f"1e{decade}") / 4).astype("float32")
    for method in ("auto", "newton_schulz"):
        U, H = orthlin.polar(A, method=method)
        scaled_A, _, exact = with_exact_hermitian_factor(A, U)
        assert within(judge_polar(scaled_A, U, exact))
        error = np.abs(H - ldexp(exact, scaled(A)[1])).max()
        assert error <= 8 * 2.0**-23 * np.abs(H).max() + 2.0**-149
    assert (np.linalg.norm(orthlin.orthogonalize(A, schedule=schedules.muon()), 2) > 0.6) == A.any()


# half precision ------------------------------------------------------------------------------------

HALVES = {
    "numpy:float16": (lambda a: a.astype("float16"), 2.0**-10),
    "torch:float16": (lambda a: torch.asarray(a, dtype=torch.float16), 2.0**-10),
    "torch:bfloat16": (lambda a: torch.asarray(a, dtype=torch.bfloat16), 2.0**-7),
    "jax:bfloat16": (lambda a: jnp.asarray(a, dtype=jnp.bfloat16), 2.0**-7),
}


def as_double(x):
    return np.asarray(x.double() if isinstance(x, torch.Tensor) else x, dtype=float)


@pytest.mark.parametrize(("make", "eps"), HALVES.values(), ids=HALVES)
def test_half_precision_is_worked_on_in_single(make, eps):
    """The only error is one rounding of U and H, by eps/2 each."""
    A = make(spectrum(10.0))
    U, H = orthlin.polar(A)
    assert U.dtype == H.dtype == A.dtype
    u, h, a = (as_double(x) for x in (U, H, A))
    assert isometry_defect(u) <= eps * np.sqrt(16)
    assert np.linalg.norm(u @ h - a) <= eps / 2 * (1 + np.sqrt(16)) * np.linalg.norm(a)
    assert np.all(h == h.T)


@pytest.mark.parametrize(("make", "eps"), HALVES.values(), ids=HALVES)
def test_half_precision_reaches_every_tolerance_it_can_hold(make, eps):
    A = make(spectrum(100.0))
    for tol in (8 * eps, 0.1, 0.5) if not isinstance(A, jnp.ndarray) else (8 * eps,):
        O = orthlin.orthogonalize(A, tol=tol)
        assert O.dtype == A.dtype
        assert np.abs(np.linalg.svd(as_double(O), compute_uv=False) - 1).max() <= tol
    with pytest.raises(OptionError, match="float16 can hold"):
        orthlin.orthogonalize(A, tol=7.9 * eps)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(64, 64), (200, 16), (16, 200)])
def test_tol_is_kept_in_single_and_double_precision(dtype, shape):
    """From the least that the dtype holds, with singular values down to the end of the interval."""
    A = spectrum(250.0, (max(shape), min(shape)), dtype)
    A = A if shape[0] >= shape[1] else A.T
    for tol in np.geomspace(8 * np.finfo(dtype).eps, 0.5, 25):
        O = orthlin.orthogonalize(A, tol=float(tol)).astype(float)
        assert np.abs(np.linalg.svd(O, compute_uv=False) - 1).max() <= tol


# errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_values_are_an_error_on_the_host_and_nan_elsewhere(xp, bad):
    A = np.ones((5, 5), dtype="float32")
    A[2, 3] = bad
    if xp.host:
        with pytest.raises(NonFiniteError, match="A: holds NaN or infinity"):
            xp.call(orthlin.polar, A)
    else:
        assert all(np.isnan(x).all() for x in xp.call(orthlin.polar, A))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "qdwh"}, OptionError, "method: expected one of"),
        ({"schedule": "muon"}, OptionError, "schedule: expected an orthlin"),
        ({"schedule": schedules.muon(), "tol": 0.1}, OptionError, "tol: choose either"),
        ({"schedule": schedules.muon(), "method": "svd"}, OptionError, "method: 'svd' takes neither"),
        ({"tol": 0.0}, OptionError, "tol: expected a number between"),
        ({"tol": 1e-8}, OptionError, "tol: float32 can hold 9.5e-07, got 1e-08"),
        ({"schedule": schedules.newton_schulz(3, upper=0.9)}, ScheduleError, "here they lie in"),
    ],
)
def test_contradictory_options(options, error, message):
    A = np.eye(3, dtype="float32")
    with pytest.raises(error, match=message):
        orthlin.orthogonalize(A, **options)


def test_unknown_side_or_method_of_polar():
    for options in ({"side": "both"}, {"method": "gram_newton_schulz"}):
        with pytest.raises(OptionError, match="expected one of"):
            orthlin.polar(np.eye(3), **options)
