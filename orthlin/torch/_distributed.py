"""Steps of parameters that lie on several processes: DTensors, or copies with gradients of their own.

Where the matrices of a parameter are cut along rows or columns, a low-rank direction is made where its parts are, with
two sums for all matrices of a shape that are cut alike, or by an owner of the matrix, whichever sends less; a full one
by an owner.  Everything else is gathered, parameter by parameter, and stepped along whole on every process.  Of copies
the products are averaged in place of the gradients; matrices that are needed whole are averaged themselves.  All of it
gives the update of one process.
"""

from typing import Any, cast

import torch
from torch import Tensor

from orthlin.torch._owners import assign
from orthlin.torch._pieces import Batch, Matrix, collect
from orthlin.torch._sharded import Part, anywhere, held, is_sharded, parts_of, sides
from orthlin.torch._update import update
from orthlin.torch._ways import ways


@torch.compiler.disable  # type: ignore[untyped-decorator]
def step_shards(matrices: list[Matrix]) -> None:
    """Step such parameters: first those whose parts are stepped along where they are, then the others.

    Processes without a gradient take part for those that have one.
    """
    placed = [matrix._replace(given=_given(matrix)) for matrix in locate(matrices)]
    _step([x for x in placed if x.parts is not None and (x.p.grad is not None or _shared(x.parts))])
    gathered = [x for x in placed if x.parts is None]
    for mesh in dict.fromkeys(x.p.device_mesh for x in gathered):
        mine = [x for x in gathered if x.p.device_mesh == mesh]
        flags = anywhere(torch.stack([cast(Tensor, x.given).to(torch.int32) for x in mine]), sides(mesh))
        for matrix, given in zip(mine, flags.bool(), strict=True):
            _step([matrix._replace(given=given, parts=of_copies(matrix))], gathered=True)


def locate(matrices: list[Matrix]) -> list[Matrix]:
    """Say of parameters where their parts are and how they are stepped along, or that they are gathered."""
    known: dict[Any, list[Part]] = {}
    return [matrix._replace(parts=_parts(matrix, known)) for matrix in matrices]


def _parts(matrix: Matrix, known: dict[Any, list[Part]]) -> list[Part] | None:
    """Parts of a parameter, None if it is gathered; `known` are the ways of what is alike."""
    p, found = matrix.p, []
    if matrix.options["diagnostics"]:
        return None
    for part in (parts_of(p, matrix.view) if is_sharded(p) else of_copies(matrix)) or []:
        key = part, matrix.recipe, matrix.kind, p.dtype, "fading" in matrix.state
        if key not in known:
            known[key] = ways(matrix, part._replace(over_copies=matrix.copies))
        if not known[key]:
            return None
        found.append(known[key][0])
    return found or None


def of_copies(matrix: Matrix) -> list[Part] | None:
    """Whole matrices of which there are copies; None if there are none."""
    if matrix.copies is None:
        return None
    shapes = matrix.view.shapes(tuple(matrix.p.shape))
    return [Part((m, n), 0, n, over_copies=matrix.copies, whole=True) for _, m, n in shapes]


def _given(matrix: Matrix) -> Tensor:
    return torch.full((), matrix.p.grad is not None, device=matrix.p.device)


def _shared(parts: list[Part]) -> bool:
    return any(part.over_rows or part.over_columns or part.over_copies for part in parts)


def _step(matrices: list[Matrix], *, gathered: bool = False) -> None:
    batches: dict[Any, Batch] = {}
    copies: list[tuple[Tensor, Tensor]] = []
    holders = []
    for matrix in matrices:
        holder = held(matrix.p, matrix.state, gathered=gathered)
        holders.append(holder)
        if matrix.parts is None:
            # without a gradient on any process nothing moves, as if it were not finite
            g = cast(Tensor, holder.tensor.grad)
            holder.tensor.grad = g.masked_fill(~cast(Tensor, matrix.given), torch.nan)
        collect(matrix._replace(p=holder.tensor, state=holder.state), batches, copies)
    assign(batches.values())
    for batch in batches.values():
        update([batch])
    for p, values in copies:
        p.copy_(values)
    for holder in holders:
        holder.store()
