"""The matrices of a step: pieces of parameters, checked, and batches of them that are stepped along together."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orthlin import _backend as be
from orthlin._direction import Recipe
from orthlin.errors import ArrayTypeError, DeviceError, DTypeError, NonFiniteError, ShapeError
from orthlin.torch._adamw import is_matrix
from orthlin.torch._sharded import Part, is_sharded, local, somewhere
from orthlin.torch.views import MatrixView


def stream_name(shape: tuple[int, ...]) -> str:
    """Name under which random numbers are drawn: all matrices of a shape share a draw, whoever holds them."""
    return "x".join(map(str, shape[-2:]))


class Piece(NamedTuple):
    """Matrices of one parameter, as views of shape (b, m, n), with their part of its state."""

    gradient: Tensor
    weight: Tensor
    momentum: Tensor | None
    state: dict[str, Any]
    right: str
    skipped: Tensor
    fading: Any  # a tensor, or None without a momentum
    diagnostics: Tensor | None
    part: Part | None = None
    owners: tuple[int, ...] = ()  # of the matrices of a batch that are needed whole
    given: Any = None  # whether there is a gradient, (b, 1, 1), where that differs between processes


class Matrix(NamedTuple):
    """A parameter of a step: its state, its view, what its batches have in common, and what is here of it.

    `copies` is the group of processes with copies that have gradients of their own; `given` tells whether there is a
    gradient, where that differs between processes.
    """

    p: Tensor
    state: dict[str, Any]
    view: MatrixView
    recipe: Recipe
    options: dict[str, Any]
    kind: tuple[Any, ...]
    copies: Any = None
    parts: list[Part] | None = None
    given: Tensor | None = None


def initializing(groups: list[dict[str, Any]], copies: Any = None) -> bool:
    """Whether all rates and gradients are zero, as in the step by which tools have a state made."""
    rates = [group["lr"] for group in groups]
    if not all((not isinstance(lr, Tensor) or be.is_host(lr)) and bool(lr == 0) for lr in rates):
        return False
    params = [p for group in groups for p in group["params"]]
    given = [p.grad for p in params if p.grad is not None]
    moves = any(g.layout is not torch.strided or g.is_meta or bool(local(g).any()) for g in given)
    return not somewhere(moves, params, copies)


def check_gradient(p: Tensor, state: dict[str, Any], matrix: bool) -> None:
    """Check that a gradient can be stepped along with the state that there is."""
    g = p.grad
    if g is None:
        return
    if matrix and g.layout is not torch.strided:
        raise ArrayTypeError("params: a gradient is sparse; use dense gradients for matrices")
    if g.dtype != p.dtype:
        raise DTypeError(f"grad: is {g.dtype} where its parameter is {p.dtype}; convert one of them")
    if g.device != p.device:
        raise DeviceError(f"grad: lives on {g.device}, its parameter on {p.device}; move one of them")
    lies, belongs = ((x.device_mesh, x.placements) if is_sharded(x) else None for x in (g, p))
    if lies != belongs:
        raise ArrayTypeError(f"grad: lies as {lies} where its parameter lies as {belongs}; redistribute one of them")
    held = state.get("momentum", state.get("exp_avg", p))
    if g.shape != p.shape or held.shape != p.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (g, held))
        raise ShapeError(f"params: gradient and state of a parameter of shape {tuple(p.shape)} have shapes {shapes}")


def check_finite(groups: list[dict[str, Any]], copies: Any = None) -> None:
    """Check that gradients of matrices on the host are finite where that is asked for, all parts of them."""
    asked = [(group, p) for group in groups if group["nonfinite"] == "raise" for p in group["params"]]
    params = [p for group, p in asked if is_matrix(group, p) and p.device.type == "cpu"]
    bad = any(p.grad is not None and not bool(local(p.grad).isfinite().all()) for p in params)
    if somewhere(bad, params, copies):
        raise NonFiniteError("grad: holds NaN or infinity; remove or replace them first")


def values_of(p: Tensor, state: dict[str, Any]) -> Tensor:
    """Return a tensor with the values of a parameter that can be seen as matrices: itself, if it is no copy."""
    if "master" in state:
        # Entries that were changed elsewhere are taken over, as when a model is loaded after the optimizer was made.
        master: Tensor = state["master"]
        return master.copy_(torch.where(master.to(p.dtype) == p, master, p.to(master.dtype)))
    # Layouts such as channels_last have no view as matrices.
    return p if p.ndim == 2 or p.is_contiguous() else p.contiguous()


def pieces_of(matrix: Matrix, weight: Tensor) -> Iterator[Piece]:
    """Split a parameter, whose values are in `weight`, its gradient and its state into matrices, or parts of them."""
    p, state, view, parts, given = matrix.p, matrix.state, matrix.view, matrix.parts, matrix.given
    weights = view.view(weight)
    momenta = view.view(state["momentum"]) if "momentum" in state else [None] * len(weights)
    start = 0
    for i, (g, w, m) in enumerate(zip(view.view(p.grad, copy=True), weights, momenta, strict=True)):
        rows = slice(start, start + w.shape[0])
        start = rows.stop
        fading, noted = (state[key][rows] if key in state else None for key in ("fading", "diagnostics"))
        part = None if parts is None else parts[i]
        there = None if given is None else given.expand(len(w), 1, 1)
        yield Piece(g, w, m, state, f"right_{i}", state["skipped"][rows], fading, noted, part, given=there)


_OPTIONS = (
    "step", "lr", "momentum", "nesterov", "error_feedback", "weight_decay", "cautious", "maximize", "diagnostics",
)  # fmt: skip


class Batch(NamedTuple):
    """Matrices of one shape that are stepped along in the same way, in all groups, and the options of those."""

    pieces: list[Piece]
    recipe: Recipe
    options: dict[str, Any]


def kind_of(piece: Piece) -> tuple[Any, ...]:
    """What the pieces of a batch have in common: shape, dtypes, device, and which of their sides is contiguous.

    Parts have their place in common, whatever their strides: every process must come to the same batches.
    """
    w = piece.weight
    lies = piece.part or (w.stride(-2) < w.stride(-1))
    return w.shape[1:], w.dtype, piece.gradient.dtype, w.device, lies, piece.momentum is None


def options_of(group: dict[str, Any]) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """What the groups of a batch have in common beside their recipe, and its key; a tensor is its own kind."""
    options = {key: group[key] for key in _OPTIONS}
    return options, tuple(id(v) if isinstance(v, Tensor) else v for v in options.values())


def collect(matrix: Matrix, batches: dict[Any, Batch], copies: list[tuple[Tensor, Tensor]]) -> None:
    """Add the pieces of a parameter to batches, and itself to the copies if one is stepped along in its place."""
    p, recipe = matrix.p, matrix.recipe
    weight = values_of(p, matrix.state)
    if weight is not p:
        copies.append((p, weight))
    for piece in pieces_of(matrix, weight):
        key = kind_of(piece), recipe, matrix.kind
        batches.setdefault(key, Batch([], recipe, matrix.options)).pieces.append(piece)
