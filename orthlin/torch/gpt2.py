"""Routing of GPT-2, LLaMA and other models: which parameters are matrices, and which are AdamW's."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from orthlin import _checks as check
from orthlin.errors import OptionError
from orthlin.torch import optim
from orthlin.torch._survey import Claim, Overrides, Survey, check_memory, settled
from orthlin.torch._table import NOTHING, Route, Routing
from orthlin.torch.views import MatrixView

OPTIMIZERS = ("LowRankMuon", "Muon", "LowRankMSGD", "MSGD")

__all__ = ["OptimizerFactory", "Route", "Routing", "param_groups", "route"]


def route(
    model: nn.Module,
    *,
    split_qkv: bool = True,
    per_head: bool = False,
    overrides: Mapping[str, str | MatrixView] | None = None,
) -> Routing:
    """Decide for every parameter of a model, by the modules that own it, which algorithm steps it.

    Parameters
    ----------
    model : Module
        A model of transformers, or any of linear layers, convolutions, attention, experts, embeddings and norms;
        on any device, the meta device too.
    split_qkv : bool
        Whether a fused query, key and value projection is three matrices, where each of them lies in one piece.
    per_head : bool
        Whether queries, keys and values split by heads along out, and the output projection of attention along in.
    overrides : mapping of str to "adamw" or MatrixView, optional
        Decisions by full parameter name, or by pattern with ``*``, ``?`` and ``[]``; names go before patterns.

    Returns
    -------
    Routing
        Every parameter exactly once; ``print`` shows it as a table.

    Raises
    ------
    OptionError
        If no rule knows a parameter, two claims on one differ, two that are trained share memory without being
        one object, one has no shape yet (lazy modules), an override matches nothing, or there is no head count
        where one is needed.
    ShapeError
        If a parameter does not split as its view says.

    Notes
    -----
    In this order: overrides; frozen parameters; 0-D and 1-D parameters and norms are AdamW's, without decay;
    weights of embeddings and output heads, whatever else they are tied to, are AdamW's; so are other matrices
    with an axis of the vocabulary's size, LoRA's A, heads, routers and vectors; Linear, Conv1D, convolutions (those
    of patches too), MultiheadAttention, stacks of experts and LoRA's B are matrices; what is left are tokens and
    tables, AdamW's, if they have one or two axes longer than 1 or a first axis of 1.

    A head is, in a model of transformers, a matrix outside of its base model whose result no later one there takes
    in (a hidden layer before a classifier is none), or, without such a base, one onto ``config.num_labels`` where no
    layer takes in that width.  Elsewhere it is the last matrix, with those beside it on the same input, if other
    matrices come before and none takes in its result.  A router gives one number for each expert: the rows are
    labels.  A vector is a matrix with an axis of 1, as each filter of a depthwise convolution is.

    Fused projections split if their parts lie one after the other, with `split_qkv` those of attention.

    The vocabulary's size is that of the model's ``get_input_embeddings()``, else of every table.  A hidden width
    may coincide with it.  So inside a ModuleList or Sequential an axis of that size counts only if no layer takes
    it in, and only for the last matrix of the list's entry (an extra head; blocks end on a projection);
    elsewhere, if some layer takes it in, only for the last matrix (the head).

    Examples
    --------
    >>> from torch import nn
    >>> print(route(nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 9, bias=False), nn.Linear(9, 50, bias=False))))
    name      shape   algorithm   matrices   reason
    0.weight  50 x 8  adamw                  embedding
    1.weight  9 x 8   orthogonal  1 x 9 x 8  Linear
    2.weight  50 x 9  adamw                  vocabulary-sized axis
    922 numbers in 3 parameters: orthogonal: 72; adamw: 850; adamw, no decay: 0; frozen: 0
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"model: expected a torch.nn.Module, got {type(model).__qualname__}")
    names: dict[nn.Parameter, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if is_lazy(p):
            raise OptionError(f"model: {name} has no shape yet; run the model once first")
        names.setdefault(p, []).append(name)
    chosen = Overrides(overrides or {}, [name for same in names.values() for name in same])
    survey = Survey(model, split_qkv, per_head)
    rows, unknown = [], []
    for p, same in names.items():
        claims: list[Claim | None] = [*chosen.of(same, p)] or [survey.claim(name, p) for name in same]
        known = [claim for claim in claims if claim is not None]
        if len(known) == len(claims):
            rows.append(Route(same[0], p, *settled(same, p, known)))
        else:
            unknown.append(f"{same[0]} {tuple(p.shape)} of {type(survey.owner(same[0])).__name__}")
    if unknown:
        raise OptionError(f"model: no rule for {', '.join(unknown)}; name them in overrides, 'adamw' or a MatrixView")
    check_memory((row.name, row.parameter) for row in rows if row.algorithm != "frozen")
    return Routing(tuple(rows))


def param_groups(
    model: nn.Module,
    *,
    split_qkv: bool = True,
    per_head: bool = False,
    overrides: Mapping[str, str | MatrixView] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups of a model for the optimizers of `orthlin.torch`, as `route` decides.

    Parameters
    ----------
    model : Module
        The model.
    split_qkv, per_head, overrides
        See :func:`route`.

    Returns
    -------
    list of dict
        See :meth:`Routing.groups`.

    Raises
    ------
    OptionError, ShapeError
        As :func:`route`.

    Warns
    -----
    UserWarning
        If no matrix is trained, so that AdamW steps the whole model.

    Examples
    --------
    >>> from torch import nn
    >>> [group["view"]["splits"] for group in param_groups(nn.Conv2d(4, 4, 3, groups=2, bias=False))]
    [2]
    """
    routing = route(model, split_qkv=split_qkv, per_head=per_head, overrides=overrides)
    if routing.is_without_matrix():
        warnings.warn(f"model: {NOTHING}; print(route(model)) says why", stacklevel=2)
    return routing.groups()


class OptimizerFactory:
    """Make an optimizer for a model, in the form that transformers' Trainer wants it.

    Give it to the Trainer as ``optimizer_cls_and_kwargs=(OptimizerFactory, {"lr": 0.02, "rank": 64})``.  The
    learning rate of the training arguments is not used.

    Examples
    --------
    >>> from torch import nn
    >>> OptimizerFactory()(nn.Linear(3, 2), optimizer="LowRankMuon", lr=0.02, rank=1).param_groups[0]["lr"]
    0.02
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        optimizer: str = "LowRankMuon",
        split_qkv: bool = True,
        per_head: bool = False,
        overrides: Mapping[str, str | MatrixView] | None = None,
        **options: Any,
    ) -> Any:
        """Route the parameters of a model and make the optimizer.

        Parameters
        ----------
        model : Module
            The model.
        optimizer : {"LowRankMuon", "Muon", "LowRankMSGD", "MSGD"}
            Class of `orthlin.torch`.
        split_qkv, per_head, overrides
            See :func:`route`.
        **options
            Of the optimizer.

        Returns
        -------
        Optimizer
            With the groups of :func:`param_groups`.

        Raises
        ------
        OptionError, ShapeError
            As :func:`route`, or if `optimizer` is not one of those.

        Examples
        --------
        >>> from torch import nn
        >>> type(OptimizerFactory()(nn.Linear(3, 2), optimizer="Muon", lr=0.02)).__name__
        'Muon'
        """
        check.option(optimizer, "optimizer", OPTIMIZERS)
        groups = param_groups(model, split_qkv=split_qkv, per_head=per_head, overrides=overrides)
        return getattr(optim, optimizer)(groups, **options)
