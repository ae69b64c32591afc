"""The command line, and the settings that follow from it."""

import argparse
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from orthlin.errors import OptionError
from orthlin.torch.train.config import MODELS, OPTIMIZERS, SIZES, Config, Spec
from orthlin.torch.train.data import TOKENS, Text, read_text
from orthlin.torch.train.models import DTYPES
from orthlin.torch.train.world import BACKENDS, World

STEPS, WARMUP, LR = 2000, 100, 3e-3
COPIED = (
    *("model", "size", "steps", "warmup", "final_lr", "weight_decay", "clip", "split_qkv", "per_head"),
    *("eval_every", "eval_batches", "dtype", "amp", "device", "compile", "capture"),
)
Adder = Callable[..., argparse.Action]
_DIGITS = 19  # of 2^63, beyond which torch takes no seed


def count(text: str, least: int = 1) -> int:
    """Read an integer not below `least` (for argparse)."""
    value = int(text) if text.isdecimal() and len(text) < _DIGITS else -1
    if value < least:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number of at least {least}, of under {_DIGITS} digits"
        )
    return value


def number(text: str, positive: bool = False, most: float = math.inf) -> float:
    """Read a finite number in [0, most], or above zero (for argparse)."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= most or math.isinf(value) or (positive and value == 0):
        least = "above" if positive else "of at least"
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number {least} 0{'' if most == math.inf else f', at most {most:g}'}"
        )
    return value


NATURAL = functools.partial(count, least=0)
POSITIVE = functools.partial(number, positive=True)
FRACTION = functools.partial(number, most=1.0)


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``python -m orthlin.torch.train``."""
    root = argparse.ArgumentParser(
        prog="python -m orthlin.torch.train",
        description="Train a GPT-2 or LLaMA from scratch on a text, with one optimizer or several to compare.",
        epilog=f"Optimizers: {', '.join(OPTIMIZERS)}; options follow a colon, as in "
        "lowrank_muon:rank=32,warm_start=False. An lr among them goes before --lr and --lrs.",
    )
    root.add_argument("text", type=Path, nargs="?", metavar="TEXT", help="default: the Python standard library")
    _add_model(root.add_argument_group("model and text").add_argument)
    _add_training(root.add_argument_group("training").add_argument)
    _add_files(root.add_argument_group("files").add_argument)
    _add_comparison(root.add_argument_group("comparison").add_argument)
    return root


def _add_model(option: Adder) -> None:
    option("--model", choices=MODELS, default="gpt2", help="default: gpt2")
    option("--size", choices=tuple(SIZES), default="nano", help="default: nano, 4 layers of width 128")
    option("--context", type=count, metavar="N", help="tokens a window (default: by size, nano 64)")
    option("--tokens", choices=TOKENS, default="auto", help="default: characters, or bytes where there are over 256")
    option("--dtype", choices=tuple(DTYPES), default="float32", help="of the parameters (default: float32)")
    option("--amp", action="store_true", help="matrix products in bfloat16 (autocast)")
    option("--device", default="cpu", help="default: cpu")
    option(
        "--compile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="compile the model, by default with inductor; before TEXT write it as --compile=inductor",
    )
    option("--capture", action="store_true", help="replay the optimizer's step as a CUDA graph")
    option(
        "--shard",
        action="store_true",
        help="under torchrun, parameters and state in parts (FSDP2); default: copies (DDP)",
    )
    option(
        "--threads", type=count, metavar="N", help="of PyTorch on the host (default: PyTorch's choice; 1 to compare)"
    )


def _add_training(option: Adder) -> None:
    option("--optimizer", metavar="SPEC", help="name or name:option=value,... (default: lowrank_muon)")
    option("--lr", type=POSITIVE, default=LR, metavar="X", help=f"highest learning rate (default: {LR:g})")
    option("--weight-decay", type=number, default=0.1, metavar="X", help="of matrices, decoupled (default: 0.1)")
    option("--split-qkv", action=argparse.BooleanOptionalAction, default=True, help="query, key, value on their own")
    option("--per-head", action=argparse.BooleanOptionalAction, default=False, help="every attention head on its own")
    option("--batch", type=count, metavar="N", help="windows a step (default: by size, nano 12)")
    option("--steps", type=count, default=STEPS, metavar="N", help=f"default: {STEPS}")
    option("--warmup", type=NATURAL, default=WARMUP, metavar="N", help=f"steps of linear warm-up (default: {WARMUP})")
    option(
        "--final-lr", type=FRACTION, default=0.1, metavar="X", help="end of the cosine, a part of --lr (default: 0.1)"
    )
    option("--clip", type=number, default=0.0, metavar="X", help="largest gradient norm (default: 0, no clipping)")
    option("--seed", type=NATURAL, default=0, metavar="N", help="of weights, batches and sketches (default: 0)")
    option("--eval-every", type=NATURAL, default=500, metavar="N", help="steps; 0: at the end only (default: 500)")
    option("--eval-batches", type=count, default=200, metavar="N", help="of validation (default: 200)")
    option("--seconds", type=POSITIVE, metavar="X", help="stop a run that has not finished by then (default: none)")


