"""Make the real gradient that ships with orthlin as ``orthlin/data/gpt2_gradient.npy``.

A small GPT-2 (transformers' ``GPT2LMHeadModel`` built from a config: 4 layers, 6 heads, width 192,
context 64, no dropout) learns the characters of a text with AdamW.  The saved array is the gradient
of ``transformer.h[2].mlp.c_fc.weight`` (192 x 768, float32, 590 KB) on a batch drawn after training.

Any text file will do; the shipped gradient was made with tinyshakespeare (1,115,394 characters)::

    pip install numpy torch==2.13.0 transformers
    python asv_bench/make_gradient.py tinyshakespeare.txt orthlin/data/gpt2_gradient.npy

That run (600 steps of 16 x 64 characters, seed 0, two to three minutes on two CPU cores) reached a training
loss of 2.050, the mean of the last 50 batches; the loss on the batch of the saved gradient was 2.007.
On one machine the file comes out the same each time; elsewhere the last digits may differ.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

CONTEXT, WIDTH, LAYERS, HEADS = 64, 192, 4, 6


def read_characters(path: Path) -> tuple[torch.Tensor, int]:
    """Return the text as character numbers, and how many distinct characters it has."""
    text = path.read_text(encoding="utf-8")
    if len(text) <= CONTEXT:
        raise SystemExit(f"{path}: {len(text)} characters; at least {CONTEXT + 1} are needed")
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    return torch.tensor([number[character] for character in text]), len(number)


def build_model(n_characters: int) -> GPT2LMHeadModel:
    """Build the untrained model; nothing is downloaded."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=n_characters,
            n_positions=CONTEXT,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def backward(model: GPT2LMHeadModel, text: torch.Tensor, batch: int) -> float:
    """Fill the gradients on randomly placed windows of the text and return the loss."""
    starts = torch.randint(len(text) - CONTEXT + 1, (batch,))
    windows = torch.stack([text[i : i + CONTEXT] for i in starts])
    model.zero_grad()
    loss = model(input_ids=windows, labels=windows).loss
    loss.backward()
    return loss.item()


def train(model: GPT2LMHeadModel, text: torch.Tensor, steps: int, batch: int) -> None:
    """Train with AdamW and print the loss, the mean of the last 50 batches, every 50 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(1, steps + 1):
        losses.append(backward(model, text, batch))
        optimizer.step()
        if step % 50 == 0 or step == steps:
            print(f"step {step:4d}  loss {np.mean(losses[-50:]):.3f}", flush=True)


def describe(gradient: np.ndarray) -> None:
    """Print the shape, the leading singular values and the stable rank."""
    sigma = np.linalg.svd(gradient.astype(np.float64), compute_uv=False)
    print(f"shape {gradient.shape}, {gradient.dtype}")
    print("leading singular values", " ".join(f"{s:.3e}" for s in sigma[:6]), f"... {sigma[-1]:.3e}")
    print(f"stable rank {np.sum(sigma**2) / sigma[0] ** 2:.2f}")
    print(f"nuclear rank {np.sum(sigma) / sigma[0]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small GPT-2 and save one of its gradients.")
    parser.add_argument("text", type=Path, help="any text file (UTF-8)")
    parser.add_argument("output", type=Path, help="the .npy file to write")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    text, n_characters = read_characters(options.text)
    model = build_model(n_characters)
    train(model, text, options.steps, options.batch)
    print(f"loss on the batch of the saved gradient {backward(model, text, options.batch):.3f}")
    gradient = model.transformer.h[LAYERS // 2].mlp.c_fc.weight.grad.numpy()
    describe(gradient)
    np.save(options.output, gradient, allow_pickle=False)


if __name__ == "__main__":
    main()
