"""
What a step sends, up to 1,024 devices
======================================

Bytes and a time model for the ways in which the matrices of a model can be stepped along on many devices.  The bytes
are those that ``explain()`` of an optimizer foretells, which the tests count on two and four processes, written as
formulas.  The times are a model and no measurement: a latency for each hop, a bandwidth, the same between all devices.
"""

import matplotlib.pyplot as plt
import numpy as np

SINGLE, DOUBLE = 4, 8
LATENCY, BANDWIDTH = 5e-6, 50e9  # seconds a hop, bytes a second: a network of 400 Gb/s a device
MODELS = {
    "GPT-2 124M": {(768, 768): 48, (3072, 768): 12, (768, 3072): 12},
    "LLaMA 7B": {(4096, 4096): 128, (11008, 4096): 64, (4096, 11008): 32},
}


def averaged(m, n, r, P):
    """Gradients averaged over copies, as DDP does it: what everything else is compared with."""
    return [SINGLE * m * n]


def copies(m, n, r, P):
    """``replicate_group``: the sketch, the trace and two flags in double precision, and the block."""
    return [DOUBLE * (m * r + 3), SINGLE * r * n]


def low_rank(m, n, r, P):
    """Rows on P devices: Gram matrix, squares of the columns and two flags, and Gram matrix and block."""
    return [DOUBLE * (r * r + n + 2), SINGLE * (r * r + r * n)]


def owners(m, n, r, P):
    """Full directions of rows on P devices: a matrix to its owner and back, an even share of both."""
    share = SINGLE * m * n / P * (P - 1) / P
    return [share, share]


def low_rank_by_owners(m, n, r, P):
    """The same at low rank; the next warm start goes to all."""
    there, back = owners(m, n, r, P)
    return [there, back + SINGLE * r * n * (P - 1) / P]


def gathered(m, n, r, P):
    """Weight, gradient and momentum gathered on every device."""
    return [SINGLE * m * n / P] * 3


def in_sums(P):
    """What a device sends for each byte of a sum, and the hops of a tree."""
    return 2 * (P - 1) / P, 2 * np.ceil(np.log2(P))


SENT = {
    averaged: in_sums,
    copies: in_sums,
    low_rank: in_sums,
    owners: lambda P: (1, P - 1),
    low_rank_by_owners: lambda P: (1, P - 1),
    gathered: lambda P: (P - 1, P - 1),
}


def given(way, shapes, P, rank):
    """Bytes that a device gives to the collectives of a step, by stacks of one shape."""
    return sum(count * sum(way(m, n, rank(m, n), P)) for (m, n), count in shapes.items())


def seconds(way, shapes, P, rank):
    """Time of the collectives of a step, none of which overlaps with anything."""
    sent, hops = SENT[way](P)
    calls = sum(len(way(m, n, rank(m, n), P)) for m, n in shapes)
    return calls * hops * LATENCY + sent * given(way, shapes, P, rank) / BANDWIDTH


def at_most(r):
    """Return the rank r, or less for smaller matrices."""
    return lambda m, n: min(r, m, n)


for model, shapes in MODELS.items():
    print(f"{model}, rank 64: MB that a device gives for its matrices in a step, and ms by the model")
    print("devices", *(f"{way.__name__:>18}" for way in SENT))
    for P in (4, 64, 1024):
        found = [(given(way, shapes, P, at_most(64)), seconds(way, shapes, P, at_most(64))) for way in SENT]
        print(f"{P:7}", *(f"{sent / 1e6:8.1f} ({1e3 * time:6.1f})" for sent, time in found))

# %%
processes = 2 ** np.arange(1, 11)
figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), sharex=True, layout="constrained")
for column, (model, shapes) in zip(axes.T, MODELS.items()):
    for way in SENT:
        sent = [SENT[way](P)[0] * given(way, shapes, P, at_most(64)) / 1e6 for P in processes]
        times = [1e3 * seconds(way, shapes, P, at_most(64)) for P in processes]
        column[0].loglog(processes, sent, "o-", ms=3, label=way.__name__)
        column[1].loglog(processes, times, "o-", ms=3)
    column[0].set(title=f"{model}, rank 64", ylabel="MB sent by a device")
    column[1].set(xlabel="devices", ylabel="ms by the model")
axes[0, 0].legend(fontsize="x-small")
plt.show()

# %%
# Low rank on shards sends the least up to some 12 devices for a GPT-2 and 80 for a LLaMA; then owners of full
# directions do, whose share falls like 1/P while sums stay what they are, but for whom latency grows with the
# devices, as every one of them talks to all others.  Owners make low rank as well, for the warm start on top: an
# optimizer takes whichever sends less, shape by shape, and ``explain()`` says so.  So a mesh of 8 to 64 devices for
# the shards and copies of it beyond, as HSDP has it, suits low rank.  Copies with gradients of their own give a fifth
# of what averaged gradients are for a GPT-2 and a twenty-fifth for a LLaMA.
