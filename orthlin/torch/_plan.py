"""What a step sends between processes, foretold from shapes and from how parameters lie."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch import distributed as dist

from orthlin.torch._distributed import locate, of_copies
from orthlin.torch._owners import Swap, owners_of
from orthlin.torch._pieces import Matrix
from orthlin.torch._sharded import chunk, is_sharded, local
from orthlin.torch._ways import flags_of, itemsize, name_of, riding, sums_of, volume, ways


class Traffic(NamedTuple):
    """What a step sends for some matrices.

    Attributes
    ----------
    shape : tuple of int
        Shape (m, n) of the matrices, that of the parameter if it is gathered.
    matrices : int
        Their number.
    way : {"here", "low rank", "owners", "copies", "averaged", "gathered"}
        How they are stepped along, of parts of copies two of them.
    collectives : int
        Calls of torch.distributed in a step.
    sent : int
        Bytes that this process gives into them, for an exchange those that go to others.
    volume : float
        Bytes that a process sends, on the average of all of them: sums around a ring, exchanges once.
    instead : tuple of (str, float)
        The other ways that give the same update, and what they would send.
    """

    shape: tuple[int, ...]
    matrices: int
    way: str
    collectives: int
    sent: int
    volume: float = 0.0
    instead: tuple[tuple[str, float], ...] = ()


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
        keys = "matrices", "way", "collectives", "sent", "volume"
        sums = {key: "" if key == "way" else sum(getattr(row, key) for row in self.rows) for key in keys}
        cells = [["shape", "matrices", "way", "collectives", "bytes", "volume", "instead"]]
        for row in self.rows:
            others = ", ".join(f"{name} {size:.0f}" for name, size in row.instead)
            cells.append(["x".join(map(str, row.shape)), *(_cell(getattr(row, key)) for key in keys), others])
        cells.append(["in all", *map(_cell, sums.values()), ""])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join("  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def _cell(x: Any) -> str:
    return f"{x:.0f}" if isinstance(x, float) else str(x)


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
    owned = [stack for stack in stacks.values() if stack[1].whole and stack[1].group is not None]
    ranks = [matrix.recipe.width(part.shape, matrix.options["step"]) for matrix, part, *_ in owned]
    found = owners_of([(part, count, r) for (_, part, *_, count), r in zip(owned, ranks, strict=True)])
    owners = {id(stack): tuple(x) for stack, x in zip(owned, found, strict=True)}
    return Plan((*rows, *(_row(stack, owners.get(id(stack))) for stack in stacks.values())))


def _row(stack: list[Any], owners: tuple[int, ...] | None) -> Traffic:
    """What goes for a stack: a matrix of it, their part, which has a x w entries, and their number."""
    matrix, part, a, w, count = stack
    sums = sums_of(matrix, part, a, w)
    calls, sent = len(sums), count * sum(size for _, size in sums)
    if owners is not None:
        calls, sent = calls + 2, sent + _by_owners(matrix, Swap(part, owners), a, w)
    others = tuple((name_of(way), count * volume(matrix, way)) for way in ways(matrix, part) if way != part)
    return Traffic(part.shape, count, name_of(part), calls, sent, count * volume(matrix, part), others)


def _by_owners(matrix: Matrix, swap: Swap, a: int, w: int) -> int:
    """Bytes to others of a stack, with what rides with it."""
    part, flags, (more, notes) = swap.part, flags_of(matrix), riding(matrix, swap.part)
    size, mine = dist.get_world_size(part.group), len(swap.mine)
    here, whole = (a + more) * w, (part.shape[0] + more) * part.shape[1]
    others = whole - here + (size - 1) * notes
    sent: int = itemsize(matrix) * ((len(swap.owners) - mine) * (here + flags) + mine * others)
    return sent


def _whole(matrix: Matrix) -> Traffic:
    """What goes for a parameter that is gathered, and, of copies, averaged."""
    p, shapes = matrix.p, matrix.view.shapes(tuple(matrix.p.shape))
    gathered = [p, p, *(x for x in matrix.state.values() if isinstance(x, Tensor) and is_sharded(x))]
    calls = [call for x in gathered for call in _gathering(x)]
    sent, sends = sum(size for size, _ in calls), float(sum(size * (others - 1) for size, others in calls))
    means = list(zip(of_copies(matrix) or [], shapes, strict=False))
    for part, (count, m, n) in means:
        sent += sum(count * size for _, size in sums_of(matrix, part, m, n))
        sends += count * volume(matrix, part)
    name = "averaged, gathered" if means else "gathered"
    return Traffic(tuple(p.shape), sum(shape[0] for shape in shapes), name, len(calls) + len(means), sent, sends)


def _gathering(x: Any) -> list[tuple[int, int]]:
    """Bytes of this process, filled up to those of the largest part, and of how many, to gather a tensor."""
    lengths, cuts, found = list(x.shape), [], []
    for i, placement in enumerate(x.placements):
        if placement.is_shard():
            d, size = placement.dim, x.device_mesh.size(i)
            cuts.append((d, lengths[d], size))
            start, stop = chunk(lengths[d], size, x.device_mesh.get_local_rank(i))
            lengths[d] = stop - start
    for d, length, size in reversed(cuts):
        lengths[d] = -(-length // size)
        found.append((math.prod(lengths) * x.dtype.itemsize, size))
        lengths[d] = length
    return found
