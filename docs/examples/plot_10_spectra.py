"""
How low the rank of gradients and momenta is
============================================

A GPT-2 of four layers and width 128 reads the sources of Python's standard library, byte by byte, and is stepped by
:class:`orthlin.torch.LowRankMuon`.  At the start, in the middle and at the end its gradients and momenta are looked
at, layer by layer: their stable rank, and the energy that each kind of basis captures at an eighth and a quarter of
the rank.
"""

import matplotlib.pyplot as plt
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import orthlin
from orthlin.torch import LowRankMuon
from orthlin.torch.gpt2 import param_groups
from orthlin.torch.train.data import read_text, training_batch

LAYERS, WIDTH, CONTEXT, BATCH = 4, 128, 64, 8
AT = {"start": 5, "middle": 75, "end": 150}
RANKS = {"k/8": WIDTH // 8, "k/4": WIDTH // 4}
text = read_text(None, "bytes", CONTEXT)

# %%
# Transformers keeps a weight as (in, out), and query, key and value as one.  Here every matrix is (out, in), and those
# of one shape are a stack over layers and kinds.

SHAPES = {
    ("query", "key", "value", "output"): ("attn.c_attn", "attn.c_proj"),
    ("up",): ("mlp.c_fc",),
    ("down",): ("mlp.c_proj",),
}
KINDS = [kind for kinds in SHAPES for kind in kinds]


def stacks(model, of):
    """What `of` gives for each weight, in stacks of shape (layers, kinds, out, in)."""
    for kinds, names in SHAPES.items():
        rows = [
            torch.cat([of(block.get_submodule(name).weight) for name in names], 1).mT for block in model.transformer.h
        ]
        yield torch.stack(rows).unflatten(1, (len(kinds), -1))


# %%
# The bases.  A warm start sketches with the right factor that the step before left, as the optimizer does; all the
# others know nothing of the past.

SKETCHED = {
    "columns": {"sketch": "columns"},
    "sparse signs": {"sketch": "sparse_sign"},
    "Gaussian": {},
    "Gaussian, a power": {"n_iter": 1},
}
BASES = [*SKETCHED, "warm start", "best (SVD)"]


def captured(A, Q, r):
    """Share of the energy of A in each kind of basis of r columns, and of its nuclear norm in the best one.

    Q is the basis of the warm start.
    """
    values = torch.linalg.svdvals(A)
    squares = values**2
    found = {
        name: orthlin.metrics.captured_energy(
            A, orthlin.randomized_range_finder(A, r, n_oversamples=0, rng=0, **options)
        )
        for name, options in SKETCHED.items()
    }
    found["warm start"] = orthlin.metrics.captured_energy(A, Q)
    found["best (SVD)"] = squares[..., :r].sum(-1) / squares.sum(-1)
    return found | {"nuclear": values[..., :r].sum(-1) / values.sum(-1)}


def look(what, step, stack, warm, results):
    """Note the stable rank and what is captured of one stack, and renew the warm starts, which are a list by rank."""
    measured = {}
    for i, (name, r) in enumerate(RANKS.items()):
        basis = orthlin.lowrank_orth_factors(stack, r, test_matrix=warm[i], rng=0)
        warm[i] = basis.W.mT
        if step in AT.values():
            measured |= {(name, of): share for of, share in captured(stack, basis.Q, r).items()}
    if measured:
        results.setdefault((what, step), []).append(measured | {"rank": orthlin.metrics.stable_rank(stack)})


def train(steps):
    """Losses, and by (what, step) the figures of each stack."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": text.vocabulary_size,
        "n_positions": CONTEXT,
        "n_embd": WIDTH,
        "n_layer": LAYERS,
        "n_head": 4,
    }
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, **off, bos_token_id=None, eos_token_id=None))
    optimizer = LowRankMuon(param_groups(model), lr=6e-3, adamw={"lr": 1e-3})
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    views = {"gradient": lambda p: p.grad, "momentum": lambda p: optimizer.state[p]["momentum"]}
    warm = {what: [[None] * len(RANKS) for _ in SHAPES] for what in views}
    losses, results = [], {}
    for step in range(1, steps + 1):
        batch = torch.from_numpy(training_batch(text, CONTEXT, BATCH, 0, step))
        optimizer.zero_grad()
        logits = model(input_ids=batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        for what, of in views.items():
            for stack, starts in zip(stacks(model, of), warm[what]):
                look(what, step, stack, starts, results)
    return losses, results


def joined(stacked, key):
    """One figure of all stacks, shape (layers, kinds)."""
    return torch.cat([torch.broadcast_to(stack[key], (LAYERS, -1)) for stack in stacked], 1)


losses, results = train(AT["end"])
print(f"loss {losses[0]:.2f} at the first step, {losses[-1]:.2f} at the last\n")
for (what, step), stacked in results.items():
    print(f"{what} of step {step}: stable rank of {WIDTH}, then shares of energy and nuclear norm in the best k/4")
    print(f"{'layer':8}" + "".join(f"{kind:>17}" for kind in KINDS))
    figures = [joined(stacked, key) for key in ("rank", ("k/4", "best (SVD)"), ("k/4", "nuclear"))]
    for layer in range(LAYERS):
        cells = zip(*(figure[layer].tolist() for figure in figures))
        print(f"{layer:<8}" + "".join(f"{rank:7.1f}{energy:5.2f}{nuclear:5.2f}" for rank, energy, nuclear in cells))
    print()

# %%
figure, axes = plt.subplots(2, 3, figsize=(9, 5), layout="constrained", sharex=True, sharey=True)
for row, what in zip(axes, ("gradient", "momentum")):
    for axis, (when, step) in zip(row, AT.items()):
        for kind, ranks in zip(KINDS, joined(results[what, step], "rank").mT):
            axis.plot(range(LAYERS), ranks, "o-", label=kind)
        axis.set_title(f"{what}, {when}", fontsize="medium")
    row[0].set_ylabel("stable rank")
for axis in axes[1]:
    axis.set(xlabel="layer", xticks=range(LAYERS))
axes[0, 0].legend(fontsize="x-small", ncols=2)
plt.show()

# %%
# The energy that each kind of basis misses: the mean over all matrices, with the least and the most.

figure, axes = plt.subplots(2, 3, figsize=(9, 6), layout="constrained", sharex=True, sharey=True)
for row, what in zip(axes, ("gradient", "momentum")):
    for axis, (when, step) in zip(row, AT.items()):
        for offset, rank in zip((-0.15, 0.15), RANKS):
            missed = 1 - torch.stack([joined(results[what, step], (rank, basis)).flatten() for basis in BASES])
            mean, least, most = missed.mean(1), missed.amin(1), missed.amax(1)
            places, spread = torch.arange(len(BASES)) + offset, torch.stack([mean - least, most - mean])
            axis.errorbar(places, mean, spread, fmt="o", ms=4, lw=1, capsize=2, label=f"rank {rank}")
        axis.set_title(f"{what}, {when}", fontsize="medium")
        axis.set_xticks(range(len(BASES)), BASES, rotation=60, ha="right", fontsize="small")
        axis.set(yscale="log", ylim=(1e-5, 1))
    row[0].set_ylabel("share of the energy missed")
axes[0, 0].legend(fontsize="x-small", loc="lower left")
plt.show()

COLUMNS = [(what, rank) for what in ("gradient", "momentum") for rank in RANKS]
print(f"{'missed at the end':20}" + "".join(f"{what} {rank:6}" for what, rank in COLUMNS))
for basis in BASES:
    missed = [1 - joined(results[what, AT["end"]], (rank, basis)).mean() for what, rank in COLUMNS]
    print(f"{basis:20}" + "".join(f"{share:8.4f}{'':7}" for share in missed))

# %%
# Both are of very low rank at this size and after 150 steps: stable ranks of 1 to 5 of 128, lowest in the last layer at
# first, growing as training goes on, and largest in the two matrices of the MLP.  Momenta end wider than gradients.
#
# Random columns, sparse signs and Gaussian sketches miss alike, about three times as much as the best basis of the
# same rank.  One power iteration brings most of that back, for two products more.  A warm start costs nothing: for
# momenta, which change little from step to step, it is as good as the power iteration, for gradients less so.
#
# Energy is not all that counts.  At the end the best quarter of the rank misses 0.01 of the energy of a momentum in the
# mean, but 0.07 to 0.28 of its nuclear norm, along which full Muon descends as well.  Plain low rank has no way to that
# part, whatever the basis; it is what the tail of :class:`orthlin.torch.LowRankMuon` brings back.
#
# The text is that of the Python that runs this; with another version the figures differ a little.
