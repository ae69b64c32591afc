"""The optimizer behind all of `orthlin.torch`: its groups, its state, its step."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from orthlin import _backend as be
from orthlin import _checks as check
from orthlin import schedules
from orthlin._direction import Recipe
from orthlin.errors import ArrayTypeError, DTypeError
from orthlin.schedules import Schedule
from orthlin.torch._state import exact_load
from orthlin.torch._update import DIAGNOSTICS, Piece, stream_name, update
from orthlin.torch.views import MatrixView, default_view

ALGORITHMS = ("orthogonal", "adamw")
NAMED_SCHEDULES = {s.__name__: s for s in (schedules.muon, schedules.speedrun, schedules.polar_express)}
DEFAULTS: dict[str, Any] = {
    "rank": None,
    "momentum": 0.0,
    "nesterov": False,
    "n_iter": 0,
    "sketch": "gaussian",
    "warm_start": False,
    "error_feedback": False,
    "tail": 0.0,
    "seed": 0,
    "view": None,
}
_RECIPE = ("rank", "n_iter", "sketch", "warm_start", "tail", "scale", "seed")


def given(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the options among the local variables of a constructor."""
    return {key: value for key, value in arguments.items() if key not in ("self", "params", "__class__")}


class Orthogonal(torch.optim.Optimizer):  # type: ignore[misc]
    """Steps of matrices along their orthogonalized momentum, of everything else by torch's own AdamW.

    Options are those of :class:`orthlin.torch.LowRankMuon`, checked group by group.
    """

    def __init__(self, params: Any, options: dict[str, Any]) -> None:
        options = DEFAULTS | options
        adamw = {"lr": options["lr"], **(options.pop("adamw") or {})}
        self._adamw_defaults = torch.optim.AdamW([torch.empty(0)], **adamw).defaults
        rank = options["rank"]
        self._rank_schedule = rank if callable(rank) else None
        super().__init__(params, options | {"rank": rank(0)} if callable(rank) else options)

    def __getstate__(self) -> dict[str, Any]:
        mine = {"_adamw_defaults": self._adamw_defaults, "_rank_schedule": self._rank_schedule}
        return {**super().__getstate__(), **mine}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters: matrices to the orthogonal steps and others to AdamW, unless "algorithm" says which.

        Parameters
        ----------
        param_group : dict
            "params", and options of its own.  "algorithm" is "orthogonal" or "adamw"; "view" the fields of a
            :class:`orthlin.torch.MatrixView` for parameters that are not (out, in) matrices.
        """
        group = dict(param_group)
        params = group.get("params", [])
        group["params"] = [params] if isinstance(params, Tensor) else list(params)
        if "algorithm" in group:
            check.option(group["algorithm"], "algorithm", ALGORITHMS)
            self._add(group)
            return
        matrix = [_tensor(p).ndim > 1 for p in group["params"]]
        for algorithm in ALGORITHMS:
            chosen = [p for p, m in zip(group["params"], matrix, strict=True) if m is (algorithm == "orthogonal")]
            if chosen or (algorithm == "orthogonal" and not matrix):
                self._add({**group, "params": chosen, "algorithm": algorithm})

    def _add(self, group: dict[str, Any]) -> None:
        if group["algorithm"] == "adamw":
            super().add_param_group({**self._adamw_defaults, **group})
            return
        merged = {**self.defaults, **group}
        _check(merged)
        recipe = _recipe(merged)
        # Everything that can be refused is looked at before the group is added.
        states = [_initial_state(_tensor(item), recipe, merged) for item in group["params"]]
        super().add_param_group({**group, "step": 0})
        self.state.update(zip(self.param_groups[-1]["params"], states, strict=True))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state: refused before anything is written unless all of it fits, and kept in its dtypes.

        Parameters
        ----------
        state_dict : dict
            What `state_dict()` of an optimizer of the same parameters gave.

        Raises
        ------
        OptionError
            If groups, names, shapes or dtypes differ; nothing has changed then.
        """
        exact_load(self, state_dict, super().load_state_dict)

    def skipped(self) -> Tensor:
        """Count the matrix updates that were left out because a gradient was not finite, without synchronising.

        Returns
        -------
        Tensor
            An integer.
        """
        counts = [state["skipped"].sum() for state in self.state.values() if "skipped" in state]
        return torch.stack(counts).sum() if counts else torch.zeros((), dtype=torch.int64)

    def diagnostics(self) -> dict[str, dict[str, Tensor]]:
        """Read what the last step noted of each parameter with ``diagnostics=True``, without synchronising.

        Returns
        -------
        dict
            By name (or index) of a parameter: "captured", the share of ||M||_F^2 in the low-rank part,
            "stable_rank" ||M||_F^2/||M||_2^2, and "update_ratio" ||update||_F/||weight||_F; each a tensor with
            one entry a matrix.  The first two are NaN for full directions.
        """
        found = {}
        for i, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"{i}.{j}" for j in range(len(group["params"]))]
            for name, p in zip(names, group["params"], strict=True):
                if "diagnostics" in self.state.get(p, {}):
                    found[name] = dict(zip(DIAGNOSTICS, self.state[p]["diagnostics"].unbind(1), strict=True))
        return found

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the model again and returns the loss.

        Returns
        -------
        Any
            The loss, if a closure is given.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["algorithm"] == "orthogonal":
                self._step_orthogonal(group)
        groups = [group for group in self.param_groups if group["algorithm"] == "adamw"]
        if groups:
            inner = torch.optim.AdamW([torch.empty(0)])
            inner.param_groups, inner.state = groups, self.state
            inner.step()
        return loss

    def _step_orthogonal(self, group: dict[str, Any]) -> None:
        if self._rank_schedule is not None:
            group["rank"] = self._rank_schedule(group["step"])
        params = [p for p in group["params"] if p.grad is not None]
        batches: dict[Any, list[Piece]] = {}
        for p in params:
            for piece in _pieces(p, self.state[p], group):
                key = piece.weight.shape[1:], piece.weight.dtype, piece.weight.device
                batches.setdefault(key, []).append(piece)
        recipe = _recipe(group)
        for pieces in batches.values():
            update(pieces, recipe, group)
        for p in params:
            if "master" in self.state[p]:
                p.copy_(self.state[p]["master"])
        group["step"] += 1


