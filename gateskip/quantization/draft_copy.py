"""4-bit copies of a model's weights that draft for it, made while loading.

Which rounding error matters depends on what a weight is multiplied with: some inputs of a layer are
hundreds of times larger than others. So the copy `int4` chooses the range of each group of weights
for the least error of the layer's output, every input weighing by its mean square (activation-aware
rounding: arXiv 2306.00978; llama.cpp's importance matrices do the same). Those squares are seen on
text that the model writes itself, so a copy asks for no data (arXiv 2305.17888). `nf4` is
bitsandbytes' format, which looks at weights alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gateskip.model.families import backbone, final_norm
from gateskip.model.reference import masked_forward
from gateskip.quantization.packed_linear import DenseLinear, PackedLinear, has_kernels, quantize_nf4

GROUP = 32  # weights that share a range in `int4`
LEVELS = 15
HEAD_ROWS = 4096  # of the LM head, rounded at a time
CLIPPED = (0.0, 0.04, 0.08, 0.12, 0.16, 0.2)  # parts of a group's range that may be cut off
Pack = Callable[[Any], PackedLinear | None]  # of a linear layer


def nf4_twin(model: Any) -> Any:
    """The model once more with its layers' linear weights in NF4; all other tensors are shared.

    Raises ValueError where no weight can be packed, as when they have 4 bits already.
    """
    return _twin(model, lambda linear: quantize_nf4(linear.weight, linear.bias))


def int4_twin(model: Any, blocks: Tensor) -> Any:
    """The same in 4-bit integers with a scale and an offset for every 32 weights.

    blocks [N, S] are token ids of text on which the layers' inputs are measured.

    Raises ValueError where no weight can be packed, as when they have 4 bits already.
    """
    squares = input_squares(model, blocks)

    def pack(linear: Any) -> PackedLinear | None:
        if linear.in_features % GROUP:
            return None
        parts = round_to_grid(linear.weight.detach().float(), squares[linear])
        return PackedLinear(*parts, None, linear.bias)

    return _twin(model, pack)


@torch.no_grad()
def int4_head(model: Any, blocks: Tensor) -> PackedLinear:
    """The LM head in the same 4 bits, for ranking a draft's tokens; blocks [N, S]."""
    hidden = masked_forward(model, blocks).float().flatten(0, 1)
    head = model.get_output_embeddings()
    parts = [
        round_to_grid(rows.float(), hidden.square().mean(0))
        for rows in head.weight.detach().split(HEAD_ROWS)
    ]
    codes, scale, offset = (torch.cat(each) for each in zip(*parts, strict=True))
    return PackedLinear(codes, scale, offset, None, head.bias)


def _twin(model: Any, pack: Pack) -> Any:
    if not has_kernels(final_norm(model).weight):
        raise ValueError("4-bit drafts run on the native kernels: float32 or bfloat16 on a CPU")
    tensors = (*model.parameters(), *model.buffers())
    twin = copy.deepcopy(model, {id(each): each for each in tensors})
    names = {module: name for name, module in model.named_modules()}
    packed = {names[layer]: pack(layer) for layer in _layers(model)}
    for name, layer in packed.items():
        if layer is not None:
            twin.set_submodule(name, layer)
    if not any(packed.values()):
        raise ValueError("no weight of this model can be drafted with in 4 bits")
    return twin


def _layers(model: Any) -> list[nn.Module]:
    """The linear modules of a model's layers."""
    parts = backbone(model).layers.modules()
    return [part for part in parts if isinstance(part, nn.Linear | DenseLinear)]


@torch.no_grad()
def input_squares(model: Any, blocks: Tensor) -> dict[nn.Module, Tensor]:
    """Mean square of each input of every linear layer [K], over all tokens of blocks [N, S]."""
    squares: dict[nn.Module, Tensor] = {}

    def observe(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        squares[module] = arguments[0].detach().float().flatten(0, -2).square().mean(0)

    hooks = [layer.register_forward_pre_hook(observe) for layer in _layers(model)]
    try:
        masked_forward(model, blocks)
    finally:
        for hook in hooks:
            hook.remove()
    return squares


def round_to_grid(weight: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [n, k], scales and offsets [n, k / GROUP] of weights [n, k], squares [k].

    Of several ranges for each group the one with the least sum of squared errors wins, each error
    weighed by its input's mean square. Within a range, scale and offset follow from the codes by
    least squares. Both are rounded to bfloat16, as kernels read them, before codes are chosen.
    """
    groups = weight.unflatten(1, (-1, GROUP))  # [n, groups, GROUP]
    weighs = (squares / squares.mean().clamp_min(1e-12)).view(1, -1, GROUP) + 1e-6
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    best: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    for cut in CLIPPED:
        margin = (high - low) * (cut / 2)
        found = _fit(groups, weighs, low + margin, high - margin)
        if best is None:
            best = found
        else:
            better = found[0] < best[0]
            best = tuple(torch.where(better, a, b) for a, b in zip(found, best, strict=True))  # type: ignore[assignment]
    assert best is not None, "there are ranges to choose from"
    _, codes, scale, low = best
    return codes.flatten(1).to(torch.uint8), scale.squeeze(2), (low + 8 * scale).squeeze(2)


def _fit(
    groups: Tensor, weighs: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Error, codes, scale and lowest value of each group in a range; [n, groups, 1 or GROUP]."""
    codes = _codes(groups, (high - low) / LEVELS, low)
    total = weighs.sum(2, keepdim=True)
    mean_code = (weighs * codes).sum(2, keepdim=True) / total
    mean = (weighs * groups).sum(2, keepdim=True) / total
    spread = (weighs * (codes - mean_code).square()).sum(2, keepdim=True)
    scale = (weighs * (codes - mean_code) * (groups - mean)).sum(2, keepdim=True)
    scale = (scale / spread.clamp_min(1e-20)).bfloat16().float()
    low = (mean - scale * mean_code + 8 * scale).bfloat16().float() - 8 * scale
    codes = _codes(groups, scale, low)
    error = (weighs * (scale * codes + low - groups).square()).sum(2, keepdim=True)
    return error, codes, scale, low


def _codes(groups: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    steps = (groups - low) / torch.where(scale == 0, torch.ones_like(scale), scale)
    return steps.round_().clamp_(0, LEVELS)
