"""Products and factorizations that the standard lacks, or that differ between libraries."""

from collections.abc import Callable
from typing import Any, cast

import numpy as np

from orthlin._backend.arrays import (
    Array,
    DType,
    bits,
    convert,
    device,
    eps,
    from_numbers,
    is_complex,
    is_half,
    is_host,
    library,
    numbers,
    wide_dtype,
    working,
)
from orthlin._backend.settings import attained, products, units

_GRAM_BLOCK = 256  # rows from which halving a Gram product pays
_HALF_BLOCK = 48  # order from which converting half precision pays
_SQUARED_ROWS = 128  # rows that are squared at a time
PRECISIONS = ("highest", "high", "medium")  # of large products: the words of PyTorch


def adjoint(xp: Any, x: Array) -> Array:
    """Conjugate transpose."""
    return xp.conj(x.mT) if is_complex(xp, x) else x.mT


def _by_halves(xp: Any, x: Array) -> bool:
    """Whether halves are faster: of half precision whole products are, by units for it, and rounded once."""
    large = x.shape[-2] >= _GRAM_BLOCK and library(x) == "torch" and x.device.type == "cpu"
    return bool(large and not is_half(xp, x))


def _slow_half(xp: Any, x: Array) -> bool:
    """Whether single precision is faster in torch: half precision on a CPU whose vector units lack it."""
    if max(x.shape[-2:]) < _HALF_BLOCK or not (is_half(xp, x) and library(x) == "torch" and is_host(x)):
        return False
    return not units(str(x.dtype))


def reduced(xp: Any, x: Array, precision: str) -> Array:
    """Return `x` as large products of a precision take it: at "medium" in bfloat16, where that is attained."""
    if attained(x, precision) != "medium" or not hasattr(xp, "bfloat16") or is_complex(xp, x):
        return working(xp, x)
    return convert(xp, x, xp.bfloat16)


def large_product(xp: Any, a: Array, b: Array, dtype: DType = None, *, precision: str = "highest") -> Array:
    """A B, in half precision if one of them is, and returned in `dtype`, by default in single precision at least.

    At precision "high" in TensorFloat-32, where the device has it.
    """
    common = a.dtype if is_half(xp, a) else b.dtype
    with products(a, precision):
        product = convert(xp, a, common) @ convert(xp, b, common)
    return working(xp, product) if dtype is None else convert(xp, product, dtype)


