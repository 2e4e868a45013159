"""Shapes of published Llamas, and models of random weights that have them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama-3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


def empty_llama(shape: str, **more: Any) -> Any:
    """A Llama in bfloat16 whose weights are whatever was in memory; `more` are of its config."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[shape], **more)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def write_random(shape: str, folder: Path, seed: int = 0) -> Path:
    """A Llama of random bfloat16 weights with tied embeddings, and SmolLM2's tokenizer.

    Weights have the size at which a layer keeps the norm of what it reads.
    """
    import torch

    from compose.assets import resolve_model

    torch.manual_seed(seed)
    model = empty_llama(shape, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1)
            else:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    for path in resolve_model("smollm2-135m-instruct").path.glob("*token*"):
        shutil.copyfile(path, folder / path.name)
    return folder
