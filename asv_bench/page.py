"""Draw the benchmarks page of the docs, figures and tables, from the results in `asv_bench/results`.

    python asv_bench/page.py
    python asv_bench/page.py --machine epyc-2-cores --out docs

The text is that of `page.md`.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import figures
from benchmarks import counts
from stored import RESULTS, Run, machines, newest

HERE = Path(__file__).parent
TIMES = {
    "lowrank": ["lowrank.Time.time_way", "lowrank.Slow.time_way"],
    "polar": ["polar.Time.time_way", "polar.Slow.time_way"],
    "sign": ["polar.Sign.time_way"],
    "qr": ["qr.Time.time_way"],
    "rangefinder": ["rangefinder.Time.time_way"],
    "sketch": ["sketch.Time.time_way"],
    "metrics": ["metrics.Time.time_way"],
    "steppers": ["steppers.Time.time_way"],
}
PANELS = {
    "low rank, 768 x 3072, rank 96": ("lowrank.Time.time_way", "lowrank.Accuracy.track_error", "768x3072"),
    "full rank, 768 x 768, values from 1 to 1/100": ("polar.Time.time_way", "polar.Accuracy.track_error", "768x768"),
}
# placeholder: benchmark, names of its parameters, unit of the table in that of asv, how the table calls it
LISTED = {
    "step": ("torch_optim.Time.time_step", ("device", "optimizer"), 1.0, "seconds"),
    "step_memory": ("torch_optim.Time.peakmem_step", ("device", "optimizer"), 2**-20, "MB"),
    "stack": ("polar.Stack.time_way", ("library", "way", "order"), 1e3, "ms"),
    "imports": ("imports.Time.timeraw_import", ("module",), 1e3, "ms"),
}


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table of Markdown."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def number(x: float | None) -> str:
    """Three digits, more for what is a thousand or more, nothing for what was not measured."""
    return "" if x is None else f"{x:.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def caption(run: Run, pattern: str) -> str:
    """Machine, versions and command."""
    threads = run.environment.get("OMP_NUM_THREADS", "?")
    versions = ", ".join(f"{name} {version}" for name, version in sorted(run.versions.items()))
    command = f"asv run '{run.commit[:8]}^!' --machine {run.machine['machine']} --bench '{pattern}'"
    return f"\n{run.machine['machine']} ({run.machine['cpu']}), threads: {threads}; {versions}; `{command}`"


def drawn(run: Run, out: Path) -> dict[str, str]:
    """Draw the figures; return what stands in their places."""

    def shown(name: str, title: str, pattern: str) -> str:
        return f"![{title}](benchmarks/{name}.svg)\n{caption(run, pattern)}"

    folder = out / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, benchmarks in TIMES.items():
        if not any(run.values.get(benchmark) for benchmark in benchmarks):
            found[name] = "Not measured on this machine."
            continue
        figures.time_against_size(run, benchmarks, folder / f"{name}.svg")
        found[name] = shown(name, "time against size", benchmarks[0].rpartition(".")[0])
    figures.error_against_time(run, PANELS, folder / "accuracy.svg")
    found["accuracy"] = shown("accuracy", "error against time", "(lowrank|polar).(Time|Accuracy)")
    figures.roofline(run, folder / "roofline.svg")
    found["roofline"] = shown("roofline", "rate against flops a byte", "(floor|(lowrank|polar|qr|rangefinder).Time)")
    return found


def counted(run: Run) -> str:
    """Calls, flops and passes of the device path."""
    rows = []
    for name in counts.COUNTED:
        sized = counts.SIZED.get(name)
        least = (number(sized.flops * 1e-9), sized.passes) if sized else ("", "")
        found = (run.value(f"counts.Arithmetic.track_{what}", name) for what in ("flops", "passes"))
        calls = run.value("counts.Calls.track_calls", name)
        rows.append((f"`{name}`", number(calls), *least, *map(number, found)))
    head = (
        "routine",
        "calls",
        "least GFLOP",
        "least passes over the matrix",
        "flops over the least",
        "bytes over the least",
    )
    return table(head, rows) + caption(run, "counts")


def listed(run: Run, benchmark: str, names: tuple[str, ...], scale: float, unit: str) -> str:
    """Every value of a benchmark."""
    rows = ((*params, number(scale * value)) for params, (value, *_) in run.values.get(benchmark, {}).items())
    return table((*names, unit), rows) + caption(run, benchmark.rpartition(".")[0])


def by_library(run: Run, benchmark: str, scale: float, *rest: str) -> str:
    """A row for each way, a column for each library; `rest` are further parameters."""
    names = figures.libraries(run, benchmark)
    ways = dict.fromkeys(params[1] for params in run.values.get(benchmark, {}))
    rows = []
    for way in ways:
        values = (run.value(benchmark, name, way, *rest) for name in names)
        rows.append((f"`{way}`", *(number(value and scale * value) for value in values)))
    return table(("", *names), rows) + caption(run, benchmark.rpartition(".")[0])


def ceilings(run: Run) -> str:
    """What the machine can do, and how it was set."""
    rows = []
    for (name, dtype), (rate, *_) in run.values.get("floor.Ceilings.track_product_rate", {}).items():
        width = run.value("floor.Ceilings.track_bandwidth", name, dtype)
        threads, error = (run.value(f"floor.Settings.track_{what}", name) for what in ("threads", "product_error"))
        rows.append((name, dtype, *map(number, (rate, width, threads, error))))
    head = ("library", "dtype", "GFLOP/s", "GB/s", "threads", "error of a product in float32, eps")
    return table(head, rows) + caption(run, "floor")


def compared(path: Path) -> str:
    """The table of `ratios.py`."""
    stored = json.loads(path.read_text())
    rows = []
    for row in stored["ratios"]:
        ours, reference = row["case"].split(" / ")
        spread = f"{row['low']:.2f} to {row['high']:.2f}"
        rows.append((ours, reference, row["library"], f"{row['median']:.2f}", spread, row["ms"], row["reference_ms"]))
    head = ("ours", "over", "library", "ratio", "quartiles", "ms", "ms of the other")
    versions = ", ".join(f"{name} {stored[name]}" for name in ("numpy", "python", "scipy", "torch"))
    command = f"python asv_bench/ratios.py --threads {stored['threads']} --json asv_bench/results/{path.name}"
    machine = path.stem.removeprefix("ratios-").replace("_", ", ")
    return f"{table(head, rows)}\n{machine}; threads: {stored['threads']}; {versions}; `{command}`"


def main() -> None:
    """Draw the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", default="epyc-2-cores", choices=machines(), help="whose results")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs", help="folder of the page")
    args = parser.parse_args()
    run = newest(args.machine)
    parts = drawn(run, args.out) | {name: listed(run, *how) for name, how in LISTED.items()}
    parts |= {
        "ratios": "\n\n".join(map(compared, sorted(RESULTS.glob(f"ratios-{args.machine}*.json")))),
        "small": by_library(run, "ratios.Small.time_call", 1e6),
        "memory": "\n\n".join(
            by_library(run, f"{layer}.Peak.peakmem_way", 2**-20, "1600x6400") for layer in ("lowrank", "polar")
        ),
        "counts": counted(run),
        "ceilings": ceilings(run),
    }
    (args.out / "benchmarks.md").write_text((HERE / "page.md").read_text().format(**parts))


if __name__ == "__main__":
    main()
