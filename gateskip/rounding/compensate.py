"""Rounding to a grid with error compensation: weights compensate for the errors of others.

The objective is the error of a layer's output, (W - Q) H (W - Q)^T with H the second moments of its
inputs. Columns are rounded one after another, and later columns compensate for the error of each
(GPTQ, arXiv 2210.17323, section 3). Groups come in order of falling inputs. The range of each group
is fitted when its turn comes, to weights that already compensate for earlier errors. Then
coordinate descent lowers the same error over everything that GPTQ fixed, one group after another
with all others fixed: scale and minimum by least squares for the codes, then codes one column at a
time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gateskip.quantization.grid import Grid, Offset, exact_minimum, exact_scale
from gateskip.quantization.rounding import round_to_grid
from gateskip.rounding.columns import Steps, descend_columns, round_columns

DAMP = 0.01  # share of the mean second moment that is added to all
SWEEPS = 6  # over all groups after GPTQ
HELD = 1e-4  # weight of the current scale where least squares leave it free


@dataclass(frozen=True)
class Rounding:
    """How a layer's weights are put on a grid."""

    bits: int = 4
    group: int = 32
    offset: Offset = "real"
    damp: float = DAMP
    sweeps: int = SWEEPS


@torch.no_grad()
def round_compensated(weight: Tensor, moments: Tensor, how: Rounding, chance: float = 0.0) -> Grid:
    """Weights [n, k] on a grid; moments [k, k] are the mean products of the layer's inputs.
    `chance` is the share of products of different inputs that is noise (moments.py)."""
    moments = _damped(moments.float(), how.damp, chance)
    order = _by_input(moments.diagonal(), how.group)
    back = order.argsort()
    moments, ordered = moments[order.unsqueeze(1), order], weight.float()[:, order]
    grid = _descend(ordered, moments, _gptq(ordered, moments, how), how)
    groups = back[:: how.group] // how.group  # where each group went
    minimum = None if grid.minimum is None else grid.minimum[:, groups]
    return Grid(grid.codes[:, back], grid.scale[:, groups], minimum, how.bits)


def output_error(weight: Tensor, moments: Tensor, grid: Grid) -> float:
    """Relative error of the layer's output, ||y' - y|| / ||y||, over the inputs of the moments."""
    lost = weight.float() - grid.weight()
    error = (lost @ moments * lost).sum()
    return float(
        (error / (weight.float() @ moments * weight.float()).sum().clamp_min(1e-30)).sqrt()
    )


def _damped(moments: Tensor, damp: float, chance: float) -> Tensor:
    diagonal = moments.diagonal()
    damped = moments * (1 - chance)
    damped.diagonal().copy_(diagonal + damp * diagonal.mean().clamp_min(1e-12))
    return damped


def _by_input(squares: Tensor, group: int) -> Tensor:
    """Columns [k], whole groups by falling mean square of their inputs."""
    groups = squares.view(-1, group).mean(1).argsort(descending=True, stable=True)
    return (groups.unsqueeze(1) * group + torch.arange(group, device=squares.device)).flatten()


def _gptq(weight: Tensor, moments: Tensor, how: Rounding) -> Grid:
    """Column after column; a group's grid is fitted when its first column's turn comes."""
    left = weight.T.contiguous()  # [k, n]: a column of weights lies together
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    upper = torch.linalg.cholesky(inverse, upper=True)
    del inverse  # a quarter of what a wide layer takes
    grids, codes = [], torch.empty_like(left, dtype=torch.uint8)
    for first in range(0, len(left), how.group):
        last = first + how.group
        here, part = upper[first:last, first:last], left[first:last]
        needs = here.diagonal().square().reciprocal()
        grid = round_to_grid(part.T, needs, how.bits, how.group, how.offset)
        grids.append(grid)
        steps = Steps.of(grid.scale[:, 0], _lowest(grid)[:, 0], how.bits, how.offset == "none")
        codes[first:last], errors = round_columns(part, here, steps)
        left[last:].addmm_(upper[first:last, last:].T, errors, alpha=-1)
    minima = [grid.minimum for grid in grids if grid.minimum is not None]
    return Grid(
        codes.T.contiguous(),
        torch.cat([grid.scale for grid in grids], 1),
        torch.cat(minima, 1) if minima else None,
        how.bits,
    )


