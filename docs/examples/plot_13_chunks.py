r"""
A matrix larger than memory, in chunks
======================================

Low-rank orthogonalization touches a large matrix in two products only, :math:`Y = G \Omega` and
:math:`C = Q^H G`.  Dask makes both from chunks that exist one at a time; what is left has r rows or columns and is
done by orthlin in memory, and the result :math:`Q \operatorname{msign}(C)` is made in chunks again, when they are
asked for.  Here a matrix of 12,000 x 4,096 that is never there as a whole.
"""

import dask.array as da
import matplotlib.pyplot as plt
import numpy as np

import orthlin

M, N, CHUNK, RANK = 12_000, 4_096, 1_000, 64


def rows(block_info=None):
    """A chunk of rows: 48 directions that fall like 1/i, and noise, drawn from the number of the chunk."""
    start, stop = block_info[None]["array-location"][0]
    rng = np.random.default_rng(start)
    left = rng.standard_normal((stop - start, len(right)), dtype=np.float32)
    return left / np.arange(1, len(right) + 1, dtype=np.float32) @ right + 0.1 * rng.standard_normal(
        (stop - start, N), dtype=np.float32
    )


right = np.random.default_rng(1).standard_normal((48, N), dtype=np.float32)
heights = (CHUNK,) * (M // CHUNK)
G = da.map_blocks(rows, chunks=(heights, (N,)), dtype=np.float32, meta=np.empty((0, 0), np.float32))
print(f"G {G.nbytes / 1e6:.0f} MB in chunks of {G.nbytes / G.numblocks[0] / 1e6:.0f} MB")

# %%
# The two products, and between them a basis: Y has r columns and fits.
omega = np.random.default_rng(0).standard_normal((N, RANK), dtype=np.float32)
with_one_thread = {"scheduler": "synchronous"}
Y = (G @ omega).compute(**with_one_thread)
Q = orthlin.qr(Y).Q
C = (da.from_array(Q.T, chunks=(RANK, CHUNK)) @ G).compute(**with_one_thread)
W = orthlin.orthogonalize(C)
O = da.from_array(Q, chunks=(CHUNK, RANK)) @ W
print("kept in memory:", f"{(Y.nbytes + Q.nbytes + C.nbytes + W.nbytes) / 1e6:.0f} MB")
print("orthonormal to", f"{max(np.abs(Q.T @ Q - np.eye(RANK)).max(), np.abs(W @ W.T - np.eye(RANK)).max()):.1e}")

# %%
# A part of the result, and the same from the part of the matrix that it belongs to, in memory: with the test matrix
# and the rows of all chunks it would be :func:`orthlin.lowrank_orth`, to rounding.
small = G[: 2 * CHUNK].compute(**with_one_thread)
chunks = small @ omega
basis = orthlin.qr(chunks).Q
difference = np.abs(
    basis @ orthlin.orthogonalize(basis.T @ small) - orthlin.lowrank_orth(small, RANK, test_matrix=omega)
).max()
print("largest difference of the two ways on 2,000 rows:", f"{difference:.1e}")

# %%
energy = np.linalg.svd(C, compute_uv=False) ** 2
figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
axis.semilogy(range(1, RANK + 1), energy / energy[0], "o", ms=3, label="of G, along the basis")
axis.semilogy(range(1, RANK + 1), np.linalg.svd(W, compute_uv=False), label="of the result")
axis.set(xlabel="direction", ylabel="energy, over the largest")
axis.legend()
plt.show()

# %%
# One more pass over G for a power iteration, ``Y = G @ (G.T @ Y)``, captures more of a spectrum that falls slowly.
