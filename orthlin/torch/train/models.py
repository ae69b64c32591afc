"""GPT-2 and LLaMA from transformers, built from a configuration, with nothing downloaded."""

from importlib import import_module
from typing import Any

import torch

from orthlin.errors import OptionError
from orthlin.torch.train.config import SIZES, Config

Module = Any
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
COMMON = {"attn_implementation": "sdpa", "use_cache": False, "bos_token_id": None, "eos_token_id": None}


def swiglu_width(width: int) -> int:
    """Return LLaMA's 8/3 of the width, up to a multiple of 32."""
    return -(-8 * width // (3 * 32)) * 32


def build_model(config: Config, vocabulary: int) -> Module:
    """Return the model with weights drawn from the seed; PyTorch's own random state is left as it was."""
    try:
        transformers: Any = import_module("transformers")
    except ImportError:
        raise OptionError(f"--model {config.model} needs transformers: pip install transformers") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.model == "gpt2":
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**_gpt2(config, vocabulary)))
        else:
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_llama(config, vocabulary)))
    model = model.to(device=config.device, dtype=DTYPES[config.dtype]).train()
    if config.compile:
        model.compile(backend=config.compile)
    return model


def _gpt2(config: Config, vocabulary: int) -> dict[str, Any]:
    size = SIZES[config.size]
    return COMMON | {
        "vocab_size": vocabulary,
        "n_positions": config.context,
        "n_embd": size.width,
        "n_layer": size.layers,
        "n_head": size.heads,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "activation_function": "gelu_pytorch_tanh",  # gelu_new in one fused operation
    }


def _llama(config: Config, vocabulary: int) -> dict[str, Any]:
    size = SIZES[config.size]
    return COMMON | {
        "vocab_size": vocabulary,
        "max_position_embeddings": config.context,
        "hidden_size": size.width,
        "intermediate_size": swiglu_width(size.width),
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
    }


def loss_of(model: Module, drawn: Any, config: Config) -> Any:
    """Return the mean cross-entropy in nats per token of windows, a NumPy array of shape (batch, context + 1)."""
    device = torch.device(config.device)
    windows = torch.from_numpy(drawn)
    if device.type == "cuda":  # pinned memory, so that the host does not wait for the device
        windows = windows.pin_memory().to(device, non_blocking=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
