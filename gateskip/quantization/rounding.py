"""Rounding weights to 4-bit integers with a scale and an offset for every 32 of them.

Which rounding error matters depends on what a weight is multiplied with: some inputs of a layer are
hundreds of times larger than others. So the range of each group of weights is chosen for the least
error of the layer's output, every input weighing by its mean square (activation-aware rounding:
arXiv 2306.00978; llama.cpp's importance matrices do the same).
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32  # weights that share a scale and an offset
LARGEST_CODE = 15
CLIPPED = (0.0, 0.04, 0.08, 0.12, 0.16, 0.2)  # parts of a group's range that may be cut off


def round_to_grid(weight: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [n, k], scales and offsets [n, k / GROUP] of weights [n, k], squares [k].

    Of several ranges for each group the one with the least sum of squared errors wins, each error
    weighted by its input's mean square. Within a range, scale and offset follow from the codes by
    least squares. Both are rounded to bfloat16, as kernels read them, before codes are chosen.
    """
    groups = weight.unflatten(1, (-1, GROUP))  # [n, groups, GROUP]
    importance = (squares / squares.mean().clamp_min(1e-12)).view(1, -1, GROUP) + 1e-6
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    best: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    for cut in CLIPPED:
        margin = (high - low) * (cut / 2)
        candidate = _fit(groups, importance, low + margin, high - margin)
        if best is None:
            best = candidate
        else:
            better = candidate[0] < best[0]
            best = tuple(torch.where(better, a, b) for a, b in zip(candidate, best, strict=True))  # type: ignore[assignment]
    assert best is not None, "there are ranges to choose from"
    _, codes, scale, low = best
    return codes.flatten(1).to(torch.uint8), scale.squeeze(2), (low + 8 * scale).squeeze(2)


def _fit(
    groups: Tensor, importance: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Error, codes, scale and lowest value of each group in a range; [n, groups, 1 or GROUP]."""
    codes = _codes(groups, (high - low) / LARGEST_CODE, low)
    total = importance.sum(2, keepdim=True)
    mean_code = (importance * codes).sum(2, keepdim=True) / total
    mean = (importance * groups).sum(2, keepdim=True) / total
    spread = (importance * (codes - mean_code).square()).sum(2, keepdim=True)
    scale = (importance * (codes - mean_code) * (groups - mean)).sum(2, keepdim=True)
    scale = (scale / spread.clamp_min(1e-20)).bfloat16().float()
    low = (mean - scale * mean_code + 8 * scale).bfloat16().float() - 8 * scale
    codes = _codes(groups, scale, low)
    error = (importance * (scale * codes + low - groups).square()).sum(2, keepdim=True)
    return error, codes, scale, low


def _codes(groups: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    steps = (groups - low) / torch.where(scale == 0, torch.ones_like(scale), scale)
    return steps.round_().clamp_(0, LARGEST_CODE)
