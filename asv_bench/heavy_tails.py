"""Low-rank Muon under noise without a variance: the rate that theory gives, and what a low rank does to noise.

    python asv_bench/heavy_tails.py
    python asv_bench/heavy_tails.py --parts rate --largest 15 --seeds 32

Every entry of the noise is drawn from Student's t distribution with index a = 1.5 (no variance; 2 would be the
least for one).

rate       f(X) = ||X - A||_F^2/2 with ||A||_2 = 1, so that ||grad f(X) - grad f(Y)||_* <= k ||X - Y||_2.  K steps of
           Muon with theta = 1 - momentum = K^(-a/(3a - 2)) and step c K^(-(2a - 1)/(3a - 2)) bring the mean of
           ||grad f||_* over the steps down like K^(-(a - 1)/(3a - 2)) = K^-0.2.  Fitted over K = 2^6, 2^7, ... and over
           the upper half of these.  Seeds make a stack, which shares its sketches.
alignment  S of rank 20, 256 x 512, singular values from 1 to 1/2, plus noise.  For the direction O of S + noise and
           the clean one, O_S = msign(S), with ||O_S||_F^2 = 20:
             aligned  <O, O_S>/20, what the step does along the clean direction, at most 1;
             cosine   <O, O_S>/(||O||_F ||O_S||_F), what share of the step that is: a full direction has
                      ||O||_F^2 = 256, so that its cosine is at most sqrt(20/256) = 0.28 whatever the noise.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from orthlin import lowrank_orth, orthogonalize, steppers

INDEX = 1.5
M, N, RANK = 256, 512, 20
SHAPE, LOW = (8, 12), 2

METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "low rank": {"rank": LOW},
    "power iteration": {"rank": LOW, "n_iter": 1},
    "warm start": {"rank": LOW, "warm_start": True},
    "tail": {"rank": LOW, "tail": 1.0},
    "warm, tail": {"rank": LOW, "tail": 1.0, "warm_start": True},
}

DIRECTIONS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "full": lambda G, _: orthogonalize(G),
    "20": lambda G, seed: lowrank_orth(G, RANK, rng=seed),
    "20, 1 power": lambda G, seed: lowrank_orth(G, RANK, n_iter=1, rng=seed),
    "20, 2 powers": lambda G, seed: lowrank_orth(G, RANK, n_iter=2, rng=seed),
    "40, 1 power": lambda G, seed: lowrank_orth(G, 2 * RANK, n_iter=1, rng=seed),
}


def exponents(index: float) -> tuple[float, float, float]:
    """Those of theta, of the step and of the gradient norm, in K."""
    q = 3 * index - 2
    return -index / q, -(2 * index - 1) / q, -(index - 1) / q


def mean_gradient(
    steps: int, seeds: int, *, length: float, noise: float, momentum: float | None = None, **options: Any
) -> np.ndarray:
    """Mean of ||grad f||_* over the steps, for every seed; `momentum` in place of that of the theory."""
    of_theta, of_step, _ = exponents(INDEX)
    beta = 1 - steps**of_theta if momentum is None else momentum
    step = steppers.muon(length * steps**of_step, momentum=beta, nesterov=False, **options)
    A = np.random.default_rng(0).standard_normal(SHAPE)
    A /= np.linalg.norm(A, 2)
    rngs = [np.random.default_rng((seed, steps)) for seed in range(seeds)]
    X = np.zeros((seeds, *SHAPE))
    state, total = step.init(X), np.zeros(seeds)
    for _ in range(steps):
        G = X - A
        total += np.linalg.svd(G, compute_uv=False).sum(-1)
        drawn = np.stack([rng.standard_t(INDEX, SHAPE) for rng in rngs])
        delta, state = step.update(G + noise * drawn, state, X)
        X = X + delta
    return total / steps


def slope(counts: list[int], values: np.ndarray) -> tuple[float, float]:
    """Slope of log(mean over the seeds) over log(K), and its standard error from the seeds; values (K, seed)."""
    x = np.log(counts) - np.mean(np.log(counts))
    each = x @ np.log(values) / (x @ x)
    return float(x @ np.log(values.mean(1)) / (x @ x)), float(each.std(ddof=1) / math.sqrt(len(each)))


def rate(seeds: int, largest: int, noise: float) -> None:
    counts = [2**i for i in range(6, largest + 1)]
    upper = len(counts) // 2
    print(f"rate: {SHAPE[0]}x{SHAPE[1]}, rank {LOW}, noise {noise} t, {seeds} seeds; theory {exponents(INDEX)[2]:+.2f}")
    print(f"{'':18}{'c':>5}{'slope':>8}{'s.e.':>7}{'upper half':>12}{'s.e.':>7}   gradient norms, K = {counts[0]}, ...")
    for name, options in METHODS.items():
        for length in (2.0, 6.0):
            values = np.stack([mean_gradient(K, seeds, length=length, noise=noise, **options) for K in counts])
            fits = *slope(counts, values), *slope(counts[upper:], values[upper:])
            row = f"{name:18}{length:>5.0f}{fits[0]:>8.3f}{fits[1]:>7.3f}{fits[2]:>12.3f}{fits[3]:>7.3f}   "
            print(row + " ".join(f"{v:.2f}" for v in values.mean(1)), flush=True)
    for name in ("full", "low rank"):
        values = np.stack(
            [mean_gradient(K, seeds, length=2.0, noise=noise, momentum=0.0, **METHODS[name]) for K in counts]
        )
        row = f"{name + ', no momentum':23}{slope(counts, values)[0]:>8.3f}{'':29}"
        print(row + " ".join(f"{v:.2f}" for v in values.mean(1)), flush=True)


def draw(kind: str, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clean matrix of norm one, its sign, and noise of unit scale."""
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.standard_normal((size, RANK))).Q for size in (M, N))
    noise = rng.standard_t(INDEX, (M, N)) if kind == "t" else rng.standard_normal((M, N))
    return (U * np.linspace(1, 0.5, RANK)) @ V.T, U @ V.T, noise


