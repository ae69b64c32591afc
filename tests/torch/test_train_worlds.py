"""Training by several processes: that of one, to rounding, and what is left when one of them is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from test_train_run import log_of
from torch.optim.optimizer import register_optimizer_step_pre_hook

from orthlin.torch.train import checkpoint, files, loop, options, world
from orthlin.torch.train.__main__ import main
from orthlin.torch.train.config import Spec
from orthlin.torch.train.loop import Clock, Trainer

pytest.importorskip("transformers", reason="transformers is not installed")
STEPS, EVERY = 12, 3
COMMON = ["--size", "pico", "--steps", str(STEPS), "--warmup", "2", "--eval-every", "0", "--eval-batches", "2"]
COMMON += ["--lr", "1e-2", "--clip", "1", "--checkpoint-every", str(EVERY), "--threads", "1", "--quiet", "--no-plot"]
MODES: dict[str, list[str]] = {"copies": [], "shards": ["--shard"]}
LOW_RANK = "lowrank_muon:rank=8,adamw_eps=1e-4"
# The unit of rounding in the products of the optimizer: PyTorch's Muon multiplies in half precision.
OPTIMIZERS = {
    LOW_RANK: torch.float32,
    "lowrank_muon:rank=8,tail=0.0,n_iter=1,adamw_eps=1e-4": torch.float32,
    "muon:schedule=None,adamw_eps=1e-4": torch.float32,
    "lowrank_msgd:rank=8,adamw_eps=1e-4": torch.float32,
    "adamw:eps=1e-4": torch.float32,
    "torch_muon:adamw_eps=1e-4": torch.bfloat16,
}


def command(text: Path, out: Path, *more: str, optimizer: str = LOW_RANK) -> list[str]:
    return [str(text), *COMMON, "--optimizer", optimizer, "--out", str(out), *more]


def losses_of(folder: Path) -> torch.Tensor:
    records = log_of(folder)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    return torch.tensor([*(record["loss"] for record in records), records[-1]["validation"]], dtype=torch.float64)


def alone(text: Path, optimizer: str, noise: float = 0.0) -> torch.Tensor:
    """Losses of one process, with noise in every gradient."""
    given = options.parse([str(text), *COMMON, "--out", "unused"])
    read = options.read(given)
    run = Trainer.build(options.config(given, read, Spec.parse(optimizer), given.lr, 0), read)
    generator = torch.Generator().manual_seed(1)

    def disturb(*_: Any) -> None:
        for p in run.model.parameters():
            p.grad.add_(noise * p.grad.square().mean().sqrt() * torch.randn(p.shape, generator=generator))

    run.optimizers[0].register_step_pre_hook(disturb)
    for _ in range(STEPS):
        run.advance(Clock("cpu"))
    losses = [record["loss"] for record in run.collect(Clock("cpu"))]
    return torch.tensor([*losses, run.evaluate()], dtype=torch.float64)


@cache
def expected(text: Path, optimizer: str) -> tuple[torch.Tensor, float]:
    """Losses of one process, and how far off others may be: some eps, of their size and times the condition."""
    losses, size = alone(text, optimizer), 2.0**-12
    condition = max((alone(text, optimizer, x) - losses).abs().max().item() for x in (size, -size)) / size
    eps = torch.finfo(torch.float32).eps, torch.finfo(OPTIMIZERS[optimizer]).eps
    return losses, 4 * (eps[0] * losses.max().item() + eps[1] * condition)


def assert_as_alone(folder: Path, text: Path, optimizer: str = LOW_RANK) -> None:
    losses, bound = expected(text, optimizer)
    assert losses[-1] < losses[0] - 0.1
    assert (losses_of(folder) - losses).abs().max().item() <= bound


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of two processes."""
    folders = {}
    for name, more in MODES.items():
        folders[name] = tmp_path_factory.mktemp("whole") / "out"
        done = worlds.train(command(text, folders[name], *more), 2, folders[name].parent)
        assert [code for code, _ in done] == [0, 0]
        assert done[0][1].startswith("lowrank_muon:adamw_eps=0.0001,rank=8 lr 0.01 seed 0: validation ")
        assert done[1][1] == ""  # one speaks for all
    return folders