def gram(xp: Any, x: Array) -> Array:
    """X X^H, by a symmetric rank-k update where there is one.

    NumPy makes one of `x @ x.mT`.  For torch on the CPU the lower triangle is multiplied by halves, which
    saves up to half of the flops; on devices one launch is worth more than the flops.
    """
    if _slow_half(xp, x):
        return convert(xp, gram(xp, working(xp, x)), x.dtype)
    if not _by_halves(xp, x):
        return x @ adjoint(xp, x)
    m = x.shape[-2]
    top, bottom = x[..., : m // 2, :], x[..., m // 2 :, :]
    corner = bottom @ adjoint(xp, top)
    upper = xp.concat([gram(xp, top), adjoint(xp, corner)], axis=-1)
    return xp.concat([upper, xp.concat([corner, gram(xp, bottom)], axis=-1)], axis=-2)


def add_product(xp: Any, beta: float, c: Array, alpha: float, a: Array, b: Array, *, hermitian: bool = False) -> Array:
    """Beta C + alpha A B, in one pass over the result where the library fuses it.

    `hermitian` says that A and B are the same Hermitian matrix, whose square is a Gram product.
    """
    if _slow_half(xp, c):
        C, A, B = (working(xp, x) for x in (c, a, b))
        return convert(xp, add_product(xp, beta, C, alpha, A, B, hermitian=hermitian), c.dtype)
    if library(c) == "torch" and c.ndim in (2, 3) and not (hermitian and _by_halves(xp, a)):
        fused = c.addmm if c.ndim == 2 else c.baddbmm
        return fused(a, b, beta=beta, alpha=alpha)
    return scaled(beta, c) + scaled(alpha, gram(xp, a) if hermitian else a @ b)


def add_to(total: Array, x: Array, factors: Array) -> None:
    """Add `x` times factors to part of a total in place, in one pass where the library fuses it."""
    if library(x) == "torch":
        total.addcmul_(x, factors)
    else:
        total += x * factors


def scaled(alpha: float, x: Array) -> Array:
    """Alpha X, without a call where alpha is the number one."""
    return x if isinstance(alpha, float) and alpha == 1 else alpha * x


def column_squares(xp: Any, x: Array, *, double: bool = False) -> Array:
    """Squared norms of the columns, shape (..., 1, n), on devices, or if asked, in double precision if there is one.

    torch on the CPU takes two to eight times as long for a norm along that axis, and fresh memory for all the
    squares costs as much: a few rows at a time, in one buffer.
    """
    wide = wide_dtype(xp, x) if double or not is_host(x) else None
    if wide is not None and library(x) == "torch":
        import torch

        return torch.linalg.vector_norm(x, dim=-2, keepdim=True, dtype=wide) ** 2
    plain = library(x) == "torch" and is_host(x) and x.ndim == 3 and not x.requires_grad
    if not plain or is_complex(xp, x):
        return xp.linalg.vector_norm(convert(xp, x, wide or x.dtype), axis=-2, keepdims=True) ** 2
    buffer, result = xp.empty_like(x[:1, :_SQUARED_ROWS]), xp.zeros_like(x[:, :1])
    for matrix, total in zip(x, result, strict=True):
        for start in range(0, x.shape[1], _SQUARED_ROWS):
            rows = matrix[start : start + _SQUARED_ROWS]
            total.add_(xp.sum(xp.square(rows, out=buffer[0, : rows.shape[0]]), axis=0, keepdims=True))
    return result


def cholesky(xp: Any, s: Array, *, definite: bool = False) -> Array:
    """Lower Cholesky factor of a Hermitian matrix; not finite, never an exception, if it is not definite.

    `definite` says that it is, to rounding, unless it holds NaN: then there is nothing to check.
    """
    if definite and library(s) == "torch":
        import torch

        return torch.linalg.cholesky_ex(s)[0]
    L = _nan_where_it_fails(xp, "cholesky", s)
    if definite or library(s) != "cupy":
        return L
    positive = xp.all(xp.real(xp.linalg.diagonal(L)) > 0, axis=-1)[..., None, None]
    return xp.where(positive & _is_product(xp, s, L, adjoint(xp, L)), L, xp.nan)


def inv(xp: Any, a: Array) -> Array:
    """Inverse of a square matrix; not finite, never an exception, if it is singular."""
    x = _nan_where_it_fails(xp, "inv", a)
    if library(a) != "cupy":
        return x
    return xp.where(_is_product(xp, eye_like(xp, a, a.shape[-1]), x, a), x, xp.nan)


def _is_product(xp: Any, c: Array, a: Array, b: Array) -> Array:
    """Whether C is A B to half of the digits: CuPy, which must not wait, leaves anything where it fails."""
    rest, *sizes = (xp.linalg.matrix_norm(x, keepdims=True) for x in (c - a @ b, a, b))
    return rest <= eps(xp, c) ** 0.5 * sizes[0] * sizes[1]


def _nan_where_it_fails(xp: Any, name: str, a: Array) -> Array:
    if library(a) == "torch":
        import torch

        result, info = getattr(torch.linalg, f"{name}_ex")(a)
        return torch.where((info == 0)[..., None, None], result, torch.nan)
    try:
        return getattr(xp.linalg, name)(a)
    except np.linalg.LinAlgError:  # for a stack as soon as one of its matrices fails
        if a.ndim == 2:
            return a + xp.nan
        stack = xp.reshape(a, (-1, *a.shape[-2:]))
        each = [_nan_where_it_fails(xp, name, stack[i, ...]) for i in range(stack.shape[0])]
        return xp.reshape(xp.stack(each), a.shape)


def eigh(xp: Any, s: Array) -> tuple[Array, ...]:
    """Eigenvalues and eigenvectors of Hermitian matrices, NaN for one that is all NaN, never an exception."""
    return _unless_nan(xp, xp.linalg.eigh, xp.linalg.eigh, s)


def svd(xp: Any, x: Array) -> tuple[Array, ...]:
    """Thin singular value decomposition, NaN for a matrix that is all NaN, never an exception.

    MKL gives up on one rank-one complex64 matrix in thirty; it does not on the adjoint in double precision.
    """

    def of_adjoint(x: Array) -> tuple[Array, ...]:
        V, s, Uh = xp.linalg.svd(xp.astype(adjoint(xp, x), wide_dtype(xp, x) or x.dtype), full_matrices=False)
        real = xp.float32 if bits(xp, x) == 32 else xp.float64
        return xp.astype(adjoint(xp, Uh), x.dtype), xp.astype(s, real), xp.astype(adjoint(xp, V), x.dtype)

    return _unless_nan(xp, lambda x: xp.linalg.svd(x, full_matrices=False), of_adjoint, x)


def _unless_nan(
    xp: Any,
    first: Callable[[Array], tuple[Array, ...]],
    second: Callable[[Array], tuple[Array, ...]],
    x: Array,
) -> tuple[Array, ...]:
    """`first(x)`, or if that fails `second` of the finite matrices of the stack and NaN for the others.

    GPUs do not say that it fails, or spoil the whole stack: there the others are zero before and NaN after the call.
    """
    if not is_host(x) and library(x) != "jax":
        return _of_finite(xp, first, x)
    try:
        return first(x)
    except _refusal(x):
        return _of_finite(xp, second, x)


def _of_finite(xp: Any, function: Callable[[Array], tuple[Array, ...]], x: Array) -> tuple[Array, ...]:
    """`function` of the finite matrices of a stack and NaN for the others."""
    spoiled = xp.sum(0 * x, axis=(-2, -1), keepdims=True)  # zero, or NaN where an entry is not finite
    bad = xp.real(spoiled) if is_complex(xp, x) else spoiled
    parts = function(xp.where(bad == 0, x, 0))
    return tuple(p + (bad if p.ndim == x.ndim else bad[..., 0]) for p in parts)


def _refusal(x: Array) -> type[Exception]:
    if library(x) == "torch":
        import torch

        return cast("type[Exception]", torch.linalg.LinAlgError)
    return np.linalg.LinAlgError


def inv_lower(xp: Any, a: Array, one: Array | None = None) -> Array:
    """Inverse of a lower triangular matrix; without a triangular solve, by halves down to blocks of 32.

    `one` is the identity, where it is at hand.
    The standard has no triangular solve, and the general inverse costs NumPy three times as much; on CuPy it is a few
    launches for a hundred.
    """
    n = a.shape[-1]
    if library(a) == "torch":
        import torch

        return torch.linalg.solve_triangular(a, eye_like(xp, a, n) if one is None else one, upper=False)
    if library(a) == "jax":
        from jax.lax.linalg import triangular_solve

        one = xp.broadcast_to(eye_like(xp, a, n) if one is None else one, a.shape)
        return triangular_solve(a, one, left_side=True, lower=True)
    if n <= 32 or library(a) == "cupy":
        return inv(xp, a)
    h = n // 2
    upper, lower = inv_lower(xp, a[..., :h, :h]), inv_lower(xp, a[..., h:, h:])
    corner = -(lower @ (a[..., h:, :h] @ upper))
    zero = xp.zeros((*a.shape[:-2], h, n - h), dtype=a.dtype, device=device(a))
    return xp.concat([xp.concat([upper, zero], axis=-1), xp.concat([corner, lower], axis=-1)], axis=-2)


def eye_like(xp: Any, x: Array, n: int) -> Array:
    """Identity of order `n` with dtype and device of `x`."""
    if library(x) == "torch":  # one call in place of array-api-compat's three
        import torch

        return torch.eye(n, dtype=x.dtype, device=x.device)
    return xp.eye(n, dtype=x.dtype, device=device(x))


def select(xp: Any, ok: Array, a: Array, b: Any) -> Array:
    """`a` where `ok`, which comes from `numbers`, else `b`; on the host no call where it is one of them throughout."""
    if isinstance(ok, np.ndarray) and ok.all():
        return a
    if isinstance(ok, np.ndarray) and not (isinstance(b, float) or ok.any()):
        return b
    return xp.where(from_numbers(xp, ok, a), a, b)


def choose(xp: Any, ok: Array, quick: Callable[[], tuple[Array, ...]], slow: Callable[[], tuple[Array, ...]]) -> Any:
    """`quick()` for the matrices of a host stack where `ok`, else `slow()`, each called only if it is needed.

    So that a stack equals a loop bit for bit, every matrix takes the route it would take alone.
    """
    ok = numbers(ok)
    if ok.all():
        return quick()
    if not ok.any():
        return slow()
    return tuple(xp.where(from_numbers(xp, ok, a), a, b) for a, b in zip(quick(), slow(), strict=True))
