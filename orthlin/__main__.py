"""Orthogonalize a real gradient at several ranks on every array library found on this machine.

``python -m orthlin`` needs NumPy alone.  The matrix is the gradient that ships with the package, from
a small GPT-2 (``asv_bench/make_gradient.py`` makes it again), or the one given with ``--gradient``.
"""

import argparse
import functools
import io
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata, resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import orthlin
from orthlin import _backend
from orthlin.errors import DTypeError, NonFiniteError, OptionError, OrthlinError, RankError, ShapeError

DEFAULT_RANKS = (8, 16, 32, 64, 128)
PLOT_DRAWS = 5
PLOT_RANKS = 12
PLOT_WAYS: tuple[tuple[str, dict[str, Any], str, str], ...] = (
    ("one power iteration", {"n_iter": 1}, "tab:blue", "-"),
    ("Gaussian sketch", {"n_iter": 0}, "tab:orange", "-"),
    ("column selection", {"n_iter": 0, "sketch": "columns"}, "tab:green", ":"),
)

Array = npt.NDArray[Any]


class Row(NamedTuple):
    """One line of the table; the numbers are milliseconds, a ratio, a fraction and a distance."""

    routine: str
    rank: int
    time: float
    speed: float
    captured: float
    error: float


@dataclass(frozen=True)
class Reference:
    """What NumPy's SVD in float64 says about the matrix."""

    matrix: Array
    sigma: Array
    rank: int

    @classmethod
    def of(cls, gradient: Array) -> "Reference":
        """Decompose; the numerical rank is that of the dtype the matrix came in."""
        matrix = gradient.astype(np.float64)
        sigma = np.linalg.svd(matrix, compute_uv=False)
        noise = max(gradient.shape) * float(np.finfo(gradient.dtype).eps) * sigma[0]
        return cls(matrix, sigma, int(np.sum(sigma > noise)))

    def captured(self, result: Array) -> float:
        """Return <G, O> / ||G||_*, the part of the nuclear norm that a step along O sees."""
        return float(np.vdot(self.matrix, result.astype(np.float64)) / self.sigma.sum())

    def error(self, result: Array, rank: int) -> float:
        """Return max |sigma_i(O) - 1| over the directions that the matrix has, at most `rank`."""
        sigma = np.linalg.svd(result.astype(np.float64), compute_uv=False)
        return float(np.max(np.abs(sigma[: min(rank, self.rank)] - 1)))


def load_gradient(path: Path | None) -> Array:
    """Read a real floating-point matrix from a .npy file, the shipped one for None."""
    source = path or resources.files("orthlin") / "data" / "gpt2_gradient.npy"
    try:
        with source.open("rb") as file:
            gradient: Array = np.lib.format.read_array(io.BytesIO(file.read()), allow_pickle=False)
    except (ValueError, MemoryError) as problem:
        raise OptionError(f"{source} is not a .npy file of numbers: {problem}") from problem
    if gradient.ndim != 2 or gradient.size == 0:
        raise ShapeError(f"{source} holds an array of shape {gradient.shape}; a non-empty matrix is needed")
    if gradient.dtype.kind != "f" or gradient.dtype.itemsize > 8:
        raise DTypeError(f"{source} holds {gradient.dtype}; float16, float32 or float64 is needed")
    if not (np.all(np.isfinite(gradient)) and np.any(gradient)):
        raise NonFiniteError(f"{source} holds NaN or infinity, or nothing but zeros")
    return np.ascontiguousarray(gradient, dtype=gradient.dtype.newbyteorder("="))


