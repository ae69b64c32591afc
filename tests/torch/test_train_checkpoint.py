"""Checkpoints: exact, atomic, and refused whole when they do not fit."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS

from orthlin.torch.train.__main__ import main
from orthlin.torch.train.checkpoint import CheckpointError, load, mismatch
from orthlin.torch.train.config import OPTIMIZERS, Spec
from orthlin.torch.train.files import CHECKPOINT
from orthlin.torch.train.loop import Clock, Trainer
from orthlin.torch.train.options import config, parse, read

FULL = os.environ.get("ORTHLIN_FULL") == "1"
SHORT = ["--size", "pico", "--steps", "6", "--warmup", "2", "--eval-every", "0", "--eval-batches", "2"]
SHORT += ["--checkpoint-every", "3", "--quiet", "--no-plot"]


def trainer(text: Path, optimizer: str, *more: str) -> Trainer:
    options = parse([str(text), *SHORT, "--out", "unused", *more])
    read_text = read(options)
    return Trainer.build(config(options, read_text, Spec.parse(optimizer), 3e-3, 0), read_text)


def tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else []
    return [leaf for child in children for leaf in tensors(child)]


def state(run: Trainer) -> list[torch.Tensor]:
    return tensors([run.model.state_dict(), [optimizer.state_dict() for optimizer in run.optimizers]])


@pytest.mark.parametrize("model", ["gpt2", "llama"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumed_state_is_bit_identical(tmp_path: Path, text: Path, optimizer: str, model: str) -> None:
    whole, clock = trainer(text, optimizer, "--model", model), Clock("cpu")
    for _ in range(3):
        whole.advance(clock)
    whole.save(tmp_path)
    resumed = trainer(text, optimizer, "--model", model)
    resumed.resume(tmp_path / CHECKPOINT)
    assert resumed.step == 3
    for run in (whole, resumed):
        for _ in range(3):
            run.advance(clock)
    assert len(state(whole)) > 50
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(state(whole), state(resumed), strict=True))


def test_half_precision_resumes(tmp_path: Path, text: Path) -> None:
    whole, clock = trainer(text, "lowrank_muon", "--dtype", "bfloat16"), Clock("cpu")
    for _ in range(2):
        whole.advance(clock)
    whole.save(tmp_path)
    resumed = trainer(text, "lowrank_muon", "--dtype", "bfloat16")
    resumed.resume(tmp_path / CHECKPOINT)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(state(whole), state(resumed), strict=True))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    folder = tmp_path_factory.mktemp("run") / "out"
    assert main([str(text), *SHORT, "--optimizer", "lowrank_muon:rank=4", "--out", str(folder)]) == 0
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for name, content in snapshot(folder).items():
        (to / name).write_bytes(content)
    return to


def content_of(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def first(content: Any, index: int = 0) -> dict[str, Any]:
    """State of one parameter of the optimizer."""
    found: dict[str, Any] = content["optimizers"][0]["state"][index]
    return found


WEIGHT = "transformer.h.0.mlp.c_fc.weight"


def reshape_weight(c: Any) -> None:
    c["model"][WEIGHT] = c["model"][WEIGHT].T


def round_weight(c: Any) -> None:
    c["model"][WEIGHT] = c["model"][WEIGHT].half()


def reshape_momentum(c: Any) -> None:
    first(c)["momentum"] = first(c)["momentum"][1:]


def round_momentum(c: Any) -> None:
    first(c)["momentum"] = first(c)["momentum"].bfloat16()


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "wrong shape": (reshape_weight, rf"model\.{WEIGHT} is torch.float32 \(128, 32\), expected .*\(32, 128\)"),
    "other dtype": (round_weight, rf"{WEIGHT} is torch.float16"),
    "missing weight": (lambda c: c["model"].pop(WEIGHT), f"missing or unknown entries: {WEIGHT}"),
    "unknown weight": (lambda c: c["model"].update(more=torch.ones(1)), "missing or unknown entries: more"),
    "not a tensor": (lambda c: c["model"].update({WEIGHT: 1.0}), "is no tensor"),
    "missing state": (lambda c: c["optimizers"][0]["state"].pop(3), r"optimizers\.0\.state has missing"),
    "wrong momentum": (reshape_momentum, r"momentum is torch.float32 \("),
    "rounded momentum": (round_momentum, "momentum is torch.bfloat16"),
    "one optimizer more": (lambda c: c["optimizers"].append({}), "optimizers does not have the 1 entries"),
    "no optimizer": (lambda c: c.pop("optimizers"), "optimizers does not have"),
    "group of fewer": (lambda c: c["optimizers"][0]["param_groups"][0]["params"].pop(), "does not have the"),
    "step beyond": (lambda c: c.update(step=7), "step 7 is not a number from 1 to 6"),
    "no settings": (lambda c: c.pop("config"), "no settings"),
    "later format": (lambda c: c.update(format=2), "not of the format"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_checkpoint_that_does_not_fit(
    tmp_path: Path, text: Path, finished: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    folder = copied(finished, tmp_path / "out")
    content = content_of(folder / CHECKPOINT)
    apply, message = CHANGES[change]
    apply(content)
    torch.save(content, folder / CHECKPOINT)
    refused(folder, text, capsys, message)


def refused(folder: Path, text: Path, capsys: pytest.CaptureFixture[str], message: str, *more: str) -> None:
    before = snapshot(folder)
    command = [str(text), *SHORT, "--optimizer", "lowrank_muon:rank=4", "--out", str(folder), "--resume", *more]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("orthlin: error: ")
    assert "Traceback" not in error
    with pytest.raises(CheckpointError, match=message):
        raise CheckpointError(error)
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--optimizer", "adamw"], "optimizer is 'lowrank_muon:rank=4' there and 'adamw' here"),
        (["--optimizer", "lowrank_muon:rank=8"], "rank=4' there and 'lowrank_muon:rank=8' here"),
        (["--tokens", "bytes"], "vocabulary is .* there and 'bytes' here"),
        (["--size", "nano"], "size is 'pico' there and 'nano' here"),
        (["--model", "llama"], "model is 'gpt2' there"),
        (["--context", "8"], "context is 16 there and 8 here"),
        (["--dtype", "float64"], "dtype is 'float32' there"),
        (["--lr", "1e-2"], "lr is 0.003 there and 0.01 here"),
        (["--seed", "1"], "seed is 0 there and 1 here"),
        (["--steps", "7"], "steps is 6 there"),
        (["--no-split-qkv"], "split_qkv is True there"),
    ],
)
def test_checkpoint_of_another_run(
    text: Path, finished: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    refused(finished, text, capsys, message, *more)


def test_checkpoint_of_another_text(tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.txt"
    other.write_text(WORDS * 41)
    refused(finished, other, capsys, "SHA-256 of the text is '.* there")


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: raw[:0],
    "truncated": lambda raw: raw[: len(raw) // 2],
    "cut by a byte": lambda raw: raw[:-1],
    "flipped in a tensor": lambda raw: (
        raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :]
    ),
    "zeros in a tensor": lambda raw: raw[: len(raw) // 2] + bytes(512) + raw[len(raw) // 2 + 512 :],
    "text": lambda raw: b"a checkpoint\n" * (len(raw) // 13),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint(
    tmp_path: Path, text: Path, finished: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    folder = copied(finished, tmp_path / "out")
    path = folder / CHECKPOINT
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    refused(folder, text, capsys, "damaged|cannot be read")


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("exit 1",))


def test_pickled_code_is_not_run(
    tmp_path: Path, text: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(finished, tmp_path / "out")
    torch.save({"format": 1, "config": Harmful()}, folder / CHECKPOINT)
    refused(folder, text, capsys, "cannot be read: UnpicklingError")


def test_no_flipped_byte_goes_unnoticed(tmp_path: Path, text: Path, finished: Path) -> None:
    raw = bytearray((finished / CHECKPOINT).read_bytes())
    settings, path = trainer(text, "lowrank_muon:rank=4").config, tmp_path / CHECKPOINT
    wanted = load(finished / CHECKPOINT, settings)
    chosen = random.Random(0)
    for _ in range(500 if FULL else 60):
        where, bit = chosen.randrange(len(raw)), 1 << chosen.randrange(8)
        raw[where] ^= bit
        path.write_bytes(raw)
        raw[where] ^= bit
        try:
            found = load(path, settings)
        except CheckpointError:
            continue
        # The bit lay between the records, where nothing is stored.
        assert mismatch(found, wanted, "") is None
        assert all(torch.equal(a, b) for a, b in zip(tensors(found), tensors(wanted), strict=True))
