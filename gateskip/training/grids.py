"""Integer grids that learn: their scales and minima, and optionally their codes.

Codes are trained as in quantization-aware training: each weight has a position on its group's grid,
a real number that is rounded in the forward pass, and the gradient passes the rounding unchanged
(straight-through, arXiv 1308.3432). Scales and minima learn at the same time (arXiv 1902.08153),
and the dense model's predictions are the target (arXiv 2305.17888). A group's codes, scale and
minimum are stored as before: format, size and speed of the checkpoint do not change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gateskip.quantization.grid import (
    Grid,
    Lines,
    exact_minimum,
    exact_scale,
    minimum_in_steps,
    pack_bits,
    row_steps,
    scale_in_steps,
)
from gateskip.quantization.grid_linear import stored_lines
from gateskip.quantization.offsets import STEPS_BELOW

WITHIN = 0.3
"""The largest distance, in steps of the grid, of a weight's first position from its code. At half a
step the noise of the first gradients alone would change codes: KL 0.108 became 0.185 in 25 steps.
"""

PLACE_RATE = 6.0
"""The learning rate of positions over that of scales: a hundred steps at 1e-3 move a position,
whose gradient always points the same way, by a third of a step."""


class ScaledGrid(nn.Module):
    """A layer on an integer grid (quantization/grid.py) that learns its scales and its minima.

    weight = scale * (gain * (code - middle) + shift) + offset. The offset is the middle code's
    value, so that gains and shifts, which begin at 1 and 0, move a weight by like amounts.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    bias: Tensor | None

    def __init__(self, grid: Grid, bias: Tensor | None) -> None:
        super().__init__()
        self.bits, self.middle = grid.bits, grid.middle
        self.register_buffer("codes", grid.codes.unflatten(1, (-1, grid.group)))
        self.register_buffer("scale", grid.scale)
        self.register_buffer("offset", grid.offset())
        self.register_buffer("bias", None if bias is None else bias.detach())
        lines = Lines.of(grid.scale, grid.minimum, grid.bits)
        self.in_steps = self.bits < STEPS_BELOW and lines is not None
        self.gain = nn.Parameter(torch.ones_like(grid.scale))
        self.shift = None if self.offset is None else nn.Parameter(torch.zeros_like(grid.scale))

    def learned(self) -> tuple[Tensor, Tensor | None]:
        """Scales, and values of middle codes, [out, G] each; None where all of these are 0."""
        scale = self.scale * self.gain
        if self.offset is None or self.shift is None:
            return scale, None
        return scale, self.offset + self.scale * self.shift

    def tensors(self) -> dict[str, Tensor]:
        """The current scales and minima, rounded to numbers that the format holds, as stored."""
        raw, offset = (None if part is None else part.detach() for part in self.learned())
        assert raw is not None, "every grid has scales"
        scale = raw.clamp_min(0)
        low = None if offset is None else offset - self.middle * raw
        if not self.in_steps:
            scale = exact_scale(scale)
            low = None if low is None else exact_minimum(low, scale, self.bits)
            return stored_lines(scale, low, self.bits)
        step = row_steps(scale, low, self.bits).unsqueeze(1)
        scale = scale_in_steps(scale, step)
        low = None if low is None else minimum_in_steps(low, scale, step, self.bits)
        return stored_lines(scale, low, self.bits)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        weight = self._weight(dtype).flatten(1)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    def _weight(self, dtype: torch.dtype) -> Tensor:
        """[out, G, group]"""
        scale, offset = self.learned()
        weight = (self.codes.to(dtype) - self.middle) * scale.to(dtype).unsqueeze(2)
        return weight if offset is None else weight + offset.to(dtype).unsqueeze(2)


class LearnedGrid(ScaledGrid):
    """A layer on an integer grid that learns its codes, too.

    It begins with the grid's codes. A weight's position is that of the dense weight, or as near to
    it as its code allows, so that weights between two codes change first.
    """

    def __init__(self, grid: Grid, bias: Tensor | None, dense: Tensor | None = None) -> None:
        """`dense` [out, in] are the weights that were rounded; with None positions start at the
        codes."""
        super().__init__(grid, bias)
        codes = self.codes.float()
        within = torch.zeros_like(codes)
        if dense is not None:
            away = (dense.detach().float() - grid.weight()).view_as(codes)
            scale = torch.where(grid.scale == 0, torch.inf, grid.scale).unsqueeze(2)
            within = (away / scale).clamp(-WITHIN, WITHIN)
        self.place = nn.Parameter(codes + within)
        del self.codes

    def tensors(self) -> dict[str, Tensor]:
        """The current scales, minima and codes."""
        codes = self.place.detach().round().clamp(0, (1 << self.bits) - 1).to(torch.uint8)
        return super().tensors() | {"codes": pack_bits(codes.flatten(1), self.bits)}

    def _weight(self, dtype: torch.dtype) -> Tensor:
        scale, offset = self.learned()
        offset = torch.zeros_like(scale) if offset is None else offset
        weight: Tensor = _Rounded.apply(self.place, scale, offset, self.bits, dtype)  # type: ignore[no-untyped-call]
        return weight


class _Rounded(torch.autograd.Function):
    """Weights [out, G, group] from positions on a grid. A position gets the gradient of its weight
    for one step of the grid, unless it is beyond the grid's ends."""

    @staticmethod
    def forward(
        ctx: Any, place: Tensor, scale: Tensor, offset: Tensor, bits: int, dtype: torch.dtype
    ) -> Tensor:
        max_code = (1 << bits) - 1
        codes = place.round()
        inside = (codes >= 0) & (codes <= max_code)
        codes = codes.clamp_(0, max_code).sub_(1 << (bits - 1))
        ctx.save_for_backward(codes.to(torch.int8), inside, scale)
        weight: Tensor = torch.addcmul(offset.unsqueeze(2), codes, scale.unsqueeze(2)).to(dtype)
        return weight

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        codes, inside, scale = ctx.saved_tensors
        gradient = upstream[0].float()
        of_scale, of_offset = (gradient * codes).sum(2), gradient.sum(2)
        return (gradient * scale.unsqueeze(2)).mul_(inside), of_scale, of_offset, None, None
