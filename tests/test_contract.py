"""The contract at large: 31 classes of input, on every routine and library, get a right answer or a typed error.

The classes are those of the table `CLASSES`; a right answer keeps the promise that defines the routine, and a
typed error names the argument, the value and the remedy.
"""

import jax
import numpy as np
import pytest
import torch
from conftest import BACKENDS
from gallery import gram_defect, judge_partial_isometry, judge_polar, judge_qr, ldexp, scaled, within
from hypothesis import settings
from strategies import LAYOUTS

import orthlin
from orthlin import sketch
from orthlin.errors import DTypeError, NonFiniteError, OrthlinError, ShapeError, SingularError

MUON = orthlin.schedules.muon()


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def spoiled(value):
    A = gaussian(4, 4)
    A[1, 2] = value
    return A


BASE = gaussian(4, 4)
LARGEST = np.finfo("float32").max
CLASSES = {
    "zero": 0 * BASE,
    "NaN": spoiled(np.nan),
    "Inf": spoiled(np.inf),
    "subnormal": ldexp(BASE, -129).astype("float32"),  # where H and R, subnormal too, have most of their digits
    "1e-30": np.float32(1e-30) * BASE,
    "1e30": np.float32(1e30) * BASE,
    "near max": np.float32(0.9) * LARGEST * np.eye(4, dtype="float32")[[1, 0, 2, 3]],  # of norm below the maximum
    "rank one": np.outer(BASE[0], BASE[1]),
    "identity": np.eye(4, dtype="float32"),
    "half rank": gaussian(4, 2) @ gaussian(2, 4),
    "(0, 0)": gaussian(0, 0),
    "(0, 5)": gaussian(0, 5),
    "(5, 0)": gaussian(5, 0),
    "(1, 1)": gaussian(1, 1),
    "(1, 7)": gaussian(1, 7),
    "(7, 1)": gaussian(7, 1),
    "(50000, 2)": gaussian(50_000, 2),
    "1-D": BASE[0],
    "0-D": np.array(BASE[0, 0]),
    "batch": gaussian(3, 4, 4),
    "empty batch": gaussian(0, 4, 4),
    "int64": np.arange(16).reshape(4, 4),
    "bool": BASE > 0,
    "float16": BASE.astype("float16"),
    "complex64": BASE + 1j * gaussian(4, 4, seed=1),
    **{name: LAYOUTS[name](BASE) for name in ("transposed", "reversed", "strided", "broadcast")},
    "read-only": LAYOUTS["read_only"](BASE),
    "Fortran": LAYOUTS["fortran"](BASE),
}
SINGULAR = {"zero", "rank one", "broadcast", "half rank"}


def errors(routine, backend):
    """Class -> the expected error; all NaN where a device cannot raise; a right answer for every other class."""
    table = {"1-D": ShapeError, "0-D": ShapeError, "int64": DTypeError, "bool": DTypeError}
    if backend.name.startswith("strict"):
        table["float16"] = "not in this library"
    if routine == "matrix_sign":
        square = ("(0, 5)", "(5, 0)", "(1, 7)", "(7, 1)", "(50000, 2)")
        table |= dict.fromkeys(SINGULAR, SingularError if backend.host else "all NaN") | dict.fromkeys(
            square, ShapeError
        )
    return table | dict.fromkeys(("NaN", "Inf"), NonFiniteError if backend.host else "all NaN")


# routines and what makes their answers right -----------------------------------------------------


def rank_of(A):
    return min(2, *A.shape[-2:]) if len(A.shape) > 1 else 2


def seeded():
    return np.random.default_rng(0)


def eps(A):
    return float(np.finfo(A.dtype).eps)


def polar_is_right(A, result):
    return within(judge_polar(A, result.U, result.H))


def factor_is_right(A, U):
    As, exponent = scaled(A)
    H = U.conj().T @ As
    return within(judge_polar(A, U, ldexp((H + H.conj().T) / 2, exponent)))


def schedule_is_right(A, result):
    """Against the scalars p(sigma / s); rounding errors of every direction grow by the slope at zero at most."""
    left, sigma, right = np.linalg.svd(scaled(A)[0], full_matrices=False)
    norm = (sigma**4).sum() ** 0.25 or 1.0
    exact = (left * [MUON(x / norm) for x in sigma]) @ right
    error, top = np.linalg.norm(result - exact), np.linalg.norm(ldexp(result, 0), 2)
    return error <= 4 * MUON.slope * eps(A) and top <= MUON.band_with_rounding(eps(A))[1]


