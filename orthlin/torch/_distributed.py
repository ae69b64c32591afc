"""Steps of parameters that lie on several processes, DTensors of FSDP2, HSDP and tensor parallelism.

Where the matrices of a parameter are cut along rows or columns, a low-rank direction is made where its parts are, with
two sums for all matrices of a shape that are cut alike.  Everything else is gathered, parameter by parameter, and
stepped along whole on every process.  Both give the update of one process.
"""

from typing import Any

import torch
from torch import Tensor

from orthlin import _backend as be
from orthlin.torch._pieces import Batch, Matrix, collect
from orthlin.torch._sharded import Part, held, parts_of
from orthlin.torch._update import update


@torch.compiler.disable  # type: ignore[untyped-decorator]
def step_shards(matrices: list[Matrix]) -> None:
    """Step parameters that are DTensors: first those whose parts are stepped along where they are, then the others."""
    placed = [(matrix, _parts(matrix)) for matrix in matrices]
    _step([(matrix, parts) for matrix, parts in placed if parts is not None])
    for matrix, parts in placed:
        if parts is None:
            _step([(matrix, None)])


def _step(placed: list[tuple[Matrix, list[Part] | None]]) -> None:
    batches: dict[Any, Batch] = {}
    copies: list[tuple[Tensor, Tensor]] = []
    holders = []
    for matrix, parts in placed:
        holder = held(matrix.p, matrix.state, gathered=parts is None)
        holders.append(holder)
        collect(matrix._replace(p=holder.tensor, state=holder.state), batches, copies, parts)
    for batch in batches.values():
        update(batch)
    for p, values in copies:
        p.copy_(values)
    for holder in holders:
        holder.store()


def _parts(matrix: Matrix) -> list[Part] | None:
    """Where the parts of a parameter are, None if its matrices are needed whole."""
    p, recipe, options = matrix.p, matrix.recipe, matrix.options
    shapes = matrix.view.shapes(tuple(p.shape))
    low = all(recipe.fits_shards(shape, options["step"]) for shape in shapes)
    single = be.kind(be.namespace(p), p.dtype)
    if not low or options["diagnostics"] or single is None or single.bits > 32:
        return None
    return parts_of(p, matrix.view)