def _add_files(option: Adder) -> None:
    option("--out", type=Path, metavar="DIR", help="folder for log, checkpoint, result and curves (default: none)")
    option("--checkpoint-every", type=NATURAL, default=0, metavar="N", help="steps; 0: none (default)")
    option("--resume", action="store_true", help="continue from the checkpoint in --out")
    option("--overwrite", action="store_true", help="replace the run in --out")
    option("--plot", action=argparse.BooleanOptionalAction, default=True, help="draw the curves into --out")
    option("--quiet", action="store_true", help="no progress bar")


def _add_comparison(option: Adder) -> None:
    option(
        "--compare", nargs="+", metavar="SPEC", help="optimizers; runs every one, at every --lrs, with every --seeds"
    )
    option("--lrs", type=POSITIVE, nargs="+", metavar="X", help="default: that of --lr")
    option("--seeds", type=NATURAL, nargs="+", metavar="N", help="default: that of --seed")
    option("--jobs", type=count, default=1, metavar="N", help="runs at a time (default: 1)")


def check(options: argparse.Namespace) -> None:
    """Refuse combinations that say nothing sensible."""
    if options.resume and options.overwrite:
        raise OptionError("--resume and --overwrite exclude each other")
    for name in ("resume", "overwrite", "checkpoint_every"):
        if getattr(options, name) and options.out is None:
            raise OptionError(f"--{name.replace('_', '-')} needs --out DIR")
    if options.compare and options.out is None:
        raise OptionError("--compare needs --out DIR")
    for name in ("optimizer", "seconds", "shard"):
        if options.compare and getattr(options, name):
            raise OptionError(f"--compare and --{name} exclude each other")
    if not options.compare and (options.lrs or options.seeds):
        raise OptionError("--lrs and --seeds need --compare; one run takes --lr and --seed")
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        raise OptionError(f"--out {options.out}: not a folder")
    _check_world(options, World.around().size)
    _check_device(options.device)
    if options.capture and torch.device(options.device).type != "cuda":
        raise OptionError(f"--capture needs --device cuda, got {options.device}")
    if options.compile and options.compile not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise OptionError(f"--compile {options.compile}: accepted are {', '.join(known)}")


def _check_world(options: argparse.Namespace, size: int) -> None:
    """Refuse what several processes do not do together."""
    if size == 1:
        return
    for name in ("compare", "capture"):
        if getattr(options, name):
            raise OptionError(f"--{name} is accepted with one process, here are {size}: leave out torchrun")
    batch = options.batch or SIZES[options.size].batch
    if batch % size:
        raise OptionError(f"--batch {batch}: {size} processes take equal parts of it; accepted are multiples of {size}")
    if options.device not in BACKENDS:
        raise OptionError(
            f"--device {options.device}: {size} processes choose their own; accepted are {' and '.join(BACKENDS)}"
        )


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as problem:
        raise OptionError(f"--device {name}: {str(problem).splitlines()[0]}") from None
    if torch.device(name).type not in {"cpu", "cuda"}:
        raise OptionError(f"--device {name}: accepted are cpu, cuda and cuda:N")


def read(options: argparse.Namespace) -> Text:
    """Return the text that the command line names."""
    return read_text(options.text, options.tokens, options.context or SIZES[options.size].context)


def config(options: argparse.Namespace, text: Text, spec: Spec, lr: float, seed: int) -> Config:
    """Return the settings of one run; an lr in the specification moves to the settings."""
    size = SIZES[options.size]
    rest = {key: value for key, value in spec.options.items() if key != "lr"}
    given = {name: getattr(options, name) for name in COPIED}
    lr = spec.options.get("lr", lr)
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not 0 < lr < math.inf:
        raise OptionError(f"optimizer {spec}: lr is {lr!r}; a number above zero is accepted")
    return Config(
        text=text.sha256,
        vocabulary=text.vocabulary,
        context=options.context or size.context,
        batch=options.batch or size.batch,
        lr=float(lr),
        optimizer=str(Spec(spec.name, rest)),
        seed=seed,
        **given,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    options = parser().parse_args(arguments)
    check(options)
    return options
