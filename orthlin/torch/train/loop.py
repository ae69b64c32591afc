"""The training loop: steps, evaluations, log records and checkpoints."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from orthlin.errors import NonFiniteError
from orthlin.torch.train import checkpoint
from orthlin.torch.train.captured import Captured
from orthlin.torch.train.config import Config, Spec
from orthlin.torch.train.data import Text, evaluation_batches, training_batch
from orthlin.torch.train.files import CHECKPOINT, Log
from orthlin.torch.train.models import build_model, loss_of
from orthlin.torch.train.optimizers import build_optimizers, schedule, set_learning_rate
from orthlin.torch.train.world import ALONE, World

LAG = 20
"""Steps that an accelerator may be ahead of the log; a host is never."""
Record = dict[str, Any]


class Clock:
    """Marks in time, on the accelerator's own clock where there is one."""

    def __init__(self, device: str) -> None:
        self._events = torch.device(device).type == "cuda"

    def mark(self) -> Any:
        """Return the present moment, without waiting for the device."""
        if not self._events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Return the time between two marks."""
        return float(start.elapsed_time(end)) / 1e3 if self._events else float(end - start)


@dataclass
class Trainer:
    """A model, its optimizers, how far they have come, and `net`, which is called for the model."""

    config: Config
    text: Text
    model: Any
    optimizers: list[Any]
    world: World
    net: Any
    step: int = 0
    seconds: float = 0.0
    pending: list[tuple[Any, ...]] = field(default_factory=list)
    captured: Captured | None = field(init=False)

    def __post_init__(self) -> None:
        self.captured = Captured(self.optimizers, self.config) if self.config.capture else None

    @classmethod
    def build(cls, config: Config, text: Text, world: World = ALONE) -> "Trainer":
        """Build everything at step zero."""
        model = build_model(config, text.vocabulary_size)
        net = world.spread(model, config.device)
        return cls(config, text, model, build_optimizers(model, Spec.parse(config.optimizer), config), world, net)

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint; the state must be what one step on a new model leaves."""
        content = checkpoint.load(path, self.config)
        trial = Trainer.build(self.config, self.text, self.world)
        trial.advance(Clock(self.config.device))
        checkpoint.restore(
            content, path, self.model, self.optimizers, [optimizer.state_dict() for optimizer in trial.optimizers]
        )
        self.step, self.seconds = content["step"], content["seconds"]
        self.__post_init__()  # what was loaded lies elsewhere

    def save(self, folder: Path) -> None:
        """Write a checkpoint."""
        state = self.model, self.optimizers
        checkpoint.save(folder / CHECKPOINT, self.config, self.step, self.seconds, *state, self.world)

    def advance(self, clock: Clock) -> None:
        """Take one step; what it measured goes to `pending`."""
        config = self.config
        drawn = training_batch(self.text, config.context, config.batch, config.seed, self.step)
        factor = schedule(self.step, config)
        set_learning_rate(self.optimizers, factor)
        start = clock.mark()
        loss = loss_of(self.net, self.world.rows(drawn), config)
        loss.backward()
        if config.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        before = clock.mark()
        if self.captured:
            self.captured.step()
        else:
            for optimizer in self.optimizers:
                optimizer.step()
        end = clock.mark()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=not self.captured)
        self.step += 1
        self.pending.append((self.step, loss.detach(), factor * config.lr, start, before, end))

    def collect(self, clock: Clock) -> list[Record]:
        """Return the records of the steps since the last call; on an accelerator this waits for them."""
        pending, self.pending = self.pending, []
        losses = self.world.mean(torch.stack([entry[1] for entry in pending])).tolist() if pending else []
        records = []
        for (step, _, lr, start, before, end), loss in zip(pending, losses, strict=True):
            whole = clock.seconds(start, end)
            self.seconds += whole
            records.append(
                {
                    "step": step,
                    "loss": loss,
                    "lr": lr,
                    "tokens_per_s": round(self.config.batch * self.config.context / whole),
                    "optimizer_share": round(clock.seconds(before, end) / whole, 4),
                    "time": round(self.seconds, 4),
                }
            )
        return records

    @torch.no_grad()  # type: ignore[untyped-decorator,unused-ignore]
    def evaluate(self) -> float:
        """Return the mean loss on the fixed validation batches."""
        config = self.config
        batches = evaluation_batches(self.text, config.context, config.batch, config.eval_batches)
        losses = [loss_of(self.net, self.world.rows(drawn), config) for drawn in batches]
        return float(self.world.mean(torch.stack(losses).double().mean()))

    def train(
        self,
        log: Log,
        report: Callable[[Record], None],
        folder: Path | None,
        checkpoint_every: int,
        seconds: float | None = None,
    ) -> str:
        """Run to the last step and return "finished"; or "diverged" where a loss was not finite, or "stopped"."""
        config, clock = self.config, Clock(self.config.device)
        end = math.inf if seconds is None else time.monotonic() + seconds
        lag = LAG if torch.device(config.device).type == "cuda" else 1
        every = config.eval_every or config.steps
        while self.step < config.steps:
            try:
                self.advance(clock)
            except NonFiniteError:  # an optimizer looked at a gradient before the loss was looked at here
                return "diverged"
            last = self.step == config.steps
            evaluates = last or self.step % every == 0
            stops = not last and seconds is not None and self.world.agreed(time.monotonic() > end)
            saves = checkpoint_every > 0 and (last or stops or self.step % checkpoint_every == 0)
            if not (evaluates or saves or stops or self.step % lag == 0):
                continue
            fresh = self.collect(clock)
            if evaluates:
                fresh[-1]["validation"] = self.evaluate()
            for record in fresh:
                if not math.isfinite(record["loss"] + record.get("validation", 0.0)):
                    return "diverged"
                log.write(record)
                report(record)
            if evaluates or saves:
                log.flush()
            if saves and folder is not None:
                self.save(folder)
            if stops:
                return "stopped"
        return "finished"
