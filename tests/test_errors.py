"""Errors are also the builtins a caller would catch; they name the argument, what was given, what is accepted."""

import builtins
import inspect
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import orthlin
from orthlin import errors, metrics, schedules, sketch, steppers
from orthlin.errors import (
    ArrayTypeError,
    DeviceError,
    DTypeError,
    NonFiniteError,
    OptionError,
    OrthlinError,
    RankError,
    RngError,
    ScheduleError,
    ShapeError,
    SingularError,
)

BUILTINS = {
    ArrayTypeError: TypeError,
    DTypeError: TypeError,
    RngError: TypeError,
    DeviceError: ValueError,
    NonFiniteError: ValueError,
    OptionError: ValueError,
    RankError: ValueError,
    ScheduleError: ValueError,
    ShapeError: ValueError,
    SingularError: np.linalg.LinAlgError,
}
A = np.diag([3.0, 2.0, 1.0])
HALF = torch.eye(3, dtype=torch.bfloat16)
META = torch.eye(3, device="meta", dtype=torch.float64)
TORCH = torch.eye(3, dtype=torch.float64)

MATRIX = {
    "A": {
        "orthogonalize": orthlin.orthogonalize,
        "polar": orthlin.polar,
        "matrix_sign": orthlin.matrix_sign,
        "qr": orthlin.qr,
        "randomized_range_finder": lambda x: orthlin.randomized_range_finder(x, 1),
        "adaptive_range_finder": lambda x: orthlin.adaptive_range_finder(x, tol=0.1),
        "nuclear_norm": metrics.nuclear_norm,
        "numerical_rank": metrics.numerical_rank,
        "stable_rank": metrics.stable_rank,
        "qr_residual": lambda x: metrics.qr_residual(x, A, A),
        "polar_backward_error": lambda x: metrics.polar_backward_error(x, A, A),
        "captured_energy": lambda x: metrics.captured_energy(x, A),
        "range_error": lambda x: metrics.range_error(x, A),
    },
    "G": {
        "lowrank_orth": lambda x: orthlin.lowrank_orth(x, 1),
        "lowrank_orth_factors": lambda x: orthlin.lowrank_orth_factors(x, 1),
        "captured_nuclear_norm": lambda x: metrics.captured_nuclear_norm(x, A),
        "captured_fraction": lambda x: metrics.captured_fraction(x, A),
    },
    "U": {"orthogonality": metrics.orthogonality},
    "H": {"hermitian_defect": metrics.hermitian_defect, "psd_defect": metrics.psd_defect},
}
MATRIX_CALLS = [pytest.param(key, call, id=name) for key, calls in MATRIX.items() for name, call in calls.items()]
LIKE_CALLS = [
    pytest.param("like", lambda x, draw=draw: draw(3, 2, like=x), id=draw.__name__)
    for draw in (sketch.gaussian, sketch.sparse_sign, sketch.columns)
]
FLOATS = "float32, float64, complex64, complex128"
NO_ARRAYS = {  # what is given, the error, how the message shows it, what it says is accepted
    "list": (A.tolist(), ArrayTypeError, "builtins.list", "array API"),
    "none": (None, ArrayTypeError, "builtins.NoneType", "array API"),
    "masked": (np.ma.masked_array(A), ArrayTypeError, "MaskedArray", "plain dense array"),
    "matrix": (A.view(np.matrix), ArrayTypeError, "matrix", "plain dense array"),
    "sparse": (TORCH.to_sparse(), ArrayTypeError, "torch.Tensor", "plain dense array"),
    "int64": (A.astype(np.int64), DTypeError, "int64", FLOATS),
    "bool": (A.astype(bool), DTypeError, "bool", FLOATS),
    "object": (A.astype(object), DTypeError, "object", FLOATS),
    "longdouble": (A.astype(np.longdouble), DTypeError, str(np.dtype(np.longdouble)), FLOATS),
    "ml_dtypes": (A.astype(ml_dtypes.bfloat16), DTypeError, "bfloat16", FLOATS),
    "float8": (TORCH.to(torch.float8_e4m3fn), DTypeError, "float8_e4m3fn", FLOATS),
}
NO_MATRICES = {
    "vector": (A[0], ShapeError, "(3,)", "(..., m, n)"),
    "scalar": (A[0, 0].reshape(()), ShapeError, "()", "(..., m, n)"),
    "nan": (A * np.nan, NonFiniteError, "NaN", "remove or replace"),
    "inf": (np.where(A == 1, np.inf, A), NonFiniteError, "infinity", "remove or replace"),
}