def median_times(runs: Sequence[Callable[[], Any]], repeat: int) -> list[float]:
    """Return the median time of each run in milliseconds; the runs take turns, so load hits all alike."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeat):
        for run, own in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            own.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(own) for own in times]


def measure(backend: Any, gradient: Array, reference: Reference, options: argparse.Namespace) -> Iterator[Row]:
    """Time every routine on one array library and judge the results; the full polar factor comes first."""
    native = backend.asarray(gradient)
    full = min(gradient.shape)

    def low_rank(r: int) -> Any:
        return orthlin.lowrank_orth(native, r, rng=np.random.default_rng(options.seed))

    routines: list[tuple[str, int, Callable[[], Any]]] = [
        ("polar", full, lambda: orthlin.polar(native).U),
        ("orthogonalize", full, lambda: orthlin.orthogonalize(native)),
        *(("lowrank_orth", r, functools.partial(low_rank, r)) for r in options.ranks),
    ]
    # The first call of each also warms up: compilation, workspace, page faults.
    results = [np.asarray(backend.to_numpy(run())) for _, _, run in routines]
    runs = [lambda run=run: backend.wait(run()) for _, _, run in routines]
    times = median_times(runs, options.repeat)
    for (name, rank, _), result, taken in zip(routines, results, times, strict=True):
        yield Row(name, rank, taken, times[0] / taken, reference.captured(result), reference.error(result, rank))


def versions(backends: Sequence[Any]) -> str:
    """Return the versions of orthlin, which may run from a bare checkout, the array libraries and Python."""
    try:
        named = {"orthlin": metadata.version("orthlin")}
    except metadata.PackageNotFoundError:
        named = {"orthlin": "(not installed)"}
    for backend in backends:
        library = backend.name.partition(":")[0]
        named[library] = sys.modules[library].__version__
    return ", ".join(f"{name} {number}" for name, number in (named | {"Python": platform.python_version()}).items())


def print_table(gradient: Array, reference: Reference, options: argparse.Namespace) -> None:
    """Print what the matrix is, the versions, and a block of rows for each array library."""
    backends = list(_backend.installed())
    rows, columns = gradient.shape
    sigma = reference.sigma
    what = options.gradient or "gradient of a GPT-2 MLP weight (shipped)"
    print(f"{what}: {rows} x {columns}, {gradient.dtype}")
    print(f"nuclear norm {sigma.sum():.3e}, stable rank {np.sum((sigma / sigma[0]) ** 2):.2f}")
    print(versions(backends))
    print(f"times: medians of {options.repeat} runs, with the draw of the test matrix (seed {options.seed})\n")
    width = max([len("library"), *(len(backend.name) for backend in backends)])
    print(f"{'library':<{width}}  {'routine':<13}  rank   time, ms  speed  captured  orth. error")
    for backend in backends:
        for row in measure(backend, gradient, reference, options):
            print(
                f"{backend.name:<{width}}  {row.routine:<13}  {row.rank:4d}  {row.time:9.3f}  "
                f"{row.speed:5.1f}  {row.captured:8.4f}  {row.error:11.1e}",
                flush=True,
            )
    print("\nspeed: time of the full polar factor on the same library divided by this time")
    print("captured: <G, O> / ||G||_*     orth. error: max |singular value of O - 1| over the rank directions")


def captured_by_rank(gradient: Array, reference: Reference, ranks: Array, seed: int, **way: Any) -> Array:
    """Return the captured fraction for each rank (rows) and draw (columns)."""

    def captured(r: int, draw: int) -> float:
        rng = np.random.default_rng([seed, draw])
        return reference.captured(orthlin.lowrank_orth(gradient, r, n_oversamples=0, rng=rng, **way))

    return np.array([[captured(int(r), draw) for draw in range(PLOT_DRAWS)] for r in ranks])


def draw_plot(gradient: Array, reference: Reference, options: argparse.Namespace) -> Any:
    """Return a figure: the spectrum, and what each rank captures in each way to the basis."""
    from matplotlib.figure import Figure

    top = max(options.ranks)
    ranks = np.unique([*np.geomspace(1, top, min(top, PLOT_RANKS)).astype(int), *options.ranks])
    positive = reference.sigma[: reference.rank]
    best = np.cumsum(reference.sigma) / reference.sigma.sum()
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.semilogy(np.arange(1, positive.size + 1), positive / positive[0], color="0.25")
    left.set(title="spectrum of the gradient", xlabel="index", ylabel="singular value / largest")
    right.plot(ranks, best[ranks - 1], color="0.25", linestyle="--", label="best possible (SVD)")
    for label, way, color, line in PLOT_WAYS:
        captured = captured_by_rank(gradient, reference, ranks, options.seed, **way)
        right.plot(ranks, captured.mean(axis=1), color=color, linestyle=line, marker="o", markersize=3, label=label)
        right.fill_between(ranks, captured.min(axis=1), captured.max(axis=1), color=color, alpha=0.15, linewidth=0)
    right.set(title="what each rank captures")
    right.set(xlabel="rank", ylabel="part of the nuclear norm", ylim=(0, 1.02))
    right.legend(frameon=False, title=f"mean and range of {PLOT_DRAWS} draws")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def save_atomically(figure: Any, path: Path) -> None:
    """Write the figure beside its destination and move it there, so that no half file is ever seen."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    try:
        part.write_bytes(drawn.getvalue())
        part.replace(path)
    except OSError as problem:
        raise OptionError(f"--plot {path}: {problem.strerror}") from problem
    finally:
        part.unlink(missing_ok=True)


def require_plotting(path: Path) -> None:
    """Fail before the long run if a plot could not be drawn or not be stored."""
    if path.suffix.lower() != ".png":
        raise OptionError(f"--plot {path}: the name must end in .png")
    if not path.parent.is_dir():
        raise OptionError(f"--plot {path}: there is no folder {path.parent}")
    try:
        import_module("matplotlib")
    except ImportError:
        raise OptionError("--plot needs matplotlib: pip install matplotlib") from None


def count(text: str, least: int = 1) -> int:
    """Read an integer not below `least` (for argparse)."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m orthlin",
        description="Orthogonalize a real gradient at several ranks on every array library found here.",
    )
    option = parser.add_argument
    option("--ranks", type=count, nargs="+", metavar="R", help="default: 8 16 32 64 128, as far as they fit")
    option("--repeat", type=count, default=7, metavar="N", help="timed runs of each routine (default: 7)")
    option("--gradient", type=Path, metavar="FILE.npy", help="a matrix of your own")
    option("--plot", type=Path, metavar="FILE.png", help="draw the spectrum and what each rank captures")
    option(
        "--seed",
        type=functools.partial(count, least=0),
        default=0,
        metavar="N",
        help="of the test matrices (default: 0)",
    )
    return parser.parse_args(arguments)


def job(options: argparse.Namespace) -> None:
    """Do the whole job."""
    if options.plot:
        require_plotting(options.plot)
    gradient = load_gradient(options.gradient)
    rows, columns = gradient.shape
    full = min(rows, columns)
    options.ranks = options.ranks or sorted({min(r, full) for r in DEFAULT_RANKS})
    if max(options.ranks) > full:
        raise RankError(f"--ranks {max(options.ranks)}: a {rows} x {columns} matrix has rank {full} at most")
    reference = Reference.of(gradient)
    print_table(gradient, reference, options)
    if options.plot:
        save_atomically(draw_plot(gradient, reference, options), options.plot)
        print(f"plot written to {options.plot}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 2 for bad usage."""
    try:
        job(parse(arguments))
    except BrokenPipeError:  # whoever read the table, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OrthlinError, OSError) as problem:
        print(f"orthlin: error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
