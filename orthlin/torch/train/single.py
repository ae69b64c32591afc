"""One run, from the settings to the files it leaves."""

import argparse
import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from orthlin.errors import OptionError
from orthlin.torch.train import files, report
from orthlin.torch.train.config import Config
from orthlin.torch.train.data import Text
from orthlin.torch.train.loop import Trainer
from orthlin.torch.train.world import ALONE, World

Reporter = Callable[[Mapping[str, Any]], None]


def refuse_existing(folder: Path, options: argparse.Namespace) -> None:
    """Refuse to write over a run, unless asked to continue or to replace it."""
    present = [name for name in (files.LOG, files.CHECKPOINT, files.RESULT) if (folder / name).exists()]
    if present and not (options.resume or options.overwrite):
        raise OptionError(
            f"--out {folder} holds a run ({', '.join(present)}): --resume continues it, --overwrite replaces it"
        )


def run(
    config: Config, text: Text, options: argparse.Namespace, reporter: Reporter, world: World = ALONE
) -> dict[str, Any]:
    """Train and return the summary; nothing is written before everything has been checked, and by one process alone."""
    folder: Path | None = None if world.rank else options.out
    if folder is not None:
        refuse_existing(folder, options)
    trainer = Trainer.build(config, text, world)
    if options.resume:
        trainer.resume(options.out / files.CHECKPOINT)
    with contextlib.ExitStack() as stack:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(files.locked(folder))
            if options.resume:
                files.clear_parts(folder)
            else:
                files.clear(folder)
        log = files.Log(folder, report.header(config.as_dict(), trainer.model, text, world), trainer.step)
        stack.callback(log.close)
        for record in log.records[-1:]:
            reporter(record)
        status = trainer.train(log, reporter, options.out, options.checkpoint_every, options.seconds)
        log.flush()
        if world.rank:
            return {"status": status}
        if status == "finished" and not any("validation" in record for record in log.records):
            raise OptionError(f"--resume: the run in {folder} has ended, and its log is gone; --overwrite repeats it")
        result = report.summary(config.as_dict(), status, log.records)
        if folder is not None:
            files.write_json(folder / files.RESULT, result)
            if options.plot and report.can_plot() and status == "finished":
                report.draw(folder / files.CURVES, config.optimizer, {config.optimizer: [log.records]})
    return result
