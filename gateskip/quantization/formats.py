"""The formats of a model's weights, in words."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from gateskip.model.families import backbone
from gateskip.quantization.gpu_linear import GpuEmbedding, GpuLinear
from gateskip.quantization.grid_linear import GridEmbedding, GridLinear
from gateskip.quantization.head import RoundedHead
from gateskip.quantization.packed_embedding import PackedEmbedding
from gateskip.quantization.packed_linear import PackedLinear


def weight_format(model: Any) -> str:
    """The formats of the layers' linear weights, that of most weights first: `bfloat16`, or `4 bits
    in groups of 64, bfloat16`; a rounded LM head is named too."""
    counts: Counter[str] = Counter()
    for module in backbone(model).layers.modules():
        if (name := _format(module)) is not None:
            counts[name] += int(module.in_features) * int(module.out_features)
    names = [name for name, _ in counts.most_common()]
    embedding = model.get_input_embeddings()
    if isinstance(embedding, GridEmbedding | PackedEmbedding | GpuEmbedding):
        names.append(f"embedding and LM head {embedding.bits} bits in groups of {embedding.group}")
    if isinstance(model.get_output_embeddings(), RoundedHead):
        names.append("LM head 8 bits in groups of 32")
    return ", ".join(names)


def has_packed(model: Any) -> bool:
    """Whether any layer's weights are packed for our kernels."""
    return any(isinstance(module, PackedLinear) for module in model.modules())


def _format(module: nn.Module) -> str | None:
    """The format of one linear layer; None for any other module."""
    if not hasattr(module, "in_features") or not hasattr(module, "out_features"):
        return None
    if isinstance(module, GridLinear | GpuLinear):
        return f"{module.bits} bits in groups of {module.group}"
    if isinstance(module, PackedLinear):
        kind = "4-bit codebook" if module.book is not None else f"{module.bits} bits"
        return f"{kind} in groups of {module.group}"
    if hasattr(module, "qweight"):
        return f"GPTQ {module.bits} bits"
    kind = type(module).__name__
    if kind in ("Linear4bit", "Linear8bitLt"):
        return "bitsandbytes " + ("4 bits" if kind == "Linear4bit" else "int8")
    weight: Any = module.weight
    return str(weight.dtype).removeprefix("torch.")
