"""One step of a batch of same-shape matrices, in place: the formulas of `orthlin.steppers`, without its copies."""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from orthlin import _backend as be
from orthlin._direction import Direction, Recipe, faded, real_product
from orthlin._scaling import Seen, seen
from orthlin.torch._notes import note, spectrum
from orthlin.torch._owners import Swap, by_owners
from orthlin.torch._pieces import Batch, Piece
from orthlin.torch._sums import Exchange

_CACHE = 1 << 24  # bytes of a stack that stays in the cache of a host, on pages that have been written before
_LEAST_DECAY = 1e-12  # far below the rounding of a weight, and its inverse far from overflow


def stream_name(shape: tuple[int, ...]) -> str:
    """Name under which random numbers are drawn: all matrices of a shape share a draw, whoever holds them."""
    return "x".join(map(str, shape[-2:]))


def update(batch: Batch) -> None:
    """Step of a batch; all it makes of its size is one stack, unless entries are far out of range."""
    with be.settings(batch.pieces[0].weight):
        for pieces in _cached(batch.pieces):
            _update(pieces, batch.recipe, batch.options)


def _cached(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Parts of a batch whose stack the host's cache holds; all of it on devices, and if others have a share in it."""
    size = math.prod(pieces[0].weight.shape[1:]) * _dtype(pieces[0]).itemsize
    together = pieces[0].part is not None or not be.is_host(pieces[0].weight)
    if together or size * sum(len(p.weight) for p in pieces) <= _CACHE:
        yield pieces
        return
    part: list[Piece] = []
    for piece in pieces:
        if part and size * (sum(len(p.weight) for p in part) + len(piece.weight)) > _CACHE:
            yield part
            part = []
        part.append(piece)
    yield part


def _update(pieces: list[Piece], recipe: Recipe, group: dict[str, Any]) -> None:
    counts = [p.weight.shape[0] for p in pieces]
    sizes = None if pieces[0].momentum is None or be.is_host(pieces[0].weight) else _sizes(pieces)
    directed = _directed if pieces[0].part is None else _directed_in_parts
    U, d, moved, bad = directed(pieces, recipe, group, sizes)
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


def _directed(
    pieces: list[Piece], recipe: Recipe, group: dict[str, Any], sizes: Tensor | None
) -> tuple[Tensor, Direction, Tensor | None, Tensor | None]:
    """Stack, its direction, and of which of its matrices the gradient is not zero, and is there but not finite."""
    U, sight = (_fused if torch.compiler.is_compiling() else _stacked)(pieces, group)
    xp, step, name = be.namespace(U), group["step"], stream_name(U.shape)
    right, r = None, recipe.width(U.shape, step)
    if r is not None and recipe.warm_start:
        right = torch.cat([recipe.resized(xp, p.state[p.right], r, step, name) for p in pieces])
    bad = _bad(U, sight.finite, _given(pieces))
    return U, recipe.direction(xp, U, right, step, name, sight), _moved(pieces, sizes), bad


def _directed_in_parts(
    pieces: list[Piece], recipe: Recipe, group: dict[str, Any], sizes: Tensor | None
) -> tuple[Tensor, Direction, Tensor | None, Tensor | None]:
    """The same of parts of matrices, with what others have of them."""
    part: Any = pieces[0].part
    U, given, moved = _blends(pieces, group), cast(Tensor, _given(pieces)), _moved(pieces, sizes)
    xp, step, name = be.namespace(U), group["step"], stream_name(part.shape)
    right, r = None, recipe.width(part.shape, step)
    if r is not None and recipe.warm_start:
        right = torch.cat([recipe.resized(xp, p.state[p.right], r, step, name, part.columns) for p in pieces])
    if part.whole:
        d, given, moved = by_owners(U, right, recipe, Swap(part, pieces[0].owners), step, name, given, moved)
        return U, d, moved, _bad(U, d.finite, given)
    exchange = Exchange(given, moved)
    d = recipe.direction_on_shards(xp, U, right, step, name, exchange.shards(part))
    return U, d, exchange.moved(), _bad(U, d.finite, exchange.given())


def _bad(U: Tensor, finite: Tensor, given: Tensor | None) -> Tensor | None:
    """Which gradients are there and not finite, their matrices made zero; None if the host sees none."""
    if be.is_host(U) and bool(finite.all()):
        return None
    bad = ~finite
    if not torch.compiler.is_compiling():
        U.masked_fill_(bad, 0)
    return bad if given is None else bad & given


def _given(pieces: list[Piece]) -> Tensor | None:
    """Which matrices have a gradient, (..., 1, 1), None where all must have one."""
    return None if pieces[0].given is None else torch.cat([p.given for p in pieces])


def _moved(pieces: list[Piece], sizes: Tensor | None) -> Tensor | None:
    """Which gradients are not zero, (..., 1, 1), where that is needed."""
    if pieces[0].fading is None:
        return None
    xp = be.namespace(pieces[0].gradient)
    return torch.cat([be.nonzero(xp, p.gradient) for p in pieces]) if sizes is None else sizes != 0


def _slices(pieces: list[Piece]) -> Iterator[tuple[Piece, slice]]:
    """Pieces with their places in the stack."""
    start = 0
    for piece in pieces:
        yield piece, slice(start, start + piece.weight.shape[0])
        start += piece.weight.shape[0]


def _sizes(pieces: list[Piece]) -> Tensor:
    """Sizes of the gradients, (..., 1, 1), zero for zero."""
    if torch.compiler.is_compiling() and pieces[0].gradient.numel():  # along columns, as the norms in the same pass
        return torch.cat([p.gradient.abs().amax(-2, keepdim=True).amax(-1, keepdim=True) for p in pieces])
    matrices = [g for p in pieces for g in p.gradient.unbind()]
    # the 1-norm, as the largest entry of nothing is an error
    return torch.stack(torch._foreach_norm(matrices, 1)).view(-1, 1, 1)


def _dtype(piece: Piece) -> torch.dtype:
    """Of what is orthogonalized."""
    dtype = piece.gradient.dtype if piece.momentum is None else piece.momentum.dtype
    return torch.float32 if dtype.itemsize < 4 else dtype


def _blend(piece: Piece, group: dict[str, Any], out: Tensor | None = None) -> Tensor:
    """What is orthogonalized: a gradient, or its blend with the momentum."""
    g, m, beta = piece.gradient, piece.momentum, group["momentum"]
    if m is None:
        return g.to(_dtype(piece)) if out is None else out.copy_(g)
    if group["error_feedback"]:
        return torch.add(m, g, alpha=1 - beta, out=out)
    # beta (beta M + (1 - beta) G) + (1 - beta) G for Nesterov's momentum
    return torch.lerp(g.to(_dtype(piece)), m, beta**2 if group["nesterov"] else beta, out=out)


def _stacked(pieces: list[Piece], group: dict[str, Any]) -> tuple[Tensor, Seen]:
    """Blends in a stack, and what is seen of them."""
    U = _blends(pieces, group)
    return U, seen(be.namespace(U), U)


def _blends(pieces: list[Piece], group: dict[str, Any]) -> Tensor:
    first, beta = pieces[0], group["momentum"]
    counts, (m, n) = [len(p.weight) for p in pieces], first.weight.shape[1:]
    U = torch.empty((sum(counts), m, n), dtype=_dtype(first), device=first.weight.device)
    if first.weight.stride(-2) < first.weight.stride(-1):
        U = U.view(-1, n, m).mT
    parts = list(U.split(counts))
    if be.is_host(U):  # where passes cost more than calls
        for piece, out in zip(pieces, parts, strict=True):
            _blend(piece, group, out)
    else:
        torch._foreach_copy_(parts, [p.gradient for p in pieces])
        momenta = [p.momentum for p in pieces if p.momentum is not None]
        if group["error_feedback"]:
            torch._foreach_mul_(parts, 1 - beta)
            torch._foreach_add_(parts, momenta)
        elif momenta:
            torch._foreach_lerp_(parts, momenta, beta**2 if group["nesterov"] else beta)
    return U


def _fused(pieces: list[Piece], group: dict[str, Any]) -> tuple[Tensor, Seen]:
    """The same, zero where one is not finite, and momenta for `torch.compile`, which makes two passes of it all."""
    parts = [_blend(piece, group) for piece in pieces]
    xp = be.namespace(parts[0])
    sights = [seen(xp, x) for x in parts]
    parts = [torch.where(found.finite, x, 0) for found, x in zip(sights, parts, strict=True)]
    sight = Seen(*(None if found[0] is None else torch.cat(found) for found in zip(*sights, strict=True)))
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
