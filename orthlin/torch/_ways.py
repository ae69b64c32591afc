"""What each way of a step sends for matrices that lie on several processes, and which of them sends the least."""

from typing import Any

from torch import distributed as dist

from orthlin import _backend as be
from orthlin.torch._pieces import Matrix
from orthlin.torch._sharded import Part

_SINGLE, _DOUBLE = 4, 8  # bytes of a number


def ways(matrix: Matrix, part: Part) -> list[Part]:
    """How the matrices of a stack can be stepped along with the same update, what sends the least first.

    All processes come to the same order: volumes are averages over them.  Error feedback needs what a low-rank
    direction has captured in every part, which owners do not send.
    """
    recipe, step, p = matrix.recipe, matrix.options["step"], matrix.p
    kind, r = be.kind(be.namespace(p), p.dtype), recipe.width(part.shape, step)
    found, part = [], part._replace(whole=False)
    if kind is not None and kind.bits <= 32 and recipe.fits_shards(part.shape, step):
        found.append(part)
    once = part.over_rows is None or part.over_columns is None
    if once and (r is None or part.group is None or not matrix.options["error_feedback"]):
        found.append(part._replace(whole=True))
    return sorted(found, key=lambda way: volume(matrix, way))


def name_of(part: Part) -> str:
    """Name of a way."""
    cut, copied = part.over_rows or part.over_columns, part.over_copies
    if part.whole:
        names = ["averaged"] * (copied is not None) + ["owners"] * (cut is not None)
    else:
        names = ["low rank"] * (cut is not None) + ["copies"] * (copied is not None)
    return ", ".join(names) or "here"


def volume(matrix: Matrix, part: Part) -> float:
    """Bytes that a process sends for a matrix, on the average of all: its sums around a ring, its exchanges once."""
    (m, n), sides = part.shape, [_size(group) for group in (part.over_rows, part.over_columns)]
    sums = sums_of(matrix, part, -(-m // sides[0]), -(-n // sides[1]))
    sent = sum(2 * (1 - 1 / _size(group)) * size for group, size in sums)
    if part.whole and part.group is not None:
        size, (more, notes) = _size(part.group), riding(matrix, part)
        numbers = 2 * (m + more) * n / size + flags_of(matrix) + notes
        sent += (1 - 1 / size) * itemsize(matrix) * numbers
    return sent


def sums_of(matrix: Matrix, part: Part, a: int, w: int) -> list[tuple[Any, int]]:
    """Group and bytes of each sum for a matrix of which a x w entries are here.

    See :func:`orthlin._shards.factors`; where directions are made of whole matrices, the mean of copies is one.
    """
    c, flags = (2 if matrix.p.is_complex() else 1), flags_of(matrix)
    if part.whole:
        mean = itemsize(matrix) * a * w + itemsize(matrix) // c * flags
        return [] if part.over_copies is None else [(part.over_copies, mean)]
    r = matrix.recipe.width(part.shape, matrix.options["step"]) or 0
    found = []
    if part.over_columns is not None:
        found += [(part.over_columns, _DOUBLE * (c * a * r + flags)), (part.over_columns, _DOUBLE * c * r * r)]
    if part.over_copies is not None:
        found += [(part.over_copies, _DOUBLE * (c * a * r + 1 + flags)), (part.over_copies, _SINGLE * c * r * w)]
    if part.over_rows is not None:
        squares = w if matrix.recipe.tail else 1
        found.append((part.over_rows, _DOUBLE * (c * r * r + squares + flags)))
        found.append((part.over_rows, _SINGLE * c * (r * r + r * w)))
    return found


def riding(matrix: Matrix, part: Part) -> tuple[int, int]:
    """Rows that ride with a matrix to its owner and back, and numbers that come back with it to every process.

    See :func:`orthlin.torch._owners.by_owners`: where columns are cut, the warm start lies as they do; where rows are
    cut, all have the last one and get the next.
    """
    r = matrix.recipe.width(part.shape, matrix.options["step"])
    warm = r if r is not None and matrix.recipe.warm_start else 0
    rows = part.over_rows is not None
    notes = flags_of(matrix) + 1 + (matrix.recipe.scale == "nuclear")
    return (0, notes + warm * part.shape[1]) if rows else (warm, notes)


def flags_of(matrix: Matrix) -> int:
    """Flags of a matrix: whether a gradient is there, and, with a momentum, whether it is zero."""
    return 2 if "fading" in matrix.state else 1


def itemsize(matrix: Matrix) -> int:
    """Bytes of a number of what is orthogonalized."""
    return max(int(matrix.p.dtype.itemsize), _SINGLE)


def _size(group: Any) -> int:
    return 1 if group is None else dist.get_world_size(group)