def _tensor(item: Any) -> Tensor:
    """Return the parameter of an item of "params", which may be a pair of name and parameter."""
    return item[1] if isinstance(item, tuple) else item


@cache
def _schedule(name: str | None) -> Schedule | None:
    return None if name is None else NAMED_SCHEDULES[name]()


def _recipe(group: dict[str, Any]) -> Recipe:
    return Recipe(schedule=_schedule(group["schedule"]), **{key: group[key] for key in _RECIPE})


def _check(group: dict[str, Any]) -> None:
    """Check the options that a recipe does not."""
    lr = group["lr"]
    if not (isinstance(lr, Tensor) and lr.numel() == 1):
        check.non_negative(lr, "lr")
    check.non_negative(group["momentum"], "momentum", below=1)
    check.non_negative(group["weight_decay"], "weight_decay")
    check.option(group["nonfinite"], "nonfinite", ("skip", "raise"))
    if group["schedule"] is not None:
        check.option(group["schedule"], "schedule", tuple(NAMED_SCHEDULES))


def _initial_state(p: Tensor, recipe: Recipe, group: dict[str, Any]) -> dict[str, Any]:
    """State with all its keys from the start, so that every process has the same."""
    if not isinstance(p, Tensor):
        raise ArrayTypeError(f"params: expected torch tensors, got {type(p).__qualname__}")
    if not p.is_floating_point():
        raise DTypeError(f"params: expected real floating-point matrices, got {p.dtype}; leave others to 'adamw'")
    shapes = _view(group, p).shapes(tuple(p.shape))
    working = torch.float32 if p.dtype.itemsize < 4 else p.dtype
    state = {"skipped": torch.zeros(sum(shape[0] for shape in shapes), dtype=torch.int32, device=p.device)}
    if group["momentum"] or group["error_feedback"]:
        state["momentum"] = torch.zeros_like(p, dtype=working, memory_format=torch.preserve_format)
    if working != p.dtype and group["master_weights"]:
        state["master"] = p.detach().to(working)
    if group["diagnostics"]:
        state["diagnostics"] = torch.zeros(state["skipped"].shape[0], len(DIAGNOSTICS), device=p.device)
    like = torch.zeros((), dtype=working, device=p.device)
    for i, shape in enumerate(shapes):
        right = recipe.first_right(be.namespace(like), like.expand(shape), stream_name(shape))
        if right is not None:
            state[f"right_{i}"] = right.clone()
    return state


def _view(group: dict[str, Any], p: Tensor) -> MatrixView:
    return default_view(tuple(p.shape)) if group["view"] is None else MatrixView(**group["view"])


def _pieces(p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> list[Piece]:
    """Split a parameter, its gradient and its state into matrices."""
    if p.grad is None or p.grad.is_sparse:
        raise ArrayTypeError("params: a gradient is sparse; use dense gradients for matrices")
    view = _view(group, p)
    weights = view.view(state.get("master", p.detach()))
    momenta = view.view(state["momentum"]) if "momentum" in state else [None] * len(weights)
    pieces, start = [], 0
    for i, (g, w, m) in enumerate(zip(view.view(p.grad, copy=True), weights, momenta, strict=True)):
        rows = slice(start, start + w.shape[0])
        start = rows.stop
        noted = state["diagnostics"][rows] if "diagnostics" in state else None
        pieces.append(Piece(g, w, m, state, f"right_{i}", state["skipped"][rows], noted))
    return pieces
