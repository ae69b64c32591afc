"""Texts, tokens, batches, specifications and the schedule."""

import math
from pathlib import Path

import numpy as np
import pytest

from orthlin.errors import OptionError
from orthlin.torch.train.config import Config, Spec
from orthlin.torch.train.data import (
    LIBRARY_BYTES,
    evaluation_batches,
    read_text,
    standard_library,
    training_batch,
)
from orthlin.torch.train.optimizers import schedule


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "text.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_characters_are_sorted_and_split_90_to_10(tmp_path: Path) -> None:
    text = read_text(write(tmp_path, "bäc\r\n" * 100), "auto", 8)
    assert text.vocabulary == "\nbcä"
    assert text.vocabulary_size == 4
    assert (len(text.train), len(text.validation)) == (360, 40)
    assert text.train[:4].tolist() == [1, 3, 2, 0]


@pytest.mark.parametrize(
    ("content", "tokens", "vocabulary"),
    [
        ("".join(map(chr, range(0x400, 0x501))) * 2, "auto", "bytes"),
        (b"\xff\xfe" * 50, "auto", "bytes"),
        ("ab" * 50, "bytes", "bytes"),
        ("".join(map(chr, range(0x400, 0x501))) * 2, "chars", "".join(map(chr, range(0x400, 0x501)))),
    ],
)
def test_vocabulary(tmp_path: Path, content: str | bytes, tokens: str, vocabulary: str) -> None:
    assert read_text(write(tmp_path, content), tokens, 4).vocabulary == vocabulary


def test_texts_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="not UTF-8 at byte 0; --tokens bytes"):
        read_text(write(tmp_path, b"\xff" * 100), "chars", 4)
    with pytest.raises(OptionError, match="leave 8 for validation; --context 8 needs at least 9"):
        read_text(write(tmp_path, "a" * 80), "auto", 8)
    assert len(read_text(write(tmp_path, "a" * 90), "auto", 8).validation) == 9
    with pytest.raises(OptionError, match="0 tokens"):
        read_text(write(tmp_path, ""), "auto", 8)
    with pytest.raises(OptionError, match=r"missing\.txt: No such file"):
        read_text(tmp_path / "missing.txt", "auto", 8)


def test_standard_library_is_the_same_text_every_time() -> None:
    text = standard_library()
    assert len(text) == LIBRARY_BYTES
    assert text == standard_library()
    assert b"def " in text


def test_batches_depend_on_seed_and_step_alone(tmp_path: Path) -> None:
    text = read_text(write(tmp_path, "the quick brown fox" * 50), "auto", 8)
    first = training_batch(text, 8, 3, seed=1, step=5)
    assert first.shape == (3, 9)
    assert first.dtype == np.int64
    assert np.array_equal(first, training_batch(text, 8, 3, seed=1, step=5))
    assert not np.array_equal(first, training_batch(text, 8, 3, seed=1, step=6))
    assert not np.array_equal(first, training_batch(text, 8, 3, seed=2, step=5))
    train = bytes(text.train.astype(np.uint8))
    assert all(bytes(window.astype(np.uint8)) in train for window in first)
    fixed = list(evaluation_batches(text, 8, 3, 4))
    assert np.array_equal(fixed, list(evaluation_batches(text, 8, 3, 4)))
    assert not np.array_equal(fixed[0], fixed[1])


def test_every_window_can_be_drawn(tmp_path: Path) -> None:
    text = read_text(write(tmp_path, bytes(range(100))), "bytes", 8)
    drawn = {int(w[0]) for step in range(50) for w in training_batch(text, 8, 16, seed=0, step=step)}
    assert drawn == set(range(90 - 8))


@pytest.mark.parametrize(
    ("given", "name", "options", "canonical"),
    [
        ("adamw", "adamw", {}, "adamw"),
        ("muon:", "muon", {}, "muon"),
        (
            "lowrank_muon:warm_start=False,rank=32",
            "lowrank_muon",
            {"rank": 32, "warm_start": False},
            "lowrank_muon:rank=32,warm_start=False",
        ),
        (
            "lowrank_muon:scale=rms,rank=.25,adamw_betas=(0.9, -1)",
            "lowrank_muon",
            {"rank": 0.25, "scale": "rms", "adamw_betas": (0.9, -1)},
            "lowrank_muon:adamw_betas=(0.9, -1),rank=0.25,scale='rms'",
        ),
    ],
)
def test_specifications(given: str, name: str, options: dict[str, object], canonical: str) -> None:
    spec = Spec.parse(given)
    assert (spec.name, spec.options, str(spec)) == (name, options, canonical)
    assert Spec.parse(canonical) == spec


@pytest.mark.parametrize(
    "given", ["sgd", "", "adamw:lr", "adamw:**{}", "adamw:lr=1e-3)", "adamw:lr=f(2)", "adamw:lr=1,lr=2", "muon:a=(1"]
)
def test_specifications_that_say_nothing(given: str) -> None:
    with pytest.raises(OptionError, match="optimizer"):
        Spec.parse(given)


def make_config(**changes: object) -> Config:
    fixed: dict[str, object] = dict.fromkeys(Config.__dataclass_fields__, 0)
    return Config(**{**fixed, "steps": 110, "warmup": 10, "final_lr": 0.1, **changes})  # type: ignore[arg-type]


def test_schedule() -> None:
    config = make_config()
    factors = [schedule(step, config) for step in range(111)]
    assert factors[:3] == [1 / 11, 2 / 11, 3 / 11]
    assert factors[10] == 1
    assert math.isclose(factors[60], 0.55)
    assert math.isclose(factors[110], 0.1)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert schedule(0, make_config(steps=1, warmup=0)) == 1
    assert schedule(5, make_config(steps=5, warmup=10)) == 6 / 11
