import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import orthlin
from orthlin.__main__ import Reference, load_gradient, main

NUMPY = SimpleNamespace(name="numpy", asarray=np.asarray, to_numpy=np.asarray, wait=lambda x: x)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def only_numpy(monkeypatch):
    monkeypatch.setattr("orthlin._backend.installed", lambda: [NUMPY])


@pytest.fixture
def gradient(tmp_path):
    """A decaying 12 x 20 matrix in a file, its size and path as a user would have them."""
    matrix = np.random.default_rng(3).standard_normal((12, 20)) * 0.7 ** np.arange(12)[:, None]
    np.save(tmp_path / "g.npy", matrix)
    return tmp_path / "g.npy"


def python(*arguments):
    checkout = str(Path(orthlin.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "orthlin", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": checkout},
    )


def rows(output):
    """The lines of the table, split into words."""
    return [line.split() for line in output.splitlines() if line.startswith("numpy ") and "," not in line]


def test_table_has_a_row_for_each_routine_and_rank(gradient, capsys):
    assert main(["--gradient", str(gradient), "--ranks", "2", "5", "12", "--repeat", "2"]) == 0
    output = capsys.readouterr().out
    table = rows(output)
    assert output.startswith(f"{gradient}: 12 x 20, float64")
    assert [(row[1], row[2]) for row in table] == [
        ("polar", "12"),
        ("orthogonalize", "12"),
        ("lowrank_orth", "2"),
        ("lowrank_orth", "5"),
        ("lowrank_orth", "12"),
    ]
    assert table[0][4] == "1.0"
    captured = [float(row[5]) for row in table]
    assert captured[0] == pytest.approx(1, abs=1e-3)
    assert captured[2] < captured[3] < captured[4] == pytest.approx(1, abs=1e-3)
    assert all(float(row[6]) < 1e-10 for row in table if row[1] != "orthogonalize")


def test_columns_line_up(gradient, capsys):
    main(["--gradient", str(gradient), "--ranks", "2", "12", "--repeat", "1"])
    lines = capsys.readouterr().out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("library"))
    assert len({len(line) for line in lines[header : header + 5]}) == 1


def test_same_seed_same_result(gradient, capsys):
    seen = []
    for seed in ("7", "7", "8"):
        main(["--gradient", str(gradient), "--ranks", "3", "--repeat", "1", "--seed", seed])
        seen.append([row[5:] for row in rows(capsys.readouterr().out)])
    assert seen[0] == seen[1] != seen[2]


def test_shipped_gradient_is_a_real_one():
    matrix = load_gradient(None)
    assert matrix.shape == (192, 768)
    assert matrix.dtype == np.float32
    sigma = Reference.of(matrix).sigma
    assert sigma[0] > 100 * sigma[-1] > 0


def test_default_ranks_fit_the_matrix(tmp_path, capsys):
    np.save(tmp_path / "small.npy", np.random.default_rng(0).standard_normal((20, 11), dtype=np.float32))
    assert main(["--gradient", str(tmp_path / "small.npy"), "--repeat", "1"]) == 0
    assert [row[2] for row in rows(capsys.readouterr().out)] == ["11", "11", "8", "11"]


def test_error_is_judged_over_the_directions_that_exist():
    matrix = np.zeros((4, 5))
    matrix[0, 0] = 2
    reference = Reference.of(matrix)
    assert reference.rank == 1
    assert reference.error(matrix / 2, 3) == 0
    assert reference.captured(matrix / 2) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (np.ones(3), "shape (3,)"),
        (np.ones((2, 2, 2)), "shape (2, 2, 2)"),
        (np.ones((0, 4)), "shape (0, 4)"),
        (np.ones((2, 3), dtype=int), "int64"),
        (np.ones((2, 3), dtype=complex), "complex128"),
        (np.zeros((2, 3)), "zeros"),
        (np.full((2, 3), np.nan), "NaN"),
        (np.array([[object()]]), "allow_pickle"),
        (b"", "not a .npy file"),
        (b"nonsense, and long enough", "not a .npy file"),
    ],
)
def test_unusable_file(tmp_path, capsys, content, says):
    path = tmp_path / "bad.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    assert main(["--gradient", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"orthlin: error: {path}")
    assert says in err
    assert err.count("\n") == 1


def test_truncated_file(gradient, capsys):
    gradient.write_bytes(gradient.read_bytes()[:-100])
    assert main(["--gradient", str(gradient)]) == 2
    assert "not a .npy file" in capsys.readouterr().err


def test_missing_file(tmp_path, capsys):
    assert main(["--gradient", str(tmp_path / "none.npy")]) == 2
    assert "none.npy" in capsys.readouterr().err


def test_rank_beyond_the_matrix(gradient, capsys):
    assert main(["--gradient", str(gradient), "--ranks", "13"]) == 2
    assert capsys.readouterr().err == "orthlin: error: --ranks 13: a 12 x 20 matrix has rank 12 at most\n"


@pytest.mark.parametrize("arguments", [["--ranks", "0"], ["--repeat", "x"], ["--seed", "-1"], ["--what"]])
def test_bad_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f4", ">f8"])
def test_every_real_dtype_is_read(tmp_path, dtype):
    matrix = np.arange(6.0).reshape(2, 3)
    np.save(tmp_path / "m.npy", np.asfortranarray(matrix.astype(dtype)))
    read = load_gradient(tmp_path / "m.npy")
    assert read.dtype == np.dtype(dtype).newbyteorder("=")
    assert read.dtype.isnative
    np.testing.assert_array_equal(read, matrix)


class TestPlot:
    def test_file_is_written_and_nothing_else(self, gradient, tmp_path, capsys):
        pytest.importorskip("matplotlib")
        plot = tmp_path / "plot.png"
        arguments = ["--gradient", str(gradient), "--ranks", "3", "6", "--repeat", "1", "--plot", str(plot)]
        assert main(arguments) == 0
        assert plot.read_bytes().startswith(PNG)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["g.npy", "plot.png"]
        assert str(plot) in capsys.readouterr().out

    def test_without_matplotlib(self, gradient, tmp_path, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert main(["--gradient", str(gradient), "--plot", str(tmp_path / "plot.png")]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err == "orthlin: error: --plot needs matplotlib: pip install matplotlib\n"

    @pytest.mark.parametrize("name", ["nowhere/plot.png", "plot.txt"])
    def test_impossible_name_is_refused_before_the_run(self, gradient, tmp_path, capsys, name):
        assert main(["--gradient", str(gradient), "--plot", str(tmp_path / name)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("orthlin: error: --plot")

    def test_unwritable_path_leaves_nothing_behind(self, gradient, tmp_path, capsys):
        pytest.importorskip("matplotlib")
        (tmp_path / "plot.png").mkdir()
        arguments = ["--gradient", str(gradient), "--ranks", "2", "--repeat", "1"]
        assert main([*arguments, "--plot", str(tmp_path / "plot.png")]) == 2
        assert "plot.png" in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["g.npy", "plot.png"]


def test_help_in_a_process_of_its_own():
    finished = python("--help")
    assert finished.returncode == 0
    assert "--plot FILE.png" in finished.stdout
    assert finished.stderr == ""


def test_exit_code_in_a_process_of_its_own():
    finished = python("--gradient", "none.npy")
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr.startswith("orthlin: error:")
    assert "Traceback" not in finished.stderr