@pytest.mark.parametrize("mode", MODES)
def test_what_several_processes_leave(undisturbed: dict[str, Path], text: Path, tmp_path: Path, mode: str) -> None:
    out = undisturbed[mode]
    assert main(command(text, tmp_path / "alone")) == 0
    names = [{path.name for path in folder.iterdir()} for folder in (out, tmp_path / "alone")]
    assert names[0] == names[1] == {".lock", "checkpoint.pt", "log.jsonl", "result.json"}
    headers = [next(files.read_log(folder / files.LOG)) for folder in (out, tmp_path / "alone")]
    assert [(header["processes"], header["shard"]) for header in headers] == [(2, mode == "shards"), (1, False)]
    assert all(header["config"] == headers[0]["config"] for header in headers)
    found, wanted = (torch.load(folder / files.CHECKPOINT, weights_only=True) for folder in (out, tmp_path / "alone"))
    assert checkpoint.mismatch(found, wanted, "") is None
    assert json.loads((out / files.RESULT).read_text())["status"] == "finished"
    assert_as_alone(out, text)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("optimizer", "processes"), [(name, 4 if name == LOW_RANK else 2) for name in OPTIMIZERS])
def test_losses_are_those_of_one_process(tmp_path: Path, text: Path, optimizer: str, processes: int, mode: str) -> None:
    done = worlds.train(command(text, tmp_path / "out", *MODES[mode], optimizer=optimizer), processes, tmp_path)
    assert [code for code, _ in done] == [0] * processes
    assert_as_alone(tmp_path / "out", text, optimizer)


def test_another_model(tmp_path: Path, text: Path) -> None:
    more = ["--model", "llama", "--shard"]
    assert [code for code, _ in worlds.train(command(text, tmp_path / "two", *more), 2, tmp_path)] == [0, 0]
    assert main(command(text, tmp_path / "one", *more)) == 0  # alone, one part is the whole
    change = losses_of(tmp_path / "two") - losses_of(tmp_path / "one")
    assert change.abs().max().item() <= expected(text, LOW_RANK)[1]


def kill(after: int) -> Callable[..., None]:
    """A call that ends the process at once, the so-many-th time."""
    left = [after]

    def call(*_: Any) -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    return call


def in_backward(who: int, rank: int) -> None:
    """After the forward pass of step 8, so that the others wait for gradients."""
    plain, fuse = loop.loss_of, kill(8)

    def loss_of(*args: Any) -> Any:
        loss = plain(*args)
        fuse()
        return loss

    if rank == who:
        loop.loss_of = loss_of


def in_optimizer(who: int, rank: int) -> None:
    """Before the optimizer of step 8."""
    if rank == who:
        register_optimizer_step_pre_hook(kill(8))


