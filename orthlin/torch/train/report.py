"""What a run leaves to read: the header, the summary and the curves."""

import io
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from orthlin.torch.train.files import write_atomically
from orthlin.torch.train.world import ALONE, World

Records = Sequence[Mapping[str, Any]]
LAST = 100
"""Steps over which the final training loss is averaged."""
SMOOTHING = 50
"""A curve is averaged over one part in this many of its steps."""


def versions() -> dict[str, str]:
    """Return the versions that a run's numbers may depend on."""
    found = {"python": platform.python_version()}
    for name in ("orthlin", "torch", "transformers", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def header(config: Mapping[str, Any], model: Any, text: Any, world: World = ALONE) -> dict[str, Any]:
    """Return the first line of a log."""
    return {
        "config": config,
        "versions": versions(),
        "platform": platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": world.size,
        "shard": world.shard,
        "text": text.name,
        "tokens": {"training": len(text.train), "validation": len(text.validation)},
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def peak_memory(device: str) -> int | None:
    """Return the most bytes that PyTorch held on a GPU in this process, None on a host."""
    return torch.cuda.max_memory_allocated(device) if torch.device(device).type == "cuda" else None


def summary(config: Mapping[str, Any], status: str, records: Records) -> dict[str, Any]:
    """Return what `result.json` holds: final losses, speed, memory, and the validation losses on the way."""
    validation = [(record["step"], record["validation"]) for record in records if "validation" in record]
    finished = status == "finished"
    return {
        "status": status,
        "config": config,
        "versions": versions(),
        "step": records[-1]["step"] if records else 0,
        "validation": validation[-1][1] if finished else None,
        "loss": statistics.fmean(r["loss"] for r in records[-LAST:]) if finished else None,
        "tokens_per_s": statistics.median(r["tokens_per_s"] for r in records) if records else None,
        "optimizer_share": statistics.median(r["optimizer_share"] for r in records) if records else None,
        "peak_memory": peak_memory(config["device"]),
        "seconds": records[-1]["time"] if records else 0.0,
        "curve": validation,
    }


def can_plot() -> bool:
    """Say whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def smooth(values: Sequence[float]) -> list[float]:
    """Return the trailing means over a fiftieth of the values."""
    window, total, result = max(1, len(values) // SMOOTHING), 0.0, []
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        result.append(total / min(index + 1, window))
    return result


def draw(path: Path, title: str, curves: Mapping[str, Sequence[Records]]) -> None:
    """Draw, for each label, the mean over its runs: training loss as a line, validation loss as dots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    lowest = []
    for label, runs in curves.items():
        steps = [record["step"] for record in runs[0]]
        losses = smooth([statistics.fmean(at) for at in zip(*([r["loss"] for r in run] for run in runs), strict=True)])
        (line,) = axes.plot(steps, losses, linewidth=1, label=label)
        dots = [[(r["step"], r["validation"]) for r in run if "validation" in r] for run in runs]
        means = [(at[0][0], statistics.fmean(value for _, value in at)) for at in zip(*dots, strict=True)]
        axes.plot(*zip(*means, strict=True), "o", markersize=4, color=line.get_color())
        lowest += [*losses[len(losses) // 10 :], *(value for _, value in means)]
    margin = 0.05 * (max(lowest) - min(lowest)) or 0.1
    axes.set(title=title, xlabel="step", ylabel="loss, nats per token (dots: validation)")
    axes.set_ylim(min(lowest) - margin, max(lowest) + margin)
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    write_atomically(path, drawn.getvalue())
