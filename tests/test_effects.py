"""What a call must not do: write to an input, change anything on bad input, or wait for a device."""

import array_api_strict
import jax
import numpy as np
import pytest
import torch
from strategies import DTYPES, LAYOUTS, matrix

import orthlin
from orthlin import metrics, schedules, sketch
from orthlin.errors import (
    ArrayTypeError,
    DeviceError,
    DTypeError,
    NonFiniteError,
    OptionError,
    OrthlinError,
    RankError,
    RngError,
    ShapeError,
)

MUON = schedules.muon()
CALLS = {
    **{f"polar-{m}": lambda A, _, m=m: orthlin.polar(A, method=m) for m in ("auto", "svd", "newton_schulz")},
    "polar-left": lambda A, _: orthlin.polar(A, side="left"),
    "orthogonalize": lambda A, _: orthlin.orthogonalize(A),
    "orthogonalize-tol": lambda A, _: orthlin.orthogonalize(A, tol=0.1),
    **{
        f"schedule-{m}": lambda A, _, m=m: orthlin.orthogonalize(A, schedule=MUON, method=m)
        for m in ("newton_schulz", "gram_newton_schulz")
    },
    "sign": lambda A, _: orthlin.matrix_sign(A[..., :4, :4] + 4 * diagonal(A)),
    "sign-schedule": lambda A, _: orthlin.matrix_sign(square(A), method="newton_schulz"),
    **{
        f"qr-{m}": lambda A, _, m=m: orthlin.qr(A, method=m)
        for m in ("auto", "householder", "cholesky2", "shifted_cholesky3")
    },
    **{
        f"range-{n}": lambda A, O, n=n: orthlin.randomized_range_finder(A, 2, test_matrix=O, n_iter=1, normalizer=n)
        for n in ("qr", "none")
    },
    **{
        f"lowrank-{m}-{r}": lambda A, O, m=m, r=r: orthlin.lowrank_orth(A, r, test_matrix=O, method=m, n_iter=1)
        for m in ("auto", "exact")
        for r in (2, 3)
    },
    "factors": lambda A, O: orthlin.lowrank_orth_factors(A, 3, test_matrix=O),
    "orthogonality": lambda A, _: metrics.orthogonality(A),
    "gaussian": lambda A, _: sketch.gaussian(4, 3, like=A, rng=0),
}
HOST_ONLY = {"adaptive": lambda A, _: orthlin.adaptive_range_finder(A, tol=1e-3, rng=0)}


def diagonal(A):
    space = orthlin._backend.namespace(A)
    return space.eye(4, dtype=A.dtype, device=orthlin._backend.device(A))


def square(A):
    B = A[..., :4, :4]
    return orthlin._backend.adjoint(orthlin._backend.namespace(A), B) @ B + diagonal(A)


def root(A):
    """The array that owns the memory of `A`."""
    while isinstance(A.base, np.ndarray):
        A = A.base
    return A


# purity ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", *DTYPES])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("call", [*CALLS, *HOST_ONLY])
def test_no_input_is_written_to_in_any_layout_and_dtype(call, layout, dtype):
    A, O = (matrix((2, *shape), dtype, seed, layout=layout) for seed, shape in enumerate([(8, 4), (4, 3)]))
    if call == "adaptive":
        A = A[0]
    before = root(A).tobytes(), root(O).tobytes()
    (CALLS | HOST_ONLY)[call](A, O)
    assert (root(A).tobytes(), root(O).tobytes()) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128], ids=str)
@pytest.mark.parametrize("call", [*CALLS, *HOST_ONLY])
def test_no_tensor_is_written_to(call, dtype):
    """Its version counts every write, also one that restores what was there."""
    A, O = (torch.from_numpy(matrix(shape, "complex128", 0)) for shape in [(8, 4), (4, 3)])
    A, O = (x.to(dtype) if dtype.is_complex else x.real.to(dtype) for x in (A, O))
    (CALLS | HOST_ONLY)[call](A, O)
    assert (A._version, O._version) == (0, 0)


@pytest.mark.parametrize("call", sorted(set(CALLS) - {"gaussian"}))
def test_no_result_shares_memory_with_an_input(call):
    """Not even for an orthogonal matrix, which is its own factor, and with a test matrix of its own kind."""
    A, O = np.eye(8, 4), np.eye(4, 3)
    result = CALLS[call](A, O)
    for x in result if isinstance(result, tuple) else (result,):
        assert not np.shares_memory(x, A)
        assert not np.shares_memory(x, O)


# bad input changes nothing -----------------------------------------------------------------------

GOOD = matrix((8, 4), "float32", 0)
SPOILED = np.where(np.arange(4) == 2, np.float32(np.nan), GOOD)
BAD = [
    (SPOILED, {}, NonFiniteError),
    (GOOD.astype(int), {}, DTypeError),
    (GOOD[0], {}, ShapeError),
    (GOOD, {"n_iter": -1}, RankError),
    (GOOD, {"n_oversamples": 1.5}, RankError),
    (GOOD, {"sketch": "uniform"}, OptionError),
    (GOOD, {"test_matrix": GOOD}, ShapeError),
    (GOOD, {"test_matrix": SPOILED[:4, :3]}, NonFiniteError),
]


