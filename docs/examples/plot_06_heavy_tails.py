"""
Heavy-tailed noise
==================

What a low rank does to noise without a variance.  Every entry is drawn from Student's t distribution of index 1.5;
the study is ``asv_bench/heavy_tails.py``, here with fewer seeds.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import orthlin

sys.path.insert(0, str(Path(orthlin.__file__).parents[1] / "asv_bench"))
import heavy_tails

# %%
# The direction
# -------------
#
# A matrix of rank 20, 256 x 512, plus noise.  *Aligned* is what a step does along the clean direction; *cosine* is
# what share of the step that is.  A full direction steps along the signal as far as any other, and along 236
# directions of noise as well, so that its cosine is at most :math:`\sqrt{20/256} = 0.28` whatever the noise.

levels, seeds = (1e-5, 1e-4, 2e-4, 5e-4), 2
found = {level: {name: rest for name, *rest in heavy_tails.means("t", level, seeds)} for level in levels}
print(f"{'noise':>14}", *(f"{level:>14g}" for level in levels))
for name in heavy_tails.DIRECTIONS:
    print(f"{name:>14}", *(f"{found[level][name][0]:>8.3f} {found[level][name][1]:.3f}" for level in levels))

# %%
# Along rank 20 with a power iteration nearly all of the step is signal, as long as the rank is that of the signal: at
# rank 40 half of it is noise again.  In *aligned* nothing is won over the full direction.
#
# The rate
# --------
#
# Theory: with momentum and step chosen for index a, the mean gradient norm over K steps falls like
# :math:`K^{-(a-1)/(3a-2)} = K^{-0.2}`.

counts = [64, 128, 256, 512, 1024]
norms = {
    name: np.stack(
        [heavy_tails.mean_gradient(K, 8, length=6.0, noise=0.05, **heavy_tails.METHODS[name]) for K in counts]
    )
    for name in ("full", "low rank", "warm, tail")
}
slopes = {name: heavy_tails.slope(counts, values) for name, values in norms.items()}
for name, (fitted, error) in slopes.items():
    print(f"{name:12} K^{fitted:.3f}, standard error {error:.3f}")

# %%
figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
for name, values in norms.items():
    axis.loglog(counts, values.mean(1), "o-", label=name)
axis.loglog(counts, norms["full"].mean(1)[0] * (np.asarray(counts) / counts[0]) ** -0.2, "k--", label="K to the -0.2")
axis.set(xlabel="steps K", ylabel="mean nuclear norm of the gradient")
axis.legend(fontsize="small")
plt.show()

# %%
# All three fall at the rate of the theory.  So short, and with so few seeds, their order says nothing.
