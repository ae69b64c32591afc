"""Train a GPT-2 or LLaMA from scratch on a text, with one optimizer or with several to compare."""

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch

from orthlin.errors import OptionError, OrthlinError
from orthlin.torch.train import compare, options, report, single, table
from orthlin.torch.train.config import Config, Spec
from orthlin.torch.train.world import LostError, World

DEFAULT = "lowrank_muon"


def load_tqdm() -> Any:
    """Return tqdm, which transformers brings along."""
    try:
        return import_module("tqdm").tqdm
    except ImportError:
        raise OptionError("training needs transformers and tqdm: pip install transformers") from None


class Bar:
    """The progress bar of one run, shown from its first step on."""

    def __init__(self, steps: int, quiet: bool) -> None:
        self._steps, self._quiet = steps, quiet
        self._bar: Any = None
        self._validation = ""

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Show a step."""
        if self._quiet:
            return
        if self._bar is None:
            self._bar = load_tqdm()(total=self._steps, initial=record["step"] - 1, unit="step", dynamic_ncols=True)
        if "validation" in record:
            self._validation = f" val {record['validation']:.4f}"
            line = f"step {record['step']}: loss {record['loss']:.4f}, validation {record['validation']:.4f}"
            self._bar.write(line, file=sys.stderr)
        self._bar.set_postfix_str(
            f"loss {record['loss']:.4f}{self._validation}, {record['tokens_per_s']} tokens/s, "
            f"optimizer {record['optimizer_share']:.0%}",
            refresh=False,
        )
        self._bar.update(record["step"] - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def train(given: Any, world: World) -> int:
    """Do one run; the first of several processes speaks for all."""
    text = options.read(given)
    config = options.config(given, text, Spec.parse(given.optimizer or DEFAULT), given.lr, given.seed)
    bar = Bar(config.steps, given.quiet or world.rank > 0)
    try:
        with world.joined(config.device):
            result = single.run(config, text, given, bar, world)
    finally:
        bar.close()
    if world.rank == 0:
        tell(config, result)
    return 0 if result["status"] in {"finished", "stopped"} else compare.DIVERGED


def tell(config: Config, result: Mapping[str, Any]) -> None:
    """Say how a run has ended."""
    if result["status"] == "stopped":
        print(f"orthlin: {config.optimizer}: stopped after step {result['step']}, --seconds are over", file=sys.stderr)
    elif result["status"] != "finished":
        print(f"orthlin: {config.optimizer}: the loss is no longer finite after step {result['step']}", file=sys.stderr)
    else:
        print(
            f"{config.optimizer} lr {config.lr:g} seed {config.seed}: validation {result['validation']:.4f}, "
            f"{result['tokens_per_s']:.0f} tokens/s, optimizer {result['optimizer_share']:.0%} of the step"
        )


def job(given: Any) -> int:
    """Do the whole job."""
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.out is not None and given.plot and not report.can_plot():
        print("orthlin: no curves without matplotlib: pip install matplotlib", file=sys.stderr)
    if not given.compare:
        return train(given, World.around(given.shard))
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the subprocesses are ended too
    try:
        rows = compare.run(given, load_tqdm())
    finally:
        signal.signal(signal.SIGTERM, before)
    print(table.markdown(rows), end="")
    return 1 if any(row["failed"] for row in rows) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 for a run that failed or lost a process, or 2 for bad usage."""
    try:
        return job(options.parse(arguments))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("orthlin: interrupted", file=sys.stderr)
        return 130
    except (OrthlinError, OSError) as problem:
        print(f"{World.around()}: error: {problem}", file=sys.stderr)
        return 1 if isinstance(problem, LostError) else 2


if __name__ == "__main__":
    sys.exit(main())