def noisy(kind: str, level: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A noisy matrix and the sign of the clean one; level is the scale of an entry of the noise."""
    signal, clean, noise = draw(kind, seed)
    return signal + level * noise, clean


def aligned(O: np.ndarray, clean: np.ndarray) -> float:
    return float(np.vdot(O, clean)) / RANK


def means(kind: str, level: float, seeds: int) -> Iterator[tuple[str, float, float]]:
    """Alignment and cosine of every direction, in the mean over the seeds."""
    drawn = [noisy(kind, level, seed) for seed in range(seeds)]
    for name, direction in DIRECTIONS.items():
        found = [(direction(G, seed), clean) for seed, (G, clean) in enumerate(drawn)]
        cosines = [aligned(O, clean) * math.sqrt(RANK) / np.linalg.norm(O) for O, clean in found]
        yield name, float(np.mean([aligned(O, clean) for O, clean in found])), float(np.mean(cosines))


def level_of_full(kind: str, target: float, seeds: int) -> float:
    """Noise level at which the alignment of a full direction falls to `target`, by bisection of its logarithm."""
    low, high = 1e-6, 1e2
    for _ in range(25):
        middle = math.sqrt(low * high)
        drawn = (noisy(kind, middle, seed) for seed in range(seeds))
        above = np.mean([aligned(orthogonalize(G), clean) for G, clean in drawn]) > target
        low, high = (middle, high) if above else (low, middle)
    return middle


def alignment(seeds: int) -> None:
    bound = math.sqrt(RANK / M)
    for kind, name, levels in (
        ("t", "Student t, index 1.5", (1e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3)),
        ("g", "Gaussian", (0.5e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2)),
    ):
        print(f"\nalignment: {name} noise, {M}x{N}, rank {RANK}, {seeds} seeds; aligned and cosine")
        print(f"{'level':>9}{'||noise||_2':>12}" + "".join(f"{column:>15}" for column in DIRECTIONS))
        for level in (*levels, level_of_full(kind, bound, seeds)):
            spectral = np.mean(
                [np.linalg.norm(noisy(kind, level, s)[0] - noisy(kind, 0, s)[0], 2) for s in range(seeds)]
            )
            pairs = "".join(f"{f'{a:.3f} {c:.3f}':>15}" for _, a, c in means(kind, level, seeds))
            note = f"   full aligned {bound:.2f}" if level not in levels else ""
            print(f"{level:>9.1e}{spectral:>12.3f}{pairs}{note}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["rate", "alignment"], choices=["rate", "alignment"])
    parser.add_argument("--seeds", type=int, default=16, help="of the rate; a quarter as many of the alignment")
    parser.add_argument("--largest", type=int, default=13, help="binary logarithm of the largest number of steps")
    parser.add_argument("--noise", type=float, default=0.05, help="scale of an entry of the noise of the rate")
    options = parser.parse_args()
    start = time.perf_counter()
    if "rate" in options.parts:
        rate(options.seeds, options.largest, options.noise)
    if "alignment" in options.parts:
        alignment(max(2, options.seeds // 4))
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
