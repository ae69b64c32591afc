"""The decisions on the parameters of a model, as a table and as groups."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from orthlin.torch._blocks import WHOLE
from orthlin.torch._survey import LEAST, NARROW, RAW
from orthlin.torch.views import MatrixView

NOTHING = "no matrix is trained: AdamW steps all of it"
REMARKS = (
    (NARROW, f"narrow: matrices with an axis below {LEAST}, where an orthogonal step differs little from AdamW's"),
    (WHOLE, "fused, whole: projections whose parts no view tells apart; per_head=True splits those of attention"),
    (RAW, "taken for tables: parameters of no layer; give those that are matrices a view in overrides"),
)


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
        >>> from orthlin.torch.gpt2 import route
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
        summary = f"{sum(totals.values()):,} numbers in {len(self.rows)} parameters: {parts}"
        remarks = [f"{count} {says}" for words, says in REMARKS if (count := self._count(words))]
        return "\n".join([*table, summary, *remarks, *([NOTHING] if self.is_without_matrix() else [])])

    def is_without_matrix(self) -> bool:
        """Whether something is trained, and no matrix is.

        Returns
        -------
        bool
            True means that AdamW steps the whole model.

        Examples
        --------
        >>> from torch import nn
        >>> from orthlin.torch.gpt2 import route
        >>> route(nn.LayerNorm(3)).is_without_matrix()
        True
        """
        return {row.algorithm for row in self.rows} - {"frozen"} == {"adamw"}

    def _count(self, words: str) -> int:
        return sum(words in row.reason for row in self.rows)


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
