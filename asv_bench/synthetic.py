"""Convergence of matrix-sign gradient descent, full and at low rank, where theory says how fast it is.

    python asv_bench/synthetic.py                                      # all of it at one fifth of the sizes
    python asv_bench/synthetic.py --scale 1 --problems regression      # one problem at the published sizes

Three problems, with sizes as in Lau, Long and Su, PolarGrad (arXiv 2505.21799), section on experiments:

regression   ||A X B - C||_F^2/2, X 500 x 100, A 1000 x 500, B 100 x 250, all Gaussian, X_0 uniform in (-1, 1)
logistic     mean log(1 + exp(-c (A X B))), X 1000 x 100, A 10000 x 1000, B 100 x 400, c the signs of A X* B plus
             as much noise, all rows in every step
completion   ||mask (X Y^T - M)||_F^2/2, M 500 x 250 of rank 5, 30 % observed, both factors stepped at once

With ||grad f(X) - grad f(Y)||_* <= L ||X - Y||_2 a step along a direction of rank r obeys

    f(X - eta O) <= f(X) - eta ||Q^T grad f||_* + L_r eta^2/2,      L_r = sum of w_i for i <= r,

for the first two problems with w_i = s sigma_i(A)^2 sigma_i(B)^2, s = 1 and 1/(4 number of labels), because
||A O B||_F^2 <= sum of sigma_i(A)^2 sigma_i(B)^2 sigma_i(O)^2; L = L_k.  For the third w_i = sigma_i(M), a guess that
is made near the solution.  So a step of low rank may be longer by L/L_r.  Tables give the learning rate as a multiple
of 1/L, and the number of the step at which the error, relative to the start, falls below 1e-2, 1e-5 and 1e-10.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from orthlin import steppers

Arrays = tuple[np.ndarray, ...]
TOLERANCES = (1e-2, 1e-5, 1e-10)
DIVERGED = 1e3
RANK_SHARE = 0.2
LENGTHS = (0.1, 0.03, 0.01)

METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "low rank": {"rank": RANK_SHARE},
    "power iteration": {"rank": RANK_SHARE, "n_iter": 1},
    "warm start": {"rank": RANK_SHARE, "warm_start": True},
    "tail": {"rank": RANK_SHARE, "tail": 1.0},
    "warm, tail": {"rank": RANK_SHARE, "tail": 1.0, "warm_start": True},
    "warm, tail auto": {"rank": RANK_SHARE, "tail": "auto", "warm_start": True},
    "error feedback": {"rank": RANK_SHARE, "error_feedback": True},
    "warm, feedback": {"rank": RANK_SHARE, "error_feedback": True, "warm_start": True},
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Matrices to step, a function of them, its gradients with its error (one at the start), and the weights w_i.

    `distance` is about how far the solution is, in the spectral norm.
    """

    name: str
    start: Arrays
    value: Callable[[Arrays], float]
    gradient: Callable[[Arrays], tuple[Arrays, float]]
    weights: np.ndarray
    distance: float

    def smoothness(self, rank: int | None = None) -> float:
        """L_r, or L."""
        return float(self.weights[:rank].sum())


def leading(P: np.ndarray, R: np.ndarray) -> np.ndarray:
    """Products of the eigenvalues of two positive semidefinite matrices, the largest with the largest."""
    k = min(len(P), len(R))
    return np.linalg.eigvalsh(P)[::-1][:k] * np.linalg.eigvalsh(R)[::-1][:k]


def regression(scale: float = 1.0, seed: int = 0, sizes: tuple[int, ...] = (1000, 500, 100, 250)) -> Problem:
    """The unknown is E = X - X*, so that the gap to the minimum, <E, P E R>/2, is known to all its digits."""
    rng = np.random.default_rng(seed)
    N, m, n, q = (round(scale * size) for size in sizes)
    A, B, C = (rng.standard_normal(shape) for shape in ((N, m), (n, q), (N, q)))
    P, R = A.T @ A, B @ B.T
    solution = np.linalg.solve(R, np.linalg.solve(P, A.T @ C @ B.T).T).T
    start = (rng.uniform(-1, 1, (m, n)) - solution,)

    def value(E: Arrays) -> float:
        return float(np.vdot(E[0], P @ E[0] @ R)) / 2

    def gradient(E: Arrays) -> tuple[Arrays, float]:
        G = P @ E[0] @ R
        return (G,), float(np.vdot(E[0], G)) / 2 / first

    first = value(start)
    return Problem("regression", start, value, gradient, leading(P, R), float(np.linalg.norm(start[0], 2)))


