"""4-bit copies of a model's weights that draft for it, made while loading.

The copy `int4` is rounded by the mean squares of its layers' inputs (rounding.py). Those are
measured on text that the model writes itself, so a copy asks for no data (arXiv 2305.17888). `nf4`
is bitsandbytes' format, which looks at weights alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gateskip.model.families import backbone, final_norm
from gateskip.model.inputs import input_squares
from gateskip.model.reference import masked_forward
from gateskip.quantization.grid import joined
from gateskip.quantization.packed_linear import DenseLinear, PackedLinear, has_kernels, quantize_nf4
from gateskip.quantization.rounding import GROUP, round_to_grid

HEAD_ROWS = 4096  # of the LM head, rounded at a time
Pack = Callable[[Any], PackedLinear | None]  # of a linear layer


def nf4_copy(model: Any) -> Any:
    """The model once more with its layers' linear weights in NF4; all other tensors are shared.

    Raises ValueError where no weight can be packed, as when they have 4 bits already.
    """
    return _copy(model, lambda linear: quantize_nf4(linear.weight, linear.bias))


def int4_copy(model: Any, blocks: Tensor) -> Any:
    """The same in 4-bit integers with a scale and an offset for every 32 weights.

    blocks [N, S] are token ids of text on which the layers' inputs are measured.

    Raises ValueError where no weight can be packed, as when they have 4 bits already.
    """
    layers = _layers(model)
    with torch.no_grad():
        measured = input_squares(layers, lambda: masked_forward(model, blocks))
    squares = dict(zip(layers, measured, strict=True))

    def pack(linear: Any) -> PackedLinear | None:
        if linear.in_features % GROUP:
            return None
        grid = round_to_grid(linear.weight.detach().float(), squares[linear])
        return PackedLinear.of(grid, linear.bias)

    return _copy(model, pack)


@torch.no_grad()
def int4_draft_head(model: Any, blocks: Tensor) -> PackedLinear | None:
    """The LM head in the same 4 bits, for ranking a draft's tokens; blocks [N, S].

    None where its inputs are no whole groups of 32: then the model's own head ranks them.
    """
    hidden = masked_forward(model, blocks).float().flatten(0, 1)
    head = model.get_output_embeddings()
    if head.weight.shape[1] % GROUP:
        return None
    grids = [
        round_to_grid(rows.float(), hidden.square().mean(0))
        for rows in head.weight.detach().split(HEAD_ROWS)
    ]
    return PackedLinear.of(joined(grids), head.bias)


def _copy(model: Any, pack: Pack) -> Any:
    if not has_kernels(final_norm(model).weight):
        raise ValueError("4-bit drafts run on the native kernels: float32 or bfloat16 on a CPU")
    tensors = (*model.parameters(), *model.buffers())
    copied = copy.deepcopy(model, {id(each): each for each in tensors})
    names = {module: name for name, module in model.named_modules()}
    packed = {names[layer]: pack(layer) for layer in _layers(model)}
    for name, layer in packed.items():
        if layer is not None:
            copied.set_submodule(name, layer)
    if not any(packed.values()):
        raise ValueError("no weight of this model can be drafted with in 4 bits")
    return copied


def _layers(model: Any) -> list[nn.Module]:
    """The linear modules of a model's layers."""
    parts = backbone(model).layers.modules()
    return [part for part in parts if isinstance(part, nn.Linear | DenseLinear)]
