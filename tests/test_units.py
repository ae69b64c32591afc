"""CPUs whose units multiply in bfloat16: large products of single precision at "medium" use it, nothing else does."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import BACKENDS
from gallery import SHAPES, cases
from test_forced_device import EPS, gaussian
from torch.utils._python_dispatch import TorchDispatchMode

import orthlin
from orthlin import _backend as be
from orthlin._backend import linalg
from orthlin.torch import LowRankMuon, Muon

cpu = BACKENDS["torch:cpu"]


class Products(TorchDispatchMode):
    """Dtype and flag of the products that a matrix of a shape takes part in, and of all others."""

    def __init__(self, *shape):
        super().__init__()
        self.shape, self.large, self.small = {shape, shape[::-1]}, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if "mm" in func.overloadpacket.__name__:
            shapes = {tuple(x.shape[-2:]) for x in (*args, out) if isinstance(x, torch.Tensor)}
            side = self.large if shapes & self.shape else self.small
            side.append((out.dtype, torch.backends.mkldnn.matmul.fp32_precision == "bf16"))
        return out


@pytest.mark.parametrize(
    ("found", "dtype", "expected"),
    [
        ({}, "bfloat16", False),
        ({"amx_bf16": True}, "bfloat16", True),
        ({"avx512_bf16": True}, "bfloat16", True),
        ({"bf16": True}, "bfloat16", True),
        ({"avx512_bf16": True}, "float16", False),
        ({"avx512_fp16": True}, "float16", True),
    ],
)
def test_torch_is_asked_for_the_units(monkeypatch, found, dtype, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert linalg.units.__wrapped__(f"torch.{dtype}") is expected


def test_units_are_of_no_use_without_a_library_that_has_them(monkeypatch):
    """As on macOS, where torch multiplies bfloat16 entry by entry."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True}, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not linalg.units.__wrapped__("torch.bfloat16")


