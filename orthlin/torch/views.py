"""Matrix views: which axes of a parameter are out, in and batch, and how it splits into blocks."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from math import prod
from typing import Any

import torch

from orthlin import _checks as check
from orthlin.errors import OptionError, ShapeError

AXES = ("out", "in")

__all__ = ["MatrixView", "default_view"]


@dataclass(frozen=True)
class MatrixView:
    r"""How a parameter of shape (\*batch, out, in, \*rest) is read as matrices, of which it holds the memory.

    The trailing axes `rest` belong to the in side: a convolution (o, i, kh, kw) is the matrix (o, i kh kw).

    Parameters
    ----------
    transposed : bool
        Whether in is stored before out, as in transformers' Conv1D.
    splits : int or tuple of int
        Number of equal blocks along `split_axis` (fused query, key and value: 3; their heads: 3 n_heads), or the
        sizes of the blocks (grouped-query attention).
    split_axis : {"out", "in"}
        Rows or columns; the output projection of attention splits by heads along its columns.
    batch_ndim : int
        Number of leading axes that count matrices, as experts.
    interleave : bool
        Whether the equal blocks take turns, one row (or column) each, as gate and up of GPT-OSS do.

    Raises
    ------
    OptionError, RankError
        If a field is not as described.

    Examples
    --------
    >>> import torch
    >>> qkv = torch.zeros(6, 18)  # a fused Conv1D, stored in x out
    >>> [q_k_v] = MatrixView(transposed=True, splits=3).view(qkv)
    >>> q_k_v.shape
    torch.Size([3, 6, 6])
    >>> q_k_v[1] = 1  # writes the key columns
    >>> qkv.sum(0).tolist()[5:13]
    [0.0, 6.0, 6.0, 6.0, 6.0, 6.0, 6.0, 0.0]
    """

    transposed: bool = False
    splits: int | tuple[int, ...] = 1
    split_axis: str = "out"
    batch_ndim: int = 0
    interleave: bool = False

    def __post_init__(self) -> None:
        for name in ("transposed", "interleave"):
            if not isinstance(value := getattr(self, name), bool):
                raise OptionError(f"{name}: expected True or False, got {value!r}")
        if isinstance(self.splits, list | tuple):
            if not self.splits:
                raise OptionError("splits: expected a number of blocks or their sizes, got none")
            sizes = tuple(check.count(size, "splits", low=1) for size in self.splits)
            object.__setattr__(self, "splits", sizes)
            if self.interleave:
                raise OptionError(f"splits: expected a number where blocks interleave, got the sizes {sizes}")
        else:
            check.count(self.splits, "splits", low=1)
        check.option(self.split_axis, "split_axis", AXES)
        check.count(self.batch_ndim, "batch_ndim")

    def as_dict(self) -> dict[str, Any]:
        """Fields as a dict of plain values, from which ``MatrixView(**fields)`` is the same view.

        Returns
        -------
        dict
            What an optimizer can keep in its parameter groups.

        Examples
        --------
        >>> MatrixView(splits=(4, 2, 2)).as_dict()
        {'transposed': False, 'splits': (4, 2, 2), 'split_axis': 'out', 'batch_ndim': 0, 'interleave': False}
        """
        return asdict(self)

    def view(self, x: torch.Tensor, *, copy: bool = False) -> list[torch.Tensor]:
        r"""Stacks of matrices in the memory of a tensor: writing to one writes the tensor.

        Parameters
        ----------
        x : Tensor, shape (\*batch, out, in, \*rest), or (\*batch, in, out, \*rest) if transposed
            Parameter, gradient or buffer, with any strides.
        copy : bool
            Whether to copy a tensor whose strides allow no view, such as a gradient that is only read.

        Returns
        -------
        list of Tensor, each of shape (b, m, n)
            One stack of equal blocks, in order; one stack a block where the blocks are unequal or there are
            batch axes, along which b then counts.

        Raises
        ------
        ShapeError
            If the shape has too few axes or does not split as described, or if there is no view.

        Examples
        --------
        >>> import torch
        >>> [stack.shape for stack in MatrixView(splits=(4, 2, 2)).view(torch.zeros(8, 5))]
        [torch.Size([1, 4, 5]), torch.Size([1, 2, 5]), torch.Size([1, 2, 5])]
        """
        places = _places(self, tuple(x.shape), x.stride(), copy)
        if places is None:
            return self._stacks(x, copy)
        offset = x.storage_offset()
        return [x.as_strided(shape, strides, offset + start) for shape, strides, start in places]

    def shapes(self, shape: Sequence[int]) -> list[tuple[int, int, int]]:
        """Shapes of the stacks that `view` gives for a tensor of a shape.

        Parameters
        ----------
        shape : sequence of int
            Shape of the tensor.

        Returns
        -------
        list of tuple (b, m, n)
            Count, rows and columns of each stack.

        Raises
        ------
        ShapeError
            As `view`.

        Examples
        --------
        >>> MatrixView(batch_ndim=1).shapes((8, 32, 16))
        [(8, 32, 16)]
        """
        return list(_shapes(self, tuple(shape)))

    def _stacks(self, x: torch.Tensor, copy: bool) -> list[torch.Tensor]:
        matrices = self._matrices(x, copy)
        axis = 1 + AXES.index(self.split_axis)
        sizes = self._sizes(matrices.shape[axis], tuple(x.shape))
        if len(set(sizes)) > 1:
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
            return [matrices.narrow(axis, start, size) for start, size in zip(starts, sizes, strict=True)]
        counts = (sizes[0], len(sizes)) if self.interleave else (len(sizes), sizes[0])
        blocks = matrices.unflatten(axis, counts).movedim(axis + self.interleave, 0)
        return list(blocks) if self.batch_ndim else [blocks[:, 0]]

    def _matrices(self, x: torch.Tensor, copy: bool) -> torch.Tensor:
        """The unsplit matrices as one stack."""
        batch = self.batch_ndim
        if x.ndim < batch + 2:
            raise ShapeError(f"x: expected {batch} batch axes, out and in, got shape {tuple(x.shape)}")
        ordered = x.transpose(batch, batch + 1) if self.transposed else x
        shape = (prod(x.shape[:batch]), ordered.shape[batch], prod(ordered.shape[batch + 1 :]))
        if copy:
            return ordered.reshape(shape)
        try:
            return ordered.view(shape)
        except RuntimeError:
            raise ShapeError(
                f"x: shape {tuple(x.shape)} with strides {x.stride()} has no view as {' x '.join(map(str, shape))} "
                "(channels_last weights have none); make it contiguous, or pass copy=True and write the copy back"
            ) from None

    def _sizes(self, length: int, shape: tuple[int, ...]) -> list[int]:
        if isinstance(self.splits, int):
            if length % self.splits:
                raise ShapeError(
                    f"splits: {self.splits} equal blocks do not divide the {length} {self.split_axis} entries "
                    f"of shape {shape}"
                )
            return [length // self.splits] * self.splits
        if sum(self.splits) != length:
            raise ShapeError(
                f"splits: sizes {self.splits} add up to {sum(self.splits)}, not to the {length} {self.split_axis} "
                f"entries of shape {shape}"
            )
        return list(self.splits)


@cache
def _shapes(view: MatrixView, shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
    stacks = view._stacks(torch.empty(shape, device="meta"), True)
    return [(stack.shape[0], stack.shape[1], stack.shape[2]) for stack in stacks]


@cache
def _places(
    view: MatrixView, shape: tuple[int, ...], strides: tuple[int, ...], copy: bool
) -> list[tuple[torch.Size, tuple[int, ...], int]] | None:
    """Shape, strides and start of every stack in the memory of a tensor; None where a copy has to be made."""
    x = torch.empty_strided(shape, strides, device="meta")
    try:
        stacks = view._stacks(x, False)
    except ShapeError:
        if not copy:
            raise
        view._stacks(x, True)  # an error, unless strides are all that is wrong
        return None
    return [(stack.shape, stack.stride(), stack.storage_offset()) for stack in stacks]


_PLAIN = MatrixView()


def default_view(shape: Sequence[int]) -> MatrixView:
    r"""View of a parameter of which only the shape is known.

    Parameters
    ----------
    shape : sequence of int
        (out, in), or (out, in, \*kernel) with two or three kernel axes.

    Returns
    -------
    MatrixView
        The plain one.

    Raises
    ------
    ShapeError
        If the shape has another number of axes; with three it may be experts or a one-dimensional convolution.

    Examples
    --------
    >>> default_view((64, 3, 7, 7)).shapes((64, 3, 7, 7))
    [(1, 64, 147)]
    """
    if len(shape) == 3:
        raise ShapeError(
            f"shape: {tuple(shape)} may be experts or a one-dimensional convolution; give a view, "
            "MatrixView(batch_ndim=1) for the former, MatrixView() for the latter"
        )
    if len(shape) not in (2, 4, 5):
        raise ShapeError(f"shape: expected 2, 4 or 5 axes, got {tuple(shape)}; give a view, or use AdamW for it")
    return _PLAIN