def sign_is_right(A, S):
    As, I = scaled(A)[0], np.eye(len(A))
    tol = 32 * eps(A) * np.linalg.norm(S) ** 2 * np.linalg.cond(As)
    return np.linalg.norm(S @ S - I) <= tol and np.linalg.norm(S @ As - As @ S) <= tol * np.linalg.norm(As)


def qr_is_right(A, result):
    return within(judge_qr(A, result.Q, result.R), {"orthogonality": 64, "backward": 64, "triangular": 0})


def test_matrix(A, width):
    return sketch.gaussian(A.shape[-1], width, like=A, rng=seeded())


test_matrix.__test__ = False


def basis_is_right(A, Q):
    Q = ldexp(Q, 0)
    Y = scaled(A)[0] @ test_matrix(A, Q.shape[1])
    limit = 64 * eps(A) * np.sqrt(Q.shape[1])
    rest = np.linalg.norm(Y - Q @ (Q.conj().T @ Y))
    return gram_defect(Q) <= limit and rest <= limit * np.linalg.norm(Y)


def lowrank_is_right(A, result):
    O, r = ldexp(result, 0), rank_of(A)
    return judge_partial_isometry(O, A, test_matrix(A, r), r)["ok"]


def factors_are_right(A, result):
    """On devices Q has shorter columns where the sketch has a smaller rank: nothing may be longer than one."""
    Q, W = (ldexp(x, 0) for x in result)
    r = rank_of(A)
    limit = 64 * eps(A) * np.sqrt(r)
    noise = max(A.shape) * eps(A)
    deficient = np.linalg.matrix_rank(scaled(A)[0] @ test_matrix(A, r), rtol=noise) < r
    is_basis = np.linalg.norm(Q, 2) <= 1 + limit if deficient else gram_defect(Q) <= limit
    return is_basis and lowrank_is_right(A, Q @ W)


ROUTINES = {
    "polar": (orthlin.polar, polar_is_right),
    "orthogonalize": (orthlin.orthogonalize, factor_is_right),
    "schedule": (lambda A: orthlin.orthogonalize(A, schedule=MUON), schedule_is_right),
    "matrix_sign": (orthlin.matrix_sign, sign_is_right),
    "qr": (orthlin.qr, qr_is_right),
    "range": (lambda A: orthlin.randomized_range_finder(A, rank_of(A), rng=seeded()), basis_is_right),
    "lowrank_orth": (lambda A: orthlin.lowrank_orth(A, rank_of(A), rng=seeded()), lowrank_is_right),
    "factors": (lambda A: orthlin.lowrank_orth_factors(A, rank_of(A), rng=seeded()), factors_are_right),
}


def judge(routine, A, result):
    """ "right", "wrong", or "all NaN" but for the zeros below the diagonal of R."""
    parts = result if isinstance(result, tuple) else (result,)
    if A.size and all((np.isnan(x) | np.tril(x == 0, -1)).all() for x in parts):
        return "all NaN"
    for index in np.ndindex(A.shape[:-2]):
        one = type(result)(*(x[index] for x in result)) if isinstance(result, tuple) else result[index]
        if A[index].size and not ROUTINES[routine][1](A[index], one):
            return "wrong"
    return "right"


def refusal(error):
    """The type of an error that says which argument it is about and, but for a singular matrix, what to do."""
    text = str(error)
    assert text.startswith(("A: ", "G: ")), text
    assert "; " in text or isinstance(error, SingularError), text
    return type(error)


def outcome(backend, routine, A):
    """The verdict on the result, or the type of the error that orthlin raised; any other error fails the test."""
    try:
        backend.asarray(A)
    except TypeError:
        return "not in this library"
    try:
        return judge(routine, A, backend.call(ROUTINES[routine][0], A))
    except OrthlinError as error:
        return refusal(error)


EAGER = [name for name in BACKENDS if name != "jax:jit"]  # each class would be compiled anew
SHARED = {"polar", "schedule", "range", "factors"}
"""Routines that JAX, which compiles every shape, runs in a long run alone: the others have the same parts."""