def test_a_torch_that_cannot_say_has_none(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not linalg.units.__wrapped__("torch.bfloat16")


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_single_precision_of_torch_attains_medium(feigned_units, precision):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        attained = be.attained(torch.ones(2, 2, dtype=dtype), precision)
        assert attained == (precision if precision == "medium" else "highest")
    for x in (torch.ones(2, 2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.complex64), np.ones((2, 2))):
        assert be.attained(x, precision) == "highest"
    assert be.attained(jnp.ones((2, 2)), precision) == precision  # which has the device path everywhere


def test_without_units_nothing_is_short():
    assert be.attained(torch.ones(2, 2), "medium") == "highest"


@pytest.mark.parametrize("rank", [4, 16])
def test_large_products_alone_are_short(feigned_units, rank):
    G, omega = (torch.from_numpy(gaussian(*shape)) for shape in ((40, 60), (60, rank)))
    with Products(40, 60) as seen:
        orthlin.lowrank_orth(G, rank, test_matrix=omega, n_iter=1, precision="medium")
    assert [dtype for dtype, _ in seen.large] == [torch.bfloat16] * 5
    assert {dtype for dtype, _ in seen.small} <= {torch.float32, torch.float64}
    assert not any(flag for _, flag in seen.small)


def test_in_a_step_the_last_product_is_short_by_torchs_flag(feigned_units):
    weight = torch.nn.Parameter(torch.from_numpy(gaussian(40, 60)))
    weight.grad = weight.detach().clone()
    optimizer = LowRankMuon([weight], lr=0.1, rank=8, precision="medium")
    before = torch.backends.mkldnn.matmul.fp32_precision
    with Products(40, 60) as seen:
        optimizer.step()
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert [(dtype, flag) for dtype, flag in seen.large if dtype == torch.float32] == [(torch.float32, True)]
    assert [dtype for dtype, _ in seen.large] == [torch.bfloat16] * 2 + [torch.float32]
    assert not any(flag for dtype, flag in seen.small if dtype == torch.float64)


@pytest.mark.parametrize("tol", [None, 0.1])
def test_factors_of_the_gallery_stay_orthonormal(feigned_units, tol):
    """No singular value above one, and where nothing is small, all of them one."""
    for c in cases(shapes=[s for s in SHAPES if min(s) < 128], dtypes=("float32",)):
        for r in {1, max(min(c.A.shape) // 4, 1), max(min(c.A.shape) // 2, 1)}:
            omega = gaussian(c.A.shape[1], r)
            options = {"test_matrix": omega, "tol": tol, "precision": "medium"}
            for X in cpu.call(orthlin.lowrank_orth_factors, c.A, r, **options):
                s = np.linalg.svd(X.astype(float), compute_uv=False)
                bound = 32 * EPS * r**0.5 if tol is None else tol
                assert s[0] <= 1 + bound, c.id
                assert tol or not c.full_rank or c.kappa > 1e2 or s[-1] >= 1 - bound, c.id


@pytest.mark.parametrize("exponent", [-100, 0, 100])
def test_the_rounding_is_a_backward_error(feigned_units, exponent):
    """What is orthogonalized is captured as well as in float32, and equal to what it is there to bfloat16's digits."""
    G = gaussian(60, 8) @ gaussian(8, 90) + 0.01 * gaussian(60, 90)
    omega = gaussian(90, 8)
    G = G * np.float32(2.0) ** np.float32(exponent)
    short, full = (cpu.call(orthlin.lowrank_orth, G, 8, test_matrix=omega, precision=p) for p in ("medium", "highest"))
    assert np.linalg.norm(short - full) <= 16 * 2.0**-8 * 8**0.5
    assert np.linalg.norm(short - full) > 0


def test_subnormal_matrices_are_not_taken_for_zero(feigned_units, monkeypatch):
    """As units do, here all; one matrix of a stack is enough."""
    whole = be.reduced

    def flushed(xp, x, precision):
        short = whole(xp, x, precision)
        return xp.where(xp.abs(short) < 2.0**-126, 0, short)

    monkeypatch.setattr(be, "reduced", flushed)
    G = np.stack([gaussian(40, 60), gaussian(40, 60) * np.float32(2.0**-135)])
    s = np.linalg.svd(cpu.call(orthlin.lowrank_orth, G, 4, test_matrix=gaussian(60, 4), precision="medium"))[1]
    np.testing.assert_allclose(s[:, :4], 1, atol=2.0**-6)


def test_bad_and_empty_matrices(feigned_units):
    omega = gaussian(60, 4)
    zero = cpu.call(orthlin.lowrank_orth, np.zeros((40, 60), np.float32), 4, test_matrix=omega, precision="medium")
    assert not zero.any()
    bad = np.full((40, 60), np.nan, np.float32)
    with pytest.raises(orthlin.errors.NonFiniteError, match="G: "):
        cpu.call(orthlin.lowrank_orth, bad, 4, test_matrix=omega, precision="medium")


@pytest.mark.parametrize(
    "options", [{}, {"rank": 4}, {"rank": 4, "tol": None}, {"tail": 0.0}, {"error_feedback": True}]
)
def test_low_rank_steps_are_those_of_float32_to_its_digits(feigned_units, options):
    compared(lambda weights, precision: LowRankMuon(weights, 0.1, **({"rank": 8} | options), precision=precision), 0.01)


@pytest.mark.parametrize(("schedule", "bound"), [("muon", 0.04), ("polar_express", 0.15)])  # which is steeper at zero
def test_full_steps_multiply_in_bfloat16(feigned_units, schedule, bound):
    compared(lambda weights, precision: Muon(weights, 0.1, schedule=schedule, precision=precision), bound)


def compared(make, bound):
    """Three steps, one of the gradients bad, at both precisions; no small direction hides behind large ones."""
    g, moved = torch.from_numpy(gaussian(24, 40)), {}
    for precision in ("medium", "highest"):
        weights = [torch.nn.Parameter(g.clone()) for _ in range(2)]
        optimizer = make(weights, precision)
        for step in range(3):
            for i, weight in enumerate(weights):
                weight.grad = g.roll(step + i, 1)
                if i and step == 1:
                    weight.grad[3, 3] = torch.nan
            optimizer.step()
        moved[precision] = torch.stack([w.detach() - g for w in weights])
        assert int(optimizer.skipped()) == 1
    difference, size = (torch.linalg.vector_norm(x) for x in (moved["medium"] - moved["highest"], moved["highest"]))
    assert 0 < difference <= bound * size
