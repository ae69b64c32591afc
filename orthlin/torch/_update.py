"""One step of a batch of same-shape matrices, in place: the formulas of `orthlin.steppers`, without its copies."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from orthlin import _backend as be
from orthlin._direction import Direction, Recipe, faded, real_product
from orthlin._scaling import Seen, seen
from orthlin.torch._filled import Stack, directions, sight_of
from orthlin.torch._notes import note, spectrum
from orthlin.torch._owners import Swap, by_owners
from orthlin.torch._pieces import Batch, Piece, stream_name
from orthlin.torch._stacks import blend_of, blended, cached, warm_starts, which_given, which_moved
from orthlin.torch._sums import Exchange

Directed = tuple[Tensor, Direction, Tensor | None, Tensor | None]
"""Stack, its direction, and of which of its matrices the gradient is not zero, and is there but not finite."""
_LEAST_DECAY = 1e-12  # far below the rounding of a weight, and its inverse far from overflow


def update(batches: list[Batch]) -> None:
    """Step of batches, one or several small ones; all it makes of their size is a stack, unless entries are far off."""
    first, stacks = batches[0], [batch.pieces for batch in batches]
    with be.settings(first.pieces[0].weight):
        for some in [[pieces] for pieces in cached(stacks[0])] if len(stacks) == 1 else [stacks]:
            directed = _directed if first.pieces[0].part is None else _directed_in_parts
            for pieces, found in zip(some, directed(some, first.recipe, first.options), strict=True):
                _update(pieces, first.recipe, first.options, *found)


def _update(
    pieces: list[Piece],
    recipe: Recipe,
    group: dict[str, Any],
    U: Tensor,
    d: Direction,
    moved: Tensor | None,
    bad: Tensor | None,
) -> None:
    counts = [p.weight.shape[0] for p in pieces]
    finite = None if bad is None else d.finite.to(U.dtype)
    if not torch.compiler.is_compiling():
        _remember(pieces, list(U.split(counts)), group, finite)
    xp = be.namespace(U)
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
                _average([piece.momentum], [out], [finite[rows]])
    known = spectrum(d) if group["diagnostics"] else None
    rate, weight = _rate(pieces[0].weight.dtype == U.dtype, group)
    length = d.length * (rate if group["maximize"] else -rate)
    if pieces[0].fading is not None:
        length = length * _fading(pieces, counts, d.finite, moved, group["momentum"]).to(U.real.dtype)
    with be.products(U, recipe.precision):
        parts = _scaled(d, length, U, counts)
    note(pieces, parts, weight, known)
    if bad is not None:
        torch._foreach_add_([p.skipped for p in pieces], bad[:, 0, 0].split(counts))
    _move(pieces, parts, rate, weight, finite, group)


def _directed(stacks: list[list[Piece]], recipe: Recipe, group: dict[str, Any]) -> list[Directed]:
    """Directions of stacks, made together, each with what the rest of its step needs."""
    found, rest = [], []
    for pieces in stacks:
        moved = which_moved(pieces)
        U, sight = (_fused if torch.compiler.is_compiling() else _stacked)(pieces, group)
        bad = _bad(U, sight.finite, which_given(pieces))
        found.append(Stack(U, sight, warm_starts(pieces, recipe, U.shape, group["step"])))
        rest.append((moved, bad))
    made = directions(recipe, found, group["step"])
    return [(stack.U, d, *more) for stack, d, more in zip(found, made, rest, strict=True)]


def _directed_in_parts(stacks: list[list[Piece]], recipe: Recipe, group: dict[str, Any]) -> list[Directed]:
    """The same of parts of matrices, with what others have of them."""
    (pieces,) = stacks
    part: Any = pieces[0].part
    U, given, moved = blended(pieces, group), cast(Tensor, which_given(pieces)), which_moved(pieces)
    xp, step, name = be.namespace(U), group["step"], stream_name(part.shape)
    right = warm_starts(pieces, recipe, part.shape, step, part.columns)
    if part.whole:
        d, given, moved = by_owners(U, right, recipe, Swap(part, pieces[0].owners), step, name, given, moved)
        return [(U, d, moved, _bad(U, d.finite, given))]
    exchange = Exchange(given, moved)
    d = recipe.direction_on_shards(xp, U, right, step, name, exchange.shards(part))
    return [(U, d, exchange.moved(), _bad(U, d.finite, exchange.given()))]


def _bad(U: Tensor, finite: Tensor, given: Tensor | None) -> Tensor | None:
    """Which gradients are there and not finite, their matrices made zero; None if the host sees none."""
    if be.is_host(U) and bool(finite.all()):
        return None
    bad = ~finite
    if not torch.compiler.is_compiling():
        U.masked_fill_(bad, 0)
    return bad if given is None else bad & given


def _slices(pieces: list[Piece]) -> Iterator[tuple[Piece, slice]]:
    """Pieces with their places in the stack."""
    start = 0
    for piece in pieces:
        yield piece, slice(start, start + piece.weight.shape[0])
        start += piece.weight.shape[0]


def _stacked(pieces: list[Piece], group: dict[str, Any]) -> tuple[Tensor, Seen]:
    """Blends in a stack, and what is seen of them."""
    U = blended(pieces, group)
    return U, seen(be.namespace(U), U)


def _fused(pieces: list[Piece], group: dict[str, Any]) -> tuple[Tensor, Seen]:
    """The same, zero where one is not finite, and momenta for `torch.compile`, which makes two passes of it all."""
    parts = [blend_of(piece, group) for piece in pieces]
    xp = be.namespace(parts[0])
    sights = [seen(xp, x) for x in parts]
    parts = [torch.where(found.finite, x, 0) for found, x in zip(sights, parts, strict=True)]
    sight = sight_of(sights)
    _remember(pieces, parts, group, sight.finite.to(parts[0].dtype))
    return torch.cat(parts), sight


def _remember(pieces: list[Piece], parts: list[Tensor], group: dict[str, Any], finite: Tensor | None) -> None:
    """M <- M + weight (U - M), unchanged where a gradient was not finite (one where it was, none if it always was).

    For Nesterov's U = beta^2 M + (1 - beta^2) G and weight = 1/(1 + beta) that is beta M + (1 - beta) G.  With error
    feedback the momentum waits for the direction.
    """
    if pieces[0].momentum is None or group["error_feedback"]:
        return
    weight = 1 / (1 + group["momentum"]) if group["nesterov"] else 1.0
    momenta = [p.momentum for p in pieces]
    if finite is None:
        torch._foreach_lerp_(momenta, parts, weight)
    else:
        _average(momenta, parts, list((weight * finite).split([len(x) for x in parts])))


def _average(tensors: list[Tensor], parts: list[Tensor], weights: list[Tensor]) -> None:
    """Averages with weights of their own, in place."""
    if not torch.compiler.is_compiling():
        torch._foreach_lerp_(tensors, parts, weights)
        return
    for tensor, part, weight in zip(tensors, parts, weights, strict=True):
        tensor.lerp_(part, weight)


def _keep_right(pieces: list[Piece], rights: list[Tensor]) -> None:
    """Next warm starts, in place, as a captured step reads them where they were."""
    fits = [p.state[p.right].shape == new.shape for p, new in zip(pieces, rights, strict=True)]
    if all(fits):
        torch._foreach_copy_([p.state[p.right] for p in pieces], rights)
    else:
        for p, new in zip(pieces, rights, strict=True):
            p.state[p.right] = new.clone()


def _fading(pieces: list[Piece], counts: list[int], finite: Tensor, moved: Tensor | None, beta: float) -> Tensor:
    """Share of a full step that each matrix goes."""
    shares = faded(be.namespace(finite), torch.cat([p.fading for p in pieces]).view(-1, 1, 1), moved, beta, finite)
    torch._foreach_copy_([p.fading for p in pieces], list(shares.view(-1).split(counts)))
    return shares


def _scaled(d: Direction, factor: Any, out: Tensor, counts: list[int]) -> list[Tensor]:
    """Factor times the direction, in the memory of its input, split."""
    if d.Q is None:
        return list(torch.mul(d.X, factor, out=out).split(counts))
    if torch.compiler.is_compiling():  # which takes the tail into its pass over the weights
        low = torch.bmm(d.Q, d.V * factor).split(counts)
        if d.c is None:
            return list(low)
        tails = zip(d.X.split(counts), (d.c * factor).split(counts), strict=True)
        return [torch.addcmul(p, x, c) for p, (x, c) in zip(low, tails, strict=True)]
    if d.c is None:
        return list(torch.bmm(d.Q, d.V * factor, out=out).split(counts))
    return list(torch.mul(d.X, d.c * factor, out=out).baddbmm_(d.Q, d.V * factor).split(counts))


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
    pieces: list[Piece], parts: list[Tensor], rate: Any, weight: Any, finite: Tensor | None, group: dict[str, Any]
) -> None:
    """Step of the weights along O, with their decay, where the gradient was finite, as :func:`_remember`."""
    weights, counts = [p.weight for p in pieces], [len(O) for O in parts]
    if weight is not None:
        if finite is None:
            torch._foreach_lerp_(weights, parts, weight)
        else:
            _average(weights, parts, list((weight * finite).split(counts)))
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
