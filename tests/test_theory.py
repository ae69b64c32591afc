"""The constants of the convergence theorem of tail completion (docs/theory/tail.md), on a function of known smoothness.

f(X) = L ||X - A||_F^2/2: its gradient is Lipschitz with constant L and nothing smaller.
"""

import math

import numpy as np
import pytest

from orthlin import steppers

SHAPES = [(12, 20), (20, 12), (16, 16)]
WEIGHTS = [0.5, 1.0, 2.0]
RANK, LIPSCHITZ = 4, 3.0


def gaussian(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


class Norm:
    """The norm of a basis Q, its dual, and the constants of the theorem."""

    def __init__(self, Q, shape, alpha):
        self.Q, k = Q, min(shape)
        self.c = alpha * math.sqrt((k - RANK) / shape[1])
        self.nu = RANK + alpha**2 * (k - RANK)
        self.gamma = min(1.0, self.c)

    def parts(self, X):
        B = self.Q.T @ X
        return np.linalg.svd(B, compute_uv=False), np.linalg.norm(X - self.Q @ B, axis=0)

    def __call__(self, X):
        sigma, columns = self.parts(X)
        return max(sigma[0], columns.max() / self.c)

    def dual(self, G):
        sigma, columns = self.parts(G)
        return sigma.sum() + self.c * columns.sum()


def stepped(G, omega, alpha, eta=1.0):
    """The step of the library for a test matrix, and the norm of its basis."""
    stepper = steppers.msgd(eta, rank=RANK, warm_start=True, tail=alpha)
    state = stepper.init(G)._replace(right=omega.T)
    delta, state = stepper.update(G, state, G)
    return delta, Norm(np.linalg.qr(G @ omega)[0], G.shape, alpha), state.right.T


def smallest(G):
    """Right singular vectors of the smallest singular values: the basis that captures least."""
    return np.linalg.svd(G, full_matrices=False)[2][-RANK:].T


OMEGAS = {
    "random": lambda G, t: gaussian((t, 1), G.shape[1], RANK),
    "smallest": lambda G, t: smallest(G),
}
every = pytest.mark.parametrize("shape", SHAPES)
weighted = pytest.mark.parametrize("alpha", WEIGHTS)


@every
@weighted
@pytest.mark.parametrize("kind", OMEGAS)
def test_a_direction_is_the_steepest_descent_of_its_norm(shape, alpha, kind):
    """(1) and (2), the latter for a hundred matrices as well."""
    G = gaussian(0, *shape)
    delta, norm, _ = stepped(G, OMEGAS[kind](G, 0), alpha)
    assert np.vdot(G, -delta) == pytest.approx(norm.dual(G), rel=1e-10)
    assert norm(delta) == pytest.approx(1, rel=1e-10)
    assert np.linalg.norm(delta) ** 2 == pytest.approx(norm.nu, rel=1e-10)
    for seed in range(100):
        X, Y = gaussian(seed, *shape), gaussian((seed, 1), *shape)
        assert abs(np.vdot(X, Y)) <= norm(X) * norm.dual(Y)
        assert np.linalg.norm(X) ** 2 <= norm.nu * norm(X) ** 2
        assert norm.dual(X) <= math.sqrt(norm.nu) * np.linalg.norm(X)
        assert norm.dual(X) >= norm.gamma * np.linalg.svd(X, compute_uv=False).sum()


def test_the_constant_of_the_nuclear_norm_is_attained():
    """All of the gradient in one column outside of the basis, but for what makes the basis."""
    Q = np.eye(12, RANK)
    G = np.zeros((12, 20))
    G[-1, 0] = 1.0
    norm = Norm(Q, G.shape, 1.0)
    assert norm.dual(G) == pytest.approx(norm.gamma * np.linalg.svd(G, compute_uv=False).sum())


def descended(shape, alpha, kind, steps, nuclear=False):
    """Values, dual norms and nuclear norms of a run, and the bound of (4) or of the linear rate."""
    A = gaussian(1, *shape)
    X, omega = np.zeros(shape), gaussian(2, shape[1], RANK)
    delta_f = LIPSCHITZ * np.sum(A**2) / 2
    nu = Norm(None, shape, alpha).nu
    eta = 1 / (nu * LIPSCHITZ) if nuclear else math.sqrt(2 * delta_f / (nu * LIPSCHITZ * steps))
    for t in range(steps):
        G = LIPSCHITZ * (X - A)
        omega = omega if kind == "warm" else OMEGAS[kind](G, t)
        direction, norm, omega = stepped(G, omega, alpha)
        step = eta * norm.dual(G) if nuclear else eta
        before, X = np.sum((X - A) ** 2), X + step * direction
        yield G, norm, step, LIPSCHITZ / 2 * before, LIPSCHITZ / 2 * np.sum((X - A) ** 2)


@every
@weighted
@pytest.mark.parametrize("kind", [*OMEGAS, "warm"])
def test_every_basis_converges_as_fast_as_the_bound_says(shape, alpha, kind):
    """(3) is an equality here, unless a column of the tail is below the floor; (4) follows."""
    steps, dual, nuclear = 60, [], []
    for G, norm, eta, before, after in descended(shape, alpha, kind, steps):
        columns = norm.parts(G)[1]
        if np.all(columns > 0.01 * np.linalg.norm(G, axis=0)):
            expected = before - eta * norm.dual(G) + norm.nu * LIPSCHITZ * eta**2 / 2
            assert after == pytest.approx(expected, rel=1e-9, abs=1e-9 * before)
        dual.append(norm.dual(G))
        nuclear.append(np.linalg.svd(G, compute_uv=False).sum())
    bound = math.sqrt(2 * LIPSCHITZ * np.sum(gaussian(1, *shape) ** 2) / 2 * norm.nu * LIPSCHITZ / steps)
    assert norm.gamma * np.mean(nuclear) <= np.mean(dual) <= bound
    assert np.mean(dual) >= bound / 3  # the bound says something


@every
@pytest.mark.parametrize("kind", [*OMEGAS, "warm"])
def test_nuclear_scaling_converges_linearly_for_every_basis(shape, kind):
    """mu = L: every step shrinks f by 1 - gamma^2/nu at least."""
    for _, norm, _, before, after in descended(shape, 1.0, kind, 40, nuclear=True):
        assert after <= before * (1 - norm.gamma**2 / norm.nu) * (1 + 1e-12)


def test_plain_low_rank_stands_still_where_the_tail_moves():
    """A gradient that the basis misses but for a speck: the theorem asks nothing of Q."""
    G = np.diag([1.0] * 8 + [1e-6] * 4)
    omega = np.eye(12)[:, -RANK:]
    stepper = steppers.msgd(1.0, rank=RANK, warm_start=True)
    plain, _ = stepper.update(G, stepper.init(G)._replace(right=omega.T), G)
    tail, norm, _ = stepped(G, omega, 1.0)
    assert np.vdot(G, -plain) < 1e-5
    assert np.vdot(G, -tail) == pytest.approx(norm.dual(G), rel=1e-10)
    assert np.vdot(G, -tail) > 4


def noise(p, rng, shape, size):
    """Of mean zero; for p < 2 with a tail of index 1.6, of which the moment of order p = 1.5 is finite."""
    if p == 2:
        return rng.standard_normal(shape), math.sqrt(size)
    x = rng.standard_normal(shape) / math.sqrt(size)
    radius = (1 - rng.random()) ** (-1 / 1.6)  # E radius^1.5 = 1.6/(1.6 - 1.5)
    return x / np.linalg.norm(x) * radius, 16 ** (1 / 1.5)


@pytest.mark.parametrize("p", [1.5, 2])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_mean_gradient_under_noise_keeps_to_the_bound(p, alpha):
    """(5), in the mean of 20 runs."""
    shape, steps, seeds = (8, 12), 256, 20
    A = gaussian(1, *shape) / 4
    k, size = min(shape), math.prod(shape)
    beta = 1 - steps ** (-p / (3 * p - 2))
    eta = 0.1 * steps ** (-(2 * p - 1) / (3 * p - 2))
    step = steppers.muon(eta, rank=RANK, momentum=beta, nesterov=False, tail=alpha)
    total = 0.0
    for seed in range(seeds):
        rng, X = np.random.default_rng((seed, 9)), np.zeros(shape)
        state = step.init(X, str(seed))
        for _ in range(steps):
            G = LIPSCHITZ * (X - A)
            total += np.linalg.svd(G, compute_uv=False).sum() / (steps * seeds)
            xi, sigma = noise(p, rng, shape, size)
            delta, state = step.update(G + xi, state, X, str(seed))
            X = X + delta
    norm = Norm(None, shape, alpha)
    assert norm.nu == pytest.approx(RANK + alpha**2 * (k - RANK))
    start = LIPSCHITZ * np.linalg.norm(A)
    bracket = beta * start / ((1 - beta) * steps) + beta * math.sqrt(norm.nu) * LIPSCHITZ * eta / (1 - beta)
    bracket += 2 ** ((2 - p) / p) * sigma * (1 - beta) ** ((p - 1) / p)
    bound = LIPSCHITZ * np.sum(A**2) / 2 / (steps * eta) + norm.nu * LIPSCHITZ * eta / 2
    assert norm.gamma * total <= bound + 2 * math.sqrt(norm.nu) * bracket
