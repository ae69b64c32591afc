"""Matrices with declared rank, condition and norm, and judges that measure in double precision.

``case(family, shape, dtype)`` is the same matrix on every call.  Wide matrices are the conjugate
transposes of tall ones, so one declaration serves both.  Spectra are prescribed in double precision
between orthogonal factors; near overflow and underflow are reached by a power of two.  The judges undo
that power exactly before they divide, because a ruler that divides by subnormals measures nothing.
"""

import dataclasses
import functools
import itertools
import math

import numpy as np

SHAPES = ((1, 1), (1, 7), (7, 1), (32, 32), (96, 32), (32, 96), (400, 16), (128, 128))
DTYPES = ("float32", "float64", "complex64", "complex128")

EDGE = 0.01
"""The polar promise covers condition numbers up to ``EDGE / eps``; beyond, it holds on the range."""
LIMITS = {"orthogonality": 32.0, "backward": 64.0, "hermitian": 32.0, "psd": 32.0, "overshoot": 32.0}
"""What a judge's figures are held to by `within`, all in units of eps."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A matrix and what is known about it; None where the family does not fix a value."""

    family: str
    A: np.ndarray
    rank: int | None = None  # singular values above max(m, n) eps sigma_1; None where some lie near it
    cond: float | None = None  # of the nonzero part; inf where it exceeds 1 / eps
    norm: float | None = None  # 2-norm
    full_rank: bool = True  # before rounding
    singular_values: np.ndarray | None = None

    @property
    def id(self):
        return f"{self.family}-{self.A.shape[0]}x{self.A.shape[1]}-{self.A.dtype}"

    @functools.cached_property
    def kappa(self):
        """The declared condition number, or where none is declared the measured one."""
        if self.cond is not None:
            return self.cond
        sigma = np.linalg.svd(scaled(self.A)[0], compute_uv=False)
        return ratio(sigma[0], sigma[-1])

    @property
    def promised(self):
        """Whether the polar promise covers the whole matrix, not only its range."""
        return self.full_rank and self.kappa <= EDGE / np.finfo(self.A.dtype).eps


class Spec:
    """What a generator is given to make a tall ``m x k`` matrix and a declaration of it."""

    def __init__(self, rng, m, k, dtype):
        self.rng, self.m, self.k, self.dtype = rng, m, k, dtype
        self.info, self.eps = np.finfo(dtype), float(np.finfo(dtype).eps)

    def gaussian(self, m, k):
        real = self.rng.standard_normal((m, k))
        return real + 1j * self.rng.standard_normal((m, k)) if self.dtype.kind == "c" else real

    def twisted(self, A):
        """Multiply rows and columns of a complex matrix by exact fourth roots of unity."""
        if self.dtype.kind != "c":
            return A
        left, right = (np.array([1, 1j, -1, -1j])[self.rng.integers(4, size=s)] for s in A.shape)
        return left[:, None] * A * right


def prescribed(spec, sigma, exponent=0):
    sigma = np.asarray(sigma, dtype=float)
    U, V = (np.linalg.qr(spec.gaussian(rows, spec.k)).Q for rows in (spec.m, spec.k))
    return ldexp((U * sigma) @ V.conj().T, exponent), known(spec, np.ldexp(sigma, exponent))


def known(spec, sigma):
    """Declare everything that follows from the singular values."""
    top = sigma.max()
    line, positive = max(spec.m, spec.k) * spec.eps * top, sigma[sigma > 0]
    near = (sigma > line / 10) & (sigma < line * 10)
    rank = None if near.any() else int((sigma > line).sum())
    cond = float(top / positive.min()) if positive.size else 1.0
    facts = {"rank": rank, "cond": cond, "norm": float(top), "full_rank": positive.size == spec.k}
    return facts | {"singular_values": sigma}


def geometric(spec, cond):
    return np.geomspace(1, 1 / cond, spec.k) if spec.k > 1 else np.ones(1)


