"""Files are old or new, whole, at whatever moment the process ends."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from orthlin.torch.train.files import write_atomically

FULL = os.environ.get("ORTHLIN_FULL") == "1"
KILLED = """
    import io, os, random, signal, sys, time
    from pathlib import Path
    import torch
    from orthlin.torch.train.checkpoint import _unpack, save
    from orthlin.torch.train.config import Config

    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    path, chosen = folder / "checkpoint.pt", random.Random(0)
    config = Config(**{name: 0 for name in Config.__dataclass_fields__})
    model, counted = torch.nn.Linear(300, 300), set()

    def write(step):
        model.weight.data.fill_(step)
        save(path, config, step, 0.0, model, [])

    write(1)
    start = time.perf_counter()
    write(1)
    taken = time.perf_counter() - start
    for kill in range(kills):
        ready, begun = os.pipe()
        child = os.fork()
        if not child:
            for step in range(2, 10**6):
                os.write(begun, b".")
                write(step)
        os.read(ready, 1)
        time.sleep(chosen.uniform(0, 3 * taken))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready), os.close(begun)
        content = _unpack(path.read_bytes(), path)
        if not bool((content["model"]["weight"] == content["step"]).all()):
            sys.exit("mixed")
        counted.add(len(list(folder.glob(".*.part"))))
    print("interrupted", max(counted))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_while_saving(tmp_path: Path) -> None:
    kills = 200 if FULL else 20
    script = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), str(kills)]
    done = subprocess.run(script, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 0  # some were killed in the middle of a write


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]