def says(call, error, argument, given, accepted):
    """`call()` raises exactly `error`, and its message has the three parts, the argument first."""
    with pytest.raises(OrthlinError) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is error, message
    assert message.startswith(argument), message
    assert given in message, message
    assert accepted in message, message


def test_every_error_is_also_the_builtin_that_a_caller_would_catch():
    assert set(errors.__all__) == {error.__name__ for error in BUILTINS} | {"OrthlinError"}
    for error, builtin in BUILTINS.items():
        assert issubclass(error, OrthlinError)
        assert issubclass(error, builtin)
        assert inspect.getdoc(error).endswith(".")
    assert OrthlinError.__base__ is Exception
    assert not {error.__name__ for error in BUILTINS} & set(vars(builtins))


@pytest.mark.parametrize("bad", NO_ARRAYS)
@pytest.mark.parametrize(("argument", "call"), MATRIX_CALLS + LIKE_CALLS)
def test_what_is_no_array_of_floats_is_refused_by_name(argument, call, bad):
    value, error, given, accepted = NO_ARRAYS[bad]
    says(lambda: call(value), error, f"{argument}:", given, accepted)


@pytest.mark.parametrize("bad", NO_MATRICES)
@pytest.mark.parametrize(("argument", "call"), MATRIX_CALLS)
def test_what_is_no_finite_matrix_is_refused_by_name(argument, call, bad):
    value, error, given, accepted = NO_MATRICES[bad]
    before = value.tobytes()
    says(lambda: call(value), error, f"{argument}:", given, accepted)
    assert value.tobytes() == before


RANKED = {
    "lowrank_orth": (orthlin.lowrank_orth, "r"),
    "lowrank_orth_factors": (orthlin.lowrank_orth_factors, "r"),
    "randomized_range_finder": (orthlin.randomized_range_finder, "rank"),
    "max_rank": (lambda x, r: orthlin.adaptive_range_finder(x, tol=0.1, max_rank=r), "max_rank"),
}


@pytest.mark.parametrize("value", [-1, 4, 2.0, True, "2", np.float64(2)])
@pytest.mark.parametrize("name", RANKED)
def test_a_bad_rank_names_itself_and_both_limits(name, value):
    call, argument = RANKED[name]
    says(lambda: call(A, value), RankError, f"{argument}: expected an integer", f"got {value!r}", "min(m, n) = 3")
    says(lambda: call(A[:2], value), RankError, f"{argument}:", "(2, 3)", "min(m, n) = 2")


@pytest.mark.parametrize("name", list(RANKED)[:3])
def test_no_rank_is_a_rank_error_and_a_numpy_integer_is_a_rank(name):
    call, argument = RANKED[name]
    says(lambda: call(A, None), RankError, f"{argument}: expected an integer", "got None", "min(m, n) = 3")
    for rank in (np.int64(2), np.uint8(2), np.asarray(2)):
        call(A, rank)


