"""The optimizer behind all of `orthlin.torch`: its groups, its state, its step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from orthlin import _checks as check
from orthlin._direction import Recipe
from orthlin.errors import OptionError
from orthlin.torch import _adamw as adamw
from orthlin.torch._adamw import is_matrix, tensor
from orthlin.torch._copies import average_momenta, check_copies, group_of
from orthlin.torch._distributed import step_shards
from orthlin.torch._filled import joined
from orthlin.torch._groups import (
    check_rate,
    checked,
    first_recipe,
    fresh,
    listed,
    make_ready,
    merged,
    needed,
    plain,
    recipe_of,
    scheduled,
    view_of,
)
from orthlin.torch._notes import DIAGNOSTICS
from orthlin.torch._pieces import Batch, Matrix, check_finite, check_gradient, collect, initializing, options_of
from orthlin.torch._plan import Plan, foretold
from orthlin.torch._sharded import is_sharded, takes_part
from orthlin.torch._state import Saved, fitting
from orthlin.torch._update import update

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
    "precision": "highest",
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
        options = plain(DEFAULTS | options)
        check_rate(options["lr"], "lr")
        check.flag(options["capturable"], "capturable")
        self._adamw_defaults = adamw.defaults_of(options, options.pop("adamw"), options.pop("capturable"))
        rank = options["rank"]
        self._rank_schedule = rank if callable(rank) else None
        self._copies = group_of(options.pop("replicate_group", None))
        super().__init__(params, options | {"rank": plain(rank(0))} if callable(rank) else options)

    def __getstate__(self) -> dict[str, Any]:
        mine = {key: getattr(self, key) for key in ("_adamw_defaults", "_rank_schedule", "_copies")}
        return {**super().__getstate__(), **mine}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters.

        Parameters
        ----------
        param_group : dict
            "params", and options of its own, which hold for all of them.  "algorithm" is "auto" (tensors of two
            dimensions and more are matrices, the rest goes to AdamW), "orthogonal" or "adamw"; "view" the fields of
            a :class:`orthlin.torch.MatrixView` for parameters that are not (out, in) matrices.
        """
        group = merged(listed(param_group, self.param_groups), self.defaults, self._adamw_defaults)
        scheduled = "rank" not in param_group and self._rank_schedule is not None
        group = checked({**group, "step": 0, "scheduled_rank": scheduled})
        params = [tensor(item) for item in group["params"]]
        check_copies(self._copies, group, params)
        recipe = first_recipe(group, self._rank_schedule)
        states = [fresh(needed(group, p, recipe), group, p, recipe) for p in params]
        super().add_param_group(group)
        self.state.update(zip(params, states, strict=True))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def state_dict(self) -> dict[str, Any]:
        """Return the options of all groups and the state of all parameters, complete whatever was changed by hand.

        With a `replicate_group` the momenta of its processes become their average first: all of them must call.

        Returns
        -------
        dict
            "state" and "param_groups", of tensors and plain values.
        """
        make_ready(self, self._rank_schedule)
        average_momenta(self._copies, self.param_groups, self.state)
        return dict(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state by torch's rules, kept in its dtypes, or, if it does not fit, leave everything as it is.

        Options that are missing stay as they are, state that is missing is made anew, and keys may be numbers or
        names.

        Parameters
        ----------
        state_dict : dict
            What `state_dict()` of an optimizer of the same parameters gave.

        Raises
        ------
        OptionError
            If the numbers of groups or parameters, names, views, shapes or dtypes differ, if an option is not as
            described, or if a parameter has only a part of its tensors or others than those of its options.
        """
        if not isinstance(state_dict, dict):
            raise OptionError(f"state_dict: expected a dict, got {type(state_dict).__name__}")
        saved: Saved = []
        # After the hooks of others that change what is loaded, and before those that see what was loaded.
        hooks = [
            self.register_load_state_dict_pre_hook(lambda _, x: fitting(self, x, self._rank_schedule, saved)),
            self.register_load_state_dict_post_hook(lambda _: self.state.update(saved), prepend=True),
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
        states = [self.state.get(p, {}) for group in self.param_groups for p in group["params"]]
        counts = [state["skipped"].sum() for state in states if "skipped" in state]
        # What is on the host can be sent to a device without waiting, not the other way round.
        away = [count.device for count in counts if count.device.type != "cpu"]
        counts = [count.to(away[0], non_blocking=True) if away else count for count in counts]
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

    def explain(self) -> Plan:
        """Foretell what a step sends between processes, on this one.

        Returns
        -------
        Plan
            `rows` of (shape, matrices, way, collectives, sent, volume, instead), as a string a table: bytes that this
            process gives, those that a process sends on the average, and would another way.  Not in it: a flag of all
            that is gathered, and, for each group of processes, one if lr is 0 and one for ``nonfinite="raise"`` on
            the CPU.
        """
        make_ready(self, self._rank_schedule)
        found: list[list[Matrix]] = [[], []]
        for group in self.param_groups:
            recipe = recipe_of(scheduled(group, self._rank_schedule))
            options, kind = options_of(group)
            for p in group["params"]:
                if is_matrix(group, p) and (p.requires_grad or p.grad is not None):
                    matrix = Matrix(p, self.state[p], view_of(group, p), recipe, options, kind, self._copies)
                    found[is_sharded(p) or self._copies is not None].append(matrix)
        return foretold(*found)

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
        batches, copies, sharded = self._ready()
        for some in batches:
            update(some)
        if copies:
            torch._foreach_copy_(*map(list, zip(*copies, strict=True)))
        if sharded:
            step_shards(sharded)
        return loss

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _ready(self) -> tuple[list[list[Batch]], list[tuple[Tensor, Tensor]], list[Matrix]]:
        """Step everything but the matrices, and list those: first what can be refused, then what is written.

        The second list is of parameters, each with the copy that is stepped along in its place, the third of what lies
        on several processes.
        """
        if initializing(self.param_groups, self._copies):
            return [], [], []
        recipes = [recipe_of(scheduled(group, self._rank_schedule)) for group in self.param_groups]
        for group in self.param_groups:
            for p in group["params"]:
                check_gradient(p, self.state.setdefault(p, {}), is_matrix(group, p))
            check_copies(self._copies, group, group["params"])
        check_finite(self.param_groups, self._copies)
        make_ready(self, self._rank_schedule, lambda p: takes_part(p, self._copies))
        inner = torch.optim.AdamW([torch.empty(0)])
        inner.param_groups = [part for group in self.param_groups for part in adamw.parts_of(group, self.state)]
        inner.state = self.state
        adamw.check_step(inner)
        adamw.step(inner)
        return self._batches(recipes)

    def _batches(self, recipes: list[Recipe]) -> tuple[list[list[Batch]], list[tuple[Tensor, Tensor]], list[Matrix]]:
        batches: dict[Any, Batch] = {}
        copies: list[tuple[Tensor, Tensor]] = []
        sharded = []
        for group, recipe in zip(self.param_groups, recipes, strict=True):
            group["rank"] = recipe.rank
            options, kind = options_of(group)
            group["step"] += 1
            for p in group["params"]:
                if not takes_part(p, self._copies) or not is_matrix(group, p):
                    continue
                matrix = Matrix(p, self.state[p], view_of(group, p), recipe, options, kind, self._copies)
                if is_sharded(p) or self._copies is not None:
                    sharded.append(matrix)
                else:
                    collect(matrix, batches, copies)
        return joined(batches), copies, sharded
