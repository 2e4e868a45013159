"""Float32 weights of linear layers of any format, and the bits of one weight.

Draft copies are made from these, layer by layer, so that a packed model can have a draft copy in
fewer bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gateskip.model.families import backbone
from gateskip.quantization.packed_linear import (
    PackedLinear,
    bitsandbytes_functions,
    gptq_weight,
    int8_parts,
)


def linear_layers(model: Any) -> list[Any]:
    """The linear modules of a model's layers, whatever their format."""
    parts = backbone(model).layers.modules()
    return [part for part in parts if hasattr(part, "in_features") and hasattr(part, "bias")]


def stored_bits(layer: Any) -> int:
    """Bits of one stored weight, without its share of scales: 4 for NF4, 16 for bfloat16."""
    kind = type(layer).__name__
    if kind in ("Linear4bit", "Linear8bitLt"):
        return 4 if kind == "Linear4bit" else 8
    if hasattr(layer, "bits"):  # packed for our kernels, an integer grid, or one of gptqmodel's
        return int(layer.bits)
    return 8 * int(layer.weight.element_size())


def dense_weight(layer: Any) -> Tensor:
    """The float32 weights [out, in] that a linear layer of any format multiplies with."""
    kind = type(layer).__name__
    if isinstance(layer, PackedLinear):
        return layer.unpacked()
    if hasattr(layer, "grid"):
        weight: Tensor = layer.grid().weight()
    elif kind == "Linear4bit":
        weight = _of_four_bits(layer)
    elif kind == "Linear8bitLt":
        codes, scale = int8_parts(layer)
        weight = codes.float() * scale
    elif hasattr(layer, "qweight"):
        weight = gptq_weight(layer).T[:, : layer.in_features]
    else:
        weight = layer.weight
    return weight.detach().float()


def _of_four_bits(layer: Any) -> Tensor:
    """The weights [out, in] of bitsandbytes' layer. A layer that has run on a CPU may store its
    codes in another order; it then multiplies the columns of the identity."""
    state = layer.weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        weight: Tensor = bitsandbytes_functions().dequantize_4bit(layer.weight.data, state)
        return weight
    columns: Tensor = layer(torch.eye(layer.in_features, dtype=layer.compute_dtype))
    return (columns if layer.bias is None else columns - layer.bias).T
