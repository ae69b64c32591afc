"""Figures of the benchmarks page, drawn from stored results."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from benchmarks import counts
from benchmarks.common import LIBRARIES, rank, shape
from stored import Run

mpl.use("svg")
mpl.rcParams.update({
    "svg.hashsalt": "orthlin", "svg.fonttype": "none", "font.size": 8, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 7, "figure.constrained_layout.use": True,
})  # fmt: skip
import matplotlib.pyplot as plt  # noqa: E402 - after the choice of a backend

FLOAT32 = 2.0**-24  # half of its eps: what an exact result is drawn at
INTENSITIES = (0.1, 1e4)
FACTORED = "floor: two products"  # beside the floor of three


def _styles(ways: list[str]) -> dict[str, dict[str, Any]]:
    """Ours solid, peers dashed, the floor dotted and black."""
    kinds = {
        "floor": {"linestyle": ":", "marker": "x", "markersize": 4},
        "peer": {"linestyle": "--", "marker": "s", "markersize": 3},
        "ours": {"linestyle": "-", "marker": "o", "markersize": 3},
    }
    styles = {}
    for i, way in enumerate(ways):
        kind = way.partition(": ")[0] if ": " in way else "ours"
        styles[way] = {**kinds[kind], "color": "black" if kind == "floor" else f"C{i}"}
        if way == FACTORED:
            styles[way]["marker"] = "+"
    return styles


def _label(way: str) -> str:
    return way.removeprefix("peer: ").removeprefix("floor: ")


def save(figure: Any, path: Path) -> None:
    """Write an SVG that is the same for the same results."""
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def libraries(run: Run, benchmark: str) -> list[str]:
    """Those that have values, in the order of the parameter."""
    present = {params[0] for params in run.values.get(benchmark, {})}
    return [name for name in LIBRARIES if name in present]


def time_against_size(run: Run, benchmarks: list[str], path: Path) -> None:
    """One panel a library: a line a way, medians and quartiles."""
    values = {k: v for name in benchmarks for k, v in run.values.get(name, {}).items()}
    names = libraries(run, benchmarks[0])
    styles = _styles(list(dict.fromkeys(params[1] for params in values)))
    figure, axes = plt.subplots(1, len(names), figsize=(3.3 * len(names), 3.4), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for way, style in styles.items():
            points = sorted(
                (shape(size)[0] * shape(size)[1], size, *found)
                for (of, what, size), found in values.items()
                if (of, what) == (name, way)
            )
            if points:
                x, _, y, low, high = zip(*points, strict=True)
                axis.plot(x, y, label=_label(way), linewidth=1, **style)
                axis.fill_between(x, low, high, alpha=0.15, color=style["color"], linewidth=0)
        sizes = sorted({params[2] for params in values}, key=lambda size: shape(size)[0] * shape(size)[1])
        axis.set(xscale="log", yscale="log", title=name)
        axis.set_xticks([shape(size)[0] * shape(size)[1] for size in sizes], sizes, rotation=40, ha="right")
        axis.minorticks_off()
    axes[0, 0].set_ylabel("seconds")
    figure.legend(*_entries(axes[0]), loc="outside lower center", ncols=4)
    save(figure, path)


def _entries(axes: Any) -> tuple[list[Any], list[str]]:
    """Handles and labels of all axes, each label once."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    return list(found.values()), list(found)


def error_against_time(run: Run, panels: dict[str, tuple[str, str, str]], path: Path) -> None:
    """A point a way and library: `panels` maps a title to benchmarks of time and of error, and the size."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.6))
    marks = dict(zip(LIBRARIES, "osv^D", strict=True))
    present = [name for name in LIBRARIES if any(libraries(run, error).count(name) for _, error, _ in panels.values())]
    for axis, (title, (time, error, size)) in zip(axes, panels.items(), strict=True):
        found = run.values.get(error, {})
        colors = {way: f"C{i % 10}" for i, way in enumerate(dict.fromkeys(way for _, way, _ in found))}
        for (name, way, of), (off, _, _) in found.items():
            seconds = run.value(time, name, way, size)
            if of == size and seconds:
                face = "none" if way.startswith("peer") else colors[way]
                axis.plot(seconds, max(off, FLOAT32), marks[name], ms=5, mfc=face, mec=colors[way])
        for way, color in colors.items():
            face = "none" if way.startswith("peer") else color
            axis.plot([], [], "o", ms=5, mfc=face, mec=color, label=_label(way))
        for name in present:
            axis.plot([], [], marks[name], ms=5, mfc="grey", mec="grey", label=name)
        axis.set(xscale="log", yscale="log", title=title, xlabel="seconds", ylabel="worst |s - 1|")
        if colors:
            axis.legend(fontsize=6, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    save(figure, path)


POINTS: dict[str, tuple[str, Callable[[str], tuple[int, int, int]]]] = {
    "lowrank_orth": ("lowrank", lambda size: (*shape(size), rank(size))),
    "lowrank_orth_factors": ("lowrank", lambda size: (*shape(size), rank(size))),
    "orthogonalize": ("polar", lambda size: (*shape(size), 0)),
    "polar": ("polar", lambda size: (*shape(size), 0)),
    "randomized_range_finder": ("rangefinder", lambda size: (*shape(size), rank(size))),
    "qr": ("qr", lambda size: (*shape(size)[::-1], 0)),
}
AT = {"qr": "4096x256"}


def useful(run: Run, name: str, routine: str) -> tuple[float, float] | None:
    """Least flops a byte that must move, and least flops a second of the measured time."""
    module, sizes = POINTS[routine]
    size = AT.get(routine, "768x3072")
    seconds = run.value(f"{module}.Time.time_way", name, routine, size)
    m, n, r = sizes(size)
    flops, passes = counts.least(m, n, r)[routine]
    return (flops / (4 * passes * m * n), flops / seconds) if seconds else None


def roofline(run: Run, path: Path) -> None:
    """What is possible for so many flops a byte, and what each routine gets of it, counting only what it must do."""
    names = libraries(run, "floor.Ceilings.track_product_rate")
    figure, axes = plt.subplots(1, len(names), figsize=(3.3 * len(names), 3.2), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for dtype, line in (("float32", "-"), ("float64", "--")):
            rate = run.value("floor.Ceilings.track_product_rate", name, dtype)
            width = run.value("floor.Ceilings.track_bandwidth", name, dtype)
            if rate and width:
                knee = rate / width
                x = (INTENSITIES[0], knee, INTENSITIES[1])
                y = (INTENSITIES[0] * width, rate, rate)
                axis.plot(x, y, line, color="black", linewidth=1, label=f"ceiling, {dtype}")
        for i, routine in enumerate(POINTS):
            point = useful(run, name, routine)
            if point:
                axis.plot(point[0], 1e-9 * point[1], "o", color=f"C{i}", markersize=5, label=routine)
        axis.set(xscale="log", yscale="log", title=name, xlabel="least flops a byte")
    axes[0, 0].set_ylabel("GFLOP/s")
    figure.legend(*_entries(axes[0]), loc="outside lower center", ncols=4)
    save(figure, path)
