"""Routing of GPT-2, LLaMA and models like them: which parameters are matrices, and which are AdamW's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from orthlin import _checks as check
from orthlin.errors import OptionError
from orthlin.torch import optim
from orthlin.torch._survey import Claim, Overrides, Survey, check_memory, settled
from orthlin.torch.views import MatrixView

OPTIMIZERS = ("LowRankMuon", "Muon", "LowRankMSGD", "MSGD")

__all__ = ["OptimizerFactory", "Route", "Routing", "param_groups", "route"]


class Route(NamedTuple):
    """What happens to one parameter.

    Attributes
    ----------
    name : str
        Its first full name.
    parameter : Parameter
        The parameter itself.
    algorithm : {"orthogonal", "adamw", "frozen"}
        Who steps it; "frozen" is nobody.
    view : MatrixView or None
        The matrices it holds, for "orthogonal".
    decay : bool
        Whether weight decay applies.
    reason : str
        The rule that decided, in words.
    """

    name: str
    parameter: nn.Parameter
    algorithm: str
    view: MatrixView | None
    decay: bool
    reason: str


@dataclass(frozen=True)
class Routing:
    """The decision on every parameter of a model; as a string, a table of it.

    Parameters
    ----------
    rows : tuple of Route
        One for each parameter, in the order of the model, tied ones once.
    """

    rows: tuple[Route, ...]

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimizers of `orthlin.torch`.

        Returns
        -------
        list of dict
            One group with named parameters for each view of the matrices, then one for AdamW with weight decay
            and one without; empty groups and frozen parameters are left out.

        Examples
        --------
        >>> from torch import nn
        >>> [group["algorithm"] for group in route(nn.Linear(3, 2)).groups()]
        ['orthogonal', 'adamw']
        """
        groups: dict[Any, dict[str, Any]] = {}
        for row in sorted(self.rows, key=lambda row: (row.algorithm == "adamw", not row.decay)):
            settings: dict[str, Any] = {"algorithm": row.algorithm}
            if row.view is not None:
                settings["view"] = row.view.as_dict()
            elif not row.decay:
                settings["weight_decay"] = 0.0
            if row.algorithm != "frozen":
                group = groups.setdefault((row.view, row.decay), {"params": [], **settings})
                group["params"].append((row.name, row.parameter))
        return list(groups.values())

    def __str__(self) -> str:
        lines = [("name", "shape", "algorithm", "matrices", "reason")]
        totals = dict.fromkeys(("orthogonal", "adamw", "adamw, no decay", "frozen"), 0)
        for row in self.rows:
            shape = tuple(row.parameter.shape)
            label = "adamw, no decay" if row.algorithm == "adamw" and not row.decay else row.algorithm
            totals[label] += row.parameter.numel()
            stacks = row.view.shapes(shape) if row.view is not None else []
            lines.append((row.name, _times(shape), label, " + ".join(map(_times, stacks)), row.reason))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        parts = "; ".join(f"{label}: {count:,}" for label, count in totals.items())
        return "\n".join([*table, f"{sum(totals.values()):,} numbers in {len(self.rows)} parameters: {parts}"])


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
        transformers' GPT2LMHeadModel or LlamaForCausalLM, or any model of linear layers, convolutions, Conv1D,
        embeddings and norms; on any device, the meta device too.
    split_qkv : bool
        Whether a fused query, key and value projection is three matrices.
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
        one object, an override matches nothing, or there is no head count where one is needed.
    ShapeError
        If a parameter does not split as its view says.

    Notes
    -----
    In this order: overrides; frozen parameters; 0-D and 1-D parameters and norms are AdamW's, without decay;
    weights of embeddings and output heads, whatever else they are tied to, are AdamW's; so are other matrices
    with an axis of the vocabulary's size, and LoRA's A; Linear, Conv1D, convolutions and LoRA's B are matrices.

    The vocabulary's size is that of the model's ``get_input_embeddings()``, else of every table.  A hidden width
    may coincide with it.  So inside a ModuleList or Sequential an axis of that size counts only if no layer takes
    it in, and only for the last matrix of the list's entry (an extra head; blocks end on a projection);
    elsewhere, if some layer takes it in, only for the last matrix (the head).

    Examples
    --------
    >>> from torch import nn
    >>> print(route(nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 4, bias=False), nn.Linear(4, 50, bias=False))))
    name      shape   algorithm   matrices   reason
    0.weight  50 x 8  adamw                  embedding
    1.weight  4 x 8   orthogonal  1 x 4 x 8  Linear
    2.weight  50 x 4  adamw                  vocabulary-sized axis
    632 numbers in 3 parameters: orthogonal: 32; adamw: 600; adamw, no decay: 0; frozen: 0
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"model: expected a torch.nn.Module, got {type(model).__qualname__}")
    names: dict[nn.Parameter, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
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

    Examples
    --------
    >>> from torch import nn
    >>> [group["view"]["splits"] for group in param_groups(nn.Conv2d(4, 4, 3, groups=2, bias=False))]
    [2]
    """
    return route(model, split_qkv=split_qkv, per_head=per_head, overrides=overrides).groups()


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


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
