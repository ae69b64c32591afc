"""Every routine has the abilities that the registry says, and refuses or fails at the others."""

import warnings

import fakecupy
import jax
import numpy as np
import pytest
import torch
from support import ABILITIES, OMEGA, REGISTRY, SHAPE

import orthlin
from orthlin import metrics, sketch, steppers


def sample(*shape, dtype=np.float64):
    rng = np.random.default_rng(0)
    A = rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
    return A.astype(dtype) if np.dtype(dtype).kind == "c" else A.real.astype(dtype)


def tensors(result):
    return list(result) if isinstance(result, tuple) else [result]


def stacks(call):
    found, loop = (tensors(call(sample(*shape), sample(*OMEGA))) for shape in ((3, *SHAPE), SHAPE))
    for x, one in zip(found, loop, strict=True):
        assert x.shape == (3, *np.shape(one)) or x.shape == np.shape(one)  # draws have no batch


def complex_numbers(call):
    for x in tensors(call(sample(*SHAPE, dtype=np.complex64), sample(*OMEGA, dtype=np.complex64))):
        assert np.isfinite(x).all()


def half(call):
    A, W = (torch.from_numpy(sample(*shape)).bfloat16() for shape in (SHAPE, OMEGA))
    assert all(torch.isfinite(x).all() for x in tensors(call(A, W)))


def nothing_waits(call):
    with fakecupy.standing_in() as cupy:
        call(cupy.asarray(sample(*SHAPE)), cupy.asarray(sample(*OMEGA)))


def jitted(call):
    jax.make_jaxpr(call)(sample(*SHAPE), sample(*OMEGA))


def compiled(call):
    torch.compiler.reset()
    A, W = (torch.from_numpy(sample(*shape)) for shape in (SHAPE, OMEGA))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of caches that it traces through
        torch.compile(call, fullgraph=True, backend="eager")(A, W)


def derivative(call):
    """A derivative along a random direction that is finite and that of a difference quotient."""
    A, E = (torch.from_numpy(sample(*SHAPE)), torch.from_numpy(sample(2, *SHAPE)[1]))
    W = torch.from_numpy(sample(*OMEGA))

    def along(h):
        return sum((x * torch.arange(1.0, x.numel() + 1).reshape(x.shape)).sum() for x in tensors(call(A + h * E, W)))

    h = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(along(h), h)
    assert g != 0
    assert float(g) == pytest.approx(float(along(1e-6) - along(-1e-6)) / 2e-6, rel=1e-5)


CHECKS = dict(zip(ABILITIES, (stacks, complex_numbers, half, nothing_waits, jitted, compiled, derivative), strict=True))


@pytest.mark.parametrize("ability", ABILITIES)
@pytest.mark.parametrize("name", REGISTRY)
def test_the_registry_says_what_a_routine_can_do(name, ability):
    entry = REGISTRY[name]
    if ability not in entry.lacks:
        CHECKS[ability](entry.call)
        return
    with pytest.raises(Exception):  # noqa: B017, PT011  whatever a library says where it cannot
        CHECKS[ability](entry.call)


def test_every_routine_on_arrays_is_in_the_registry():
    modules = {"errors", "metrics", "schedules", "sketch", "steppers"}
    names = [name for name in orthlin.__all__ if name not in modules and name[0].islower()]
    names += [f"sketch.{name}" for name in sketch.__all__] + ["steppers.muon", "steppers.msgd"]
    no_arrays = {"hmt_frobenius_bound", "hmt_spectral_bound", "hmt_tail_bound", "posterior_factor", "TailBound"}
    names += [f"metrics.{name}" for name in metrics.__all__ if name not in no_arrays]
    assert {name.partition(",")[0] for name in REGISTRY} == set(names)
    assert set(steppers.__all__) >= {"muon", "msgd"}