low_rank, factors = orthlin.lowrank_orth, orthlin.lowrank_orth_factors
finder, adaptive = orthlin.randomized_range_finder, orthlin.adaptive_range_finder
cubic, raw = schedules.newton_schulz(3), schedules.polar_express(safety=0.0)
short = schedules.Schedule("short", cubic.steps, (0.1, 0.5), "")
OPTIONS = [
    (lambda: orthlin.qr(A, method="lu"), OptionError, "method:", "'lu'", "'householder'"),
    (lambda: orthlin.qr(A, method=None), OptionError, "method:", "None", "'householder'"),
    (lambda: orthlin.qr(A[:2], method="cholesky2"), ShapeError, "A:", "(2, 3)", "'householder'"),
    (lambda: orthlin.polar(A, side="up"), OptionError, "side:", "'up'", "'left'"),
    (lambda: orthlin.polar(A, method="gram_newton_schulz"), OptionError, "method:", "'gram", "'newton_schulz'"),
    (lambda: orthlin.orthogonalize(A, method="qr"), OptionError, "method:", "'qr'", "'svd'"),
    (lambda: orthlin.orthogonalize(A, schedule=5), OptionError, "schedule:", "5", "Schedule"),
    (lambda: orthlin.orthogonalize(A, tol=0), OptionError, "tol:", "0", "between 0 and 1"),
    (lambda: orthlin.orthogonalize(A, tol="x"), OptionError, "tol:", "'x'", "between 0 and 1"),
    (lambda: orthlin.orthogonalize(A, tol=0.1, schedule=cubic), OptionError, "tol:", "both", "either schedule or tol"),
    (lambda: orthlin.orthogonalize(A, method="svd", tol=0.1), OptionError, "method:", "'svd'", "'newton_schulz'"),
    (lambda: orthlin.orthogonalize(A, schedule=short), ScheduleError, "schedule: 'short'", "[0, 1]", "(0.1, 0.5)"),
    (lambda: orthlin.orthogonalize(HALF, schedule=raw), ScheduleError, "schedule: 'polar", "bfloat16", "admits"),
    (lambda: orthlin.matrix_sign(A[:2]), ShapeError, "A:", "(2, 3)", "(..., n, n)"),
    (lambda: orthlin.matrix_sign(A, method="svd"), OptionError, "method:", "'svd'", "'newton'"),
    (lambda: orthlin.matrix_sign(A, schedule=cubic), OptionError, "schedule:", "'newton'", "'newton_schulz'"),
    (lambda: orthlin.matrix_sign(A - 2 * np.eye(3)), SingularError, "A:", "imaginary axis", "no sign"),
    (lambda: low_rank(A, 1, n_iter=-1), RankError, "n_iter:", "-1", "at least 0"),
    (lambda: low_rank(A, 1, n_iter=1.5), RankError, "n_iter:", "1.5", "an integer"),
    (lambda: low_rank(A, 1, n_oversamples=-2), RankError, "n_oversamples:", "-2", "at least 0"),
    (lambda: factors(A, 1, sketch="normal"), OptionError, "sketch:", "'normal'", "'gaussian'"),
    (lambda: factors(A, 1, method="svd"), OptionError, "method:", "'svd'", "'exact'"),
    (lambda: low_rank(A, 1, rng="x"), RngError, "rng:", "str", "numpy.random.Generator"),
    (lambda: low_rank(A, 1, rng=True), RngError, "rng:", "bool", "numpy.random.Generator"),
    (lambda: low_rank(A, 1, rng=-3), RngError, "rng:", "-3", "must not be negative"),
    (lambda: low_rank(A, 1, rng=torch.Generator()), RngError, "rng:", "torch", "numpy.random.Generator"),
    (lambda: low_rank(A, 1, rng=np.random.RandomState(0)), RngError, "rng:", "RandomState", "numpy.random.Generator"),
    (lambda: low_rank(A, 1, test_matrix=A[:2, :1]), ShapeError, "test_matrix:", "(2, 1)", "(3, w)"),
    (lambda: low_rank(A, 2, test_matrix=A[:, :1]), ShapeError, "test_matrix:", "(3, 1)", "2 <= w <= 3"),
    (lambda: low_rank(A, 1, test_matrix=np.ones((4, 3, 1))), ShapeError, "test_matrix:", "(4,)", "broadcast"),
    (lambda: low_rank(A, 1, test_matrix=TORCH), ArrayTypeError, "test_matrix:", "torch.Tensor", "numpy.ndarray"),
    (lambda: low_rank(A, 1, test_matrix=A.astype(int)), DTypeError, "test_matrix:", "int64", FLOATS),
    (lambda: low_rank(A, 1, test_matrix=A * np.nan), NonFiniteError, "test_matrix:", "NaN", "remove or replace"),
    (lambda: low_rank(TORCH, 1, test_matrix=META), DeviceError, "test_matrix:", "meta", "cpu"),
    (lambda: finder(A, 1, normalizer="lu"), OptionError, "normalizer:", "'lu'", "'qr'"),
    (lambda: finder(A, 1, sketch="srft"), OptionError, "sketch:", "'srft'", "'sparse_sign'"),
    (lambda: adaptive(A[None], tol=0.1), ShapeError, "A:", "(1, 3, 3)", "(m, n)"),
    (lambda: adaptive(A, tol=-1), OptionError, "tol:", "-1", "between 0 and"),
    (lambda: adaptive(A, tol=0.1, block_size=0), RankError, "block_size:", "0", "at least 1"),
    (lambda: adaptive(A, tol=0.1, failure_probability=1), OptionError, "failure_probability:", "1", "between 0 and 1"),
    (lambda: sketch.gaussian(-1, 2, like=A), RankError, "n:", "-1", "at least 0"),
    (lambda: sketch.gaussian(1, 2.0, like=A), RankError, "width:", "2.0", "an integer"),
    (lambda: sketch.columns(2, 3, like=A), RankError, "width:", "3", "between 0 and 2"),
    (lambda: sketch.sparse_sign(2, 3, like=A, nonzeros=0), RankError, "nonzeros:", "0", "at least 1"),
    (lambda: schedules.muon(lower=1.5), OptionError, "lower", "1.5", "between 0 and 1"),
    (lambda: schedules.muon(0), OptionError, "n_iter", "0", "at least 1"),
    (lambda: schedules.newton_schulz(3, 4), OptionError, "degree", "4", "3 or 5"),
    (lambda: schedules.newton_schulz(3, lower=2.0), OptionError, "lower", "2.0", "below upper = 1"),
    (lambda: low_rank(A, 1, tol=1e-17), OptionError, "tol:", "1e-17", "at least 8.9e-16"),
    (lambda: steppers.muon(0.1, rank=1, tol=5e-324), OptionError, "tol:", "5e-324", "at least 8.9e-16"),
    (lambda: steppers.muon(0.1, tail=np.ones(2)), OptionError, "tail:", "array", "at least 0"),
    (lambda: schedules.for_tolerance(5e-324, 0.1), OptionError, "lower", "5e-324", "between 0 and 1"),
    (lambda: schedules.polar_express(safety=1), OptionError, "safety", "1", "[0, 1)"),
    (lambda: schedules.polar_express(cushion=-1), OptionError, "cushion", "-1", "[0, 1)"),
    (lambda: schedules.polar_express(degree=4), OptionError, "degree", "4", "odd, from 3 to 21"),
    (lambda: schedules.for_tolerance(0.1, 2.0), OptionError, "tol", "2.0", "1)"),
    (lambda: schedules.stable(0.1, 1.0), OptionError, "tol", "1.0", "between 0 and 1"),
    (lambda: schedules.suppress(True), OptionError, "n_iter", "True", "integer of at least 1"),
    *[
        (
            lambda bound=bound, bad=bad: bound(bad, 2, 4),
            OptionError,
            "singular_values:",
            repr(bad),
            "iterable of numbers",
        )
        for bound in (metrics.hmt_frobenius_bound, metrics.hmt_spectral_bound)
        for bad in (None, 3, 1.5, np.float64(2.0), np.asarray(2.0))
    ],
    (lambda: metrics.hmt_tail_bound(3, 2, 4, 2, 2), OptionError, "singular_values:", "3", "iterable of numbers"),
    (lambda: metrics.range_error(A, A, ord=np.ones(2)), OptionError, "ord:", "array", "'fro' or 2"),
    (lambda: metrics.range_error(A, A, ord=None), OptionError, "ord:", "None", "'fro' or 2"),
    (lambda: schedules.Schedule("none", (), (0, 1), ""), OptionError, "steps of 'none'", "()", "non-empty"),
    (
        lambda: cubic.then(schedules.suppress()),
        ScheduleError,
        "'suppress(4)' is made for [0.9",
        "delivers [0.0",
        "1.1]",
    ),
]


