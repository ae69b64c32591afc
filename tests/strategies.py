"""Hypothesis strategies for matrices: shape, batch, dtype, scale, rank and memory layout.

Hypothesis draws only a few integers and names, and NumPy makes the entries from a drawn seed: examples
stay cheap to generate and shrink by shape, scale and layout rather than entry by entry.
"""

import math

import numpy as np
from hypothesis import strategies as st

DTYPES = ("float32", "float64", "complex64", "complex128")


def transposed(A):
    return np.ascontiguousarray(A.swapaxes(-1, -2)).swapaxes(-1, -2)


def strided(A):
    """Every second row and every third column of a larger array."""
    host = np.full((*A.shape[:-2], 2 * A.shape[-2], 3 * A.shape[-1]), np.nan, dtype=A.dtype)
    host[..., ::2, ::3] = A
    return host[..., ::2, ::3]


def reversed_(A):
    """A view with negative strides along both matrix axes."""
    return np.ascontiguousarray(A[..., ::-1, ::-1])[..., ::-1, ::-1]


def broadcast(A):
    """The first slice along the first axis, repeated with stride zero: a batch axis, or else the rows."""
    return np.broadcast_to(A[:1], A.shape)


def read_only(A):
    A = A.copy()
    A.setflags(write=False)
    return A


LAYOUTS = {
    "contiguous": np.ascontiguousarray,
    "fortran": np.asfortranarray,
    "transposed": transposed,
    "strided": strided,
    "reversed": reversed_,
    "broadcast": broadcast,
    "read_only": read_only,
}
"""Each gives an array of the same shape and dtype, and all but ``broadcast`` of the same values."""


def dtypes(names=DTYPES):
    return st.sampled_from([np.dtype(name) for name in names])


def shapes(max_side=40, max_batch_dims=2, min_side=0):
    """``(..., m, n)`` with sides up to `max_side` and batch dimensions of 0 to 3."""
    side = st.integers(min_side, max_side)
    batch = st.lists(st.integers(0, 3), max_size=max_batch_dims)
    return st.builds(lambda b, m, n: (*b, m, n), batch, side, side)


def exponents(dtype):
    """Powers of ten from the smallest subnormal number of `dtype` to its largest, zero first."""
    info = np.finfo(dtype)
    low = math.ceil(math.log10(float(info.smallest_subnormal)))
    return st.one_of(st.just(0), st.integers(low, math.floor(math.log10(float(info.max)))))


def ranks(shape):
    """A rank from zero to full, full first."""
    full = min(shape[-2:])
    return st.integers(0, full).map(lambda deficit: full - deficit)


def matrix(shape, dtype, seed, *, rank=None, exponent=0, layout="contiguous"):
    """A Gaussian matrix, or a product of two of inner size `rank`, with largest part ``10**exponent``."""
    rng, rank = np.random.default_rng(seed), min(shape[-2:]) if rank is None else rank
    dtype, (*batch, m, n) = np.dtype(dtype), shape

    def gaussian(*size):
        real = rng.standard_normal(size)
        return real + 1j * rng.standard_normal(size) if dtype.kind == "c" else real

    A = gaussian(*shape) if rank == min(m, n) else gaussian(*batch, m, rank) @ gaussian(*batch, rank, n)
    top = max(np.abs(A.real).max(initial=0.0), np.abs(A.imag).max(initial=0.0)) or 1.0
    return LAYOUTS[layout]((A / top * float(f"1e{exponent}")).astype(dtype))


@st.composite
def matrices(draw, *, shape=None, dtype=None, exponent=None, rank=None, layout=None):
    """NumPy arrays ``(..., m, n)``; every keyword takes a strategy in place of the default one."""
    drawn_shape = draw(shapes() if shape is None else shape)
    drawn_dtype = draw(dtypes() if dtype is None else dtype)
    return matrix(
        drawn_shape,
        drawn_dtype,
        draw(st.integers(0, 2**32 - 1)),
        rank=draw(ranks(drawn_shape) if rank is None else rank),
        exponent=draw(exponents(drawn_dtype) if exponent is None else exponent),
        layout=draw(st.sampled_from(list(LAYOUTS)) if layout is None else layout),
    )
