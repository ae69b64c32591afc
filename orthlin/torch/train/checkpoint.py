"""Checkpoints: saved atomically, checked whole before anything is changed."""

import io
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from orthlin.errors import OrthlinError
from orthlin.torch._sharded import placed
from orthlin.torch.train.config import Config, differences
from orthlin.torch.train.files import write_atomically
from orthlin.torch.train.world import ALONE, World, mapped

FORMAT = 1


class CheckpointError(OrthlinError, ValueError):
    """A checkpoint is damaged or belongs to another run."""


def save(
    path: Path, config: Config, step: int, seconds: float, model: Any, optimizers: list[Any], world: World = ALONE
) -> None:
    """Have the first process write the state after `step` steps; the others give their parts."""
    content = {
        "format": FORMAT,
        "config": config.as_dict(),
        "step": step,
        "seconds": seconds,
        "model": world.gathered(model.state_dict()),
        "optimizers": world.gathered([optimizer.state_dict() for optimizer in optimizers]),
    }
    if world.rank:
        return
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


def load(path: Path, config: Config) -> dict[str, Any]:
    """Read a checkpoint and make sure that it is whole and was written by this very run."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"--resume: there is no checkpoint {path}") from None
    content = _unpack(raw, path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {path}: not of the format that this version writes ({FORMAT})")
    if different := differences(content.get("config"), config.as_dict()):
        raise CheckpointError(f"checkpoint {path} is of another run: {'; '.join(different)}")
    step = content.get("step")
    if type(step) is not int or not 0 < step <= config.steps or type(content.get("seconds")) is not float:
        raise CheckpointError(f"checkpoint {path}: step {step!r} is not a number from 1 to {config.steps}")
    return content


def _unpack(raw: bytes, path: Path) -> Any:
    """Load from bytes; torch does not look at the checksums in the file, so they are checked here."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            damaged = archive.testzip()
        if damaged is None:
            return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as problem:
        raise CheckpointError(f"checkpoint {path} is damaged: {problem}") from problem
    except Exception as problem:  # torch raises pickle.UnpicklingError and more
        raise CheckpointError(f"checkpoint {path} cannot be read: {type(problem).__name__}") from problem
    raise CheckpointError(f"checkpoint {path} is damaged: wrong checksum of {damaged}")


def restore(content: Mapping[str, Any], path: Path, model: Any, optimizers: list[Any], template: list[Any]) -> None:
    """Put a checkpoint's state into the model and the optimizers, all of it or, with an error, nothing."""
    wanted = {"model": model.state_dict(), "optimizers": template}
    for key, tree in wanted.items():
        if problem := mismatch(content.get(key), tree, key):
            raise CheckpointError(f"checkpoint {path}: {problem}")
    state = mapped(placed, {key: content[key] for key in wanted}, wanted)
    model.load_state_dict(state["model"])
    for optimizer, own in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(own)


def mismatch(found: Any, wanted: Any, where: str) -> str | None:
    """Say where two trees of dicts, lists, tensors and plain values differ in structure, or None."""
    if isinstance(wanted, torch.Tensor):
        described = [
            f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else "no tensor" for x in (found, wanted)
        ]
        return None if described[0] == described[1] else f"{where} is {described[0]}, expected {described[1]}"
    if isinstance(wanted, Mapping):
        if not isinstance(found, Mapping):
            return f"{where} is {type(found).__name__}, expected a dict"
        if extra := set(found) ^ set(wanted):
            return f"{where} has missing or unknown entries: {', '.join(sorted(map(str, extra))[:5])}"
        pairs = [(found[key], wanted[key], f"{where}.{key}") for key in wanted]
    elif isinstance(wanted, list | tuple):
        if not isinstance(found, list | tuple) or len(found) != len(wanted):
            return f"{where} does not have the {len(wanted)} entries expected"
        pairs = [(*pair, f"{where}.{index}") for index, pair in enumerate(zip(found, wanted, strict=True))]
    else:
        return None if type(found) is type(wanted) else f"{where} is {found!r}, expected {type(wanted).__name__}"
    return next(filter(None, (mismatch(*pair) for pair in pairs)), None)
