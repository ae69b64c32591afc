r"""
An orthogonal layer trained through orthogonalize
=================================================

A layer with weight ``orthogonalize(V)`` is orthogonal whatever V is, and can be trained by any optimizer, as the
derivative of the polar factor is exact: with :math:`V = U H` and a tangent E,

.. math:: dU = U Y, \qquad H Y + Y H = U^T E - E^T U.

Here the task is to find a hidden rotation from noisy pairs :math:`y = R x + \varepsilon`, by Adam through
orthogonalize, by Adam on a free matrix, and, beside them, in closed form.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch

import orthlin

SIZE, PAIRS, NOISE = 32, 64, 0.5
rng = np.random.default_rng(0)
R = torch.asarray(np.linalg.qr(rng.standard_normal((SIZE, SIZE)))[0])
R[0] *= torch.linalg.det(R).sign()  # a rotation, as the identity that training starts from is one
x = torch.asarray(rng.standard_normal((PAIRS, SIZE)))
y = x @ R.mT + NOISE * torch.asarray(rng.standard_normal((PAIRS, SIZE)))


class Orthogonal(torch.nn.Module):
    """A square layer whose weight is the polar factor of its parameter."""

    def __init__(self):
        super().__init__()
        self.V = torch.nn.Parameter(torch.eye(SIZE, dtype=torch.float64))

    @property
    def weight(self):
        """The orthogonal weight."""
        return orthlin.orthogonalize(self.V)


class Free(Orthogonal):
    """The same without a constraint."""

    @property
    def weight(self):
        """The parameter itself."""
        return self.V


# %%
# The derivative
# --------------
#
# Against a central difference along a random direction, where the singular values of V are all equal, which a
# derivative by way of the SVD cannot take:

layer, E = Orthogonal(), torch.asarray(rng.standard_normal((SIZE, SIZE)))
(layer.weight * R).sum().backward()
plus, minus = (float((orthlin.orthogonalize(layer.V.detach() + h * E) * R).sum()) for h in (1e-6, -1e-6))
exact, difference = float((layer.V.grad * E).sum()), (plus - minus) / 2e-6
print(f"derivative {exact:.8f}, difference quotient {difference:.8f}")

# %%
# Training
# --------

curves, found = {}, {}
for name, kind in {"orthogonal": Orthogonal, "free": Free}.items():
    layer = kind()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.997)
    curves[name] = []
    for _ in range(1000):
        optimizer.zero_grad()
        (x @ layer.weight.mT - y).square().sum().backward()
        optimizer.step()
        schedule.step()
        curves[name].append(float((layer.weight.detach() - R).norm() / R.norm()))
    found[name] = layer.weight.detach()

closed = {
    "orthogonal": orthlin.orthogonalize(y.mT @ x),  # orthogonal Procrustes
    "free": torch.linalg.lstsq(x, y).solution.mT,
}
for name, weight in found.items():
    defect = float((weight.mT @ weight - torch.eye(SIZE)).norm())
    apart = float((weight - closed[name]).norm() / closed[name].norm())
    print(f"{name:10} error {curves[name][-1]:.4f}, |W^T W - I| {defect:.0e}, from the closed form {apart:.1e}")

# %%
figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
for name, errors in curves.items():
    (line,) = axis.semilogy(errors, label=f"{name}, by Adam")
    end = float((closed[name] - R).norm() / R.norm())
    axis.axhline(end, color=line.get_color(), ls=":", label=f"{name}, in closed form")
axis.set(xlabel="step", ylabel="error of the weight, relative")
axis.legend(fontsize="small")
plt.show()

# %%
# The constraint is worth a factor of two in the error here, as it leaves half of the unknowns.  It does not help
# where the answer is not orthogonal, and the determinant of the weight cannot change its sign on the way: from the
# identity, which has determinant 1, rotations with determinant -1 are out of reach unless V passes through a singular
# matrix.
