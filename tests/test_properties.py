"""What holds for every matrix that hypothesis can draw: shape, dtype, scale, rank and layout.

A short run belongs to the tests.  The long one, 100,000 examples shared by the properties, is

    ORTHLIN_HYPOTHESIS=long pytest tests/test_properties.py -n auto
"""

import math
import sys

import conftest
import numpy as np
from gallery import LIMITS, gram_defect, judge_partial_isometry, judge_polar, judge_qr, ldexp, scaled, within
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.internal.detection import is_hypothesis_test
from strategies import LAYOUTS, exponents, matrices, matrix, ranks, shapes

import orthlin
from orthlin import schedules, sketch

LIBRARIES = st.sampled_from(["numpy", "torch:cpu", "strict"]).map(conftest.BACKENDS.get)
SHORT = shapes(max_side=24, max_batch_dims=1, min_side=1)
HEADROOM = 3  # decades between the largest part drawn and overflow: norms of H and R reach 24 times the part
SCHEDULES = (schedules.muon(), schedules.newton_schulz(12), schedules.polar_express(), schedules.suppress())


def room(dtype):
    """Scales at which a norm of the matrix can still be represented."""
    top = int(np.log10(float(np.finfo(dtype).max))) - HEADROOM
    return exponents(dtype).map(lambda exponent: min(exponent, top))


@st.composite
def representable(draw):
    dtype = np.dtype(draw(st.sampled_from(["float32", "float64", "complex64", "complex128"])))
    return draw(matrices(shape=SHORT, dtype=st.just(dtype), exponent=room(dtype)))


def each(A, result):
    """Every matrix of a stack, with what belongs to it."""
    for index in np.ndindex(A.shape[:-2]):
        yield A[index], *(x[index] for x in (result if isinstance(result, tuple) else (result,)))


def rounding(A, size):
    """What rounding a subnormal factor of `size` entries costs, in units of eps ||A||."""
    info, (As, exponent) = np.finfo(A.dtype), scaled(A)
    unit = math.ldexp(float(info.smallest_subnormal), -exponent)
    return unit * size**0.5 / (float(info.eps) * (np.linalg.norm(As) or 1.0))


@given(representable(), LIBRARIES, st.sampled_from(["right", "left"]))
def test_polar_factors_are_orthonormal_and_reproduce_the_matrix(A, xp, side):
    for a, U, H in each(A, xp.call(orthlin.polar, A, side=side)):
        slack = rounding(a, H.size)
        assert within(judge_polar(a, U, H, side), {name: limit + slack for name, limit in LIMITS.items()})


@given(representable(), LIBRARIES)
def test_qr_factors_are_orthonormal_and_reproduce_the_matrix(A, xp):
    for a, Q, R in each(A, xp.call(orthlin.qr, A)):
        limits = {"orthogonality": 64, "backward": 64 + rounding(a, R.size), "triangular": 0}
        assert within(judge_qr(a, Q, R), limits)


@st.composite
def scaled_pairs(draw):
    """A matrix of few bits and the same times a power of two, both exact."""
    dtype = np.dtype(draw(st.sampled_from(["float32", "float64", "complex64", "complex128"])))
    A = draw(matrices(shape=SHORT, dtype=st.just(dtype), exponent=st.just(0)))
    A = np.ascontiguousarray(np.round(A * 64) / 64, dtype=dtype)  # the layout is another property
    info = np.finfo(dtype)
    lowest = round(np.log2(float(info.smallest_subnormal))) + 6
    return A, ldexp(A, draw(st.integers(lowest, info.maxexp - 1))).astype(dtype)


@given(scaled_pairs(), LIBRARIES, st.sampled_from([None, *SCHEDULES[:3]]))
def test_a_power_of_two_changes_no_bit_of_a_factor(pair, xp, schedule):
    A, B = pair
    np.testing.assert_array_equal(*(xp.call(orthlin.orthogonalize, x, schedule=schedule) for x in (A, B)))


@given(st.data(), LIBRARIES, st.integers(0, 2), st.sampled_from(["auto", "exact"]))
def test_singular_values_at_low_rank_are_zero_or_one(data, xp, n_iter, method):
    G = data.draw(matrices(shape=SHORT))
    r = data.draw(ranks(G.shape))
    Omega = sketch.gaussian(G.shape[-1], r, like=G, rng=np.random.default_rng(0))
    for g, O in each(G, xp.call(orthlin.lowrank_orth, G, r, test_matrix=Omega, n_iter=n_iter, method=method)):
        assert judge_partial_isometry(O, g, Omega, r, n_iter)["ok"]


