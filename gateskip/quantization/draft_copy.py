"""Draft copies: a model's weights in fewer bits, made while loading.

An integer copy (`int4`, `int3`, `int2`) is rounded by the mean squares of its layers' inputs
(rounding.py). They are measured on text that the model writes itself, so a copy needs no data
(arXiv 2305.17888). `nf4` is bitsandbytes' format, which depends on weights only. The model may be
packed itself: layers are unpacked one at a time, and layers that would not become smaller are
shared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gateskip.model.families import final_norm
from gateskip.model.inputs import input_squares
from gateskip.model.reference import masked_forward
from gateskip.quantization.dequantize import dense_weight, linear_layers, stored_bits
from gateskip.quantization.packed_linear import PackedLinear, has_kernels, quantize_nf4
from gateskip.quantization.rounding import GROUP, round_to_grid

Pack = Callable[[Any], PackedLinear | None]  # of a linear layer


@dataclass(frozen=True)
class CopyFormat:
    """How an integer copy is stored."""

    bits: int
    """Bits of one weight."""
    group: int
    """Weights that share a scale and an offset."""


COPIES = {"int4": CopyFormat(4, 32), "int3": CopyFormat(3, 32), "int2": CopyFormat(2, 32)}
"""Integer copies by name."""
HEAD = CopyFormat(4, 32)
"""The LM head that ranks tokens where the model's own layers draft."""
COPY_HEAD = CopyFormat(3, 64)
"""The LM head of a copy. The model's own head chooses among the eight best of each thread, so that
fewer bits cost nothing: 0.908 of drafts accepted with 3, 0.910 with 4, 0.861 with 2 (SmolLM2)."""
NF4_BITS = 4
MIN_SMALLER = 0.125
"""Share of a model's weights that a copy has to make smaller to be tried by default. Value
projections in 8 bits beside 4 (3 % of SmolLM2, at most 8 % where every head has values) are too
few."""


@dataclass(frozen=True)
class Inputs:
    """Mean squares [in] of the inputs of linear layers, and of the LM head."""

    layers: Mapping[Any, Tensor]
    head: Tensor


def copy_bits(name: str) -> int | None:
    """Bits of a weight in the copy of this name; None for drafts without a copy."""
    return NF4_BITS if name == "nf4" else COPIES[name].bits if name in COPIES else None


def can_copy(model: Any, bits: int) -> bool:
    """Whether a copy in `bits` bits makes enough of the model's weights smaller to draft faster,
    and kernels can run it."""
    sizes = {layer: layer.in_features * layer.out_features for layer in linear_layers(model)}
    smaller = sum(size for layer, size in sizes.items() if stored_bits(layer) > bits)
    return has_kernels(final_norm(model).weight) and smaller >= MIN_SMALLER * sum(sizes.values())


@torch.no_grad()
def read_text(model: Any, blocks: Tensor) -> Inputs:
    """Inputs of the model's linear layers and LM head, measured on token ids blocks [N, S]."""
    layers, states = linear_layers(model), list[Tensor]()
    squares = input_squares(layers, lambda: states.append(masked_forward(model, blocks)))
    head = states[0].float().flatten(0, 1).square().mean(0)
    return Inputs(dict(zip(layers, squares, strict=True)), head)


def nf4_copy(model: Any) -> Any:
    """A copy of the model with its layers' linear weights in NF4; all other tensors are shared.

    Raises ValueError where none of them can be packed in fewer bits than it has.
    """
    return _copy(model, NF4_BITS, lambda linear: quantize_nf4(dense_weight(linear), linear.bias))


def integer_copy(model: Any, inputs: Inputs, how: CopyFormat) -> Any:
    """A copy of the model with its layers' linear weights on integer grids; it shares all other
    tensors.

    Raises ValueError as `nf4_copy` does.
    """

    def pack(linear: Any) -> PackedLinear | None:
        squares = inputs.layers[linear]
        if linear.in_features % how.group or not len(squares):  # the layer was not run
            return None
        return _packed(dense_weight(linear), squares, linear.bias, how)

    return _copy(model, how.bits, pack)


@torch.no_grad()
def draft_head(
    model: Any, inputs: Inputs, how: CopyFormat = HEAD, tokens: Tensor | None = None
) -> PackedLinear | None:
    """The LM head on the integer grid `how`, for ranking a draft's tokens: its rows of tokens [T],
    or all; in groups of 32 where larger ones do not divide its inputs.

    None where 32 does not either, or the head has as few bits already: then the model's own head
    ranks them.
    """
    head = model.get_output_embeddings()
    how = how if head.in_features % how.group == 0 else CopyFormat(how.bits, GROUP)
    if head.in_features % how.group or stored_bits(head) <= how.bits:
        return None
    rows, bias = dense_weight(head), head.bias
    if tokens is not None:
        rows, bias = rows[tokens], None if bias is None else bias[tokens]
    return _packed(rows, inputs.head, bias, how)


def _packed(weight: Tensor, squares: Tensor, bias: Tensor | None, how: CopyFormat) -> PackedLinear:
    """Weights [n, k] rounded by the mean squares [k] of their inputs. Nothing stores their scales,
    so that these need no steps."""
    grid = round_to_grid(weight, squares, how.bits, how.group, in_steps=False)
    return PackedLinear.of(grid, bias)


@torch.no_grad()
def _copy(model: Any, bits: int, pack: Pack) -> Any:
    if not has_kernels(final_norm(model).weight):
        raise ValueError(
            "draft copies need the native kernels: float32 or bfloat16 weights on a CPU"
        )
    names = {module: name for name, module in model.named_modules()}
    larger = [layer for layer in linear_layers(model) if stored_bits(layer) > bits]
    packed = {names[layer]: pack(layer) for layer in larger}
    if not any(packed.values()):
        raise ValueError(f"a copy in {bits} bits would make no weight of this model smaller")
    tensors = (*model.parameters(), *model.buffers())
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for name, layer in packed.items():
        if layer is not None:
            copied.set_submodule(name, layer)
    return copied
