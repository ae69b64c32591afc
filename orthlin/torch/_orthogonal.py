"""The optimizer behind all of `orthlin.torch`: its groups, its state, its step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from orthlin import _backend as be
from orthlin import _checks as check
from orthlin.errors import NonFiniteError, OptionError
from orthlin.torch._groups import check_lr, checked, initial_state, listed, pieces_of, recipe_of, tensor
from orthlin.torch._state import Saved, fitting, restore
from orthlin.torch._update import DIAGNOSTICS, Piece, update

ALGORITHMS = ("orthogonal", "adamw")
DEFAULTS: dict[str, Any] = {
    "rank": None,
    "momentum": 0.0,
    "nesterov": False,
    "n_iter": 0,
    "sketch": "gaussian",
    "warm_start": False,
    "error_feedback": False,
    "tail": 0.0,
    "tol": None,
    "seed": 0,
    "view": None,
}


def options_in(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the options among the local variables of a constructor."""
    return {key: value for key, value in arguments.items() if key not in ("self", "params", "__class__")}


class Orthogonal(torch.optim.Optimizer):  # type: ignore[misc]
    """Steps of matrices along their orthogonalized momentum, of everything else by torch's own AdamW.

    Options are those of :class:`orthlin.torch.LowRankMuon`, checked group by group.
    """

    def __init__(self, params: Any, options: dict[str, Any]) -> None:
        options = DEFAULTS | options
        check_lr(options["lr"])
        given = options.pop("adamw")
        try:
            adamw = {"lr": options["lr"], "maximize": options["maximize"], **(given or {})}
            self._adamw_defaults = torch.optim.AdamW([torch.empty(0)], **adamw).defaults
        except (TypeError, ValueError) as error:
            raise OptionError(f"adamw: expected options of torch.optim.AdamW, got {given!r}; {error}") from error
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
        group = {**param_group, "params": listed(param_group["params"])}
        before = len(self.param_groups)
        try:
            for part in self._parts(group):
                self._add(part)
        except Exception:
            for added in self.param_groups[before:]:
                for p in added["params"]:
                    self.state.pop(p, None)
            del self.param_groups[before:]
            raise

    def _parts(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        """Split a group into one for each algorithm that it needs."""
        if "algorithm" in group:
            check.option(group["algorithm"], "algorithm", ALGORITHMS)
            return [group]
        parts = []
        for algorithm in ALGORITHMS:
            chosen = [p for p in group["params"] if (tensor(p).ndim > 1) is (algorithm == "orthogonal")]
            parts.append({**group, "params": chosen, "algorithm": algorithm})
        return [part for part in parts if part["params"]] or parts[:1]

    def _add(self, group: dict[str, Any]) -> None:
        if group["algorithm"] == "adamw":
            super().add_param_group(checked({**self._adamw_defaults, **group}))
            return
        scheduled = self._rank_schedule if "rank" not in group else None
        merged = checked({**self.defaults, **group, "step": 0, "scheduled_rank": scheduled is not None})
        recipe = recipe_of(merged, scheduled)
        states = [initial_state(tensor(item), recipe, merged) for item in group["params"]]
        super().add_param_group(merged)
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
        if not isinstance(state_dict, dict):
            raise OptionError(f"state_dict: expected a dict, got {type(state_dict).__name__}")
        saved: Saved = []
        # After the hooks of others that change what is loaded, and before those that see what was loaded.
        hooks = [
            self.register_load_state_dict_pre_hook(lambda _, state: saved.extend(fitting(self, state))),
            self.register_load_state_dict_post_hook(lambda _: restore(self, saved), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

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
        self._step()
        return loss

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _step(self) -> None:
        """Step every group by its algorithm."""
        orthogonal = [group for group in self.param_groups if group["algorithm"] == "orthogonal"]
        for group in orthogonal:
            _refuse(group)
        for group in orthogonal:
            self._step_orthogonal(group)
        groups = [group for group in self.param_groups if group["algorithm"] == "adamw"]
        if groups:
            inner = torch.optim.AdamW([torch.empty(0)])
            inner.param_groups, inner.state = groups, self.state
            getattr(torch.optim.AdamW.step, "__wrapped__", torch.optim.AdamW.step)(inner)  # without global hooks

    def _step_orthogonal(self, group: dict[str, Any]) -> None:
        if group["scheduled_rank"] and self._rank_schedule is not None:
            group["rank"] = self._rank_schedule(group["step"])
        params = [p for p in group["params"] if p.grad is not None]
        batches: dict[Any, list[Piece]] = {}
        for p in params:
            if "master" in self.state[p]:
                _refresh(self.state[p]["master"], p)
            for piece in pieces_of(p, self.state[p], group):
                key = piece.weight.shape[1:], piece.weight.dtype, piece.weight.device
                batches.setdefault(key, []).append(piece)
        recipe = recipe_of(group)
        for pieces in batches.values():
            with be.settings(pieces[0].weight):
                update(pieces, recipe, group)
        for p in params:
            if "master" in self.state[p]:
                p.copy_(self.state[p]["master"])
        group["step"] += 1


def _refuse(group: dict[str, Any]) -> None:
    """Raise for a gradient on the CPU that is not finite, where that is asked for, before anything is written."""
    for p in group["params"] if group["nonfinite"] == "raise" else ():
        if p.grad is not None and p.grad.device.type == "cpu" and not bool(p.grad.isfinite().all()):
            raise NonFiniteError("grad: holds NaN or infinity; remove or replace them first")


def _refresh(master: Tensor, p: Tensor) -> None:
    """Take over entries that were changed elsewhere, as when a model is loaded after the optimizer was made."""
    master.copy_(torch.where(master.to(p.dtype) == p, master, p.to(master.dtype)))