def hilbert(spec):
    i, j = np.ogrid[: spec.m, : spec.k]
    A = spec.twisted(1.0 / (1 + i + j))
    if spec.k == 1:
        return A, known(spec, np.array([math.sqrt(sum(1 / (1 + i) ** 2 for i in range(spec.m)))]))
    return A, {"cond": math.inf}


def ones_upper(spec):
    angles = (2 * np.arange(spec.k) + 1) * math.pi / (4 * spec.k + 2)
    return spec.twisted(np.triu(np.ones((spec.m, spec.k)))), known(spec, 0.5 / np.sin(angles))


def kahan(spec):
    unit = np.eye(spec.m, spec.k) - math.cos(1.2) * np.triu(np.ones((spec.m, spec.k)), 1)
    A = spec.twisted(math.sin(1.2) ** np.arange(spec.m)[:, None] * unit)
    return A, known(spec, np.ones(1)) if spec.k == 1 else {}


def lauchli(spec):
    mu, k = 2.0 ** round(math.log2(spec.eps) / 2), spec.k
    A = spec.twisted(np.vstack([np.ones((1, k)), mu * np.eye(spec.m - 1, k)]))
    if spec.m > k:
        return A, known(spec, np.array([math.hypot(math.sqrt(k), mu)] + [mu] * (k - 1)))
    # the square one lacks mu in its last column: mu k - 2 times, and two of product mu
    top = math.sqrt((k + mu**2 + math.sqrt((k + mu**2) ** 2 - 4 * mu**2)) / 2) if k > 1 else 1.0
    return A, known(spec, np.array([top, *[mu] * (k - 2), mu / top][:k]))


def graded(spec, axis):
    bits = round(math.log2(0.1 / spec.eps) / 2)
    steps = np.linspace(0, -bits, (spec.m, spec.k)[axis]).round()
    A = spec.gaussian(spec.m, spec.k) * np.expand_dims(2.0**steps, 1 - axis)
    # a square Gaussian has no floor under its smallest singular value
    return A, {"rank": spec.k if spec.m > spec.k or spec.k == 1 else None}


