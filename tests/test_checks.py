"""Every check at the door: what passes, and errors that name the argument, the value and the remedy."""

import fractions

import array_api_strict
import jax
import ml_dtypes
import numpy as np
import pytest
import scipy.sparse
import torch

from orthlin import _backend as be
from orthlin import _checks as check
from orthlin.errors import ArrayTypeError, DeviceError, DTypeError, OptionError, RankError, ShapeError

A = np.eye(3, 2, dtype="float32")
T = torch.eye(3, 2)


def message(error, function, *arguments, **options):
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64", "complex128"])
def test_the_five_dtypes_of_numpy_pass(dtype):
    x = A.astype(dtype)
    assert check.matrix(x, "A") is be.namespace(x)


@pytest.mark.parametrize("x", [T.bfloat16(), T.half(), jax.numpy.ones((2, 2), "bfloat16")], ids=lambda x: str(x.dtype))
def test_half_precision_passes_where_the_library_has_it(x):
    assert check.matrix(x, "A") is be.namespace(x)


@pytest.mark.parametrize(
    "x",
    [
        *(A.astype(d) for d in ("int8", "uint64", "bool", "object", "str", "longdouble", "clongdouble", "M8[s]")),
        A.astype(ml_dtypes.bfloat16),
        A.astype(ml_dtypes.float8_e4m3fn),
        T.int(),
        T.bool(),
        T.to(torch.float8_e4m3fn),
        jax.random.split(jax.random.key(0), 4).reshape(2, 2),
        jax.numpy.ones((2, 2), "float8_e4m3fn"),
        array_api_strict.ones((2, 2), dtype=array_api_strict.int64),
    ],
    ids=lambda x: f"{type(x).__module__}-{x.dtype}",
)
def test_any_other_dtype_is_refused_by_name(x):
    text = message(DTypeError, check.array, x, "A")
    assert text.startswith("A: expected float32, float64, complex64, complex128, or float16 and bfloat16")
    assert f"got {x.dtype}; convert it first" in text


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
def test_complex_half_precision_is_refused():
    x = torch.empty(2, 2, dtype=torch.complex32, device="meta")
    assert "got torch.complex32; convert" in message(DTypeError, check.array, x, "A")