@pytest.mark.parametrize("xp", EAGER, indirect=True)
def test_31_of_31_input_classes_get_a_right_answer_or_a_typed_error(xp):
    assert len(CLASSES) == 31
    short = xp.name == "jax" and settings.get_current_profile_name() == "ci"
    for routine in set(ROUTINES) - (SHARED if short else set()):
        expected = dict.fromkeys(CLASSES, "right") | errors(routine, xp)
        assert {name: outcome(xp, routine, A) for name, A in CLASSES.items()} == expected, routine


# what else looks like a matrix ---------------------------------------------------------------------


class Subclass(np.ndarray):
    pass


def inference(A):
    with torch.inference_mode():
        return torch.from_numpy(A.copy())


PLAIN, COMPLEX = CLASSES["1e30"] / np.float32(1e30), CLASSES["complex64"]
LOOKALIKES = {
    "subclass": (PLAIN, lambda A: A.view(Subclass)),
    "big endian": (PLAIN, lambda A: A.astype(">f4")),
    "requires_grad": (PLAIN, lambda A: torch.from_numpy(A.copy()).requires_grad_()),
    "parameter": (PLAIN, lambda A: torch.nn.Parameter(torch.from_numpy(A.copy()))),
    "part of a graph": (PLAIN, lambda A: torch.from_numpy(A.copy()).requires_grad_() * 1),
    "inference": (PLAIN, inference),
    "conjugate view": (COMPLEX, lambda A: torch.from_numpy(A.conj()).conj()),
    "negative view": (COMPLEX.imag.copy(), lambda _: torch.from_numpy(COMPLEX.conj()).conj().imag),
    "torch transposed": (PLAIN, lambda A: torch.from_numpy(A.T.copy()).T),
    "torch strided": (PLAIN, lambda A: torch.from_numpy(LAYOUTS["strided"](A))),
    "torch expanded": (CLASSES["broadcast"], lambda A: torch.from_numpy(A[:1].copy()).expand(4, 4)),
}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_a_view_or_a_kind_of_array_is_the_matrix_it_shows(name):
    A, make = LOOKALIKES[name]
    x = make(A)
    np.testing.assert_array_equal(x.detach().resolve_conj().resolve_neg() if isinstance(x, torch.Tensor) else x, A)
    for routine, (function, _) in ROUTINES.items():
        if routine == "matrix_sign" and name == "torch expanded":
            continue  # of rank one
        result = function(x)
        parts = result if isinstance(result, tuple) else (result,)
        arrays = [y.detach().resolve_conj().numpy() if isinstance(y, torch.Tensor) else np.asarray(y) for y in parts]
        assert all(y.dtype.kind == A.dtype.kind and y.itemsize == A.itemsize for y in arrays)
        whole = type(result)(*arrays) if isinstance(result, tuple) else arrays[0]
        assert judge(routine, A, whole) == "right", routine


@pytest.mark.parametrize(
    "half",
    [
        CLASSES["float16"],
        torch.from_numpy(PLAIN).half(),
        torch.from_numpy(PLAIN).bfloat16(),
        jax.numpy.asarray(PLAIN, "bfloat16"),
    ],
    ids=lambda x: f"{type(x).__module__}-{x.dtype}",
)
def test_half_precision_is_single_precision_rounded(half):
    """All but a schedule, which multiplies in half precision."""
    space = orthlin._backend.namespace(half)
    for routine in set(ROUTINES) - {"schedule"}:
        function = ROUTINES[routine][0]
        result, single = (function(x) for x in (half, space.astype(half, space.float32)))
        for y, z in zip(*((x if isinstance(x, tuple) else (x,)) for x in (result, single)), strict=True):
            assert y.dtype == half.dtype
            assert bool(space.all(y == space.astype(z, half.dtype))), routine
    top = np.linalg.norm(np.asarray(space.astype(ROUTINES["schedule"][0](half), space.float32)), 2)
    assert 0.5 < top <= MUON.band_with_rounding(float(space.finfo(half.dtype).eps))[1]


def test_jax_without_x64_is_right_and_silent():
    with jax.enable_x64(False):
        for dtype in ("float32", "complex64"):
            for routine in ("orthogonalize", "qr", "lowrank_orth"):
                assert outcome(BACKENDS["jax"], routine, PLAIN.astype(dtype)) == "right", routine
