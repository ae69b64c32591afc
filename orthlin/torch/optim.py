"""Optimizers for PyTorch: matrix-sign gradient descent and Muon, full and at low rank."""

from typing import Any

from torch import Tensor

from orthlin._direction import Rank
from orthlin.torch._orthogonal import Orthogonal, options_in

__all__ = ["MSGD", "PAPER", "LowRankMSGD", "LowRankMuon", "Muon"]

PAPER: dict[str, Any] = {"warm_start": False, "tail": 0.0, "tol": None}
"""Options that make the directions of `LowRankMuon` those of the paper, He, Deng and Lu, arXiv 2509.11983."""


class LowRankMuon(Orthogonal):
    r"""Low-rank Muon: steps of matrices along their momentum, orthogonalized at low rank; AdamW for all else.

    .. math:: M \leftarrow \beta M + (1 - \beta) G, \qquad
        X \leftarrow (1 - \eta \lambda) X - \eta\, s \Bigl(Q\,\mathrm{msign}(Q^T U)
        + \alpha \sqrt{\tfrac{k - r}{n}}\, T D^{-1}\Bigr)

    with :math:`U = \beta M + (1 - \beta) G`, Q a basis of a sketch of U, the tail :math:`T = U - Q Q^T U` and the
    lengths D of its columns.  ``LowRankMuon(..., **PAPER)`` takes the directions of the paper.

    Parameters
    ----------
    params : iterable
        Tensors, pairs (name, tensor) or groups.  In each group tensors of two and more dimensions are stepped along
        as matrices, real or complex, and the rest goes to AdamW, unless its "algorithm" is "orthogonal" or "adamw";
        embeddings and heads are matrices too, which :func:`orthlin.torch.gpt2.param_groups` tells apart.
    lr : float or Tensor
        Learning rate :math:`\eta`.  That of AdamW stays the multiple of it that it is at first, one if lr is 0.
    rank : int, float or callable
        Rank r of the direction: a number, a fraction of k = min(m, n), or a function of the step that gives either.
        Matrices with k <= r are orthogonalized in full.
    momentum : float
        :math:`\beta` of the average, as in `torch.optim.Muon`; `torch.optim.SGD` adds G itself, not (1 - beta) G.
    nesterov : bool
        Orthogonalize :math:`\beta M + (1 - \beta) G` in place of M.
    weight_decay : float or Tensor
        Decoupled weight decay :math:`\lambda` of the matrices.
    cautious : bool
        Decay only the entries that the step moves towards zero too.
    scale : {"none", "spectral", "rms", "rms_rank", "nuclear"}
        Scaling s of the step, see :func:`orthlin.steppers.muon`; with "rms" and "rms_rank" a matrix can share the
        learning rate of AdamW.
    n_iter : int
        Power iterations on the sketch.
    sketch : {"gaussian", "columns", "sparse_sign"}
        How a sketch is drawn.
    warm_start : bool
        Sketch with the right factor of the last step in place of random numbers.
    error_feedback : bool
        Leave in the momentum what the direction leaves out, as Dion does; in place of `nesterov`.
    tail : float or "auto"
        Weight :math:`\alpha` of the tail; "auto" is sqrt(8 r/k).
    tol : float or None
        How far from one the singular values of a low-rank direction may be, as in :func:`orthlin.lowrank_orth`, where
        less is cheaper; None for working precision.
    precision : {"highest", "high", "medium"}
        Of the large products, as in :func:`orthlin.lowrank_orth`; of a schedule by "medium" alone.
    schedule : {"muon", "speedrun", "polar_express"} or None
        Polynomials for matrices that are orthogonalized in full; None for working precision.
    nonfinite : {"skip", "raise"}
        What a gradient with NaN or infinity does: nothing, counted by :meth:`skipped`; or, on the CPU, an error.
    master_weights : bool
        Keep half-precision parameters in float32 as well, and round from there.
    diagnostics : bool
        Note what :meth:`diagnostics` reads.
    maximize : bool
        Ascend.
    capturable : bool
        A CUDA graph may hold a step: its rank is fixed and its starts are warm, as a graph repeats its random numbers;
        rates that change are tensors on the device.  A group's "step" does not count what is replayed.
    seed : int
        Random numbers are a function of seed, matrix shape and step.
    replicate_group : ProcessGroup or DeviceMesh, optional
        Processes whose copies of the matrices, whole or in parts, keep gradients of their own: two products are
        averaged in their place, or what is orthogonalized where that is less.
    adamw : dict, optional
        Options of torch.optim.AdamW for the parameters that go there, the learning rate by default that of the
        matrices; on the CPU its step is fused unless they say how.  What a group says itself holds for all of its
        parameters, a learning rate for the matrices.

    Raises
    ------
    OptionError, RankError, ShapeError, DTypeError, ArrayTypeError
        If an argument is not as described.

    Notes
    -----
    Matrices of one shape, in all groups of the same options, are stacked and stepped along together; a stack is the
    only large temporary, unless entries are far out of range.  ``torch.compile(optimizer.step)`` compiles that, in
    the precision set for float32 products; autocast changes nothing.  A matrix whose gradient has become zero goes on
    for less than 1/(1 - beta) steps in all: each is beta times the one before.  A refused step has changed nothing.
    DTensors (FSDP2, HSDP, tensor parallelism) make the step of one process, low rank where their rows or columns lie,
    with two sums for all matrices of a shape, or by an owner, whichever sends less, else gathered; never compiled.
    Cost: 6 m n r flops a matrix and O((m + n) r^2); state: a momentum of m n and, for a warm start, r n numbers.  The
    least moves 8 m n numbers, 3 of them for the direction; on devices a step moves 22 m n, compiled 13 m n.

    References
    ----------
    He, Deng and Lu, arXiv 2509.11983.  Ahn et al., Dion, arXiv 2504.05295.

    Examples
    --------
    >>> import torch
    >>> from orthlin.torch import LowRankMuon
    >>> _ = torch.manual_seed(0)
    >>> layer = torch.nn.Linear(8, 4)
    >>> optimizer = LowRankMuon(layer.named_parameters(), lr=0.1, rank=2)
    >>> layer(torch.randn(16, 8)).square().mean().backward()
    >>> optimizer.step()
    >>> [sorted(optimizer.state[p]) for p in layer.parameters()]
    [['fading', 'momentum', 'right_0', 'skipped'], ['exp_avg', 'exp_avg_sq', 'step']]
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        rank: Rank = 0.25,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float | Tensor = 0.1,
        cautious: bool = False,
        scale: str = "rms",
        n_iter: int = 0,
        sketch: str = "gaussian",
        warm_start: bool = True,
        error_feedback: bool = False,
        tail: float | str = "auto",
        tol: float | None = 0.1,
        precision: str = "high",
        schedule: str | None = None,
        nonfinite: str = "skip",
        master_weights: bool = True,
        diagnostics: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        seed: int = 0,
        replicate_group: Any = None,
        adamw: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(params, options_in(locals()))


class Muon(Orthogonal):
    """Muon: steps of matrices along their orthogonalized momentum, AdamW for all else.

    Parameters
    ----------
    params, lr, momentum, nesterov, weight_decay, cautious, scale, nonfinite, master_weights, diagnostics, maximize, \
    capturable, adamw
        See :class:`LowRankMuon`.
    precision : {"highest", "high", "medium"}
        Of the products of a schedule: float32, also by "high", or bfloat16, as in torch.optim.Muon, where
        :func:`orthlin.lowrank_orth` has it.
    schedule : {"muon", "speedrun", "polar_express"} or None
        Polynomials of the orthogonalization; None for working precision.

    Notes
    -----
    Errors are those of :class:`LowRankMuon`.
    Cost: a schedule of :func:`orthlin.orthogonalize` a matrix; the least moves 8 m n numbers, here 50 m n on devices.

    References
    ----------
    Jordan et al., Muon (2024).  "rms": Liu et al., arXiv 2502.16982.

    Examples
    --------
    >>> import torch
    >>> from orthlin.torch import Muon
    >>> weight = torch.nn.Parameter(torch.eye(3))
    >>> weight.grad = 5 * torch.eye(3)
    >>> Muon([weight], lr=0.5, scale="none", weight_decay=0.0, schedule=None).step()
    >>> weight.diagonal().tolist()
    [0.5, 0.5, 0.5]
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float | Tensor = 0.1,
        cautious: bool = False,
        scale: str = "rms",
        precision: str = "medium",
        schedule: str | None = "muon",
        nonfinite: str = "skip",
        master_weights: bool = True,
        diagnostics: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        adamw: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(params, options_in(locals()))


