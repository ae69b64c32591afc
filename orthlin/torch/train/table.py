"""The table of a comparison."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from orthlin.torch.train.config import Config

Row = dict[str, Any]
COLUMNS = ("optimizer", "lr", "validation loss", "min - max", "runs", "tokens/s", "optimizer share", "not finished")


def tabulate(results: Iterable[tuple[Config, Mapping[str, Any]]]) -> list[Row]:
    """Return a row for each optimizer and learning rate; an optimizer's best one is marked."""
    groups: dict[tuple[str, float], list[tuple[int, Mapping[str, Any]]]] = {}
    for config, result in results:
        groups.setdefault((config.optimizer, config.lr), []).append((config.seed, result))
    order = list(dict.fromkeys(name for name, _ in groups))
    rows = [_row(*key, groups[key]) for key in sorted(groups, key=lambda key: (order.index(key[0]), key[1]))]
    for name in order:
        ranked = [row for row in rows if row["optimizer"] == name and row["runs"]]
        if ranked:
            # A learning rate at which runs were lost is the best one only where all lost some.
            min(ranked, key=lambda row: (len(row["lost"]), row["validation"]))["best"] = True
    return rows


def _row(optimizer: str, lr: float, results: Sequence[tuple[int, Mapping[str, Any]]]) -> Row:
    finished = [result for _, result in results if result["status"] == "finished"]
    losses = [result["validation"] for result in finished]
    return {
        "optimizer": optimizer,
        "lr": lr,
        "best": False,
        "seeds": [seed for seed, _ in results],
        "runs": len(losses),
        "validation": statistics.fmean(losses) if losses else None,
        "std": statistics.stdev(losses) if len(losses) > 1 else None,
        "min": min(losses, default=None),
        "max": max(losses, default=None),
        "tokens_per_s": statistics.fmean(r["tokens_per_s"] for r in finished) if finished else None,
        "optimizer_share": statistics.fmean(r["optimizer_share"] for r in finished) if finished else None,
        "failed": sum(result["status"] == "failed" for _, result in results),
        "curves": [result["curve"] for result in finished],
        "lost": [f"seed {seed}: {_reason(result)}" for seed, result in results if result["status"] != "finished"],
    }


def _reason(result: Mapping[str, Any]) -> str:
    return f"diverged after step {result['step']}" if result["status"] == "diverged" else f"failed, {result['reason']}"


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table whose columns line up; bold is an optimizer's best learning rate."""
    lines = [COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    printed = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([printed[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *printed[1:]]) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    lost = "; ".join(row["lost"]).replace("|", "/")
    runs = f"{row['runs']}/{len(row['seeds'])}"
    if not row["runs"]:
        return (row["optimizer"], f"{row['lr']:g}", "-", "-", runs, "-", "-", lost)
    spread = f" ± {row['std']:.4f}" if row["std"] is not None else ""
    mean = f"{row['validation']:.4f}{spread}"
    return (
        row["optimizer"],
        f"{row['lr']:g}",
        f"**{mean}**" if row["best"] else mean,
        f"{row['min']:.4f} - {row['max']:.4f}",
        runs,
        f"{row['tokens_per_s']:.0f}",
        f"{row['optimizer_share']:.1%}",
        lost,
    )
