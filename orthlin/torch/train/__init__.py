"""``python -m orthlin.torch.train``: train a GPT-2 or LLaMA on a text, or compare optimizers on it."""
