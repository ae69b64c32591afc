"""The input contract: public functions validate once, here; private ones assume validity."""

import math
import numbers
import operator
from collections.abc import Collection
from typing import Any

import numpy as np

from orthlin import _backend as be
from orthlin._schedule import FINEST_TOL, number
from orthlin.errors import ArrayTypeError, DeviceError, DTypeError, OptionError, RankError, ShapeError

_BITS = (16, 32, 64)  # of a real number, or of each part of a complex one
_UNLIKE = (np.ma.MaskedArray, np.matrix)  # arrays of NumPy that compute otherwise
_BOOLS = (bool, np.bool)


def _describe(x: Any) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}"


def array(x: Any, name: str) -> Any:
    """Namespace of `x`; ArrayTypeError or DTypeError unless it is an array of floating-point numbers."""
    if isinstance(x, _UNLIKE) or not be.is_dense(x):
        got = f"{_describe(x)} {getattr(x, 'layout', '')}".rstrip()
        raise ArrayTypeError(
            f"{name}: expected a plain dense array, got {got}; "
            "convert it first, for example with filled(), numpy.asarray or to_dense()"
        )
    try:
        xp = be.namespace(x)
    except TypeError:
        raise ArrayTypeError(
            f"{name}: expected an array of NumPy, torch, CuPy, JAX or another array API library, got {_describe(x)}; "
            f"convert it first, for example with {'toarray()' if hasattr(x, 'toarray') else 'numpy.asarray'}"
        ) from None
    kind = be.kind(xp, x.dtype)
    if kind is None or kind.bits not in _BITS[kind.is_complex :]:
        raise DTypeError(
            f"{name}: expected float32, float64, complex64, complex128, or float16 and bfloat16 where the array "
            f"library has them, got {x.dtype}; convert it first, for example to float32"
        )
    return xp


def matrix(x: Any, name: str, *, square: bool = False) -> Any:
    """Namespace of a stack of matrices `x` of shape (..., m, n)."""
    xp = array(x, name)
    if x.ndim < 2:
        raise ShapeError(f"{name}: expected shape (..., m, n), got {tuple(x.shape)}; reshape it to a matrix")
    if square and x.shape[-2] != x.shape[-1]:
        raise ShapeError(
            f"{name}: expected square matrices of shape (..., n, n), got {tuple(x.shape)}; "
            "the sign of others is their polar factor, see orthogonalize"
        )
    return xp


def companion(xp: Any, x: Any, name: str, other: Any, other_name: str) -> None:
    """Check that `x` can be multiplied with `other`: same library, same device, not complex with real."""
    if matrix(x, name) is not xp:
        raise ArrayTypeError(
            f"{name}: expected an array of the library of {other_name} ({_describe(other)}), got {_describe(x)}; "
            "convert one of them"
        )
    here, there = be.bound_device(x), be.bound_device(other)
    if here != there and None not in (here, there):
        raise DeviceError(f"{name}: lives on {here}, {other_name} on {there}; move one of them")
    if be.is_complex(xp, x) and not be.is_complex(xp, other):
        raise DTypeError(f"{name}: is {x.dtype} where {other_name} is {other.dtype}; make both real or both complex")


def twin(xp: Any, x: Any, name: str, other: Any, other_name: str) -> None:
    """Check that `x` is an array like `other`: same library, device and shape, both real or both complex."""
    companion(xp, other, other_name, x, name)
    companion(xp, x, name, other, other_name)
    if x.shape != other.shape:
        raise ShapeError(f"{name}: expected the shape of {other_name}, {tuple(other.shape)}, got {tuple(x.shape)}")


def count(value: Any, name: str, *, low: int = 0, high: int | None = None) -> int:
    """`value` as an int in [low, high]."""
    try:
        if isinstance(value, _BOOLS):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise RankError(f"{name}: expected an integer, got {value!r}") from None
    if number < low or (high is not None and number > high):
        limit = f"between {low} and {high}" if high is not None else f"at least {low}"
        raise RankError(f"{name}: expected an integer {limit}, got {number}")
    return number


def rank(value: Any, name: str, shape: tuple[int, ...]) -> int:
    """`value` as a rank of matrices of shape (..., m, n)."""
    limit = min(shape[-2:])
    try:
        return count(value, name, high=limit)
    except RankError as error:
        raise RankError(f"{error}; min(m, n) = {limit} for shape {tuple(shape)}") from None


def rank_or_share(value: Any, k: int) -> int:
    """`value` as a rank, at most k: an integer is taken as it is, another real number as a share of k."""
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        share = float(value)
        if not 0 < share <= 1:
            raise RankError(f"rank: expected a fraction in (0, 1] or a positive integer, got {value}")
        return max(1, round(share * k))
    return min(count(value, "rank", low=1), k)


def option(value: Any, name: str, accepted: Collection[str]) -> None:
    """Check that `value` is one of the accepted words."""
    if not isinstance(value, str) or value not in accepted:
        raise OptionError(f"{name}: expected one of {', '.join(map(repr, accepted))}, got {value!r}")


def flag(value: Any, name: str) -> None:
    """Check that `value` is True or False."""
    if not isinstance(value, _BOOLS):
        raise OptionError(f"{name}: expected True or False, got {value!r}")


def positive(value: Any, name: str, below: float = math.inf) -> float:
    """`value` as a float in (0, below)."""
    x = number(value)
    if not 0 < x < below:
        raise OptionError(f"{name}: expected a number between 0 and {below}, got {value!r}")
    return x


def tolerance(value: Any, name: str) -> float | None:
    """`value` as a float in [2^-50, 1), or None."""
    x = None if value is None else number(value)
    if not (x is None or FINEST_TOL <= x < 1):
        raise OptionError(f"{name}: expected None or a number of at least {FINEST_TOL:.2g} and below 1, got {value!r}")
    return x


def non_negative(value: Any, name: str, below: float = math.inf) -> float:
    """`value` as a float in [0, below)."""
    x = number(value)
    if not 0 <= x < below:
        raise OptionError(f"{name}: expected a number of at least 0 and below {below}, got {value!r}")
    return x


def hyperparameter(value: Any, name: str, below: float = math.inf) -> Any:
    """`value` as a float in [0, below), or as it is if it is an array of one number, looked at only on the host."""
    if isinstance(value, numbers.Real) or not be.is_number(value):
        return non_negative(value, name, below)
    if be.is_host(value):
        non_negative(be.scalar(value), name, below)
    return value
