r"""
Quickstart
==========

Orthogonalizing a matrix :math:`G = U \Sigma V^H` means replacing it by :math:`U V^H`: every singular value becomes
one. At rank r only the r directions that a randomized sketch picks out of G are kept.  This page does both on the
gradient that ships with the package, on every array library found here; it needs NumPy alone.
"""

from importlib import import_module, resources
from importlib.util import find_spec

import numpy as np

import orthlin

# %%
# NumPy
# -----
#
# G is the gradient of a weight of a small GPT-2, 192 x 768.

G = np.load(resources.files("orthlin") / "data" / "gpt2_gradient.npy")
O = orthlin.lowrank_orth(G, 64, rng=0)
U = orthlin.orthogonalize(G)
Q, W = orthlin.lowrank_orth_factors(G, 64, rng=0)

print("unit singular values:", np.sum(np.linalg.svd(O)[1] > 0.5), "of", min(O.shape))
print("and in full:         ", np.sum(np.linalg.svd(U)[1] > 0.5))
print("O = Q W:             ", np.allclose(O, Q @ W, atol=1e-6), Q.shape, W.shape)

# %%
# The same lines on other libraries
# ---------------------------------
#
# Only G differs.  The result is an array of the same library, on the same device, of the same dtype.  With a NumPy
# generator as `rng` the test matrix is the same everywhere, and so is the result, to rounding.

libraries = [name for name in ("numpy", "torch", "cupy", "jax.numpy") if find_spec(name.partition(".")[0])]
for name in libraries:
    array = import_module(name)
    O = orthlin.lowrank_orth(array.asarray(G), 64, rng=np.random.default_rng(0))
    print(f"{name:10} {type(O).__module__}.{type(O).__name__}: <G, O> = {float((array.asarray(G) * O).sum()):.4f}")

# %%
# For PyTorch on a GPU that is ``torch.asarray(G, device="cuda")``.  Nothing is copied to the host on the way, and
# nothing waits.
#
# What a rank buys, and what it costs
# -----------------------------------
#
# A step along -O lowers a function at first by <G, O>, which is at most the nuclear norm of G.  A plain sketch of
# rank r captures less of it than the r leading singular directions would; one power iteration recovers most of that.

ranks = (8, 16, 32, 64, 96, 128, 160)
sigma = np.linalg.svd(G, compute_uv=False)
best = [sigma[:r].sum() / sigma.sum() for r in ranks]
captured = {
    n_iter: [orthlin.metrics.captured_fraction(G, orthlin.lowrank_orth(G, r, n_iter=n_iter, rng=0)) for r in ranks]
    for n_iter in (0, 1)
}
print("rank ", *(f"{r:5}" for r in ranks))
print("best ", *(f"{x:5.2f}" for x in best))
print("plain", *(f"{x:5.2f}" for x in captured[0]))
print("power", *(f"{x:5.2f}" for x in captured[1]))

# %%
if find_spec("matplotlib"):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(ranks, best, "k--", label="singular value decomposition")
    axes.plot(ranks, captured[1], "o-", label="one power iteration")
    axes.plot(ranks, captured[0], "s-", label="plain sketch")
    axes.set(xlabel="rank, of 192", ylabel="share of the nuclear norm captured", ylim=(0, 1))
    axes.legend()
    plt.show()

# %%
# In training
# -----------
#
# Stepping along such a direction instead of the gradient is matrix-sign gradient descent, and with momentum Muon.
# :mod:`orthlin.steppers` has them as pure functions on any library, ``orthlin.torch`` as optimizers:

A, X = G / np.linalg.norm(G, 2), np.zeros_like(G)  # minimize ||X - A||^2 / 2
stepper = orthlin.steppers.muon(lambda t: 0.2 * 0.95**t, rank=0.25, warm_start=True, tail="auto")
state = stepper.init(X)
for _ in range(150):
    delta, state = stepper.update(X - A, state, X)
    X = X + delta
print(f"distance from A: {np.linalg.norm(X - A) / np.linalg.norm(A):.4f}")

# %%
# Go on with :doc:`/howto/rank` or, for a model, with :doc:`/howto/training`.
