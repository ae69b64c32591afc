"""One run: what it leaves, that it repeats itself, and that it survives being killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from orthlin.errors import OptionError
from orthlin.torch.train import captured, options
from orthlin.torch.train.__main__ import main
from orthlin.torch.train.config import Spec
from orthlin.torch.train.files import locked, read_log
from orthlin.torch.train.loop import Clock, Trainer

SHORT = ["--size", "pico", "--warmup", "2", "--eval-batches", "2", "--quiet", "--threads", "1"]
TIMES = {"tokens_per_s", "optimizer_share", "time"}


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The records of a log without the times in them."""
    return [{k: v for k, v in record.items() if k not in TIMES} for record in list(read_log(folder / "log.jsonl"))[1:]]


def test_what_a_run_leaves(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "out"
    command = [str(text), *SHORT, "--steps", "8", "--eval-every", "3", "--optimizer", "lowrank_muon:rank=4,lr=1e-2"]
    assert main([*command, "--out", str(out), "--checkpoint-every", "4"]) == 0
    assert "lowrank_muon:rank=4 lr 0.01 seed 0: validation " in capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {".lock", "checkpoint.pt", "curves.png", "log.jsonl", "result.json"}
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    header, *records = read_log(out / "log.jsonl")
    assert header["config"]["lr"] == 0.01
    assert header["config"]["optimizer"] == "lowrank_muon:rank=4"
    assert header["versions"]["torch"] == metadata.version("torch")
    assert header["parameters"] > 25_000
    assert header["threads"] == 1
    assert [r["step"] for r in records] == list(range(1, 9))
    assert [r["step"] for r in records if "validation" in r] == [3, 6, 8]
    assert all(0 < r["optimizer_share"] < 1 and r["tokens_per_s"] > 0 for r in records)
    assert records[2]["lr"] == 0.01
    result = json.loads((out / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["validation"] == records[-1]["validation"] == result["curve"][-1][1]
    assert result["config"] == header["config"]


def test_nothing_is_written_without_out(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(text), *SHORT, "--steps", "2", "--optimizer", "adamw"]) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("threads", ["1", "2"])
def test_same_command_twice_gives_the_same_losses(tmp_path: Path, text: Path, threads: str) -> None:
    command = [str(text), *SHORT, "--steps", "12", "--no-plot", "--threads", threads, "--clip", "1"]
    before = torch.get_num_threads()
    try:
        for name in ("a", "b"):
            assert main([*command, "--out", str(tmp_path / name)]) == 0
    finally:
        torch.set_num_threads(before)
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")
    assert len(log_of(tmp_path / "a")) == 12


def test_random_state_of_torch_is_left_alone(text: Path) -> None:
    before = torch.random.get_rng_state()
    assert main([str(text), *SHORT, "--steps", "2"]) == 0
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(("dtype", "wanted"), [("float64", torch.float64), ("bfloat16", torch.float32)])
def test_losses_have_at_least_single_precision(text: Path, dtype: str, wanted: torch.dtype) -> None:
    given = options.parse([str(text), "--size", "pico", "--dtype", dtype, "--threads", "1"])
    read = options.read(given)
    run = Trainer.build(options.config(given, read, Spec.parse("adamw"), given.lr, 0), read)
    run.advance(Clock("cpu"))
    assert run.pending[0][1].dtype == wanted


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_it_learns(tmp_path: Path, text: Path, model: str) -> None:
    command = [str(text), *SHORT, "--steps", "100", "--model", model, "--lr", "3e-2", "--no-plot"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    records = log_of(tmp_path / "out")
    assert records[0]["loss"] > 2.5
    assert records[-1]["validation"] < 1.8


def test_default_text_is_the_standard_library(tmp_path: Path) -> None:
    assert main([*SHORT, "--steps", "2", "--optimizer", "adamw", "--out", str(tmp_path / "out"), "--no-plot"]) == 0
    header = next(read_log(tmp_path / "out" / "log.jsonl"))
    assert header["text"] == "the Python standard library"
    assert sum(header["tokens"].values()) > 3_000_000


def test_diverged_run(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(text), *SHORT, "--steps", "20", "--optimizer", "adamw", "--lr", "1e30"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 1
    assert "no longer finite after step" in capsys.readouterr().err
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["status"] == "diverged"
    assert result["validation"] is None
    assert result["step"] == len(log_of(tmp_path / "out")) < 20


def checkpointed(text: Path, out: Path, steps: int) -> list[str]:
    more = ["--steps", str(steps), "--eval-every", "50", "--checkpoint-every", "7", "--no-plot"]
    return [str(text), *SHORT, *more, "--optimizer", "lowrank_muon:rank=4", "--out", str(out)]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_run_continues_bit_identically(tmp_path: Path, text: Path) -> None:
    whole, killed, steps = tmp_path / "whole", tmp_path / "killed", 240
    assert main(checkpointed(text, whole, steps)) == 0
    process = subprocess.Popen([sys.executable, "-m", "orthlin.torch.train", *checkpointed(text, killed, steps)])
    try:
        while process.poll() is None and not (killed / "checkpoint.pt").exists():
            time.sleep(0.002)
        time.sleep(0.05)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not (killed / "result.json").exists()
    (killed / ".checkpoint.pt.1.part").write_bytes(b"of a write that was interrupted")
    with (killed / "log.jsonl").open("ab") as log:
        log.write(b'{"step": 239, "lo')
    assert main([*checkpointed(text, killed, steps), "--resume"]) == 0
    assert log_of(killed) == log_of(whole)
    assert not list(killed.glob("*.part"))
    ends = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, killed)]
    assert ends[0]["step"] == ends[1]["step"] == steps
    assert all(torch.equal(ends[0]["model"][name], ends[1]["model"][name]) for name in ends[0]["model"])


def test_existing_run_is_kept(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = checkpointed(text, tmp_path / "out", 7)
    assert main(command) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert main(command) == 2
    assert "--resume continues it, --overwrite replaces it" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert main([*command, "--resume"]) == 0  # nothing left to do
    assert main([*command, "--overwrite", "--seed", "3"]) == 0
    assert json.loads((tmp_path / "out" / "result.json").read_text())["config"]["seed"] == 3


@pytest.mark.parametrize("seconds", ["1e-9", "1e9"])
def test_a_run_that_runs_out_of_time_says_so_and_goes_on(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], seconds: str
) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert main(checkpointed(text, whole, 3)) == 0
    assert main([*checkpointed(text, parted, 3), "--seconds", seconds]) == 0
    result = json.loads((parted / "result.json").read_text())
    stopped = seconds == "1e-9"
    assert result["status"] == ("stopped" if stopped else "finished")
    assert (result["validation"] is None, result["step"]) == (stopped, 1 if stopped else 3)
    assert ("stopped after step 1, --seconds are over" in capsys.readouterr().err) == stopped
    assert main([*checkpointed(text, parted, 3), "--resume"]) == 0
    assert log_of(parted) == log_of(whole)


@pytest.mark.filterwarnings("ignore")  # of tracers about themselves
def test_compiled_model(tmp_path: Path, text: Path) -> None:
    for name, more in {"plain": [], "compiled": ["--compile=eager", "--amp", "--checkpoint-every", "2"]}.items():
        assert main([str(text), *SHORT, "--steps", "4", "--no-plot", *more, "--out", str(tmp_path / name)]) == 0
    header = next(read_log(tmp_path / "compiled" / "log.jsonl"))
    assert header["config"]["compile"] == "eager"
    plain, compiled = ([r["loss"] for r in log_of(tmp_path / name)] for name in ("plain", "compiled"))
    assert plain == pytest.approx(compiled, rel=2e-2)
    assert plain != compiled  # bfloat16
    assert "transformer.wte.weight" in torch.load(tmp_path / "compiled" / "checkpoint.pt", weights_only=True)["model"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lowrank_muon:rank=4", "lowrank_msgd:rank=4,warm_start=True"])
def test_captured_steps(monkeypatch: pytest.MonkeyPatch, text: Path, optimizer: str) -> None:
    """A stand-in for graphs: a recorded call is made later, with the very tensors that were there."""
    held: list[Any] = []

    def graph_of(call: Callable[[], None]) -> Callable[[], None]:
        groups = [group for o in trainers[1].optimizers for group in o.param_groups]
        held.extend((p, p.grad.data_ptr()) for group in groups for p in group["params"] if p.grad is not None)
        held.extend((group, group["lr"].data_ptr()) for group in groups)
        return call

    monkeypatch.setattr(captured, "graph_of", graph_of)
    given = options.parse([str(text), *SHORT, "--steps", "8"])
    read = options.read(given)
    plain = options.config(given, read, Spec.parse(optimizer), 1e-2, 0)
    trainers = [Trainer.build(config, read) for config in (plain, replace(plain, capture=True))]
    for _ in range(8):
        for trainer in trainers:
            trainer.advance(Clock("cpu"))
    losses = [[record["loss"] for record in trainer.collect(Clock("cpu"))] for trainer in trainers]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # rates are float32 where a graph reads them
    assert losses[0][-1] < losses[0][0]
    assert held
    assert all(at == (x.grad if isinstance(x, torch.Tensor) else x["lr"]).data_ptr() for x, at in held)
    states = [[group.get("step") for o in t.optimizers for group in o.param_groups] for t in trainers]
    assert states[0] == states[1]


@pytest.mark.parametrize(
    ("optimizer", "message"), [("torch_muon", "not capturable"), ("lowrank_muon:warm_start=False", "warm_start=True")]
)
def test_what_cannot_be_captured(text: Path, optimizer: str, message: str) -> None:
    given = options.parse([str(text), *SHORT])
    read = options.read(given)
    config = replace(options.config(given, read, Spec.parse(optimizer), 1e-2, 0), capture=True)
    with pytest.raises(OptionError, match=message):
        Trainer.build(config, read)


def test_two_processes_do_not_share_a_folder(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fcntl")
    with locked(tmp_path):
        assert main([str(text), *SHORT, "--steps", "2", "--out", str(tmp_path)]) == 2
    assert "another process is writing there" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.txt"], r"text missing.txt: No such file"),
        (["--context", "3000000"], "--context 3000000 needs at least 3000001"),
        (["TEXT", "--optimizer", "sgd"], "optimizer 'sgd' is unknown; accepted are adamw"),
        (["TEXT", "--optimizer", "adamw:rank=3"], "optimizer adamw:rank=3: no option 'rank'; accepted are lr"),
        (["TEXT", "--optimizer", "muon:adamw_beta=3"], "no option 'adamw_beta'|no option 'beta'"),
        (["TEXT", "--optimizer", "lowrank_muon:rank=-1"], "optimizer lowrank_muon:rank=-1: .*rank"),
        (["TEXT", "--optimizer", "lowrank_muon:sketch=fast"], "sketch"),
        (["TEXT", "--optimizer", "adamw:lr='a'"], "lr is 'a'; a number above zero"),
        (["TEXT", "--resume"], "--resume: there is no checkpoint"),
        (["TEXT", "--resume", "--overwrite"], "exclude each other"),
        (["TEXT", "--seeds", "1", "2"], "need --compare"),
        (["TEXT", "--device", "abacus"], "--device abacus"),
        (["TEXT", "--device", "meta"], "accepted are cpu, cuda"),
        (["TEXT", "--capture"], "--capture needs --device cuda, got cpu"),
        (["TEXT", "--compile", "fortran"], "--compile fortran: accepted are .*inductor"),
        (["TEXT", "--compare", "muon", "--seconds", "5"], "--compare and --seconds exclude each other"),
        (["TEXT", "--compare", "muon", "--shard"], "--compare and --shard exclude each other"),
        (["TEXT", "--compare", "muon", "adamw:a=1"], "no option 'a'"),
        (["TEXT", "--compare", "muon", "--optimizer", "muon"], "exclude each other"),
    ],
)
def test_usage_errors(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    given = [str(text) if argument == "TEXT" else argument for argument in arguments]
    assert main(["--size", "pico", "--out", str(tmp_path / "out"), *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("orthlin: error: ")
    assert error.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(error)
    assert list(tmp_path.iterdir()) == []


def test_an_ended_run_without_its_log_is_not_resumed(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = [str(text), *SHORT, "--steps", "4", "--checkpoint-every", "2", "--no-plot", "--out", str(out)]
    assert main(given) == 0
    assert main([*given, "--resume"]) == 0
    (out / "log.jsonl").unlink()
    assert main([*given, "--resume"]) == 2
    assert "its log is gone; --overwrite repeats it" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--resume", "--overwrite", "--checkpoint-every=5", "--compare=muon"])
def test_options_that_need_a_folder(text: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    assert main([str(text), option]) == 2
    assert f"{option.partition('=')[0]} needs --out DIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        *[
            ["--size", "huge"],
            ["--model", "bert"],
            ["--lr", "0"],
            ["--lr", "inf"],
            ["--steps", "0"],
            ["--final-lr", "2"],
        ],
        *[
            [option, digits]
            for option in ("--seed", "--seeds", "--batch", "--warmup")
            for digits in ("9" * 19, "9" * 9999)
        ],
    ],
    ids=lambda arguments: " ".join(arguments)[:30],
)
def test_argparse_errors(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_progress_bar(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loud = [argument for argument in SHORT if argument != "--quiet"]
    assert main([str(text), *loud, "--steps", "4", "--eval-every", "2"]) == 0
    shown = capsys.readouterr().err
    assert "step 2: loss" in shown
    assert "tokens/s, optimizer" in shown
    assert "4/4" in shown


def test_missing_matplotlib_is_said(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([str(text), *SHORT, "--steps", "2", "--out", str(tmp_path / "out")]) == 0
    assert "no curves without matplotlib: pip install matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "out" / "curves.png").exists()


def test_missing_transformers_is_said(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main([str(text), *SHORT, "--steps", "2"]) == 2
    assert "needs transformers: pip install transformers" in capsys.readouterr().err


def test_command_from_a_shell(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "orthlin.torch.train", "missing.txt", "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONWARNINGS": "error"},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "orthlin: error: text missing.txt: No such file or directory\n"
    assert not (tmp_path / "out").exists()
