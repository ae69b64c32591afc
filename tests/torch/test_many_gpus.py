"""The script for a machine with several GPUs, on two processes of the host."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "asv_bench" / "many_gpus.py"
if not SCRIPT.is_file():
    pytest.skip("the benchmarks are not part of a source distribution", allow_module_level=True)


def test_it_judges_every_optimizer(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    path = tmp_path / "facts.json"
    done = subprocess.run(
        [*command, f"--json={path}"], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(path.read_text())
    found = {name: fact for name, fact in facts.items() if isinstance(fact, dict) and "step" in fact}
    assert [*found] == ["AdamW fused", "LowRankMuon r=4", "LowRankMuon r=k/4", "Muon"]
    assert all(fact["difference"] <= 1e-4 for fact in found.values())
    low, full = found["LowRankMuon r=4"], found["Muon"]
    assert low["collectives"] == 6  # two for each of three shapes
    assert low["bytes"] < full["bytes"]