def logistic(scale: float = 1.0, seed: int = 0, sizes: tuple[int, ...] = (10_000, 1000, 100, 400)) -> Problem:
    """Its minimum is not known, so the error is the square of the gradient, as a gap would be."""
    rng = np.random.default_rng(seed)
    N, m, n, q = (round(scale * size) for size in sizes)
    A, X, B = (rng.standard_normal(shape) for shape in ((N, m), (m, n), (n, q)))
    scores = A @ X @ B
    labels = np.sign(scores + scores.std() * rng.standard_normal((N, q)))
    A /= scores.std()  # labels follow a probit model in A X* B, which is a logistic one in 1.7 times that
    distance = 1.7 * float(np.linalg.norm(X, 2))
    weights = leading(A.T @ A, B @ B.T) / (4 * labels.size)

    def value(X: Arrays) -> float:
        return float(np.logaddexp(0, -labels * (A @ X[0] @ B)).mean())

    def slope(X: Arrays) -> np.ndarray:
        return A.T @ (-labels / (1 + np.exp(labels * (A @ X[0] @ B)))) @ B.T / labels.size

    def gradient(X: Arrays) -> tuple[Arrays, float]:
        G = slope(X)
        return (G,), float(np.linalg.norm(G) / first) ** 2

    start = (np.zeros((m, n)),)
    first = np.linalg.norm(slope(start))
    return Problem("logistic", start, value, gradient, weights, distance)


def completion(scale: float = 1.0, seed: int = 0) -> Problem:
    """The error is that of the observed entries; where it vanishes the others are recovered too."""
    rng = np.random.default_rng(seed)
    m, n, r = round(500 * scale), round(250 * scale), 5
    M = rng.standard_normal((m, r)) @ rng.standard_normal((r, n))
    mask = rng.random((m, n)) < 0.3
    weights = np.linalg.svd(M, compute_uv=False)[:r]

    def value(Z: Arrays) -> float:
        return float(np.sum((mask * (Z[0] @ Z[1].T - M)) ** 2)) / 2

    def gradient(Z: Arrays) -> tuple[Arrays, float]:
        D = mask * (Z[0] @ Z[1].T - M)
        return (D @ Z[1], D.T @ Z[0]), float(np.sum(D**2)) / 2 / first

    start = (rng.standard_normal((m, r)), rng.standard_normal((n, r)))
    first = value(start)
    return Problem("completion", start, value, gradient, weights, float(np.linalg.norm(start[0], 2)))


PROBLEMS = {"regression": regression, "logistic": logistic, "completion": completion}


def stepper(lr: Any, scale: str = "nuclear", **options: Any) -> steppers.Stepper:
    """Matrix-sign gradient descent; error feedback needs the memory that `muon` has."""
    if options.get("error_feedback"):
        return steppers.muon(lr, momentum=0.0, nesterov=False, scale=scale, **options)
    return steppers.msgd(lr, scale=scale, **options)


def run(problem: Problem, step: steppers.Stepper, steps: int, tol: float = TOLERANCES[-1]) -> np.ndarray:
    """Error before each step, up to the first below `tol` or beyond all bounds."""
    Z = problem.start
    states = [step.init(X, str(i)) for i, X in enumerate(Z)]
    errors = []
    for _ in range(steps):
        gradients, error = problem.gradient(Z)
        errors.append(error)
        if not tol <= error <= DIVERGED:
            break
        moved = [step.update(G, s, X, str(i)) for i, (G, s, X) in enumerate(zip(gradients, states, Z, strict=True))]
        Z = tuple(X + delta for X, (delta, _) in zip(Z, moved, strict=True))
        states = [state for _, state in moved]
    return np.asarray(errors)


def steps_to(errors: np.ndarray, tol: float) -> int | None:
    """Number of the first step with an error of at most `tol`."""
    below = errors <= tol
    return int(np.argmax(below)) if below.any() else None