@given(st.data(), LIBRARIES, st.sampled_from(["qr", "none"]), st.sampled_from(["gaussian", "sparse_sign", "columns"]))
def test_a_basis_is_orthonormal_and_holds_the_factors(data, xp, normalizer, kind):
    A = data.draw(matrices(shape=SHORT))
    r = data.draw(ranks(A.shape))
    options = {"sketch": kind, "n_iter": 1, "rng": np.random.default_rng(0)}
    Q = xp.call(orthlin.randomized_range_finder, A, r, normalizer=normalizer, **options)
    assert Q.shape == (*A.shape[:-1], min(r + 10, *A.shape[-2:]))
    options["rng"] = np.random.default_rng(0)
    Q2, W = xp.call(orthlin.lowrank_orth_factors, A, r, **options)
    bound = 64 * np.finfo(A.dtype).eps * max(Q.shape[-1], 1) ** 0.5
    for _, q, q2, w in each(A, (Q, Q2, W)):
        assert gram_defect(ldexp(q, 0)) <= bound
        assert gram_defect(ldexp(q2, 0)) <= bound
        assert np.linalg.norm(ldexp(w, 0), 2) <= 1 + bound if w.size else True


EVERY = {
    **{f"polar-{method}": lambda A, m=method: orthlin.polar(A, method=m).U for method in ("auto", "newton_schulz")},
    **{f"schedule-{s.name}": lambda A, s=s: orthlin.orthogonalize(A, schedule=s) for s in SCHEDULES},
    "gram": lambda A: orthlin.orthogonalize(A, schedule=SCHEDULES[0], method="gram_newton_schulz"),
    "tol": lambda A: orthlin.orthogonalize(A, tol=0.01),
    "qr": lambda A: orthlin.qr(A).Q,
    "range": lambda A: orthlin.randomized_range_finder(A, min(A.shape[-2:]) // 2, rng=0),
    "lowrank": lambda A: orthlin.lowrank_orth(A, min(A.shape[-2:]) // 2, rng=0),
}


@given(matrices(), LIBRARIES, st.sampled_from(list(EVERY)))
def test_finite_input_of_any_scale_and_shape_gives_finite_factors(A, xp, name):
    with np.errstate(over="ignore"):  # of H and R, which may lie beyond the largest number
        result = xp.call(EVERY[name], A)
    assert np.isfinite(result).all()
    assert result.size == 0 or np.abs(result).max() < 1.5


@given(matrices(shape=shapes(max_side=24, min_side=1).filter(lambda s: len(s) > 2)), st.sampled_from(list(EVERY)))
def test_a_batch_equals_a_loop_bit_for_bit(A, name):
    assume(A.size)
    A = np.ascontiguousarray(A)
    with np.errstate(over="ignore"):
        together = EVERY[name](A)
        for index in np.ndindex(A.shape[:-2]):
            np.testing.assert_array_equal(together[index], EVERY[name](A[index]))


@given(
    shapes(max_side=24, min_side=1),
    st.sampled_from(["float32", "complex128"]),
    st.integers(0, 2**32 - 1),
    st.sampled_from(list(LAYOUTS)),
    LIBRARIES,
)
def test_a_layout_does_not_matter_beyond_rounding(shape, dtype, seed, layout, xp):
    """A factor is perturbed by the backward error, 64 eps, over the smallest singular value of a matrix of norm one."""
    A = matrix(shape, dtype, seed, layout=layout)
    first, second = (xp.call(orthlin.orthogonalize, x) for x in (A, np.array(A, order="C")))
    for a, U, V in each(np.asarray(A), (first, second)):
        sigma = np.linalg.svd(scaled(a)[0], compute_uv=False)
        eps = float(np.finfo(dtype).eps)
        assume(sigma[-1] > 1e3 * eps * sigma[0])
        assert np.linalg.norm(ldexp(U - V, 0)) <= 128 * eps * np.linalg.norm(sigma) / sigma[-1]


@st.composite
def hermitian(draw):
    """A Hermitian matrix and its sign; eigenvalues of sizes from 1 to 1/cond and of both signs."""
    n, seed = draw(st.integers(1, 24)), draw(st.integers(0, 2**32 - 1))
    dtype = np.dtype(draw(st.sampled_from(["float32", "float64", "complex64", "complex128"])))
    cond = 10.0 ** draw(st.integers(0, 3))
    Q, R = np.linalg.qr(matrix((n, n), "complex128" if dtype.kind == "c" else "float64", seed))
    assume(np.abs(np.diag(R)).min() > 0)
    signs = np.where(np.random.default_rng(seed).random(n) < 0.5, -1, 1)
    sizes, exponent = np.geomspace(1, 1 / cond, n), draw(room(dtype))
    A = ((Q * (signs * sizes)) @ Q.conj().T * float(f"1e{max(exponent, np.finfo(dtype).minexp // 4)}")).astype(dtype)
    return A, (Q * signs) @ Q.conj().T, cond


@given(hermitian(), LIBRARIES, st.sampled_from(["newton", "newton_schulz"]))
def test_the_sign_of_a_hermitian_matrix_is_that_of_its_eigenvalues(drawn, xp, method):
    """The condition number of a Hermitian sign is that of the matrix."""
    A, exact, cond = drawn
    S = xp.call(orthlin.matrix_sign, A, method=method)
    assert np.linalg.norm(S - exact) <= 64 * np.finfo(A.dtype).eps * cond * len(A)


def test_the_long_run_counts_its_properties():
    module = sys.modules[__name__]
    assert sum(is_hypothesis_test(value) for value in vars(module).values()) == conftest.PROPERTIES