def in_write(who: int, rank: int) -> None:
    """When half of the second checkpoint is written."""
    plain, written = checkpoint.write_atomically, []

    def write(path: Path, content: Any) -> None:
        written.append(path)
        if len(written) == 2:
            os.fsync, content = kill(1), content[: len(content) // 2]
        plain(path, content)

    if rank == who:
        checkpoint.write_atomically = write


def in_gathering(who: int, rank: int) -> None:
    """While the tensors of the second checkpoint are gathered."""
    plain, fuse, saves = checkpoint.save, kill(10), []

    def save(*args: Any) -> None:
        saves.append(1)
        if len(saves) == 2:
            whole = world.whole
            world.whole = lambda x: (fuse(), whole(x))[1]
        plain(*args)

    if rank == who:
        checkpoint.save = save


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize(
    ("mode", "size", "when", "who", "step"),
    [
        ("copies", 4, in_backward, 1, 6),
        ("copies", 2, in_optimizer, 0, 6),
        ("copies", 4, in_write, 0, 3),
        ("shards", 2, in_backward, 0, 6),
        ("shards", 4, in_optimizer, 3, 6),
        ("shards", 2, in_write, 0, 3),
        ("shards", 4, in_gathering, 1, 3),
    ],
)
def test_a_process_is_killed(
    undisturbed: dict[str, Path],
    tmp_path: Path,
    text: Path,
    mode: str,
    size: int,
    when: Callable[[int, int], None],
    who: int,
    step: int,
) -> None:
    killed, start = tmp_path / "killed", time.monotonic()
    done = worlds.train(command(text, killed, *MODES[mode]), size, tmp_path, partial(when, who))
    assert [code for code, _ in done] == [-signal.SIGKILL if rank == who else 1 for rank in range(size)]
    for rank, (_, output) in enumerate(done):
        if rank != who:
            assert (f"process {rank} of {size}" in output) == (rank > 0)
            assert "error: another process is gone or does not answer: " in output
            assert "Traceback" not in output
    assert time.monotonic() - start < world.TIMEOUT.total_seconds()
    assert not (killed / files.RESULT).exists()
    assert bool(list(killed.glob("*.part"))) == (when is in_write)
    assert torch.load(killed / files.CHECKPOINT, weights_only=True)["step"] == step
    other = next(name for name in MODES if name != mode)
    resumed = [("two", 2, mode)] + [("one", 1, mode), ("other", 2, other)] * (size == 2)
    for name, processes, how in resumed:
        out = tmp_path / name
        out.mkdir()
        for path in killed.iterdir():
            (out / path.name).write_bytes(path.read_bytes())
        given = command(text, out, "--resume", *MODES[how])
        codes = [main(given)] if processes == 1 else [code for code, _ in worlds.train(given, processes, tmp_path)]
        assert codes == [0] * processes
        assert not list(out.glob("*.part"))
        assert_as_alone(out, text)
    assert [code for code, _ in worlds.train(given, processes, tmp_path)] == [0] * processes  # which has ended
    if size == 2:
        assert_same(tmp_path / "two", undisturbed[mode])


def assert_same(found: Path, wanted: Path) -> None:
    """The same losses and the same state, bit for bit."""
    assert log_of(found) == log_of(wanted)
    ends = [torch.load(folder / files.CHECKPOINT, weights_only=True) for folder in (found, wanted)]
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    world.mapped(lambda a, b: pairs.append((a, b)), *({k: x[k] for k in ("model", "optimizers")} for x in ends))
    assert len(pairs) > 50
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_torchrun_stops_what_is_left_and_a_second_call_goes_on(
    undisturbed: dict[str, Path], tmp_path: Path, text: Path
) -> None:
    here, script = Path(__file__), tmp_path / "killed.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(here.parent)!r})\n"
        f"from {here.stem} import in_backward, main\nin_backward(1, int(os.environ['RANK']))\nsys.exit(main())\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(["", *sys.path])}
    for start, code, more in (([str(script)], 1, []), (["-m", "orthlin.torch.train"], 0, ["--resume"])):
        given = [*torchrun, *start, *command(text, tmp_path / "out", *more)]
        done = subprocess.run(given, capture_output=True, text=True, check=False, env=environment, timeout=300)
        assert done.returncode == code, done.stderr
    assert_same(tmp_path / "out", undisturbed["copies"])


@pytest.mark.parametrize("mode", MODES)
def test_an_error_ends_all_processes(tmp_path: Path, text: Path, mode: str) -> None:
    """A checkpoint is read by all; that a folder is taken is seen by the first."""
    out = tmp_path / "out"
    out.mkdir()
    (out / files.CHECKPOINT).write_bytes(b"of nothing")
    taken = ([], [2, 1], f"--out {out} holds a run"), (["--resume"], [2, 2], f"checkpoint {out / files.CHECKPOINT} ")
    for more, codes, message in taken:
        done = worlds.train(command(text, out, *MODES[mode], *more), 2, tmp_path)
        assert [code for code, _ in done] == codes
        assert done[0][1].startswith(f"orthlin: error: {message}")
        assert done[1][1].startswith("orthlin: process 1 of 2: error: ")
        assert [path.name for path in out.iterdir()] == [files.CHECKPOINT]


def test_time_is_over_for_all_or_for_none(tmp_path: Path, text: Path) -> None:
    done = worlds.train(command(text, tmp_path / "out", "--seconds", "1e-9"), 2, tmp_path)
    assert [code for code, _ in done] == [0, 0]
    assert json.loads((tmp_path / "out" / files.RESULT).read_text())["status"] == "stopped"
    assert torch.load(tmp_path / "out" / files.CHECKPOINT, weights_only=True)["step"] == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--compare", "muon"], "--compare is accepted with one process, here are 3: leave out torchrun"),
        (["--capture", "--device", "cuda"], "--capture is accepted with one process, here are 3"),
        (["--batch", "8"], "--batch 8: 3 processes take equal parts of it; accepted are multiples of 3"),
        ([], "--batch 4: 3 processes take equal parts of it"),
        (["--batch", "6", "--device", "cpu:0"], "--device cpu:0: 3 processes choose their own"),
        (
            ["--batch", "6", "--device", "cuda:1"],
            "--device cuda:1: 3 processes choose their own; accepted are cpu and cuda",
        ),
    ],
)
def test_what_several_processes_do_not_do(
    tmp_path: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    given = [str(text), "--size", "pico", "--out", str(tmp_path / "out")]
    assert main([*given, *more]) == 2
    assert capsys.readouterr().err.startswith(f"orthlin: process 2 of 3: error: {message}")
    assert list(tmp_path.iterdir()) == []