def unit(problem: Problem, options: dict[str, Any]) -> float:
    """The learning rate of the theory: 1/L_r for a plain direction of rank r, 1/L for one of full norm."""
    k = len(problem.weights)
    low = "rank" in options and "tail" not in options
    return 1 / problem.smoothness(max(1, round(RANK_SHARE * k)) if low else None)


def cells(values: Any, width: int = 9) -> str:
    return "".join(f"{'-' if v is None else v:>{width}}" for v in values)


class Row:
    """Steps to each tolerance, to be ordered by the finest that is reached and printed under a name."""

    def __init__(self, name: str, given: str, errors: np.ndarray):
        self.counts = [steps_to(errors, tol) if errors[-1] < 1 else None for tol in TOLERANCES]
        self.order = [10**9 if c is None else c for c in self.counts[::-1]] + [errors[-1]]
        self.text = f"{name:18}{given:>16}{cells(self.counts)}{errors[-1]:>13.1e}"


def header(name: str, given: str) -> str:
    return f"{name:18}{given:>16}{cells(f'{tol:.0e}' for tol in TOLERANCES)}{'last error':>13}"


def nuclear(problem: Problem, steps: int, multiples: tuple[float, ...]) -> None:
    """Every method at several multiples of the learning rate of the theory: that rate, and the best."""
    print(header("nuclear scaling", "lr L"))
    for name, options in METHODS.items():
        lr = unit(problem, options)
        rows = {
            x: Row(name, f"{x * lr * problem.smoothness():.2f}", run(problem, stepper(x * lr, **options), steps))
            for x in multiples
        }
        best = min(rows, key=lambda x: rows[x].order)
        print(rows[1.0].text, "  theory and best" if best == 1 else "  theory", flush=True)
        if best != 1:
            print(rows[best].text, "  best", flush=True)


def stalled(problem: Problem, steps: int, lr: float, **options: Any) -> float:
    """Root of the error, which is a distance, around which a constant step of length `lr` ends."""
    return float(np.sqrt(np.median(run(problem, stepper(lr, scale="none", **options), steps)[-steps // 10 :])))


def constant(problem: Problem, steps: int) -> None:
    print(
        f"{'constant step':18}{cells((f'{lr} d' for lr in LENGTHS), 12)}   root of the error at the end; d the distance"
    )
    for name in ("full", "low rank", "warm, tail"):
        ends = [stalled(problem, steps, problem.distance * lr, **METHODS[name]) for lr in LENGTHS]
        print(f"{name:18}{cells((f'{end:.1e}' for end in ends), 12)}", flush=True)


def decaying(problem: Problem, steps: int) -> None:
    """The best of several steps lr rho^t, by what they travel in all and how fast they shrink."""
    print(header("lr rho^t", "lr, rho"))
    for name in ("full", "low rank", "warm start", "warm, tail"):
        rows = []
        for rho in (0.9, 0.98, 0.99):
            for travel in (2, 5):
                lr = travel * problem.distance * (1 - rho)
                step = stepper(lambda t, lr=lr, rho=rho: lr * rho**t, scale="none", **METHODS[name])
                rows.append(Row(name, f"{lr:.2g}, {rho}", run(problem, step, steps)))
        print(min(rows, key=lambda row: row.order).text, flush=True)


def report(problem: Problem, steps: int, multiples: tuple[float, ...]) -> None:
    """Print the tables of one problem."""
    start, k = time.perf_counter(), len(problem.weights)
    rank = max(1, round(RANK_SHARE * k))
    ratio = problem.smoothness() / problem.smoothness(rank)
    shapes = " and ".join("x".join(map(str, X.shape)) for X in problem.start)
    print(f"\n{problem.name}, {shapes}, rank {rank} of {k}, L/L_r = {ratio:.2f}, at most {steps} steps")
    nuclear(problem, steps, multiples)
    constant(problem, steps)
    decaying(problem, steps)
    print(f"{time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--scale", type=float, default=0.2, help="of every size")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--multiples", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="must have 1")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in options.problems:
        report(PROBLEMS[name](options.scale, options.seed), options.steps, tuple(options.multiples))


if __name__ == "__main__":
    main()
