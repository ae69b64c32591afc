"""The script that trains on a GPU, on the tiny model that it takes without one."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

SCRIPT = Path(__file__).parents[2] / "asv_bench" / "gpu_train.py"
if not SCRIPT.is_file():
    pytest.skip("the scripts are not part of a source distribution", allow_module_level=True)
found = importlib.util.spec_from_file_location("gpu_train", SCRIPT)
gpu_train: Any = importlib.util.module_from_spec(found)  # type: ignore[arg-type]
found.loader.exec_module(gpu_train)  # type: ignore[union-attr]
if gpu_train.CUDA:
    pytest.skip("here it would train the large model", allow_module_level=True)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("in the beginning was the word and the word was with all of us. " * 20)
    return path


def test_a_part_and_what_there_was_no_time_for(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = "lowrank_1/4:rank=8", "muon"
    done = gpu_train.train

    def train(*given: Any) -> Any:  # the first run takes all the time there is
        row = done(*given)
        monkeypatch.setattr(gpu_train.time, "monotonic", lambda: float("inf"))
        return row

    monkeypatch.setattr(gpu_train, "train", train)
    gpu_train.main([str(text), "--methods", ",".join(methods), "--json", str(tmp_path / "part.json")])
    part = json.loads((tmp_path / "part.json").read_text())
    ran, late = (part["methods"][name] for name in methods)
    assert (ran["status"], ran["step"], ran["peak_memory"]) == ("finished", gpu_train.STEPS, None)
    assert ran["optimizer"] == "lowrank_muon:adamw_lr=0.001,lr=0.002,rank=8"
    assert [step for step, _ in ran["training"]] == list(range(1, gpu_train.STEPS + 1))
    assert [step for step, _ in ran["validation"]] == [3, 6]
    assert ran["tokens_per_s"] > 0 < ran["optimizer_share"] < 1
    assert late == {"optimizer": "muon:adamw_lr=0.001,lr=0.002", "status": "not started", "step": 0}
    assert (part["machine"], part["settings"]["size"]) == ("cpu", "pico")
    assert "not started: no time left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"status": "stopped", "step": 7, "validation": [(5, 2.5)]}, ("2.5000 at 5", "after 7 of 9 steps")),
        ({"status": "diverged", "step": 3}, ("diverged after step 3",)),
        ({"status": "failed", "step": 0, "error": "no memory"}, ("failed after step 0; no memory",)),
        ({"status": "finished", "step": 9, "captured": True, "peak_memory": 2**30}, ("captured", "1024")),
    ],
)
def test_parts_in_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], row: Any, words: Any) -> None:
    def part(number: int, **settings: Any) -> Path:
        path = tmp_path / f"{number}.json"
        known = {"machine": "card", "versions": {"torch": "2"}, "settings": {"steps": 9, **settings}}
        path.write_text(json.dumps({**known, "methods": {f"m{number}": {"optimizer": "muon", **row}}}))
        return path

    gpu_train.main(["--table", *map(str, (part(1), part(2), part(3, seed=1)))])
    first, second = capsys.readouterr().out.split("\n\n")
    assert [line.split()[0] for line in first.splitlines()[2:]] == ["method", "m1", "m2"]
    assert "seed 1" in second
    assert all(word in first and word in second for word in words)


@pytest.mark.parametrize(
    ("losses", "points"), [([], []), ([3.0], [(1, 3.0)]), ([1.0] * 150 + [2.0], [(2, 1.0), (151, 2.0)])]
)
def test_blocks(losses: list[float], points: list[tuple[int, float]]) -> None:
    assert gpu_train.blocks(losses)[:1] + gpu_train.blocks(losses)[-1:] == points[:1] + points[-1:]
    assert len(gpu_train.blocks(losses)) <= gpu_train.BLOCKS


def test_unknown_methods(text: Path) -> None:
    with pytest.raises(SystemExit, match="accepted are adamw, torch_muon"):
        gpu_train.main([str(text), "--methods", "adam"])
