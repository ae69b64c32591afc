"""Compare optimizers: every specification at every learning rate with every seed, in processes of their own."""

import argparse
import contextlib
import hashlib
import itertools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from orthlin.errors import OptionError
from orthlin.torch.train import files, report, table
from orthlin.torch.train import options as cli
from orthlin.torch.train.config import Config, Spec, differences
from orthlin.torch.train.loop import Trainer

DIVERGED = 1
"""Exit code of a run whose loss is not finite."""
TABLE, TABLE_TEXT, FAILURE = "comparison.json", "comparison.md", "failure.txt"

PASSED = (
    *("model", "size", "context", "batch", "steps", "warmup", "final_lr", "lr", "weight_decay", "clip", "seed"),
    *("eval_every", "eval_batches", "dtype", "device", "optimizer"),
)


class Cell(NamedTuple):
    """One run of a comparison."""

    spec: Spec
    config: Config
    folder: Path


class Workers:
    """Subprocesses that end with this one."""

    def __init__(self) -> None:
        self._alive: set[subprocess.Popen[str]] = set()
        self._guard = threading.Lock()
        self._stopped = False

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
        """Run a command to its end and return its exit code and its error output."""
        with self._guard:
            if self._stopped:
                return -1, "stopped"
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
            )
            self._alive.add(process)
        with process:
            _, errors = process.communicate()
        with self._guard:
            self._alive.discard(process)
        return process.returncode, errors

    def stop(self) -> None:
        """End what is running."""
        with self._guard:
            self._stopped = True
            for process in self._alive:
                process.terminate()


def cells(options: argparse.Namespace, text: Any) -> list[Cell]:
    """Return every run, in the order of the seeds, so that an interrupted sweep has compared something."""
    specs = list(dict.fromkeys(str(Spec.parse(given)) for given in options.compare))
    found: dict[Path, Cell] = {}
    lrs = options.lrs or [options.lr]
    for seed, given, lr in itertools.product(options.seeds or [options.seed], specs, lrs):
        spec = Spec.parse(given)
        config = cli.config(options, text, spec, lr, seed)
        folder = options.out / name_of(config.optimizer) / f"lr={config.lr}" / f"seed={seed}"
        found.setdefault(folder, Cell(Spec.parse(config.optimizer), config, folder))
    return list(found.values())


def name_of(spec: str) -> str:
    """Return a file name for a specification, another for every specification."""
    plain = re.sub(r"[^\w.=,+-]", "_", spec.replace(":", "-"))
    changed = plain != spec.replace(":", "-")
    return f"{plain[:80]}-{hashlib.sha256(spec.encode()).hexdigest()[:8]}" if changed or len(plain) > 80 else plain


def finished(cell: Cell) -> Any:
    """Return a cell's result, or None where it has still to be run; another run in its place is an error."""
    result = files.read_json(cell.folder / files.RESULT)
    if not isinstance(result, dict):
        return None
    if different := differences(result.get("config"), cell.config.as_dict()):
        raise OptionError(f"--out {cell.folder} holds another run: {'; '.join(different)}")
    return result


def command(cell: Cell, options: argparse.Namespace) -> list[str]:
    """Return the command that runs a cell."""
    config = cell.config
    line = [sys.executable, "-m", "orthlin.torch.train"]
    for name in PASSED:
        line += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    line += ["--tokens", options.tokens]
    line += [f"--{'' if config.split_qkv else 'no-'}split-qkv", f"--{'' if config.per_head else 'no-'}per-head"]
    line += [f"--{name}" for name in ("amp", "capture") if getattr(config, name)]
    line += [f"--compile={config.compile}"] if config.compile else []
    line += ["--threads", str(options.threads or 1), "--checkpoint-every", str(options.checkpoint_every)]
    resumes = options.checkpoint_every and not options.overwrite and (cell.folder / files.CHECKPOINT).exists()
    line += ["--out", str(cell.folder), "--resume" if resumes else "--overwrite", "--no-plot", "--quiet"]
    return [*line, *(["--", str(options.text)] if options.text else [])]


def work(cell: Cell, options: argparse.Namespace, workers: Workers) -> Any:
    """Run one cell and return its result; a failure is a result too."""
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads or 1)}
    code, errors = workers.run(command(cell, options), environment)
    result = files.read_json(cell.folder / files.RESULT)
    if isinstance(result, dict) and code == (0 if result.get("status") == "finished" else DIVERGED):
        (cell.folder / FAILURE).unlink(missing_ok=True)
        return result
    with contextlib.suppress(OSError):
        cell.folder.mkdir(parents=True, exist_ok=True)
        files.write_atomically(cell.folder / FAILURE, errors.encode())
    lines = [line for line in errors.splitlines() if line.strip()]
    return {"status": "failed", "reason": lines[-1] if lines else f"exit code {code}"}


def describe(cell: Cell, result: Mapping[str, Any]) -> str:
    """Return a line for a cell that has ended."""
    ended = {
        "finished": "validation {validation}",
        "diverged": "diverged after step {step}",
        "failed": "failed: {reason}",
    }
    return f"{cell.config.optimizer} lr {cell.config.lr:g} seed {cell.config.seed}: " + ended[result["status"]].format(
        **result
    )


def run(options: argparse.Namespace, bar: Any) -> list[table.Row]:
    """Run what has not been run, write the table and the curves, and return the table's rows."""
    text = cli.read(options)
    todo = cells(options, text)
    for config in {cell.config.optimizer: cell.config for cell in todo}.values():
        Trainer.build(config, text)  # so that a bad option is an error now
    results = {} if options.overwrite else {c.folder: found for c in todo if (found := finished(c)) is not None}
    options.out.mkdir(parents=True, exist_ok=True)
    waiting = [cell for cell in todo if cell.folder not in results]
    workers, pool = Workers(), ThreadPoolExecutor(options.jobs)
    try:
        with bar(total=len(todo), initial=len(results), unit="run", disable=options.quiet) as shown:
            running = {pool.submit(work, cell, options, workers): cell for cell in waiting}
            for future in as_completed(running):
                cell, result = running[future], future.result()
                results[cell.folder] = result
                shown.update()
                if not options.quiet:
                    bar.write(describe(cell, result), file=sys.stderr)
    finally:
        workers.stop()
        pool.shutdown(cancel_futures=True)
    rows = table.tabulate([(cell.config, results[cell.folder]) for cell in todo])
    files.write_json(options.out / TABLE, rows)
    files.write_atomically(options.out / TABLE_TEXT, table.markdown(rows).encode())
    if options.plot and report.can_plot():
        _draw(options.out / files.CURVES, rows, todo, results)
    return rows


def _draw(path: Path, rows: Sequence[table.Row], todo: Sequence[Cell], results: Mapping[Path, Any]) -> None:
    """Draw every optimizer at its best learning rate, the mean over its seeds."""
    curves: dict[str, list[Any]] = {}
    for row in rows:
        for cell in todo if row["best"] else []:
            same = (cell.config.optimizer, cell.config.lr) == (row["optimizer"], row["lr"])
            if same and results[cell.folder]["status"] == "finished":
                records = [record for record in files.read_log(cell.folder / files.LOG) if "step" in record]
                curves.setdefault(f"{row['optimizer']}, lr {row['lr']:g}", []).append(records)
    if curves:
        report.draw(path, "mean over the seeds, at each optimizer's best learning rate", curves)
