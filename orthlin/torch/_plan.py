"""What a step sends between processes, foretold from shapes and from how parameters lie."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch import distributed as dist

from orthlin.torch._distributed import locate
from orthlin.torch._owners import Swap, owners_of
from orthlin.torch._pieces import Matrix
from orthlin.torch._sharded import Part, chunk, is_sharded, local

_SINGLE, _DOUBLE, _FLAG = 4, 8, 4  # bytes of a number


class Traffic(NamedTuple):
    """What a step sends for some matrices.

    Attributes
    ----------
    shape : tuple of int
        Shape (m, n) of the matrices, that of the parameter if it is gathered.
    matrices : int
        Their number.
    way : {"here", "low rank", "owners", "copies", "averaged", "gathered"}
        How they are stepped along.
    collectives : int
        Calls of torch.distributed in a step.
    sent : int
        Bytes that this process gives into them, for an exchange those that go to others.
    """

    shape: tuple[int, ...]
    matrices: int
    way: str
    collectives: int
    sent: int


@dataclass(frozen=True)
class Plan:
    """What a step sends; as a string, a table of it.

    Parameters
    ----------
    rows : tuple of Traffic
        One for matrices that are stepped along together.
    """

    rows: tuple[Traffic, ...]

    def __str__(self) -> str:
        """Return the table, with the sums."""
        count, calls, sent = (sum(getattr(r, key) for r in self.rows) for key in ("matrices", "collectives", "sent"))
        total = ("in all", str(count), "", str(calls), str(sent))
        cells = [("shape", "matrices", "way", "collectives", "bytes")]
        cells += [("x".join(map(str, r[0])), str(r[1]), r[2], str(r[3]), str(r[4])) for r in self.rows]
        cells.append(total)
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join("  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def foretold(plain: list[Matrix], shared: list[Matrix]) -> Plan:
    """Plan of a step of parameters that lie here, and of those on several processes."""
    rows = [Traffic(shape[1:], shape[0], "here", 0, 0) for x in plain for shape in x.view.shapes(tuple(x.p.shape))]
    stacks: dict[Any, list[Any]] = {}
    for matrix in locate(shared):
        if matrix.parts is None:
            rows.append(_whole(matrix))
            continue
        shapes = matrix.view.shapes(tuple(local(matrix.p).shape))
        for part, (count, a, w) in zip(matrix.parts, shapes, strict=True):
            key = part, a, w, matrix.p.dtype, "master" in matrix.state, matrix.p.device, matrix.recipe, matrix.kind
            stacks.setdefault(key, [matrix, part, a, w, 0])[-1] += count
    owned = [stack for stack in stacks.values() if stack[1].whole]
    owners = dict(zip(map(id, owned), owners_of([(part, count) for _, part, _, _, count in owned]), strict=True))
    for stack in stacks.values():
        matrix, part, a, w, count = stack
        if part.whole:
            sent = _by_owners(matrix, Swap(part, tuple(owners[id(stack)])), a * w)
            rows.append(Traffic(part.shape, count, "owners", 2, sent))
        else:
            calls = _low(matrix, part, a, w)
            way = "copies" if part.over_copies is not None else "low rank" if calls else "here"
            rows.append(Traffic(part.shape, count, way, len(calls), count * sum(calls)))
    return Plan(tuple(rows))


def _flags(matrix: Matrix) -> int:
    """Flags of a matrix: whether a gradient is there, and, with a momentum, whether it is zero."""
    return 2 if "fading" in matrix.state else 1


def _low(matrix: Matrix, part: Part, a: int, w: int) -> list[int]:
    """Bytes of a matrix in each sum, of which a x w entries are here; see :func:`orthlin._shards.factors`."""
    c, flags = (2 if matrix.p.is_complex() else 1), _flags(matrix)
    r = matrix.recipe.width(part.shape, matrix.options["step"]) or 0
    found = []
    if part.over_columns is not None:
        found += [_DOUBLE * (c * a * r + flags), _DOUBLE * c * r * r]
    if part.over_copies is not None:
        found += [_DOUBLE * (c * a * r + 1 + flags), _SINGLE * c * r * w]
    if part.over_rows is not None:
        squares = w if matrix.recipe.tail else 1
        found += [_DOUBLE * (c * r * r + squares + flags), _SINGLE * c * (r * r + r * w)]
    return found


def _by_owners(matrix: Matrix, swap: Swap, here: int) -> int:
    """Bytes to others of a stack, with flags and, on the way back, one more for what is finite."""
    part, flags = swap.part, _flags(matrix)
    size, rank = dist.get_world_size(part.group), dist.get_rank(part.group)
    itemsize = max(matrix.p.dtype.itemsize, _SINGLE)
    mine = swap.owners.count(rank)
    others: int = math.prod(part.shape) - here + (size - 1) * (flags + 1)
    sent: int = itemsize * ((len(swap.owners) - mine) * (here + flags) + mine * others)
    return sent


def _whole(matrix: Matrix) -> Traffic:
    p, shapes = matrix.p, matrix.view.shapes(tuple(matrix.p.shape))
    count = sum(shape[0] for shape in shapes)
    if matrix.copies is not None:
        return Traffic(tuple(p.shape), count, "averaged", 1, p.numel() * p.dtype.itemsize)
    gathered = [p, p, *(x for x in matrix.state.values() if isinstance(x, Tensor) and is_sharded(x))]
    calls = [call for x in gathered for call in _gathering(x)]
    return Traffic(tuple(p.shape), count, "gathered", len(calls), sum(calls))


def _gathering(x: Any) -> list[int]:
    """Bytes of this process, filled up to those of the largest part, in the gathering of a tensor."""
    lengths, cuts, found = list(x.shape), [], []
    for i, placement in enumerate(x.placements):
        if placement.is_shard():
            d, size = placement.dim, x.device_mesh.size(i)
            cuts.append((d, lengths[d], size))
            start, stop = chunk(lengths[d], size, x.device_mesh.get_local_rank(i))
            lengths[d] = stop - start
    for d, length, size in reversed(cuts):
        lengths[d] = -(-length // size)
        found.append(math.prod(lengths) * x.dtype.itemsize)
        lengths[d] = length
    return found
