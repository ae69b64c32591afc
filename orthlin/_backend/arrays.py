"""Arrays: their namespace, device and dtype, and the products and factorizations that differ."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, cast

import array_api_compat as compat
import numpy as np

Array = Any
DType = Any

namespace = compat.array_namespace
device = compat.device


def is_dense(x: Array) -> bool:
    """Whether `x` is an ordinary array, not one of the sparse, nested or opaque tensors of torch."""
    if not compat.is_torch_array(x):
        return True
    import torch

    return bool(x.layout == torch.strided and not x.is_nested)


def is_host(x: Array) -> bool:
    """Whether the values of `x` can be read without waiting for a device and without a tracer."""
    if isinstance(x, np.ndarray):
        return True
    if compat.is_torch_array(x):
        import torch

        return (
            x.device.type == "cpu"
            and type(x) in (torch.Tensor, torch.nn.Parameter)
            and not torch.compiler.is_compiling()
            and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        )
    if compat.is_jax_array(x) or compat.is_cupy_array(x):
        return False
    info = namespace(x).__array_namespace_info__()
    return bool(device(x) == info.default_device())


def scalar(x: Array) -> float:
    """Read one number from its device, outside the graph of torch."""
    return float(x.detach() if compat.is_torch_array(x) else x)


# dtypes ------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """What a floating-point dtype is: real or complex, bits and epsilon of a real part."""

    is_complex: bool
    bits: int
    eps: float


@cache
def kind(xp: Any, dtype: DType) -> Kind | None:
    """Facts of a dtype, None unless `xp` knows it as real or complex floating-point."""
    try:
        if xp.isdtype(dtype, ("real floating", "complex floating")):
            info = xp.finfo(dtype)
            return Kind(bool(xp.isdtype(dtype, "complex floating")), int(info.bits), float(info.eps))
    except (TypeError, ValueError):
        pass  # a dtype of another library, such as ml_dtypes.bfloat16 on NumPy
    return None


def _kind(xp: Any, x: Array) -> Kind:
    return cast("Kind", kind(xp, x.dtype))


def is_complex(xp: Any, x: Array) -> bool:
    """Whether `x` has a complex dtype."""
    return _kind(xp, x).is_complex


def bits(xp: Any, x: Array) -> int:
    """Bits of a real part of the entries of `x`."""
    return _kind(xp, x).bits


def is_half(xp: Any, x: Array) -> bool:
    """Whether `x` has 16 bits an entry, which no factorization supports."""
    return bits(xp, x) == 16


def eps(xp: Any, x: Array) -> float:
    """Machine epsilon of the dtype of `x`."""
    return _kind(xp, x).eps


def working(xp: Any, x: Array) -> Array:
    """Return `x`, in float32 if it is of half precision."""
    return xp.astype(x, xp.float32) if is_half(xp, x) else x


def convert(xp: Any, x: Array, dtype: DType) -> Array:
    """Return `x` in `dtype`, `x` itself if it has it already."""
    return xp.astype(x, dtype, copy=False)


@cache
def _has_float64(xp: Any, where: Any) -> bool:
    return "float64" in xp.__array_namespace_info__().dtypes(device=where, kind="real floating")


def wide_dtype(xp: Any, x: Array) -> DType | None:
    """Twice as precise dtype of the same kind as single-precision `x`, None where there is none."""
    if bits(xp, x) > 32:
        return None
    if compat.is_torch_array(x):
        available = x.device.type != "mps"
    elif compat.is_jax_array(x):
        import jax

        available = bool(jax.config.jax_enable_x64)
    else:
        available = isinstance(x, np.ndarray) or _has_float64(xp, device(x))
    if not available:
        return None
    return xp.complex128 if is_complex(xp, x) else xp.float64


# products and factorizations ---------------------------------------------------------------------

_GRAM_BLOCK = 256  # rows from which halving a Gram product pays
_SQUARED_ROWS = 128  # rows that are squared at a time


def adjoint(xp: Any, x: Array) -> Array:
    """Conjugate transpose."""
    return xp.conj(x.mT) if is_complex(xp, x) else x.mT


def _by_halves(x: Array) -> bool:
    return bool(x.shape[-2] >= _GRAM_BLOCK and compat.is_torch_array(x) and x.device.type == "cpu")


def gram(xp: Any, x: Array) -> Array:
    """X X^H, by a symmetric rank-k update where there is one.

    NumPy makes one of `x @ x.mT`.  For torch on the CPU the lower triangle is multiplied by halves, which
    saves up to half of the flops; on devices one launch is worth more than the flops.
    """
    if not _by_halves(x):
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
    if compat.is_torch_array(c) and c.ndim in (2, 3) and not (hermitian and _by_halves(a)):
        fused = c.addmm if c.ndim == 2 else c.baddbmm
        return fused(a, b, beta=beta, alpha=alpha)
    product = gram(xp, a) if hermitian else a @ b
    return beta * c + (product if alpha == 1 else alpha * product)


def column_squares(xp: Any, x: Array) -> Array:
    """Squared norms of the columns, shape (..., 1, n).

    torch on the CPU takes two to eight times as long for a norm along that axis, and fresh memory for all the
    squares costs as much: a few rows at a time, in one buffer.
    """
    plain = compat.is_torch_array(x) and is_host(x) and x.ndim == 3 and not x.requires_grad
    if not plain or is_complex(xp, x):
        return xp.linalg.vector_norm(x, axis=-2, keepdims=True) ** 2
    buffer, result = xp.empty_like(x[:1, :_SQUARED_ROWS]), xp.zeros_like(x[:, :1])
    for matrix, total in zip(x, result, strict=True):
        for start in range(0, x.shape[1], _SQUARED_ROWS):
            rows = matrix[start : start + _SQUARED_ROWS]
            total.add_(xp.sum(xp.square(rows, out=buffer[0, : rows.shape[0]]), axis=0, keepdims=True))
    return result


def cholesky(xp: Any, s: Array) -> Array:
    """Lower Cholesky factor of a Hermitian matrix; not finite, never an exception, if it is not definite."""
    return _nan_where_it_fails(xp, "cholesky", s)


def inv(xp: Any, a: Array) -> Array:
    """Inverse of a square matrix; not finite, never an exception, if it is singular."""
    return _nan_where_it_fails(xp, "inv", a)


def _nan_where_it_fails(xp: Any, name: str, a: Array) -> Array:
    if compat.is_torch_array(a):
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
    """`first(x)`, or if that fails `second` of the finite matrices of the stack and NaN for the others."""
    try:
        return first(x)
    except _refusal(x):
        ok = xp.all(xp.isfinite(x), axis=(-2, -1), keepdims=True)
        parts = second(xp.where(ok, x, xp.zeros_like(x)))
        return tuple(xp.where(ok if p.ndim == x.ndim else ok[..., 0], p, xp.nan) for p in parts)


def _refusal(x: Array) -> type[Exception]:
    if compat.is_torch_array(x):
        import torch

        return cast("type[Exception]", torch.linalg.LinAlgError)
    return np.linalg.LinAlgError


def inv_lower(xp: Any, a: Array) -> Array:
    """Inverse of a lower triangular matrix; without a triangular solve, by halves down to blocks of 32.

    The standard has no triangular solve, and the general inverse costs NumPy three times as much.
    """
    n = a.shape[-1]
    if compat.is_torch_array(a):
        import torch

        return torch.linalg.solve_triangular(a, eye_like(xp, a, n), upper=False)
    if n <= 32:
        return inv(xp, a)
    h = n // 2
    upper, lower = inv_lower(xp, a[..., :h, :h]), inv_lower(xp, a[..., h:, h:])
    corner = -(lower @ (a[..., h:, :h] @ upper))
    zero = xp.zeros((*a.shape[:-2], h, n - h), dtype=a.dtype, device=device(a))
    return xp.concat([xp.concat([upper, zero], axis=-1), xp.concat([corner, lower], axis=-1)], axis=-2)


def eye_like(xp: Any, x: Array, n: int) -> Array:
    """Identity of order `n` with dtype and device of `x`."""
    return xp.eye(n, dtype=x.dtype, device=device(x))


def choose(xp: Any, ok: Array, quick: Callable[[], tuple[Array, ...]], slow: Callable[[], tuple[Array, ...]]) -> Any:
    """`quick()` for the matrices of a host stack where `ok`, else `slow()`, each called only if it is needed.

    So that a stack equals a loop bit for bit, every matrix takes the route it would take alone.
    """
    if bool(xp.all(ok)):
        return quick()
    if not bool(xp.any(ok)):
        return slow()
    return tuple(xp.where(ok, a, b) for a, b in zip(quick(), slow(), strict=True))
