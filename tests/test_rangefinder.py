"""The range finder: what its basis spans, what it refuses, and the adaptive one's promise."""

import math

import numpy as np
import pytest
import torch
from conftest import BACKENDS
from gallery import DTYPES, cases, scaled

from orthlin import adaptive_range_finder, randomized_range_finder
from orthlin.errors import ArrayTypeError, DeviceError, DTypeError, NonFiniteError, OptionError, RankError, ShapeError

SHAPE, RANK = (24, 40), 5  # one shape wherever JAX takes part: it compiles every new one


def gaussian(*shape, dtype="float64", seed=0):
    rng = np.random.default_rng(seed)
    real = rng.standard_normal(shape)
    return (real + 1j * rng.standard_normal(shape) if np.dtype(dtype).kind == "c" else real).astype(dtype)


def with_spectrum(sigma, m, n, dtype="float64", seed=0):
    """Random singular vectors and the given singular values; the others are zero up to rounding."""
    k = len(sigma)
    U, V = (np.linalg.qr(gaussian(size, k, dtype=dtype, seed=seed + i)).Q for i, size in enumerate((m, n)))
    return ((U * np.asarray(sigma)) @ V.conj().T).astype(dtype)


def defect(Q):
    """||Q^H Q - I||_F in eps of the dtype of Q times the root of its width."""
    wide = Q.astype(np.complex128)
    error = np.linalg.norm(wide.conj().T @ wide - np.eye(Q.shape[1]))
    return error / (np.finfo(Q.dtype).eps * math.sqrt(max(1, Q.shape[1])))


def remainder(A, Q, ord=2):
    return np.linalg.norm(A - Q @ (Q.conj().T @ A), ord)


@pytest.fixture(params=["numpy", "torch:cpu"])
def host(request):
    return BACKENDS[request.param]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_basis_of_every_gallery_matrix_is_orthonormal_and_spans_the_sketch(host, dtype):
    """64 eps as for every QR factorization, and more than that for long columns of equal entries.

    A norm summed in order rounds m equal squares to the same side, which torch shows on the all-ones matrix.
    The sketch leaves its own basis by the rounding of two products.
    """
    for c in cases(dtypes=[dtype]):
        width = max(1, min(c.A.shape) // 2)
        omega = gaussian(c.A.shape[1], width, dtype=dtype, seed=1)
        Q = host.call(randomized_range_finder, c.A, width, test_matrix=omega)
        assert defect(Q) <= max(64, c.A.shape[0] / 2), c.id
        A = scaled(c.A)[0]
        bound = 16 * np.finfo(dtype).eps * math.sqrt(c.A.shape[1]) * np.linalg.norm(A) * np.linalg.norm(omega)
        assert remainder(A @ omega, Q, "fro") <= bound, c.id


@pytest.mark.parametrize("n_iter", [0, 1])
def test_every_library_finds_the_same_range(xp, n_iter):
    """Projectors onto the range of a matrix whose condition number after powers is below 1e4."""
    A, omega = with_spectrum(np.geomspace(1, 0.1, 24), *SHAPE), gaussian(SHAPE[1], RANK)
    Q = xp.call(randomized_range_finder, A, RANK, test_matrix=omega, n_iter=n_iter)
    Y = A @ omega
    for _ in range(n_iter):
        Y = A @ (A.T @ Y)
    expected = np.linalg.qr(Y).Q
    assert defect(Q) <= 32
    assert np.linalg.norm(Q @ Q.T - expected @ expected.T) <= 1e4 * np.finfo(float).eps


@pytest.mark.parametrize(("rank", "p", "width"), [(0, 0, 0), (0, 2, 2), (5, 10, 15), (5, 100, 24), (24, 10, 24)])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_width_is_rank_plus_oversamples_cut_to_the_matrix(host, shape, rank, p, width):
    Q = host.call(randomized_range_finder, gaussian(*shape), rank, n_oversamples=p, rng=0)
    assert Q.shape == (shape[0], width)
    assert defect(Q) <= 32


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (3, 0, 4), (2, 3, 4, 0), (0, 5, 4)])
def test_empty_dimensions_give_empty_bases(host, shape):
    rank = min(shape[-2:])
    Q = host.call(randomized_range_finder, gaussian(*shape), rank, n_oversamples=0, n_iter=1, rng=0)
    assert Q.shape == (*shape[:-1], rank)