@pytest.mark.parametrize(("call", "error", "argument", "given", "accepted"), OPTIONS)
def test_a_bad_option_names_itself_what_was_given_and_what_is_accepted(call, error, argument, given, accepted):
    says(call, error, argument, given, accepted)


BUILD: dict[str, Any] = {
    "newton_schulz": {"n_iter": 3, "degree": 3, "lower": 0.1, "upper": 1.0},
    "muon": {"n_iter": 3, "lower": 0.1},
    "speedrun": {"lower": 0.1},
    "polar_express": {"lower": 0.1, "n_iter": 2, "safety": 0.01, "cushion": 0.02, "degree": 5},
    "cans": {"lower": 0.1, "n_iter": 2, "safety": 0.01},
    "for_tolerance": {"lower": 0.1, "tol": 0.1, "safety": 0.01},
    "stable": {"lower": 0.1, "tol": 0.1},
    "suppress": {"n_iter": 2},
}
NO_NUMBERS = (None, True, "x", [], {}, 1j, np.ones(2), np.nan, object())


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, options in BUILD.items() for key in options])
def test_what_is_no_number_makes_no_schedule(name, key):
    for bad in NO_NUMBERS:
        says(lambda bad=bad: getattr(schedules, name)(**BUILD[name] | {key: bad}), OptionError, key, repr(bad), "")


