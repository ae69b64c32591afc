"""Steps of parameters that lie on several processes: DTensors, or copies with gradients of their own.

Where the matrices of a parameter are cut along rows or columns, a low-rank direction is made where its parts are, with
two sums for all matrices of a shape that are cut alike; a full one is made by an owner of the matrix.  Everything else
is gathered, parameter by parameter, and stepped along whole on every process.  Of copies the products are averaged in
place of the gradients; those of matrices that need a full direction are averaged themselves.  All of it gives the
update of one process.
"""

from typing import Any, cast

import torch
from torch import Tensor

from orthlin import _backend as be
from orthlin.torch._owners import assign
from orthlin.torch._pieces import Batch, Matrix, collect
from orthlin.torch._sharded import Part, anywhere, held, is_sharded, parts_of, sides
from orthlin.torch._sums import added
from orthlin.torch._update import update


@torch.compiler.disable  # type: ignore[untyped-decorator]
def step_shards(matrices: list[Matrix]) -> None:
    """Step such parameters: first those whose parts are stepped along where they are, then the others.

    Processes without a gradient take part for those that have one.
    """
    placed = [matrix._replace(given=_given(matrix)) for matrix in locate(matrices)]
    _step([x for x in placed if x.parts is not None and (x.p.grad is not None or _shared(x.parts))])
    gathered = [x for x in placed if x.parts is None]
    for place in dict.fromkeys(map(_place, gathered)):
        mine = [x for x in gathered if _place(x) == place]
        groups = sides(place) if is_sharded(mine[0].p) else [place]
        flags = anywhere(torch.stack([cast(Tensor, x.given).to(torch.int32) for x in mine]), groups)
        for matrix, given in zip(mine, flags.bool(), strict=True):
            _step([matrix._replace(given=given)])


def locate(matrices: list[Matrix]) -> list[Matrix]:
    """Say of parameters where their parts are, or that they are gathered."""
    return [matrix._replace(parts=_parts(matrix)) for matrix in matrices]


def _place(matrix: Matrix) -> Any:
    return matrix.p.device_mesh if is_sharded(matrix.p) else matrix.copies


def _given(matrix: Matrix) -> Tensor:
    return torch.full((), matrix.p.grad is not None, device=matrix.p.device)


def _shared(parts: list[Part]) -> bool:
    return any(part.over_rows or part.over_columns or part.over_copies for part in parts)


def _step(matrices: list[Matrix]) -> None:
    batches: dict[Any, Batch] = {}
    copies: list[tuple[Tensor, Tensor]] = []
    holders = []
    for matrix in matrices:
        holder = held(matrix.p, matrix.state, gathered=matrix.parts is None)
        holders.append(holder)
        if matrix.parts is None:
            g = cast(Tensor, holder.tensor.grad)
            g = g if matrix.copies is None else added((g,), matrix.copies, mean=True)[0]
            # without a gradient on any process nothing moves, as if it were not finite
            holder.tensor.grad = g.masked_fill(~cast(Tensor, matrix.given), torch.nan)
        collect(matrix._replace(p=holder.tensor, state=holder.state), batches, copies)
    assign(batches.values())
    for batch in batches.values():
        update(batch)
    for p, values in copies:
        p.copy_(values)
    for holder in holders:
        holder.store()


def _parts(matrix: Matrix) -> list[Part] | None:
    """Where the parts of a parameter are, None if it is gathered."""
    p, recipe, step = matrix.p, matrix.recipe, matrix.options["step"]
    if matrix.options["diagnostics"]:
        return None
    if matrix.copies is not None:
        shapes = matrix.view.shapes(tuple(p.shape))
        parts: list[Part] | None = [Part((m, n), 0, n, over_copies=matrix.copies) for _, m, n in shapes]
    else:
        parts = parts_of(p, matrix.view)
    single = be.kind(be.namespace(p), p.dtype)
    small = single is not None and single.bits <= 32
    found = []
    for part in parts or []:
        full = recipe.width(part.shape, step) is None and recipe.scale != "nuclear"
        if small and recipe.fits_shards(part.shape, step):
            found.append(part)
        elif full and (part.over_rows is None) != (part.over_columns is None):
            found.append(part._replace(whole=True))
    return found if parts and len(found) == len(parts) else None
