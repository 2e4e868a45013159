"""Coordinate descent over everything that GPTQ fixed: scales, minima and codes.

One group of columns after another moves, with all others fixed: its scale and minimum by least
squares for its codes, then its codes one column at a time. On the CPU the compiled kernels do it
(gateskip/kernels/src/linear/descent.cpp); sums there have another order than those of torch's
operators here, so that a code of some ten thousand differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gateskip.kernels import abi, build, ops
from gateskip.kernels.autotune import fast_type
from gateskip.quantization.grid import (
    Grid,
    exact_minimum,
    exact_scale,
    minimum_in_steps,
    row_steps,
    scale_in_steps,
)
from gateskip.quantization.offsets import Offset, has_steps
from gateskip.rounding.columns import Steps, descend_columns

BLOCK = 128  # columns, at least a group, whose products with all others are computed together
HELD = 1e-4  # weight of the current scale where least squares leave it free


@dataclass(frozen=True)
class _Lines:
    """Scale and lowest value of each group [groups, n], where a zero is fixed, its code, and the
    steps [n] of which both are whole numbers, where they are."""

    scale: Tensor
    lowest: Tensor
    zero: Tensor | None
    steps: Tensor | None
    bits: int
    symmetric: bool

    def rows(self, part: slice) -> _Lines:
        """Some groups of all."""
        zero = None if self.zero is None else self.zero[part]
        lines = self.scale[part], self.lowest[part], zero, self.steps
        return _Lines(*lines, self.bits, self.symmetric)


def descend(weight: Tensor, moments: Tensor, grid: Grid, offset: Offset, sweeps: int) -> Grid:
    """A grid of less error (W - Q) H (W - Q)^T for weights [n, k] and moments H [k, k], after some
    sweeps over all groups. Every step lowers the error, except for the rounding of scales and
    minima to numbers that a grid holds.
    """
    lost = (weight - grid.weight()).T.contiguous()  # [k, n]: a column of weights lies together
    codes, lines = grid.codes.T.contiguous(), _lines(grid, offset)
    # of the error's gradient three digits decide a code, so that fast products serve
    fast = fast_type(lost.device.type)
    rows, columns = moments.to(fast), lost.to(fast)
    for _ in range(sweeps):
        for first, last in blocks(len(lost), grid.group):
            part = slice(first, last)
            seen = (rows[part] @ columns).float()  # minus half the gradient in each value
            some = lines.rows(slice(first // grid.group, last // grid.group))
            _descend_block(moments[part, part].contiguous(), seen, lost[part], codes[part], some)
            columns[part] = lost[part]
    minimum = None if grid.minimum is None else lines.lowest.T.contiguous()
    return Grid(codes.T.contiguous(), lines.scale.T.contiguous(), minimum, grid.bits)


def blocks(width: int, group: int) -> list[tuple[int, int]]:
    """First columns and ends of blocks of whole groups. A product for a block takes half the time
    of products for its groups."""
    step = max(group, BLOCK // group * group)
    return [(first, min(first + step, width)) for first in range(0, width, step)]


def _lines(grid: Grid, offset: Offset) -> _Lines:
    scale, lowest, zero = grid.scale.T.contiguous(), grid.lowest().T.contiguous(), None
    if offset == "none":
        zero = torch.full_like(scale, grid.middle)
    elif offset == "integer":
        zero = grid.zero_points().T.contiguous()
    steps = None
    if has_steps(grid.bits, offset):
        steps = row_steps(grid.scale, grid.minimum, grid.bits)
    return _Lines(scale, lowest, zero, steps, grid.bits, offset == "none")


def _descend_block(
    moments: Tensor, seen: Tensor, lost: Tensor, codes: Tensor, lines: _Lines
) -> None:
    """All groups of a block, one after another, in place: lost [block, n], codes, and lines.
    moments [block, block] are its own; `seen` [block, n] is used up."""
    group = len(lost) // len(lines.scale)
    if lost.device.type == "cpu" and build.library() is not None:
        tensors = moments, seen, lines.zero, lines.steps, lost, codes, lines.scale, lines.lowest
        pointers = [None if part is None else part.data_ptr() for part in tensors]
        sizes = lost.shape[1], len(lost), group, lines.bits, int(lines.symmetric)
        ops.descend_block(abi.DescentBlock(*pointers, *sizes, torch.get_num_threads()))
        return
    for number in range(len(lines.scale)):
        part = slice(number * group, (number + 1) * group)
        change = _descend_group(moments[part, part], seen[part], codes[part], lines, number)
        lost[part] += change
        seen[part.stop :].addmm_(moments[part.stop :, part], change)


def _descend_group(
    moments: Tensor, seen: Tensor, codes: Tensor, lines: _Lines, number: int
) -> Tensor:
    """By how much the values [group, n] of one group fall; its codes and its line change."""
    scale, lowest = lines.scale[number], lines.lowest[number]
    zero = None if lines.zero is None else lines.zero[number]
    chosen = codes.float()
    before = chosen * scale + lowest
    want = seen.addmm(moments, before)  # the same at values of zero in the group
    free = _line(chosen, moments, want, (scale, lowest), zero)
    scale[:], lowest[:] = _rounded(*free, lines)
    values = chosen * scale + lowest
    want.addmm_(moments, values, alpha=-1)
    steps = Steps.of(scale, lowest, lines.bits, lines.symmetric)
    descend_columns(values, codes, want, moments, steps)
    return before - values


def _line(
    codes: Tensor,
    moments: Tensor,
    want: Tensor,
    current: tuple[Tensor, Tensor],
    zero: Tensor | None,
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Scale [n] of least error for codes [group, n], and the lowest value of least error for a
    scale: least squares under moments [group, group] with the right side `want` [group, n]. In
    directions that moments leave free, the result stays near the `current` values. With `zero` [n],
    the code of the value zero, only the scale is free."""
    scale, lowest = current
    signed = codes if zero is None else codes - zero
    seen = moments @ signed
    both = (signed * seen).sum(0)  # the normal equations: signed codes, and ones
    hold = HELD * both.clamp_min(1e-12)
    both, right = both + hold, (signed * want).sum(0) + hold * scale
    if zero is not None:
        return right / both, lambda scale: -zero * scale
    mixed, ones = seen.sum(0), moments.sum()
    right_ones = want.sum(0) + HELD * ones * lowest
    ones = ones * (1 + HELD)
    free = (right * ones - right_ones * mixed) / (both * ones - mixed.square())
    return free, lambda scale: (right_ones - mixed * scale) / ones


def _rounded(
    scale: Tensor, lowest: Callable[[Tensor], Tensor], lines: _Lines
) -> tuple[Tensor, Tensor]:
    """Scale and lowest value [n] as numbers that a grid holds."""
    scale, steps = scale.clamp_min(0), lines.steps
    scale = exact_scale(scale) if steps is None else scale_in_steps(scale, steps)
    low = lowest(scale)
    if lines.zero is not None:
        return scale, low
    if steps is None:
        return scale, exact_minimum(low, scale, lines.bits)
    return scale, minimum_in_steps(low, scale, steps, lines.bits)
