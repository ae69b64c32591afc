"""The one door to array libraries: which values may be read, dtype facts, factorizations that never raise."""

import array_api_strict
import conftest
import jax
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from orthlin import _backend as be
from orthlin import sketch
from orthlin._backend.arrays import library as library_of

A = np.random.default_rng(0).standard_normal((2, 5, 5))
DTYPES = ("float32", "float64", "complex64", "complex128")
NO_FLOAT64 = array_api_strict.Device("no_float64")
T = torch.ones(2, 2)


def sample(dtype, shape=A.shape, seed=0):
    real, imaginary = np.random.default_rng(seed).standard_normal((2, *shape))
    return (real + 1j * imaginary if np.dtype(dtype).kind == "c" else real).astype(dtype)


def strict(dtype="float32", where="CPU_DEVICE"):
    return array_api_strict.ones((2, 2), dtype=getattr(array_api_strict, dtype), device=array_api_strict.Device(where))


# host or device ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "host"),
    [
        (A, True),
        (T, True),
        (T.clone().requires_grad_(), True),
        (torch.nn.Parameter(T), True),
        (torch.view_as_complex(T).conj(), True),
        (T.to("meta"), False),
        (FakeTensorMode().from_tensor(T), False),
        (jax.numpy.ones(2), False),
        (strict(), True),
        (strict(where="device1"), False),
        (strict(where="no_float64"), False),
    ],
    ids=lambda x: type(x).__name__,
)
def test_values_can_be_read_on_the_host_alone(x, host):
    assert be.is_host(x) is host


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad], ids=lambda f: f.__name__)
def test_no_value_is_read_inside_a_transformation_of_torch(transform):
    seen = []
    transform(lambda x: seen.append(be.is_host(x)) or (x * x).sum())(T)
    assert seen == [False]


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a:UserWarning")  # in array_api_compat
def test_no_value_is_read_inside_a_compiled_function_of_torch():
    compiled = torch.compile(lambda x: x + 1 if be.is_host(x) else x - 1, backend="eager", fullgraph=True)
    assert torch.equal(compiled(T), T - 1)


def test_no_value_is_read_inside_a_transformation_of_jax():
    seen = []
    jax.jit(lambda x: seen.append(be.is_host(x)) or x)(jax.numpy.ones(2))
    jax.vmap(lambda x: seen.append(be.is_host(x)) or x)(jax.numpy.ones(2))
    assert seen == [False, False]