def zero_column(spec):
    A = spec.gaussian(spec.m, spec.k)
    A[:, spec.k // 2] = 0
    return A, {"rank": spec.k - 1, "full_rank": False} if spec.k > 1 else known(spec, np.zeros(1))


def one_tiny_element(spec):
    A = np.zeros((spec.m, spec.k))
    A[spec.rng.integers(spec.m), spec.rng.integers(spec.k)] = tiny = float(spec.info.tiny)
    return spec.twisted(A), known(spec, tiny * np.eye(1, spec.k)[0])


FAMILIES = {
    "gaussian": lambda s: (s.gaussian(s.m, s.k), {"rank": s.k}),
    "geometric_1e2": lambda s: prescribed(s, geometric(s, 1e2)),
    "geometric_sqrt": lambda s: prescribed(s, geometric(s, math.sqrt(0.1 / s.eps))),
    "geometric_eps": lambda s: prescribed(s, geometric(s, 0.1 / s.eps)),
    "one_small": lambda s: prescribed(s, [1.0] * max(s.k - 1, 1) + [s.eps / EDGE] * (s.k > 1)),
    "one_large": lambda s: prescribed(s, [1.0] + [math.sqrt(s.eps / 0.1)] * (s.k - 1)),
    "arithmetic": lambda s: prescribed(s, np.linspace(1, math.sqrt(s.eps / 0.1), s.k)),
    "isometry": lambda s: prescribed(s, np.ones(s.k)),
    "two_cluster": lambda s: prescribed(s, np.where(np.arange(s.k) <= s.k // 2, 1.0, 1e-3)),
    "hilbert": hilbert,
    "ones_upper": ones_upper,
    "kahan": kahan,
    "lauchli": lauchli,
    "graded_rows": lambda s: graded(s, 0),
    "graded_columns": lambda s: graded(s, 1),
    "all_ones": lambda s: (np.ones((s.m, s.k)), known(s, np.eye(1, s.k)[0] * math.sqrt(s.m * s.k))),
    "zero": lambda s: (np.zeros((s.m, s.k)), known(s, np.zeros(s.k))),
    "half_rank": lambda s: prescribed(s, geometric(s, 1e2) * (np.arange(s.k) < (s.k + 1) // 2)),
    "zero_column": zero_column,
    "near_underflow": lambda s: prescribed(s, geometric(s, 2), s.info.minexp - s.info.machep - 2),
    "near_overflow": lambda s: prescribed(s, geometric(s, 2), s.info.maxexp - 2),
    "one_tiny_element": one_tiny_element,
    "all_subnormal": lambda s: (ldexp(scaled(s.gaussian(s.m, s.k))[0], s.info.minexp), {"rank": s.k}),
}


def case(family, shape, dtype, seed=0):
    dtype = np.dtype(dtype)
    key = [list(FAMILIES).index(family), *shape, DTYPES.index(dtype.name), seed]
    A, facts = FAMILIES[family](Spec(np.random.default_rng(key), max(shape), min(shape), dtype))
    A = np.ascontiguousarray(A if shape[0] >= shape[1] else A.conj().T, dtype=dtype)
    return Case(family=family, A=A, **facts)


def cases(families=tuple(FAMILIES), shapes=SHAPES, dtypes=DTYPES):
    return (case(*key) for key in itertools.product(families, shapes, dtypes))


def ldexp(A, exponent):
    """Return ``A`` times a power of two, which itself may be out of range."""
    parts = np.ascontiguousarray(A, dtype=np.result_type(A, np.float64))
    return np.ldexp(parts.view(np.float64), exponent).view(parts.dtype)


def scaled(A):
    """Return ``A`` in double precision with its largest part in [1/2, 1), and the exponent taken out."""
    parts = ldexp(A, 0).view(np.float64)
    exponent = int(np.frexp(np.abs(parts).max(initial=0.0))[1])
    return ldexp(A, -exponent), exponent


def within(figures, limits=LIMITS):
    """Whether every figure that has a limit keeps it; NaN keeps none."""
    return all(value <= limits.get(name, math.inf) for name, value in figures.items())


def ratio(part, whole):
    return float(part / whole) if whole > 0 else (0.0 if part == 0 else math.inf)


def finite(*arrays):
    return all(bool(np.isfinite(x).all()) for x in arrays)


def gram_defect(U):
    U = U if U.shape[0] >= U.shape[1] else U.conj().T
    return float(np.linalg.norm(U.conj().T @ U - np.eye(U.shape[1])))


def range_defect(As, U, eps):
    """How many singular values of `As` the promise covers, and how far `U` is from one on them.

    As many singular values of `U` must be one; so must those of `U` on the right singular vectors
    whose perturbation, of relative size ``eps sigma_1 / sigma_j``, vanishes when squared.
    """
    _, sigma, Vh = np.linalg.svd(As, full_matrices=False)
    rank = int((sigma > 0.9 * eps / EDGE * sigma[0]).sum())
    if rank == len(sigma):
        return rank, gram_defect(U)
    strong = U @ Vh[sigma > 16 * math.sqrt(eps) * sigma[0]].conj().T
    count = np.linalg.svd(U, compute_uv=False)[:rank] ** 2 - 1
    return rank, max(float(np.linalg.norm(count)), gram_defect(strong))


def in_eps(figures, A):
    """Count in eps, and what grows with the short side in eps times its root."""
    eps, root = float(np.finfo(A.dtype).eps), math.sqrt(max(1, min(A.shape)))
    grows = ("orthogonality", "overshoot")
    return {name: value / (eps * root if name in grows else eps) for name, value in figures.items()}


def judge_polar(A, U, H, side="right"):
    """Return orthogonality, overshoot, backward, hermitian and psd in units of eps, and the rank judged."""
    if side == "left":
        A, U = A.conj().T, U.conj().T
    if not A.size or not finite(U, H):
        return dict.fromkeys(LIMITS, math.inf if A.size else 0.0) | {"rank": 0}
    As, exponent = scaled(A)
    U, H = ldexp(U, 0), ldexp(H, -exponent)
    rank, defect = range_defect(As, U, float(np.finfo(A.dtype).eps))
    eigenvalues = np.linalg.eigvalsh((H + H.conj().T) / 2)
    figures = {
        "orthogonality": defect,
        "overshoot": max(0.0, float(np.linalg.norm(U, 2)) - 1),
        "backward": ratio(np.linalg.norm(As - U @ H), np.linalg.norm(As)),
        "hermitian": ratio(np.linalg.norm(H - H.conj().T), np.linalg.norm(H)),
        "psd": ratio(max(0.0, -eigenvalues[0]), np.abs(eigenvalues).max()),
    }
    return in_eps(figures, A) | {"rank": rank}


def judge_qr(A, Q, R):
    """Return orthogonality, backward and below-diagonal weight of ``R``, in units of eps."""
    if not finite(Q, R):
        return dict.fromkeys(("orthogonality", "backward", "triangular"), math.inf)
    As, exponent = scaled(A)
    Q, R = ldexp(Q, 0), ldexp(R, -exponent)
    figures = {
        "orthogonality": gram_defect(Q),
        "backward": ratio(np.linalg.norm(As - Q @ R), np.linalg.norm(As)),
        "triangular": ratio(np.linalg.norm(np.tril(R, -1)), np.linalg.norm(R)),
    }
    return in_eps(figures, A)


def judge_partial_isometry(O, G, Omega, r=None, n_iter=0):
    """Judge a rank-r orthogonalization of `G` against the SVD route in double precision.

    With ``B = Q^H G`` on the range of ``G Omega``, a direction of `B` must be one above ten times the
    line ``max(m, n) eps sigma_1(B)``, zero below a tenth of it, and either of the two in between.
    `forward` is ``||O - O_ref||_F`` in units of eps times the condition of the problem.
    """
    r = Omega.shape[1] if r is None else r
    eps, Gs = float(np.finfo(G.dtype).eps), scaled(G)[0]
    Y = Gs @ scaled(Omega)[0]
    for _ in range(n_iter):
        Y = Gs @ (Gs.conj().T @ np.linalg.qr(Y).Q)
    Q = np.linalg.qr(Y).Q
    left, sigma, Vh = np.linalg.svd(Q.conj().T @ Gs, full_matrices=False)
    spread, tol = np.linalg.svd(Y, compute_uv=False), 32 * eps * math.sqrt(max(r, 1))
    line = max(G.shape) * eps * sigma.max(initial=0.0)
    lo, hi = (min(r, int((sigma > line * factor).sum())) for factor in (10, 0.1))
    if not finite(O):
        return {"ok": False, "n_ones": 0, "lo": lo, "hi": hi, "forward": math.inf}
    ones = np.linalg.svd(ldexp(O, 0), compute_uv=False)
    is_one = np.abs(ones - 1) <= tol
    n_ones, others = int(is_one.sum()), float(ones[~is_one].max(initial=0.0))
    kept = min(max(n_ones, lo), hi)
    spreads = [ratio(s[0], s[kept - 1]) for s in (sigma, spread) if kept]
    cond = min(math.prod(spreads), 1 / eps)
    forward = float(np.linalg.norm(O - Q @ left[:, :kept] @ Vh[:kept])) / (eps * cond)
    counts = {"n_ones": n_ones, "lo": lo, "hi": hi, "others_max": others}
    captured = ratio(np.vdot(O, Gs).real, sigma[:kept].sum())
    ok = lo <= n_ones <= hi and others <= tol
    return {"ok": ok, **counts, "cond": cond, "forward": forward, "captured": captured}
