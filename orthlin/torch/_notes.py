"""What a step notes of its matrices, for those who want to know how it goes."""

from typing import Any

import torch
from torch import Tensor

from orthlin import _backend as be
from orthlin._direction import Direction
from orthlin.torch._pieces import Piece

DIAGNOSTICS = ("captured", "stable_rank", "update_ratio")


def note(pieces: list[Piece], parts: list[Tensor], weight: Any, known: Tensor | None) -> None:
    """Write down what :meth:`Orthogonal.diagnostics` reads."""
    if known is None:
        return
    rows = known.split([len(O) for O in parts])
    for piece, O, (captured, rank) in zip(pieces, parts, (x.unbind(1) for x in rows), strict=True):
        sizes = [torch.linalg.vector_norm(x, dim=(-2, -1)) for x in (O, piece.weight)]
        ratio = sizes[0] / sizes[1] * (1 if weight is None else weight)
        if piece.diagnostics is not None:
            noted, old = torch.stack([captured, rank, ratio], 1), piece.diagnostics
            # the note of a matrix without a gradient on any process is that of its last step, as on one process
            old.copy_(noted if piece.given is None else torch.where(piece.given[:, 0], noted, old))


def spectrum(d: Direction) -> Tensor:
    """Captured energy ||B||_F^2/||U||_F^2 and stable rank ||U||_F^2/||U||_2^2, a row for each matrix."""
    if d.B is None:
        return torch.full((d.X.shape[0], 2), torch.nan, dtype=torch.float32, device=d.X.device)
    xp = be.namespace(d.X)
    squares = be.column_squares(xp, d.X).sum(dim=(-2, -1))
    wide = None if be.is_host(d.X) else be.wide_dtype(xp, d.X)  # on devices the entries are of any size
    B = d.B.to(wide or d.B.dtype)
    S = B @ B.mH
    size = torch.linalg.matrix_norm(S, keepdim=True)
    # ||S^8||_F / ||S^4||_F is the 4th power of the largest eigenvalue, up to 4th powers of the others' ratios to it
    S4 = torch.linalg.matrix_power(S / size, 4)
    top = (torch.linalg.matrix_norm(S4 @ S4) / torch.linalg.matrix_norm(S4)) ** 0.25 * size[:, 0, 0]
    return torch.stack([S.diagonal(dim1=-2, dim2=-1).real.sum(-1) / squares, squares / top], 1)