@pytest.mark.parametrize("kind", ["gaussian", "sparse_sign", "columns"])
@pytest.mark.parametrize("n_iter", [0, 2])
def test_a_sketch_as_wide_as_the_rank_captures_all_of_it(host, kind, n_iter):
    A = gaussian(30, 4) @ gaussian(4, 50, seed=1)
    Q = host.call(randomized_range_finder, A, 4, n_oversamples=0, n_iter=n_iter, sketch=kind, rng=3)
    # the condition number of a square Gaussian block is below 1e3 with this seed
    assert remainder(A, Q) <= 1e3 * np.finfo(float).eps * np.linalg.norm(A, 2)


def test_columns_spans_columns_of_the_matrix(host):
    A = gaussian(30, 7)
    Q = host.call(randomized_range_finder, A, 3, n_oversamples=0, sketch="columns", rng=0)
    left = np.linalg.norm(A - Q @ (Q.T @ A), axis=0) / np.linalg.norm(A, axis=0)
    assert np.count_nonzero(left <= 16 * np.finfo(float).eps) == 3


def test_the_qr_normalizer_keeps_directions_that_powers_would_lose(host):
    """Singular values down to 1e-8, two power iterations: 1e-40 relative to the first is below eps."""
    A, omega = with_spectrum(np.geomspace(1, 1e-8, 24), *SHAPE), gaussian(SHAPE[1], 18)
    errors = {
        how: remainder(A, host.call(randomized_range_finder, A, 18, test_matrix=omega, n_iter=2, normalizer=how))
        for how in ("qr", "none")
    }
    sigma = np.geomspace(1, 1e-8, 24)
    assert errors["qr"] <= 2 * sigma[18]
    # documented: directions below eps^(1/5) are lost, up to the luck that noise has in hitting them
    assert 0.01 * np.finfo(float).eps ** 0.2 <= errors["none"] <= 10 * np.finfo(float).eps ** 0.2


def test_the_normalizer_does_not_matter_on_a_flat_spectrum(host):
    A, omega = with_spectrum(np.geomspace(1, 0.5, 24), *SHAPE), gaussian(SHAPE[1], RANK)
    P = [
        Q @ Q.T
        for how in ("qr", "none")
        for Q in [host.call(randomized_range_finder, A, RANK, test_matrix=omega, n_iter=2, normalizer=how)]
    ]
    assert np.linalg.norm(P[0] - P[1]) <= 1e4 * np.finfo(float).eps


@pytest.mark.parametrize("normalizer", ["qr", "none"])
def test_many_power_iterations_neither_overflow_nor_vanish(host, normalizer):
    A = with_spectrum([1e30, 1e29, 1e-30], 20, 30, "float32")
    Q = host.call(randomized_range_finder, A, 1, n_oversamples=1, n_iter=40, normalizer=normalizer, rng=0)
    assert defect(Q) <= 32


@pytest.mark.parametrize("shape", [(2, 3, 24, 40), (4, 200, 20), (1, 1, 5, 4)])
def test_a_batch_is_a_loop_bit_for_bit_with_one_draw_for_all(shape):
    A = gaussian(*shape)
    together = randomized_range_finder(A, 3, n_iter=1, rng=1)
    for index in np.ndindex(shape[:-2]):
        assert np.array_equal(together[index], randomized_range_finder(A[index], 3, n_iter=1, rng=1))


@pytest.mark.parametrize("batch", [(), (3,), (1,), (2, 3), (2, 1), (1, 1)])
def test_leading_dimensions_of_a_test_matrix_broadcast(host, batch):
    A, omega = gaussian(2, 3, 10, 12), gaussian(*batch, 12, 4, seed=1)
    Q = host.call(randomized_range_finder, A, 4, test_matrix=omega)
    each = np.broadcast_to(omega, (2, 3, 12, 4))
    for index in np.ndindex(2, 3):
        Y = A[index] @ each[index]
        assert remainder(Y, Q[index], "fro") <= 64 * np.finfo(float).eps * np.linalg.norm(Y)


@pytest.mark.parametrize("shape", [(4, 12), (12, 3), (12, 11), (13, 4), (12,), (2, 12, 4), (5, 1, 12, 4)])
def test_a_test_matrix_that_does_not_fit_is_an_error_that_names_it(shape):
    with pytest.raises(ShapeError, match=r"test_matrix: .*\("):
        randomized_range_finder(gaussian(3, 10, 12), 4, test_matrix=gaussian(*shape))


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (torch.ones(12, 4, dtype=torch.float64), ArrayTypeError),
        ([[1.0] * 4] * 12, ArrayTypeError),
        (np.ones((12, 4), dtype=int), DTypeError),
        (np.full((12, 4), np.nan), NonFiniteError),
    ],
)
def test_a_test_matrix_of_another_kind_is_an_error_that_names_it(bad, error):
    with pytest.raises(error, match="test_matrix"):
        randomized_range_finder(gaussian(10, 12), 4, test_matrix=bad)


