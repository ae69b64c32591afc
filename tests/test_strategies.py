"""What the hypothesis strategies promise: shape, dtype, rank, scale and layout as drawn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, LAYOUTS, exponents, matrices, matrix, ranks, shapes

STRIDED = {  # strides, in entries, of a (2, 4, 6) array in each layout
    "contiguous": (24, 6, 1),
    "fortran": (1, 2, 8),
    "transposed": (24, 1, 4),
    "strided": (144, 36 // 2, 3),
    "reversed": (24, -6, -1),
    "broadcast": (0, 6, 1),
    "read_only": (24, 6, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_what_its_name_says_and_keeps_the_values(layout):
    A = np.arange(48.0).reshape(2, 4, 6)
    B = LAYOUTS[layout](A)
    assert B.flags.writeable == (layout not in ("broadcast", "read_only"))
    if layout == "strided":
        assert B.base is not None
        assert B.strides[-1] == 3 * B.itemsize
        assert B.strides[-2] > 6 * B.itemsize
    else:
        assert tuple(s // B.itemsize for s in B.strides) == STRIDED[layout]
    np.testing.assert_array_equal(B, np.stack([A[0], A[0]]) if layout == "broadcast" else A)


@given(st.data())
def test_matrices_have_the_drawn_shape_dtype_rank_and_scale(data):
    shape = data.draw(shapes(max_side=8, min_side=1))
    rank, dtype = data.draw(ranks(shape)), data.draw(st.sampled_from(DTYPES))
    A = data.draw(
        matrices(shape=st.just(shape), dtype=st.just(np.dtype(dtype)), rank=st.just(rank), exponent=st.just(3))
    )
    assert (A.shape, A.dtype) == (shape, dtype)
    assert np.isfinite(A).all()
    if A.size:
        assert np.linalg.matrix_rank(A, rtol=64 * np.finfo(dtype).eps).max(initial=0) <= rank
        assert np.abs(A).max() <= 1000 * 2**0.5 * (1 + np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_reach_both_ends_of_the_range_and_nothing_overflows(dtype):
    info, seen = np.finfo(dtype), set()

    @given(exponents(np.dtype(dtype)))
    def collect(exponent):
        seen.add(exponent)

    collect()
    assert 0 in seen
    top = matrix((3, 3), dtype, 0, exponent=int(np.log10(float(info.max))))
    tiny = matrix((3, 3), dtype, 0, exponent=int(np.ceil(np.log10(float(info.smallest_subnormal)))))
    assert np.isfinite(top).all()
    assert np.abs(top).max() > float(info.max) / 10
    assert 0 < np.abs(tiny).max() < float(info.tiny)


@given(shapes(max_side=5, max_batch_dims=2))
def test_shapes_have_at_least_two_dimensions_and_ranks_fit_them(shape):
    assert 2 <= len(shape) <= 4
    assert max(shape[-2:]) <= 5
    assert all(0 <= n <= 3 for n in shape[:-2])