@pytest.mark.parametrize("name", BUILD)
def test_a_schedule_of_other_numbers_is_that_of_pythons(name):
    build, plain = getattr(schedules, name), {k: v if isinstance(v, int) else 0.5 for k, v in BUILD[name].items()}
    plain |= {"upper": 1.0} if "upper" in plain else {}
    for kind in (np.float32, np.float64, Fraction):
        assert build(**{k: np.int64(v) if isinstance(v, int) else kind(v) for k, v in plain.items()}) == build(**plain)


def test_a_stepper_of_numpys_numbers_is_that_of_pythons():
    given = {"rank": 2, "tol": 0.5, "tail": 0.5, "n_iter": 1, "seed": 3, "lr": 0.5, "weight_decay": 0.25}
    numpys = {k: np.int64(v) if isinstance(v, int) else np.float32(v) for k, v in given.items()}
    G = np.arange(24.0).reshape(4, 6) % 7
    found = []
    for options in (given, numpys, numpys | {"seed": np.asarray(3)}):
        stepper = steppers.muon(**options)
        found.append(stepper.update(G, stepper.init(G), G)[0])
    assert all(np.array_equal(found[0], other) for other in found[1:])


def test_an_error_leaves_the_generator_as_it_was():
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    for call in (
        lambda: low_rank(A, 9, rng=rng),
        lambda: low_rank(A, 1, rng=rng, method="svd"),
        lambda: low_rank(A * np.nan, 1, rng=rng),
        lambda: sketch.columns(2, 3, like=A, rng=rng),
    ):
        with pytest.raises(OrthlinError):
            call()
    assert rng.bit_generator.state == before
