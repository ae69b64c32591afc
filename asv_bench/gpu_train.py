"""GPT-2 124M on the bytes of a text, by one optimizer after the other, in parts of a few minutes.

    python asv_bench/gpu_train.py TEXT --methods adamw,torch_muon --json part1.json
    python asv_bench/gpu_train.py TEXT --methods muon,lowrank_1/2 --json part2.json
    python asv_bench/gpu_train.py TEXT --methods lowrank_1/4,lowrank_1/8 --json part3.json
    python asv_bench/gpu_train.py --table part1.json part2.json part3.json

Every method is a run of `python -m orthlin.torch.train` in a process of its own: transformers' GPT-2 compiled, float32
weights under bfloat16 autocast, the same steps, windows and seed; options of a method follow a colon, as in
lowrank_1/4:lr=3e-3.  The time of a part is shared among its methods, what one leaves goes to the next; a run that
does not finish in its share says so, with what it reached.  Of the training loss the file has means over blocks
of steps, each with its last step.  Times are those of CUDA events, medians over the steps.  Without CUDA a tiny model
runs on the CPU, to test itself.
"""

import argparse
import hashlib
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from orthlin.torch.train import files, report
from orthlin.torch.train.config import Spec

CUDA = torch.cuda.is_available()
BESIDE = "adamw_lr=1e-3"
METHODS = {
    "adamw": "adamw:lr=1e-3",
    "torch_muon": f"torch_muon:lr=2e-3,{BESIDE}",
    "muon": f"muon:lr=2e-3,{BESIDE}",
    "lowrank_1/2": f"lowrank_muon:rank=0.5,lr=2e-3,{BESIDE}",
    "lowrank_1/4": f"lowrank_muon:rank=0.25,lr=2e-3,{BESIDE}",
    "lowrank_1/8": f"lowrank_muon:rank=0.125,lr=2e-3,{BESIDE}",
}
CAPTURABLE = ("adamw", "muon", "lowrank_muon")
SIZE = {"size": "124m", "device": "cuda", "compile": "inductor"} if CUDA else {"size": "pico", "compile": "eager"}
STEPS, BATCH, EVALUATIONS = (1500, 16, 10) if CUDA else (6, 2, 2)
BLOCKS = 100
"""Points of a curve of the training loss, at most."""
GRACE = 60.0
"""Seconds that a run may need to start and to end beside its steps; it is ended after that."""
COLUMNS = ("method", "optimizer", "steps", "validation", "training", "tokens/s", "optimizer", "peak MB", "remark")


def spec_of(method: str) -> Spec:
    """Return the optimizer that a method names, with the options that follow a colon."""
    name, _, more = method.partition(":")
    if name not in METHODS:
        raise SystemExit(f"--methods {method}: accepted are {', '.join(METHODS)}")
    known = Spec.parse(METHODS[name])
    return Spec(known.name, {**known.options, **Spec.parse(f"{known.name}:{more}").options})


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Options of the training that all methods share."""
    steps = options.steps
    return {
        **SIZE,
        "tokens": "bytes",
        "steps": steps,
        "warmup": steps // 10,
        "batch": options.batch,
        "seed": options.seed,
        "eval-every": max(1, steps // EVALUATIONS),
        "eval-batches": 20 if CUDA else 2,
    }


def blocks(losses: Sequence[float]) -> list[tuple[int, float]]:
    """Return means over blocks of consecutive losses, each with the number of its last step."""
    length = -(-len(losses) // BLOCKS) or 1
    starts = range(0, len(losses), length)
    return [(min(i + length, len(losses)), round(statistics.fmean(losses[i : i + length]), 5)) for i in starts]


def train(spec: Spec, settings: Mapping[str, Any], options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Do one run in a process of its own, and return what it left."""
    capture = options.capture and spec.name in CAPTURABLE
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-m", "orthlin.torch.train", "--optimizer", str(spec), "--amp", "--quiet", "--no-plot"]
        line += [f"--{key}={value}" for key, value in settings.items()] + (["--capture"] if capture else [])
        line += ["--seconds", str(seconds), "--out", folder, "--", str(options.text)]
        try:
            errors = subprocess.run(line, capture_output=True, text=True, timeout=seconds + GRACE, check=False).stderr
        except subprocess.TimeoutExpired:
            errors = "stopped from outside"
        result = files.read_json(Path(folder, files.RESULT)) or {"status": "failed"}
        header, *records = [*files.read_log(Path(folder, files.LOG))] or [{}]
    found = {key: result[key] for key in ("tokens_per_s", "optimizer_share", "peak_memory") if key in result}
    if result["status"] == "failed":
        found["error"] = (errors.strip().splitlines() or ["no message"])[-1][:300]
    return {
        "status": result["status"],
        "step": len(records),
        "captured": capture,
        **found,
        "parameters": header.get("parameters"),
        "validation": [(r["step"], r["validation"]) for r in records if "validation" in r],
        "training": blocks([r["loss"] for r in records]),
    }


