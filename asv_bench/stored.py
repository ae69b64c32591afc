"""What asv has stored: values by benchmark and parameters, of the newest commit measured on each machine."""

import ast
import itertools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).with_name("results")
Params = tuple[str, ...]


class Run(NamedTuple):
    """One file of results; values are {benchmark: {parameters: (value, lower quartile, upper quartile)}}."""

    machine: dict[str, str]
    commit: str
    date: int
    versions: dict[str, str]
    environment: dict[str, str]
    values: dict[str, dict[Params, tuple[float, float, float]]]
    seconds: dict[str, float]

    def value(self, benchmark: str, *params: str) -> float | None:
        """The value, or None where there is none."""
        found = self.values.get(benchmark, {}).get(params)
        return found and found[0]


def _read(path: Path) -> Run:
    stored = json.loads(path.read_text())
    columns = stored["result_columns"]
    values: dict[str, Any] = {}
    seconds = {}
    for name, row in stored["results"].items():
        entry = dict(zip(columns, row, strict=False))
        seconds[name] = entry.get("duration") or 0.0
        combinations = itertools.product(*(map(ast.literal_eval, axis) for axis in entry["params"]))
        lows, highs = (entry.get(f"stats_q_{end}") or itertools.repeat(None) for end in (25, 75))
        values[name] = {
            params: (value, value if low is None else low, value if high is None else high)
            for params, value, low, high in zip(combinations, entry["result"] or (), lows, highs, strict=False)
            if value is not None and not math.isnan(value)
        }
    machine = json.loads(path.with_name("machine.json").read_text())
    facts = ("machine", "os", "arch", "cpu", "num_cpu", "ram", "python")
    versions = {k: v for k, v in stored["params"].items() if k not in facts}
    versions["python"] = stored["python"]
    return Run(machine, stored["commit_hash"], stored["date"], versions, stored["env_vars"], values, seconds)


def newest(machine: str) -> Run:
    """The run of the newest commit of a machine."""
    paths = [path for path in (RESULTS / machine).glob("*.json") if path.name != "machine.json"]
    if not paths:
        raise SystemExit(f"{RESULTS / machine}: no results; see asv_bench/README.md")
    return max(map(_read, paths), key=lambda run: run.date)


def machines() -> list[str]:
    """Names of the machines there are results of."""
    return sorted(path.parent.name for path in RESULTS.glob("*/machine.json"))
