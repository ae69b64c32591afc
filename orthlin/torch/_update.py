"""One step of a batch of same-shape matrices, in place: the formulas of `orthlin.steppers`, without its copies."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orthlin import _backend as be
from orthlin._direction import Direction, Recipe, faded, real_product
from orthlin.errors import ArrayTypeError, DeviceError, DTypeError, NonFiniteError, ShapeError
from orthlin.torch.views import MatrixView

DIAGNOSTICS = ("captured", "stable_rank", "update_ratio")


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


def stream_name(shape: tuple[int, ...]) -> str:
    """Name under which random numbers are drawn: all matrices of a shape share a draw, whoever holds them."""
    return "x".join(map(str, shape[-2:]))


def initializing(groups: list[dict[str, Any]]) -> bool:
    """Whether all rates and gradients are zero, as in the step by which tools have a state made."""
    rates = [group["lr"] for group in groups]
    if not all((not isinstance(lr, Tensor) or be.is_host(lr)) and bool(lr == 0) for lr in rates):
        return False
    given = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    return not any(g.layout is not torch.strided or g.is_meta or bool(g.any()) for g in given)


def check_gradient(p: Tensor, state: dict[str, Any], matrix: bool, nonfinite: str) -> None:
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
    held = state.get("momentum", state.get("exp_avg", p))
    if g.shape != p.shape or held.shape != p.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (g, held))
        raise ShapeError(f"params: gradient and state of a parameter of shape {tuple(p.shape)} have shapes {shapes}")
    if matrix and nonfinite == "raise" and g.device.type == "cpu" and not bool(g.isfinite().all()):
        raise NonFiniteError("grad: holds NaN or infinity; remove or replace them first")


def values_of(p: Tensor, state: dict[str, Any]) -> Tensor:
    """Return a tensor with the values of a parameter that can be seen as matrices: itself, if it is no copy."""
    if "master" in state:
        # Entries that were changed elsewhere are taken over, as when a model is loaded after the optimizer was made.
        master: Tensor = state["master"]
        return master.copy_(torch.where(master.to(p.dtype) == p, master, p.to(master.dtype)))
    # Layouts such as channels_last have no view as matrices.
    return p if p.ndim == 2 or p.is_contiguous() else p.contiguous()


def pieces_of(p: Tensor, weight: Tensor, state: dict[str, Any], view: MatrixView) -> Iterator[Piece]:
    """Split a parameter, whose values are in `weight`, its gradient and its state into matrices."""
    weights = view.view(weight)
    momenta = view.view(state["momentum"]) if "momentum" in state else [None] * len(weights)
    start = 0
    for i, (g, w, m) in enumerate(zip(view.view(p.grad, copy=True), weights, momenta, strict=True)):
        rows = slice(start, start + w.shape[0])
        start = rows.stop
        fading, noted = (state[key][rows] if key in state else None for key in ("fading", "diagnostics"))
        yield Piece(g, w, m, state, f"right_{i}", state["skipped"][rows], fading, noted)


def update(pieces: list[Piece], recipe: Recipe, group: dict[str, Any]) -> None:
    """Step of all pieces; all it makes of their size, for finite gradients on the CPU, is one stack."""
    with be.settings(pieces[0].weight):
        _update(pieces, recipe, group)


def _update(pieces: list[Piece], recipe: Recipe, group: dict[str, Any]) -> None:
    U = _inputs(pieces, group)
    xp = be.namespace(U)
    step, name = group["step"], stream_name(U.shape)
    right, r = None, recipe.width(U.shape, step)
    if r is not None and recipe.warm_start:
        right = torch.cat([recipe.resized(xp, p.state[p.right], r, step, name) for p in pieces])
    d = recipe.direction(xp, U, right, step, name)
    host = be.is_host(U)
    known = _spectrum(d) if group["diagnostics"] else None
    slices = list(_slices(pieces))
    for piece, rows in slices:
        ok = d.finite[rows]
        _remember(piece, U[rows], d, rows, ok, host and bool(ok.all()), group)
    lr = group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else group["lr"]
    factor = (lr if group["maximize"] else -lr) * d.length
    delta = _scaled(d, factor if pieces[0].fading is None else factor * _fading(pieces, d, group["momentum"]))
    for piece, rows in slices:
        if piece.diagnostics is not None and known is not None:
            sizes = [torch.linalg.vector_norm(x, dim=(-2, -1)) for x in (delta[rows], piece.weight)]
            piece.diagnostics.copy_(torch.stack([*known[rows].unbind(1), sizes[0] / sizes[1]], 1))
        if not host or bool(d.finite[rows].any()):
            if group["weight_decay"]:
                decay = lr * group["weight_decay"] * d.finite[rows].to(delta.real.dtype)
                _shrink(piece.weight, decay, delta[rows] if group["cautious"] else None)
            piece.weight.add_(delta[rows])
        piece.skipped.add_(~d.finite[rows, 0, 0])


def _slices(pieces: list[Piece]) -> Iterator[tuple[Piece, slice]]:
    """Pieces with their places in the stack."""
    start = 0
    for piece in pieces:
        yield piece, slice(start, start + piece.weight.shape[0])
        start += piece.weight.shape[0]


def _inputs(pieces: list[Piece], group: dict[str, Any]) -> Tensor:
    """What is orthogonalized, stacked: gradients, or blends with the momenta."""
    m, n = pieces[0].weight.shape[1:]
    dtype = pieces[0].gradient.dtype if pieces[0].momentum is None else pieces[0].momentum.dtype
    dtype = torch.float32 if dtype.itemsize < 4 else dtype
    U = torch.empty((sum(p.weight.shape[0] for p in pieces), m, n), dtype=dtype, device=pieces[0].weight.device)
    beta = group["momentum"]
    for piece, out in zip(pieces, U.split([p.weight.shape[0] for p in pieces]), strict=True):
        if piece.momentum is None:
            out.copy_(piece.gradient)
        elif group["error_feedback"]:
            torch.add(piece.momentum, piece.gradient, alpha=1 - beta, out=out)
        else:
            # beta (beta M + (1 - beta) G) + (1 - beta) G for Nesterov's momentum
            weight = beta**2 if group["nesterov"] else beta
            torch.lerp(piece.gradient.to(dtype), piece.momentum, weight, out=out)
    return U


def _fading(pieces: list[Piece], d: Direction, beta: float) -> Tensor:
    """Share of a full step that each matrix goes."""
    shares = []
    for piece, rows in _slices(pieces):
        xp, fading = be.namespace(piece.gradient), piece.fading.view(-1, 1, 1)
        fading.copy_(faded(xp, fading, piece.gradient, beta, d.finite[rows]))
        shares.append(fading)
    return torch.cat(shares).to(d.X.real.dtype)


def _scaled(d: Direction, factor: Any) -> Tensor:
    """Factor times the direction, in the memory of its input."""
    if d.Q is None:
        return d.X.mul_(factor)
    if d.c is None:
        return torch.bmm(d.Q, d.V * factor, out=d.X)
    return d.X.mul_(d.c * factor).baddbmm_(d.Q, d.V * factor)


def _remember(
    piece: Piece, U: Tensor, d: Direction, rows: slice, ok: Tensor, all_ok: bool, group: dict[str, Any]
) -> None:
    """Next warm start and momentum, unchanged where a gradient was not finite."""
    if d.right is not None:
        old = piece.state[piece.right]
        if old.shape == d.right[rows].shape:
            old.copy_(d.right[rows])  # in place, as a captured step reads it where it was
        else:
            piece.state[piece.right] = d.right[rows].clone()
    M = piece.momentum
    if M is None:
        return
    if group["error_feedback"]:
        if d.Q is None or d.B is None:
            new = U * group["momentum"]
        else:
            new = torch.baddbmm(
                U, d.Q[rows], be.ldexp(be.namespace(U), d.B[rows], d.e[rows]), alpha=group["momentum"] - 1
            )
        M.copy_(new if all_ok else torch.where(ok, new, M))
    else:
        g = piece.gradient.to(M.dtype)
        M.lerp_(g if all_ok else torch.where(ok, g, M), 1 - group["momentum"])


def _shrink(weight: Tensor, decay: Tensor, delta: Tensor | None) -> None:
    """X <- (1 - decay) X, or with a step `delta` only for the entries that it moves towards zero."""
    weight.mul_(1 - decay if delta is None else 1 - decay * (real_product(be.namespace(delta), delta, weight) < 0))


def _spectrum(d: Direction) -> Tensor:
    """Captured energy ||B||_F^2/||U||_F^2 and stable rank ||U||_F^2/||U||_2^2, a row for each matrix."""
    if d.B is None:
        return torch.full((d.X.shape[0], 2), torch.nan, dtype=torch.float32, device=d.X.device)
    squares = torch.linalg.vector_norm(d.X, dim=(-2, -1)) ** 2
    S = d.B @ d.B.mH
    size = torch.linalg.matrix_norm(S, keepdim=True)
    # ||S^8||_F / ||S^4||_F is the 4th power of the largest eigenvalue, up to 4th powers of the others' ratios to it
    S4 = torch.linalg.matrix_power(S / size, 4)
    top = (torch.linalg.matrix_norm(S4 @ S4) / torch.linalg.matrix_norm(S4)) ** 0.25 * size[:, 0, 0]
    return torch.stack([S.diagonal(dim1=-2, dim2=-1).real.sum(-1) / squares, squares / top], 1)