def remark(row: Mapping[str, Any], steps: int) -> str:
    """Say what is not as asked."""
    words = ["captured"] if row.get("captured") else []
    if row["status"] == "stopped":
        words.append(f"not finished: no time left after {row['step']} of {steps} steps")
    elif row["status"] == "not started":
        words.append("not started: no time left")
    elif row["status"] != "finished":
        words.append(f"{row['status']} after step {row['step']}; {row.get('error', '')}".rstrip("; "))
    return ", ".join(words)


def cells(name: str, row: Mapping[str, Any], steps: int) -> tuple[str, ...]:
    """Return a line of the table."""
    curves = [row.get(key) or [(0, None)] for key in ("validation", "training")]
    validation, training = ("" if curve[-1][1] is None else f"{curve[-1][1]:.4f}" for curve in curves)
    if row["status"] == "stopped" and validation:
        validation += f" at {curves[0][-1][0]}"
    speed, share, peak = (row.get(key) for key in ("tokens_per_s", "optimizer_share", "peak_memory"))
    return (
        name,
        row["optimizer"],
        str(row["step"]),
        validation,
        training,
        "" if speed is None else f"{speed:.0f}",
        "" if share is None else f"{share:.1%}",
        "" if peak is None else str(peak // 2**20),
        remark(row, steps),
    )


def table(parts: Iterable[Mapping[str, Any]]) -> str:
    """Return one table for all parts of the same settings on the same kind of machine."""
    groups: dict[str, list[tuple[str, ...]]] = {}
    for part in parts:
        versions = ", ".join(f"{key} {value}" for key, value in part["versions"].items())
        settings = ", ".join(f"{key} {value}" for key, value in part["settings"].items())
        rows = [cells(name, row, part["settings"]["steps"]) for name, row in part["methods"].items()]
        groups.setdefault(f"{part['machine']}; {versions}\n{settings}", []).extend(rows)
    texts = []
    for heading, rows in groups.items():
        lines = [COLUMNS, *rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts.append("\n".join([heading, *("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)]))
    return "\n\n".join(texts)


def run(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Run a part, whose file is complete after every method."""
    settings = settings_of(options)
    part: dict[str, Any] = {
        "machine": torch.cuda.get_device_name() if CUDA else "cpu",
        "versions": report.versions() | {"cuda": torch.version.cuda},
        "command": command,
        "settings": settings | {"text": hashlib.sha256(options.text.read_bytes()).hexdigest()[:16]},
        "methods": {},
    }
    specs = {name: spec_of(name) for name in options.methods.split(",")}
    end = time.monotonic() + options.seconds
    for left, (name, spec) in zip(range(len(specs), 0, -1), specs.items(), strict=True):
        # What a run needs to start and to end belongs to the time of the part as well.
        seconds = (end - time.monotonic()) / left - (GRACE / 2 if CUDA else 0.0)
        row = train(spec, settings, options, seconds) if seconds > 0 else {"status": "not started", "step": 0}
        part["methods"][name] = {"optimizer": str(spec), **row}
        print("  ".join(cells(name, part["methods"][name], options.steps)), flush=True)
        if options.json:
            options.json.write_text(json.dumps(part) + "\n")
    return part


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, nargs="?", help="file whose bytes are trained on")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {','.join(METHODS)} (default: all)")
    parser.add_argument("--seconds", type=float, default=450, help="of the whole part (default: 450)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"default: {STEPS}")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"windows a step (default: {BATCH})")
    parser.add_argument("--seed", type=int, default=0, help="of weights, windows and sketches")
    parser.add_argument("--capture", action="store_true", help="replay the step as a CUDA graph, where it can be")
    parser.add_argument("--json", type=Path, help="file for all facts")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="print one table of files of parts")
    options = parser.parse_args(arguments)
    if options.table:
        print(table(json.loads(path.read_text()) for path in options.table))
        return
    if options.text is None:
        parser.error("TEXT is needed, or --table FILE ...")
    given = sys.argv[1:] if arguments is None else arguments
    print(table([run(options, shlex.join(["python", "asv_bench/gpu_train.py", *given]))]))


if __name__ == "__main__":
    main()