class LowRankMSGD(Orthogonal):
    """Low-rank matrix-sign gradient descent: `LowRankMuon` without momentum, by default as in the paper.

    Parameters
    ----------
    params, lr, rank, weight_decay, cautious, scale, n_iter, sketch, warm_start, tail, tol, precision, \
    schedule, nonfinite, master_weights, diagnostics, maximize, capturable, seed, adamw
        See :class:`LowRankMuon`.

    Notes
    -----
    Errors are those of :class:`LowRankMuon`.
    Cost: 6 m n r flops a matrix and O((m + n) r^2); the least moves 6 m n numbers, here 12 m n on devices.

    Examples
    --------
    >>> import torch
    >>> from orthlin.torch import LowRankMSGD
    >>> weight = torch.nn.Parameter(torch.diag(torch.tensor([3.0, 2.0, 0.0])))
    >>> weight.grad = weight.detach().clone()
    >>> LowRankMSGD([weight], lr=1.0, rank=2).step()
    >>> torch.allclose(weight, torch.diag(torch.tensor([2.0, 1.0, 0.0])), atol=1e-6)
    True
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        rank: Rank = 0.25,
        weight_decay: float | Tensor = 0.0,
        cautious: bool = False,
        scale: str = "none",
        n_iter: int = 0,
        sketch: str = "gaussian",
        warm_start: bool = False,
        tail: float | str = 0.0,
        tol: float | None = None,
        precision: str = "highest",
        schedule: str | None = None,
        nonfinite: str = "skip",
        master_weights: bool = True,
        diagnostics: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        seed: int = 0,
        adamw: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(params, options_in(locals()))


class MSGD(Orthogonal):
    """Matrix-sign gradient descent: `Muon` without momentum, to working precision.

    Parameters
    ----------
    params, lr, weight_decay, cautious, scale, schedule, nonfinite, master_weights, diagnostics, maximize, \
    capturable, adamw
        See :class:`Muon`.

    Notes
    -----
    Errors are those of :class:`Muon`.
    Cost: :func:`orthlin.orthogonalize` a matrix; the least moves 6 m n numbers, here 139 m n on devices.

    Examples
    --------
    >>> import torch
    >>> from orthlin.torch import MSGD
    >>> weight = torch.nn.Parameter(2 * torch.eye(3))
    >>> weight.grad = weight.detach().clone()
    >>> MSGD([weight], lr=1.0).step()
    >>> torch.allclose(weight, torch.eye(3))
    True
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        weight_decay: float | Tensor = 0.0,
        cautious: bool = False,
        scale: str = "none",
        schedule: str | None = None,
        nonfinite: str = "skip",
        master_weights: bool = True,
        diagnostics: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        adamw: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(params, options_in(locals()))