def test_a_complex_test_matrix_of_a_real_matrix_is_an_error():
    with pytest.raises(DTypeError, match=r"test_matrix.*complex128"):
        randomized_range_finder(gaussian(10, 12), 4, test_matrix=gaussian(12, 4, dtype="complex128"))


def test_a_test_matrix_on_another_device_is_an_error():
    A, omega = BACKENDS["strict:device1"].asarray(gaussian(10, 12)), BACKENDS["strict"].asarray(gaussian(12, 4))
    with pytest.raises(DeviceError, match=r"test_matrix.*CPU_DEVICE.*device1"):
        randomized_range_finder(A, 4, test_matrix=omega)


@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_powers_of_two_change_nothing(xp, dtype):
    A, omega = gaussian(*SHAPE, dtype=dtype), gaussian(SHAPE[1], RANK, dtype=dtype, seed=1)
    plain, large = (xp.call(randomized_range_finder, B, RANK, test_matrix=omega) for B in (A, A * 2.0**-60))
    assert np.array_equal(plain, large)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 3e4])
def test_half_precision_is_worked_on_in_float32(dtype, scale):
    """A column of length one whose entries are rounded is off by eps/2 at most, so Q^T Q by eps each."""
    A = torch.from_numpy(np.clip(gaussian(*SHAPE) / 4, -1, 1) * scale).to(getattr(torch, dtype))
    Q = randomized_range_finder(A, RANK, rng=0)
    assert Q.dtype == A.dtype
    gram = Q.double().T @ Q.double()
    assert torch.linalg.matrix_norm(gram - torch.eye(len(gram)), 2) <= 2 * torch.finfo(A.dtype).eps


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("argument", ["A", "test_matrix"])
def test_what_is_not_finite_is_an_error_on_the_host_and_nan_elsewhere(xp, argument, value):
    given = {"A": gaussian(*SHAPE), "test_matrix": gaussian(SHAPE[1], RANK)}
    given[argument][1, 2] = value
    A, omega = given["A"], given["test_matrix"]
    if xp.host:
        with pytest.raises(NonFiniteError, match=f"{argument}: holds NaN or infinity"):
            xp.call(randomized_range_finder, A, RANK, test_matrix=omega)
    else:
        assert np.isnan(xp.call(randomized_range_finder, A, RANK, test_matrix=omega)).all()


def test_nothing_is_written_to():
    A, omega = gaussian(*SHAPE), gaussian(SHAPE[1], RANK)
    copies = A.copy(), omega.copy()
    randomized_range_finder(A, RANK, test_matrix=omega, n_iter=2, normalizer="none")
    adaptive_range_finder(A, tol=1e-3, rng=0)
    assert np.array_equal(A, copies[0])
    assert np.array_equal(omega, copies[1])


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"rank": 25}, RankError, r"rank: .*25.*24"),
        ({"rank": -1}, RankError, r"rank: .*-1.*24"),
        ({"rank": 2.5}, RankError, r"rank: .*2\.5"),
        ({"rank": 2, "n_oversamples": -1}, RankError, r"n_oversamples: .*-1"),
        ({"rank": 2, "n_iter": 1.5}, RankError, r"n_iter: .*1\.5"),
        ({"rank": 2, "normalizer": "lu"}, OptionError, r"normalizer: .*'qr'.*'lu'"),
        ({"rank": 2, "sketch": "fft"}, OptionError, r"sketch: .*'gaussian'.*'fft'"),
    ],
)
def test_a_bad_option_is_an_error_that_names_it(options, error, named):
    with pytest.raises(error, match=named):
        randomized_range_finder(gaussian(*SHAPE), options.pop("rank"), **options)


def test_the_adaptive_range_finder_reads_values_outside_the_graph_and_refuses_meta_tensors():
    A = torch.from_numpy(gaussian(20, 12))
    assert torch.equal(
        adaptive_range_finder(A.clone().requires_grad_(), tol=1e-8, rng=0).detach(),
        adaptive_range_finder(A, tol=1e-8, rng=0),
    )
    with pytest.raises(DeviceError, match="meta"):
        adaptive_range_finder(A.to("meta"), tol=1e-8)