@pytest.mark.parametrize(
    ("x", "name"),
    [
        (A, "numpy"),
        (T, "torch"),
        (torch.nn.Parameter(T), "torch"),
        (jax.numpy.ones(2), "jax"),
        (strict(), ""),
        (1.0, ""),
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_library_is_known_by_the_class_of_an_array(x, name):
    assert library_of(x) == name
    traced = []
    jax.jit(lambda x: traced.append(library_of(x)) or x)(jax.numpy.ones(2))
    assert traced == ["jax"]


def test_numbers_are_those_of_the_host_alone_and_come_back_where_they_belong(xp):
    def there_and_back(x):
        numbers = be.numbers(x)
        assert isinstance(numbers, np.ndarray) == be.is_host(x)
        back = be.from_numbers(be.namespace(x), 2 * numbers, x)
        assert (type(back), back.dtype) == (type(x), x.dtype)
        return back

    np.testing.assert_array_equal(xp.call(there_and_back, A), 2 * A)


def test_numbers_of_a_parameter_have_no_derivative():
    x = torch.nn.Parameter(T)
    np.testing.assert_array_equal(be.numbers(x), np.ones((2, 2)))


# dtypes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_facts_of_a_dtype_are_those_of_numpy(xp, dtype):
    def facts(x):
        space = be.namespace(x)
        fact = be.kind(space, x.dtype)
        assert fact == (np.dtype(dtype).kind == "c", 8 * np.finfo(dtype).dtype.itemsize, np.finfo(dtype).eps)
        assert (be.is_complex(space, x), be.eps(space, x), be.is_half(space, x)) == (fact[0], fact[2], False)
        assert be.working(space, x) is x
        return x

    xp.call(facts, np.ones((2, 3), dtype))


@pytest.mark.parametrize(
    ("x", "wide"),
    [
        (A.astype("float16"), "float64"),
        (A.astype("float32"), "float64"),
        (A.astype("complex64"), "complex128"),
        (A, None),
        (A.astype("complex128"), None),
        (T.bfloat16(), "float64"),
        (T.to("meta", torch.complex64), "complex128"),
        (T.double(), None),
        (jax.numpy.ones((2, 2), "bfloat16"), "float64"),
        (strict("complex64"), "complex128"),
        (strict(where="device1"), "float64"),
        (strict(where="no_float64"), None),
        (strict("complex64", "no_float64"), None),
    ],
    ids=lambda x: str(getattr(x, "dtype", x)),
)
def test_twice_the_precision_where_there_is_one(x, wide):
    space = be.namespace(x)
    assert be.wide_dtype(space, x) == (wide and getattr(space, wide))


def test_jax_has_no_wide_dtype_without_x64():
    with jax.enable_x64(False):
        assert be.wide_dtype(jax.numpy, jax.numpy.ones(2)) is None


@pytest.mark.parametrize("x", [A.astype("float16"), T.half(), T.bfloat16(), jax.numpy.ones((2, 2), "bfloat16")])
def test_half_precision_is_worked_on_in_single(x):
    space = be.namespace(x)
    assert be.is_half(space, x)
    assert be.working(space, x).dtype == space.float32


# random numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gaussian", "sparse_sign", "columns"])
@pytest.mark.parametrize("rng", [None, 2**40, np.random.default_rng(0)], ids=["none", "seed", "generator"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: (T.to("meta", torch.complex64), "meta"),
        lambda: (T.to("meta", torch.bfloat16), "meta"),
        lambda: (strict("complex64", "no_float64"), NO_FLOAT64),
        lambda: (strict(where="device1"), array_api_strict.Device("device1")),
    ],
    ids=["meta-complex", "meta-half", "no_float64", "device1"],
)
def test_draws_land_on_the_device_in_its_dtype(make, rng, kind):
    like, where = make()
    omega = getattr(sketch, kind)(6, 3, like=like, rng=rng)
    assert str(be.device(omega)) == str(where)
    assert be.namespace(omega) is be.namespace(like)
    assert kind == "columns" or omega.dtype == like.dtype


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("kind", ["gaussian", "sparse_sign", "columns"])
def test_jax_draws_without_x64(kind, dtype):
    with jax.enable_x64(False):
        like = jax.numpy.ones((2, 2), dtype)
        for rng in (7, np.random.default_rng(0), jax.random.key(0)):
            assert getattr(sketch, kind)(6, 3, like=like, rng=rng).shape[-1] == 3


@pytest.mark.parametrize("seed", [2**63, 2**64 + 1, 2**127], ids=str)
def test_a_seed_of_any_size_is_taken_on_every_library(xp, seed):
    def draw(like):
        return sketch.gaussian(4, 4, like=like, rng=seed)

    with xp.context():
        first, second = (xp.to_numpy(draw(xp.asarray(np.ones((2, 2), "float32")))) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert np.isfinite(first).all()


def test_an_int_seeds_numpy_as_numpy_does():
    drawn = sketch.gaussian(4, 4, like=A, rng=7)
    np.testing.assert_array_equal(drawn, np.random.default_rng(7).standard_normal((4, 4)))


# the machine -------------------------------------------------------------------------------------


def test_every_library_found_can_be_entered_waited_for_and_left():
    found = {library.name: library for library in be.installed()}
    assert {"numpy", "torch:cpu", f"jax:{jax.default_backend()}"} <= set(found)
    for library in found.values():
        x = library.asarray(A)
        library.wait(x)
        assert be.kind(be.namespace(x), x.dtype).bits == 64
        np.testing.assert_array_equal(library.to_numpy(x), A)


def test_a_backend_named_as_required_fails_where_it_is_missing(monkeypatch):
    missing = [name for name in conftest.BACKENDS if conftest._why_missing(name)]
    if not missing:
        pytest.skip("every backend is on this machine")
    monkeypatch.setenv("ORTHLIN_REQUIRE_BACKENDS", f"numpy,{missing[0]}")
    assert conftest.found("numpy") is conftest.BACKENDS["numpy"]
    with pytest.raises(pytest.fail.Exception, match=f"^required backend {missing[0]}: "):
        conftest.found(missing[0])
    monkeypatch.setenv("ORTHLIN_REQUIRE_BACKENDS", "numpy")
    with pytest.raises(pytest.skip.Exception):
        conftest.found(missing[0])
