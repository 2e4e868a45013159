"""What rounding changes in a model's predictions, where weights are set one after the other."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def unfilled(folder: Path) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A model of the folder's architecture in float32, its weights by name, and its config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return model, dict(model.named_parameters()), config.to_dict()  # a tied weight once


def fill(weights: dict[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Set weights of a model, in its float type; others that it has not are left out."""
    for name, value in tensors:
        if name in weights:
            weights[name].copy_(value)


def kl_of_logits(target: Tensor, logits: Tensor) -> float:
    """KL from the predictions of the logits `target` [1, S, V] to those of `logits`, the mean over
    tokens."""
    from gateskip.rounding.allocation import mean_kl

    return mean_kl(target.log_softmax(-1), logits.log_softmax(-1))
