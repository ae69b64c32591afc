"""One step of a batch of same-shape matrices, in place: the formulas of `orthlin.steppers`, without its copies."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orthlin import _backend as be
from orthlin._direction import Direction, Recipe, faded, real_product
from orthlin._scaling import seen
from orthlin.errors import ArrayTypeError, DeviceError, DTypeError, NonFiniteError, ShapeError
from orthlin.torch.views import MatrixView

_LEAST_DECAY = 1e-12  # far below the rounding of a weight, and its inverse far from overflow
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


_OPTIONS = (
    "step", "lr", "momentum", "nesterov", "error_feedback", "weight_decay", "cautious", "maximize", "diagnostics",
)  # fmt: skip


class Batch(NamedTuple):
    """Matrices of one shape that are stepped along in the same way, in all groups."""

    pieces: list[Piece]
    recipe: Recipe
    group: dict[str, Any]  # the first of theirs


def kind_of(piece: Piece) -> tuple[Any, ...]:
    """What the pieces of a batch have in common: shape, dtypes, device, and which of their sides is contiguous."""
    w = piece.weight
    return w.shape[1:], w.dtype, piece.gradient.dtype, w.device, w.stride(-2) < w.stride(-1), piece.momentum is None


def options_of(group: dict[str, Any]) -> tuple[Any, ...]:
    """What the groups of a batch have in common beside their recipe; a tensor is its own kind."""
    return tuple(id(v) if isinstance(v := group[key], Tensor) else v for key in _OPTIONS)


def update(batch: Batch) -> None:
    """Step of a batch; all it makes of its size, for finite gradients on the CPU, is one stack."""
    with be.settings(batch.pieces[0].weight):
        _update(*batch)


def _update(pieces: list[Piece], recipe: Recipe, group: dict[str, Any]) -> None:
    counts = [p.weight.shape[0] for p in pieces]
    U = _inputs(pieces, counts, group)
    xp, sight = be.namespace(U), seen(be.namespace(U), U)
    usual = be.is_host(U) and bool(sight.finite.all())
    bad = None if usual else ~sight.finite
    if bad is not None:
        U.masked_fill_(bad, 0)
    finite = None if usual else sight.finite.to(U.dtype)
    step, name = group["step"], stream_name(U.shape)
    right, r = None, recipe.width(U.shape, step)
    if r is not None and recipe.warm_start:
        right = torch.cat([recipe.resized(xp, p.state[p.right], r, step, name) for p in pieces])
    if pieces[0].momentum is not None and not group["error_feedback"]:
        _remember(pieces, U, 1 / (1 + group["momentum"]) if group["nesterov"] else 1.0, finite)
    d = recipe.direction(xp, U, right, step, name, sight)
    if d.right is not None:
        _keep_right(pieces, d.right.split(counts))
    if group["error_feedback"]:
        B, beta = d.captured(xp), group["momentum"]
        for piece, rows in _slices(pieces):  # one at a time, which is all the memory it takes
            out = piece.momentum if finite is None else torch.empty_like(U[rows])
            if d.Q is None or B is None:
                torch.mul(U[rows], beta, out=out)
            else:
                torch.baddbmm(U[rows], d.Q[rows], B[rows], alpha=beta - 1, out=out)
            if finite is not None:
                _remember([piece], out, 1.0, finite[rows])
    known = _spectrum(d) if group["diagnostics"] else None
    rate, weight = _rate(pieces[0].weight.dtype == U.dtype, group)
    length = d.length * (rate if group["maximize"] else -rate)
    if pieces[0].fading is not None:
        length = length * _fading(pieces, counts, d.finite, group["momentum"]).to(U.real.dtype)
    O = _scaled(d, length, U)
    _note(pieces, O.split(counts), weight, known)
    if bad is not None:
        torch._foreach_add_([p.skipped for p in pieces], bad[:, 0, 0].split(counts))
    _move(pieces, O.split(counts), rate, weight, finite, group)


def _slices(pieces: list[Piece]) -> Iterator[tuple[Piece, slice]]:
    """Pieces with their places in the stack."""
    start = 0
    for piece in pieces:
        yield piece, slice(start, start + piece.weight.shape[0])
        start += piece.weight.shape[0]


def _inputs(pieces: list[Piece], counts: list[int], group: dict[str, Any]) -> Tensor:
    """What is orthogonalized, stacked: gradients, or blends with the momenta."""
    first = pieces[0]
    m, n = first.weight.shape[1:]
    dtype = first.gradient.dtype if first.momentum is None else first.momentum.dtype
    dtype = torch.float32 if dtype.itemsize < 4 else dtype
    U = torch.empty((sum(counts), m, n), dtype=dtype, device=first.weight.device)
    if first.weight.stride(-2) < first.weight.stride(-1):
        U = U.view(-1, n, m).mT
    gradients, momenta, parts = [p.gradient for p in pieces], [p.momentum for p in pieces], U.split(counts)
    if first.momentum is None:
        torch._foreach_copy_(parts, gradients)
        return U
    beta = group["momentum"]
    # beta (beta M + (1 - beta) G) + (1 - beta) G for Nesterov's momentum
    weight = beta**2 if group["nesterov"] else beta
    if be.is_host(U):  # where passes cost more than calls
        for g, m, out in zip(gradients, momenta, parts, strict=True):
            if group["error_feedback"]:
                torch.add(m, g, alpha=1 - beta, out=out)
            else:
                torch.lerp(g.to(dtype), m, weight, out=out)
        return U
    torch._foreach_copy_(parts, gradients)
    if group["error_feedback"]:
        torch._foreach_mul_(parts, 1 - beta)
        torch._foreach_add_(parts, momenta)
    else:
        torch._foreach_lerp_(parts, momenta, weight)
    return U


def _remember(pieces: list[Piece], U: Tensor, weight: float, finite: Tensor | None) -> None:
    """M <- M + weight (U - M), unchanged where a gradient was not finite (one where it was, none if it always was).

    For Nesterov's U = beta^2 M + (1 - beta^2) G and weight = 1/(1 + beta) that is beta M + (1 - beta) G.
    """
    momenta, parts = [p.momentum for p in pieces], list(U.split([p.weight.shape[0] for p in pieces]))
    if finite is None:
        torch._foreach_lerp_(momenta, parts, weight)
    else:
        torch._foreach_lerp_(momenta, parts, (weight * finite).split([len(x) for x in parts]))


def _keep_right(pieces: list[Piece], rights: list[Tensor]) -> None:
    """Next warm starts, in place, as a captured step reads them where they were."""
    fits = [p.state[p.right].shape == new.shape for p, new in zip(pieces, rights, strict=True)]
    if all(fits):
        torch._foreach_copy_([p.state[p.right] for p in pieces], rights)
    else:
        for p, new in zip(pieces, rights, strict=True):
            p.state[p.right] = new.clone()


def _fading(pieces: list[Piece], counts: list[int], finite: Tensor, beta: float) -> Tensor:
    """Share of a full step that each matrix goes."""
    xp = be.namespace(finite)
    if be.is_host(finite):
        moved = torch.cat([be.nonzero(xp, p.gradient) for p in pieces])
    else:
        matrices = [g for p in pieces for g in p.gradient.unbind()]
        moved = torch.stack(torch._foreach_norm(matrices, float("inf"))).ne(0).view(-1, 1, 1)
    shares = faded(xp, torch.cat([p.fading for p in pieces]).view(-1, 1, 1), moved, beta, finite)
    torch._foreach_copy_([p.fading for p in pieces], list(shares.view(-1).split(counts)))
    return shares


def _scaled(d: Direction, factor: Any, out: Tensor) -> Tensor:
    """Factor times the direction, in the memory of its input."""
    if d.Q is None:
        return torch.mul(d.X, factor, out=out)
    if d.c is None:
        return torch.bmm(d.Q, d.V * factor, out=out)
    return torch.mul(d.X, d.c * factor, out=out).baddbmm_(d.Q, d.V * factor)


def _rate(one_dtype: bool, group: dict[str, Any]) -> tuple[Any, Any]:
    """Factor of the direction and weight of the average in X <- (1 - weight) X + weight O, or without one X + O.

    (1 - eta lambda) X + eta O is the average of X and O/lambda with weight eta lambda, one pass in place of two.
    """
    lr, decay = group["lr"], group["weight_decay"]
    if isinstance(lr, Tensor):
        lr = float(lr) if be.is_host(lr) else lr.reshape(())
    plain = one_dtype and not group["cautious"] and not isinstance(decay, Tensor)
    return (1 / decay, lr * decay) if plain and decay > _LEAST_DECAY else (lr, None)


def _move(
    pieces: list[Piece], parts: Sequence[Tensor], rate: Any, weight: Any, finite: Tensor | None, group: dict[str, Any]
) -> None:
    """Step of the weights along O, with their decay, where the gradient was finite, as :func:`_remember`."""
    weights, counts = [p.weight for p in pieces], [len(O) for O in parts]
    if weight is not None:
        each = weight if finite is None else (weight * finite).split(counts)
        torch._foreach_lerp_(weights, parts, each)
        return
    decay = rate * group["weight_decay"]
    if isinstance(decay, Tensor) or decay:
        decays = [decay] * len(parts) if finite is None else (decay * finite).split(counts)
        for w, O, lost in zip(weights, parts, decays, strict=True):
            # cautious decay holds for the entries that the step moves towards zero only
            w.mul_(
                1 - lost * (real_product(be.namespace(O), O, w) < 0).to(O.real.dtype) if group["cautious"] else 1 - lost
            )
    torch._foreach_add_(weights, parts)


def _note(pieces: list[Piece], parts: Sequence[Tensor], weight: Any, known: Tensor | None) -> None:
    """Write down what :meth:`diagnostics` reads."""
    if known is None:
        return
    rows = known.split([len(O) for O in parts])
    for piece, O, (captured, rank) in zip(pieces, parts, (x.unbind(1) for x in rows), strict=True):
        sizes = [torch.linalg.vector_norm(x, dim=(-2, -1)) for x in (O, piece.weight)]
        ratio = sizes[0] / sizes[1] * (1 if weight is None else weight)
        if piece.diagnostics is not None:
            piece.diagnostics.copy_(torch.stack([captured, rank, ratio], 1))


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
