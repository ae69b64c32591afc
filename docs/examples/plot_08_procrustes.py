r"""
Procrustes alignment by polar
=============================

Which rotation, stretch or both brings one set of points onto another?  With centred points P and C in columns, the
orthogonal matrix that minimizes :math:`\|U P - C\|_F` is the polar factor of :math:`C P^T` (Green 1952).  The other
factor says how much they agree: the trace of H is :math:`\sum \sigma_i(C P^T)`, and a scale follows from it.  Stacks
of clouds are aligned in one call.
"""

import matplotlib.pyplot as plt
import numpy as np

import orthlin

# %%
# One cloud: a rotated, scaled, noisy copy of a letter.

rng = np.random.default_rng(0)
letter = np.asarray([(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (2, 4), (2, 0), (1.3, 3.3), (1.3, 1), (2, 2)]).T
P = letter - letter.mean(1, keepdims=True)
angle, scale = 0.9, 1.7
turn = np.asarray([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
C = scale * turn @ P + 0.15 * rng.standard_normal(P.shape)
C -= C.mean(1, keepdims=True)

U, H = orthlin.polar(C @ P.T)
fitted = np.trace(H) / np.sum(P**2)
print(f"angle {np.arctan2(U[1, 0], U[0, 0]):.3f} for {angle}, scale {fitted:.3f} for {scale}")

# %%
figure, axis = plt.subplots(figsize=(5, 4), layout="constrained")
axis.plot(*P, "o", label="points")
axis.plot(*C, "s", mfc="none", label="turned, stretched, noisy")
axis.plot(*(fitted * U @ P), "x", label="points aligned with them")
axis.set_aspect("equal")
axis.legend(fontsize="small")
plt.show()

# %%
# A stack, and the nearest rotation
# ---------------------------------
#
# Five hundred clouds of 40 points in space.  The polar factor may be a reflection where the noise is large.  The
# nearest *rotation* needs one more step, the sign of the determinant on the direction of the smallest singular value,
# which H tells (Kabsch 1976).

clouds, noise = 500, 2.0
P = rng.standard_normal((clouds, 3, 40)) * np.asarray([3.0, 1.0, 0.3])[:, None]
true = np.linalg.qr(rng.standard_normal((clouds, 3, 3)))[0]
true *= np.sign(np.linalg.det(true))[:, None, None]
C = true @ P + noise * rng.standard_normal(P.shape)

U, H = orthlin.polar(C @ P.mT)
reflected = np.linalg.det(U) < 0
smallest = np.linalg.eigh(H)[1][..., :1]
rotation = np.where(reflected[:, None, None], U - 2 * (U @ smallest) @ smallest.mT, U)


def error(found):
    """Mean distance from the true rotation."""
    return float(np.linalg.norm(found - true, axis=(-2, -1)).mean())


print(f"reflections: {reflected.sum()} of {clouds}; after the step: {np.sum(np.linalg.det(rotation) < 0)}")
print(f"mean error of polar factors {error(U):.3f}, of rotations {error(rotation):.3f}")
print(f"residuals: orthogonality {orthlin.metrics.orthogonality(U).max():.1f} eps sqrt(3)")

# %%
# For one cloud `scipy.linalg.orthogonal_procrustes` is as good.  This is for stacks, and for points that live on a
# GPU.