def _lowest(grid: Grid) -> Tensor:
    """The values of code 0 [n, groups]."""
    return -grid.middle * grid.scale if grid.minimum is None else grid.minimum


def _descend(weight: Tensor, moments: Tensor, grid: Grid, how: Rounding) -> Grid:
    """One group after another: scale and minimum for its codes, then its codes column by column,
    all others fixed. Every step lowers the error, except for the rounding of scales to exact
    numbers."""
    lost = (weight - grid.weight()).T.contiguous()  # [k, n]: a column of weights lies together
    codes = grid.codes.T.contiguous()
    scale, lowest = grid.scale.T.contiguous(), _lowest(grid).T.contiguous()  # [groups, n]
    zeros = _zero_codes(grid, how.offset)
    for _ in range(how.sweeps):
        for number, zero in enumerate(zeros):
            part = slice(number * grid.group, (number + 1) * grid.group)
            here, chosen = moments[part, part], codes[part].float()
            values = chosen * scale[number] + lowest[number]  # [group, n]
            weights = lost[part] + values
            # minus half the error's gradient in each value, at values of zero in the group
            want = (moments[part] @ lost).addmm_(here, values)
            held = scale[number], lowest[number]
            scale[number], lowest[number] = _line(chosen, here, want, held, zero, grid.bits)
            values = chosen * scale[number] + lowest[number]
            want.addmm_(here, values, alpha=-1)
            steps = Steps.of(scale[number], lowest[number], grid.bits, how.offset == "none")
            descend_columns(values, codes[part], want, here, steps)
            lost[part] = weights - values
    minimum = None if grid.minimum is None else lowest.T.contiguous()
    return Grid(codes.T.contiguous(), scale.T.contiguous(), minimum, grid.bits)


def _zero_codes(grid: Grid, offset: Offset) -> list[Tensor | None]:
    """For each group the fixed codes [n] of the value zero; None where a minimum is free."""
    groups = range(grid.scale.shape[1])
    if offset == "real":
        return [None for _ in groups]
    middle = torch.full_like(grid.scale, grid.middle)
    zeros = middle if grid.minimum is None else grid.zero_points()
    return [zeros[:, group].contiguous() for group in groups]


def _line(
    codes: Tensor,
    moments: Tensor,
    want: Tensor,
    current: tuple[Tensor, Tensor],
    zero: Tensor | None,
    bits: int,
) -> tuple[Tensor, Tensor]:
    """Scale and lowest value [n] of least error for codes [group, n]: least squares under moments
    [group, group] with the right side `want` [group, n]. In directions that moments leave free, the
    result stays near the `current` values. With `zero` [n], the code of the value zero, only the
    scale is free."""
    scale, lowest = current
    signed = codes if zero is None else codes - zero
    seen = moments @ signed
    both = (signed * seen).sum(0)  # the normal equations: signed codes, and ones
    hold = HELD * both.clamp_min(1e-12)
    both, right = both + hold, (signed * want).sum(0) + hold * scale
    if zero is not None:
        scale = exact_scale((right / both).clamp_min(0))
        return scale, -zero * scale
    mixed, ones = seen.sum(0), moments.sum()
    right_ones = want.sum(0) + HELD * ones * lowest
    ones = ones * (1 + HELD)
    free = (right * ones - right_ones * mixed) / (both * ones - mixed.square())
    scale = exact_scale(free.clamp_min(0))
    return scale, exact_minimum((right_ones - mixed * scale) / ones, scale, bits)