@pytest.mark.parametrize(("A", "options", "error"), BAD)
@pytest.mark.parametrize(
    "function", [orthlin.randomized_range_finder, orthlin.lowrank_orth, orthlin.lowrank_orth_factors]
)
def test_bad_input_changes_neither_arrays_nor_generators(function, A, options, error):
    for rng, state in (
        (np.random.default_rng(0), lambda rng: rng.bit_generator.state),
        (torch.Generator(), lambda rng: rng.get_state().tolist()),
    ):
        as_torch = isinstance(rng, torch.Generator)
        x, given = (torch.from_numpy(A.copy()) if as_torch else A.copy()), dict(options)
        if as_torch and "test_matrix" in given:
            given["test_matrix"] = torch.from_numpy(given["test_matrix"].copy())
        before = state(rng)
        with pytest.raises(error):
            function(x, 2, rng=rng, **given)
        np.testing.assert_array_equal(x, A)
        assert state(rng) == before


# devices: nothing is read ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_no_value_is_read_from_a_tensor_that_has_none(call, dtype):
    A, O = (torch.empty(shape, dtype=dtype, device="meta") for shape in [(2, 8, 4), (4, 3)])
    result, real = CALLS[call](A, O), CALLS[call](*(torch.ones(x.shape, dtype=dtype) + diagonalish(x) for x in (A, O)))
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (result, real)), strict=True)
    assert all(x.is_meta and (x.shape, x.dtype) == (y.shape, y.dtype) for x, y in pairs)


def diagonalish(x):
    """A well-conditioned matrix of the shape of `x`."""
    return 4 * torch.eye(*x.shape[-2:]).to(x.dtype)


@pytest.fixture
def unreadable(monkeypatch):
    """Arrays of the strict library that cannot be turned into a Python number or be looped over."""

    def refuse(*_):
        raise AssertionError("a value was read from a device")

    kind = type(array_api_strict.ones(1))
    for name in ("__bool__", "__float__", "__int__", "__index__", "__complex__", "__iter__", "__array__", "__buffer__"):
        if hasattr(kind, name):
            monkeypatch.setattr(kind, name, refuse)


@pytest.mark.parametrize("call", CALLS)
def test_no_value_is_read_from_an_array_on_a_device(unreadable, call):
    where = array_api_strict.Device("device1")
    with pytest.raises(AssertionError, match="a value was read"):
        bool(array_api_strict.ones(1, device=where))  # the trap is set
    A, O = (
        array_api_strict.asarray(matrix(shape, "complex64", 0).tolist(), dtype=array_api_strict.complex64, device=where)
        for shape in [(2, 8, 4), (4, 3)]
    )
    if call.startswith("sign"):
        A = array_api_strict.real(A)
    result = CALLS[call](A, O)
    assert all(x.device == where for x in (result if isinstance(result, tuple) else (result,)))


# strangers: a companion or a generator that does not belong ----------------------------------------

A4 = matrix((4, 4), "float32", 0)
T = torch.from_numpy(A4)
STRICT, DEVICE1 = (
    array_api_strict.asarray(A4, device=array_api_strict.Device(name)) for name in ("CPU_DEVICE", "device1")
)
WITH_COMPANION = {
    "range": lambda A, **options: orthlin.randomized_range_finder(A, 2, **options),
    "lowrank_orth": lambda A, **options: orthlin.lowrank_orth(A, 2, **options),
    "factors": lambda A, **options: orthlin.lowrank_orth_factors(A, 2, **options),
}


@pytest.mark.parametrize("routine", WITH_COMPANION)
@pytest.mark.parametrize(
    ("A", "options", "error", "words"),
    [
        (T, {"test_matrix": A4[:, :2]}, ArrayTypeError, ("test_matrix: ", "numpy.ndarray", "convert")),
        (A4, {"test_matrix": T[:, :2]}, ArrayTypeError, ("test_matrix: ", "torch.Tensor", "convert")),
        (T, {"test_matrix": T[:, :2].to("meta")}, DeviceError, ("test_matrix: ", "meta", "cpu", "move")),
        (STRICT, {"test_matrix": DEVICE1[:, :2]}, DeviceError, ("test_matrix: ", "device1", "CPU_DEVICE", "move")),
        (A4, {"test_matrix": A4[:, :2] * 1j}, DTypeError, ("test_matrix: ", "complex64", "float32", "make both")),
        (A4, {"test_matrix": A4[:, :2].tolist()}, ArrayTypeError, ("test_matrix: ", "list", "convert")),
        (A4, {"test_matrix": A4.astype(int)}, DTypeError, ("test_matrix: ", "int64", "convert")),
        (A4, {"test_matrix": A4[0]}, ShapeError, ("test_matrix: ", "(4,)", "reshape")),
        (A4, {"test_matrix": A4[:3, :2]}, ShapeError, ("test_matrix: ", "(3, 2)", "(4, w)")),
        (A4, {"test_matrix": np.full((4, 2), np.nan)}, NonFiniteError, ("test_matrix: ", "NaN", "replace")),
        (A4, {"rng": torch.Generator()}, RngError, ("rng: ", "torch._C.Generator", "numpy.random.Generator")),
        (T, {"rng": jax.random.key(0)}, RngError, ("rng: ", "PRNGKeyArray", "torch.Generator")),
        (jax.numpy.asarray(A4), {"rng": np.random.PCG64()}, RngError, ("rng: ", "PCG64", "JAX key")),
    ],
)
def test_a_stranger_among_the_arguments_is_refused_by_name(routine, A, options, error, words):
    with pytest.raises(error) as caught:
        WITH_COMPANION[routine](A, **options)
    assert isinstance(caught.value, OrthlinError)
    assert str(caught.value).startswith(words[0])
    assert all(word in str(caught.value) for word in words)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch is installed, but no CUDA device is available")
@pytest.mark.parametrize(("array", "generator"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_generator_of_another_device_is_refused_by_name(array, generator):
    with pytest.raises(DeviceError, match=f"rng: the torch.Generator lives on {generator}.*make it there"):
        orthlin.lowrank_orth(T.to(array), 2, rng=torch.Generator(generator))
