"""The device path on torch's values of the host, over the gallery, with exact and with rounded large products."""

from contextlib import contextmanager
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_lowrank
import test_polar
import torch
from conftest import BACKENDS
from gallery import DTYPES, FAMILIES, SHAPES, case, cases
from torch.utils._python_dispatch import TorchDispatchMode

import orthlin
from orthlin import _backend as be
from orthlin._backend import arrays, linalg, powers

SINGLE = ("float32", "complex64")
EPS = np.finfo("float32").eps
FAMILIES_LISTED = tuple(FAMILIES)
DEEP = ((96, 32), (32, 96), (128, 128))
cpu = BACKENDS["torch:cpu"]


def no(x):
    return False


@contextmanager
def forced():
    """No array counts as one of the host."""
    with (
        mock.patch.object(be, "is_host", no),
        mock.patch.object(arrays, "is_host", no),
        mock.patch.object(linalg, "is_host", no),
        mock.patch.object(powers, "is_host", no),
        mock.patch.dict(linalg.products.__globals__, is_host=no),
    ):
        yield


device = type(cpu)("torch:device", cpu.asarray, cpu.to_numpy, forced)


def gaussian(*shape, dtype="float32"):
    return test_lowrank.gaussian(*shape, dtype=dtype, seed=5)


@pytest.mark.parametrize("dtype", SINGLE)
def test_low_rank_on_the_gallery(dtype):
    given = cases(shapes=[s for s in SHAPES if min(s) < 128], dtypes=(dtype,))
    assert list(test_lowrank.failures(device, given, lambda k: (k // 4, k))) == []


@pytest.mark.parametrize("dtype", SINGLE)
def test_low_rank_on_the_gallery_without_double_precision(monkeypatch, dtype):
    monkeypatch.setattr(be, "wide_dtype", lambda *_, **__: None)
    given = cases(shapes=[s for s in SHAPES if min(s) < 128], dtypes=(dtype,))
    assert list(test_lowrank.failures(device, given, lambda k: (k // 4, k // 2, k))) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_polar_on_the_gallery(side, dtype):
    assert test_polar.failures(device, cases(dtypes=(dtype,)), side=side) == {}


@pytest.mark.parametrize("dtype", [*DTYPES, "bfloat16", "float16"])
def test_powers_of_two_change_nothing(dtype):
    """From subnormal numbers to near overflow."""
    A = torch.randn(20, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A = (A / 8).round(decimals=1) if dtype == "float16" else A  # a few bits, which survive where numbers are subnormal
    A = A.to(getattr(torch, dtype))
    info = torch.finfo(A.dtype)
    low, high = round(np.log2(info.smallest_normal)) + 12, round(np.log2(info.max)) - 3
    if dtype == "float16":
        low, high = -2, 10
    with forced():
        for options in ({}, {"tol": 0.1}, {"schedule": orthlin.schedules.muon()}):
            expected = orthlin.orthogonalize(A, **options)
            for e in (low, -3, 1, high):
                assert torch.equal(orthlin.orthogonalize(A * 2.0**e, **options), expected)


def test_what_is_subnormal_is_orthogonalized():
    A = torch.eye(4, 6) * 2.0**-149
    A[1, 1] *= 3
    with forced():
        assert torch.equal(orthlin.orthogonalize(A).round(decimals=5), torch.eye(4, 6))


@pytest.mark.parametrize("dtype", SINGLE)
@pytest.mark.parametrize("shape", DEEP)
def test_a_stack_equals_a_loop_and_one_bad_matrix_spoils_no_other(shape, dtype):
    A = np.stack([case(family, shape, dtype).A for family in FAMILIES])
    A[3, 1, 2] = np.nan
    omega = gaussian(shape[1], 8, dtype=dtype)
    for function, options in (
        (orthlin.lowrank_orth, {"test_matrix": omega}),
        (orthlin.lowrank_orth, {"test_matrix": omega, "tol": 0.01}),
        (orthlin.orthogonalize, {}),
        (orthlin.orthogonalize, {"tol": 0.1}),
    ):
        rank = (8,) if function is orthlin.lowrank_orth else ()
        O = device.call(function, A, *rank, **options)
        for i, matrix in enumerate(A):
            alone = device.call(function, matrix, *rank, **options)
            np.testing.assert_array_equal(O[i], alone, err_msg=FAMILIES_LISTED[i])
            assert np.isnan(alone).all() == (i == 3)


def rounded(bits):
    """Products whose operands are rounded to so many bits: TensorFloat-32 has 11, bfloat16 8."""

    def cut(x):
        if x.is_complex():
            return torch.complex(cut(x.real), cut(x.imag))
        fraction, exponent = torch.frexp(x)
        return torch.ldexp((fraction * 2**bits).round() / 2**bits, exponent)

    def product(xp, a, b, dtype=None, *, precision="highest"):
        assert precision == ("high" if bits == 11 else "highest")
        found = cut(a) @ cut(b)
        return found if dtype is None else found.to(dtype)

    return product


@pytest.mark.parametrize("tol", [None, 0.1])
@pytest.mark.parametrize("dtype", SINGLE)
@pytest.mark.parametrize(("bits", "precision"), [(11, "high"), (8, "highest")])
def test_rounded_large_products_leave_factors_partial_isometries(monkeypatch, bits, precision, dtype, tol):
    """No singular value above one, and where nothing is small, all of them one."""
    monkeypatch.setattr(be, "large_product", rounded(bits))
    for c in cases(shapes=DEEP, dtypes=(dtype,)):
        for r in (4, min(c.A.shape) // 2):
            omega = gaussian(c.A.shape[1], r, dtype=dtype)
            for X in device.call(orthlin.lowrank_orth_factors, c.A, r, test_matrix=omega, tol=tol, precision=precision):
                s = np.linalg.svd(X.astype(np.result_type(X, float)), compute_uv=False)
                bound = 32 * EPS * r**0.5 if tol is None else tol
                assert s[0] <= 1 + bound, c.id
                assert tol or not c.full_rank or c.kappa > 1e2 or s[-1] >= 1 - bound, c.id


class Precisions(TorchDispatchMode):
    """The precision of float32 products with the matrix itself, and of all others."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.large, self.small = {shape, shape[::-1]}, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if "mm" in func.overloadpacket.__name__ and out.dtype in (torch.float32, torch.complex64):
            shapes = {tuple(x.shape[-2:]) for x in (*args, out) if isinstance(x, torch.Tensor)}
            side = self.large if shapes & self.shape else self.small
            side.append(torch.backends.mkldnn.matmul.fp32_precision)
        return out


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("around", ["highest", "high"])
def test_high_precision_is_that_of_the_large_products_alone(monkeypatch, around, precision, double):
    """With the CPU's flag in the place of CUDA's; whatever the user's is."""
    monkeypatch.setitem(linalg.products.__globals__, "_SHORT", {"cpu": "tf32"})
    if not double:
        monkeypatch.setattr(be, "wide_dtype", lambda *_, **__: None)
    G, omega = (torch.from_numpy(gaussian(*shape)) for shape in ((40, 60), (60, 8)))
    torch.set_float32_matmul_precision(around)
    try:
        before = torch.backends.mkldnn.matmul.fp32_precision
        with forced(), Precisions((40, 60)) as seen:
            orthlin.lowrank_orth(G, 8, test_matrix=omega, n_iter=1, precision=precision)
        assert torch.backends.mkldnn.matmul.fp32_precision == before
        assert torch.get_float32_matmul_precision() == around
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(seen.large) == 5
    assert "tf32" not in seen.small
    assert {flag == "tf32" for flag in seen.large} == {precision == "high"}


@pytest.mark.parametrize("warm_start", [True, False])
def test_so_it_is_in_a_step(monkeypatch, warm_start):
    monkeypatch.setitem(linalg.products.__globals__, "_SHORT", {"cpu": "tf32"})
    G = torch.from_numpy(gaussian(40, 60))
    stepper = orthlin.steppers.muon(
        0.1, rank=8, warm_start=warm_start, n_iter=1, tail="auto", scale="nuclear", precision="high"
    )
    with forced(), Precisions((40, 60)) as seen:
        stepper.update(G, stepper.init(G), G)
    assert seen.large[:4] == ["tf32"] * 4
    assert "tf32" not in {*seen.small, *seen.large[4:]}


@pytest.mark.parametrize("x64", [True, False])
def test_so_it_is_in_jaxs_programs(x64):
    with jax.enable_x64(x64):
        G, omega = jnp.ones((40, 60), jnp.float32), jnp.ones((60, 8), jnp.float32)
        for precision, count in (("highest", 0), ("high", 3)):
            made = jax.jit(lambda G, p=precision: orthlin.lowrank_orth(G, 8, test_matrix=omega, precision=p))
            program = made.lower(G).as_text()
            assert program.count("precision = [HIGH, HIGH]") == count
            assert program.count("dot_general") == program.count("precision = [HIGH")


@pytest.mark.parametrize("name", ["numpy", "torch:cpu"])
def test_high_precision_is_the_highest_on_the_host(name):
    host, G, omega = BACKENDS[name], gaussian(40, 60), gaussian(60, 8)
    found, full = (host.call(orthlin.lowrank_orth, G, 8, test_matrix=omega, precision=p) for p in ("high", "highest"))
    np.testing.assert_array_equal(found, full)