@pytest.mark.parametrize(
    ("x", "given", "remedy"),
    [
        ([[1.0]], "builtins.list", "numpy.asarray"),
        (None, "NoneType", "numpy.asarray"),
        ("abc", "builtins.str", "numpy.asarray"),
        (3.0, "builtins.float", "numpy.asarray"),
        (scipy.sparse.csr_matrix(A), "csr_matrix", "toarray()"),
        (scipy.sparse.coo_array(A), "coo_array", "toarray()"),
        (np.ma.array(A), "MaskedArray", "filled()"),
        (np.asmatrix(A), "numpy.matrix", "numpy.asarray"),
        (T.to_sparse(), "torch.Tensor torch.sparse_coo", "to_dense()"),
        (T.to_mkldnn(), "torch.Tensor torch._mkldnn", "to_dense()"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_is_no_plain_array_is_refused_by_name(x, given, remedy):
    text = message(ArrayTypeError, check.array, x, "A")
    assert text.startswith("A: expected ")
    assert given in text
    assert remedy in text.split("; convert it first")[1]


@pytest.mark.filterwarnings("ignore:Sparse .* is in beta:UserWarning", "ignore:The PyTorch API of nested:UserWarning")
@pytest.mark.parametrize(
    "make",
    [T.to_sparse_csr, T.to_sparse_csc, lambda: torch.nested.nested_tensor([T, T])],
    ids=["csr", "csc", "nested"],
)
def test_every_layout_of_torch_but_the_dense_one_is_refused(make):
    assert "to_dense()" in message(ArrayTypeError, check.array, make(), "A")


@pytest.mark.parametrize(("shape", "given"), [((), "()"), ((5,), "(5,)")])
def test_a_matrix_has_two_dimensions(xp, shape, given):
    text = message(ShapeError, xp.call, lambda x: check.matrix(x, "A"), np.ones(shape, "float32"))
    assert text == f"A: expected shape (..., m, n), got {given}; reshape it to a matrix"


def test_a_square_matrix_has_two_equal_sides():
    assert check.matrix(np.ones((4, 2, 2)), "A", square=True)
    text = message(ShapeError, check.matrix, np.ones((4, 3, 2)), "A", square=True)
    assert text.startswith("A: expected square matrices of shape (..., n, n), got (4, 3, 2); ")


def test_a_companion_shares_library_device_and_kind(xp):
    def companion(x, y):
        check.companion(be.namespace(x), y, "test_matrix", x, "A")
        return x

    for dtype in ("float32", "complex64"):
        xp.call(companion, A.astype(dtype), A.astype("float32"))
    text = message(DTypeError, xp.call, companion, A, A.astype("complex64"))
    assert text.startswith("test_matrix: is ")
    assert "complex64 where A is " in text
    assert text.endswith("; make both real or both complex")


DEVICE1 = array_api_strict.ones((3, 2), device=array_api_strict.Device("device1"))


@pytest.mark.parametrize(
    ("x", "y", "error", "given"),
    [
        (T, A, ArrayTypeError, "got numpy.ndarray; convert"),
        (A, T, ArrayTypeError, "got torch.Tensor; convert"),
        (A, jax.numpy.asarray(A), ArrayTypeError, "ArrayImpl; convert"),
        (T, T.to("meta"), DeviceError, "lives on meta, A on cpu; move"),
        (array_api_strict.ones((3, 2)), DEVICE1, DeviceError, "device1'), A on array_api_strict.Device('CPU_DEVICE')"),
        (A, A[0], ShapeError, "got (2,); reshape"),
        (A, A.astype(int), DTypeError, "got int64; convert"),
    ],
    ids=["torch-numpy", "numpy-torch", "numpy-jax", "meta", "devices", "vector", "integers"],
)
def test_a_stranger_is_refused_by_name(x, y, error, given):
    text = message(error, check.companion, be.namespace(x), y, "test_matrix", x, "A")
    assert text.startswith("test_matrix: ")
    assert given in text


@pytest.mark.parametrize("value", [0, 3, np.int8(2), np.uint64(3), np.array(2), torch.tensor(1)])
def test_a_count_is_any_integer_in_range(value):
    number = check.count(value, "n", high=3)
    assert type(number) is int
    assert number == int(value)


@pytest.mark.parametrize("value", [2.0, "2", None, True, np.True_, np.float64(2), [1], np.array([1, 2]), 1j])
def test_what_is_no_integer_is_refused_by_name(value):
    assert message(RankError, check.count, value, "n") == f"n: expected an integer, got {value!r}"


@pytest.mark.parametrize(
    ("value", "limits", "expected"),
    [(-1, {}, "at least 0"), (4, {"high": 3}, "between 0 and 3"), (0, {"low": 1, "high": 9}, "between 1 and 9")],
)
def test_a_count_out_of_range_names_the_range(value, limits, expected):
    assert message(RankError, check.count, value, "n", **limits) == f"n: expected an integer {expected}, got {value}"


@pytest.mark.parametrize("value", [0, 2, np.int64(2)])
def test_a_rank_goes_up_to_the_short_side(value):
    assert check.rank(value, "r", (7, 5, 2)) == value


@pytest.mark.parametrize("value", [-1, 3, 2.0, None, True, "1"])
def test_a_bad_rank_names_both_numbers(value):
    text = message(RankError, check.rank, value, "r", (7, 5, 2))
    assert text.startswith("r: expected an integer")
    assert f"got {value!r}; min(m, n) = 2 for shape (7, 5, 2)" in text


@pytest.mark.parametrize("value", ["d", "", None, 3, ["a"], np.array("a")])
def test_an_option_is_one_of_the_words(value):
    check.option("a", "method", ("a", "b"))
    text = message(OptionError, check.option, value, "method", ("a", "b"))
    assert text == f"method: expected one of 'a', 'b', got {value!r}"


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), fractions.Fraction(1, 2)])
def test_a_positive_number_is_any_real_one(value):
    number = check.positive(value, "tol")
    assert type(number) is float
    assert number == 0.5
    assert check.positive(3, "tol") == 3


@pytest.mark.parametrize(
    "value", [0, -1.0, 2, float("nan"), float("inf"), "0.5", None, True, np.True_, 10**400, 1j, np.ones(1)], ids=repr
)
def test_what_is_no_positive_number_below_the_limit_is_refused_by_name(value):
    text = message(OptionError, check.positive, value, "tol", below=2.0)
    assert text == f"tol: expected a number between 0 and 2.0, got {value!r}"
