"""Comparisons: the table, cells that fail, and sweeps that are interrupted and extended."""

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import WORDS

from orthlin.torch.train import compare
from orthlin.torch.train.__main__ import main
from orthlin.torch.train.config import Config
from orthlin.torch.train.table import markdown, tabulate


def run(name: str, lr: float, seed: int, loss: float | None, status: str = "finished") -> tuple[Config, dict[str, Any]]:
    fixed: dict[str, Any] = dict.fromkeys(Config.__dataclass_fields__, 0)
    config = Config(**{**fixed, "optimizer": name, "lr": lr, "seed": seed})
    measured = {"validation": loss, "tokens_per_s": 1000.0, "optimizer_share": 0.25, "step": 7, "reason": "no | luck"}
    return config, {"status": status, "curve": [(0, 4.0), (7, loss)], **measured}


def test_table() -> None:
    rows = tabulate(
        [
            run("muon", 0.01, 0, 1.5),
            run("muon", 0.003, 0, 1.25),
            run("adamw", 0.003, 0, None, "diverged"),
            run("muon", 0.01, 1, 2.5),
            run("muon", 0.003, 1, None, "failed"),
        ]
    )
    assert [(row["optimizer"], row["lr"], row["best"]) for row in rows] == [
        ("muon", 0.003, False),  # lost a run
        ("muon", 0.01, True),
        ("adamw", 0.003, False),
    ]
    assert (rows[1]["validation"], rows[1]["min"], rows[1]["max"], rows[1]["runs"]) == (2.0, 1.5, 2.5, 2)
    assert [row["curves"] for row in rows[1:]] == [[[(0, 4.0), (7, 1.5)], [(0, 4.0), (7, 2.5)]], []]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown(rows).splitlines()]
    assert lines[0][:3] == ["optimizer", "lr", "validation loss"]
    assert lines[2:] == [
        ["muon", "0.003", "1.2500", "1.2500 - 1.2500", "1/2", "1000", "25.0%", "seed 1: failed, no / luck"],
        ["muon", "0.01", "**2.0000 ± 0.7071**", "1.5000 - 2.5000", "2/2", "1000", "25.0%", ""],
        ["adamw", "0.003", "-", "-", "0/1", "-", "-", "seed 0: diverged after step 7"],
    ]
    assert len({len(line) for line in markdown(rows).splitlines()}) == 1


def test_folder_names_differ_where_specifications_do() -> None:
    names = ["adamw", "muon:scale='rms'", "muon:scale=(rms)", "lowrank_muon:rank=32,warm_start=False", "a/b", "a:b"]
    folders = [compare.name_of(name) for name in names]
    assert len(set(folders)) == len(names)
    assert folders[0] == "adamw"
    assert folders[3] == "lowrank_muon-rank=32,warm_start=False"
    assert all("/" not in folder and ":" not in folder for folder in folders)


def test_a_sweep_with_a_failure_is_repeated_and_extended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(WORDS * 40)
    sizes = ["--size", "pico", "--steps", "4", "--warmup", "1", "--eval-batches", "2", "--threads", "1", "--quiet"]
    specs = ["--compare", "adamw", "lowrank_muon:rank=4,lr=0.02"]
    base = [str(text), *sizes, *specs, "--lrs", "0.003", "--jobs", "2", "--out", str(out)]
    blocked = out / "adamw" / "lr=0.003" / "seed=1"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("in the way")

    assert main([*base, "--seeds", "1"]) == 1  # one cell cannot be run, the other is
    shown = capsys.readouterr().out
    assert "failed, orthlin: error: --out" in shown
    assert shown == (out / "comparison.md").read_text()
    rows = json.loads((out / "comparison.json").read_text())
    assert [(row["optimizer"], row["lr"], row["runs"]) for row in rows] == [
        ("adamw", 0.003, 0),
        ("lowrank_muon:rank=4", 0.02, 1),
    ]
    folder = out / "lowrank_muon-rank=4" / "lr=0.02" / "seed=1"
    assert {p.name for p in folder.iterdir()} == {".lock", "log.jsonl", "result.json"}
    before = (folder / "result.json").stat().st_mtime_ns

    blocked.unlink()
    assert main([*base, "--seeds", "1"]) == 0  # only what failed is run again
    assert (folder / "result.json").stat().st_mtime_ns == before
    assert [row["runs"] for row in json.loads((out / "comparison.json").read_text())] == [1, 1]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    again = json.loads((blocked / "result.json").read_text())
    alone = tmp_path / "alone"
    assert main([str(text), *sizes, "--optimizer", "adamw", "--seed", "1", "--out", str(alone), "--no-plot"]) == 0
    assert json.loads((alone / "result.json").read_text())["validation"] == again["validation"]

    monkeypatch.setattr(compare.subprocess, "Popen", None)  # nothing left to start
    capsys.readouterr()
    assert main([*base, "--seeds", "1"]) == 0


def test_results_of_another_sweep_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(WORDS * 40)
    folder = out / "adamw" / "lr=0.003" / "seed=0"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text('{"status": "finished", "config": {"steps": 4}}')
    assert main([str(text), "--size", "pico", "--compare", "adamw", "--steps", "5", "--out", str(out)]) == 2
    assert "holds another run: " in (error := capsys.readouterr().err)
    assert "steps is 4 there and 5 here" in error
    assert [path for path in out.rglob("*") if path.is_file()] == [folder / "result.json"]


def test_workers_end_with_the_command() -> None:
    workers = compare.Workers()
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(workers.run, sleep, os.environ)
        while not workers._alive and not running.done():
            time.sleep(0.01)
        workers.stop()
        assert running.result(timeout=30)[0] != 0
    assert workers.run(sleep, os.environ) == (-1, "stopped")
