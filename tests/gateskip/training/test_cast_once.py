"""Weights that do not train, in the precision of autocast."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from gateskip.quantization.folders import load_model
from gateskip.quantization.packed_linear import accelerate_linears
from gateskip.training.cast_once import cast_once


@pytest.mark.parametrize("replaced", [False, True], ids=["torch's", "ours"])
def test_logits_are_the_same_and_the_model_stays(tiny_llama: Path, replaced: bool) -> None:
    """Whether linear layers are torch's, or those that a gate stage puts in their place."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = load_model(tiny_llama, "float32")
    if replaced:
        assert accelerate_linears(model)["DenseLinear"]
    copied = cast_once(model, accelerator)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad(), accelerator.autocast():
        assert torch.equal(copied(ids).logits, model(ids).logits)
    layer, cast = model.model.layers[0], copied.model.layers[0]
    assert layer.mlp.up_proj.weight.dtype == torch.float32
    assert cast.mlp.up_proj.weight.dtype == torch.bfloat16
    assert cast.input_layernorm.weight is layer.input_layernorm.weight
    assert copied.get_input_embeddings().weight is model.get_input_embeddings().weight
    assert copied.lm_head.weight.dtype == torch.bfloat16


def test_without_mixed_precision_nothing_is_copied(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, "float32")
    assert cast_once(model, Accelerator(cpu=True, mixed_precision="no")) is model
