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

from gateskip.kernels.autotune import fast_type
from gateskip.quantization.grid import Grid
from gateskip.quantization.offsets import Offset
from gateskip.quantization.rounding import round_to_grid
from gateskip.rounding.columns import Steps, round_columns
from gateskip.rounding.descent import blocks, descend

DAMP = 0.01  # share of the mean second moment that is added to all
SWEEPS = 6  # over all groups after GPTQ
LEAF = 256  # columns of a triangular matrix that is inverted at once


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
    grid = descend(ordered, moments, _gptq(ordered, moments, how), how.offset, how.sweeps)
    groups = back[:: how.group] // how.group  # where each group went
    minimum = None if grid.minimum is None else grid.minimum[:, groups]
    return Grid(grid.codes[:, back], grid.scale[:, groups], minimum, how.bits)


def output_error(weight: Tensor, moments: Tensor, grid: Grid) -> float:
    """Relative error of the layer's output, ||y' - y|| / ||y||, over the inputs of the moments; to
    three digits."""
    fast = fast_type(weight.device.type)
    moments = moments.to(fast)

    def squared(values: Tensor) -> Tensor:
        return (values * (values.to(fast) @ moments)).sum()

    whole = weight.float()
    return float((squared(whole - grid.weight()) / squared(whole).clamp_min(1e-30)).sqrt())


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
    upper = inverse_factor(moments)
    grids, codes, errors = [], torch.empty_like(left, dtype=torch.uint8), torch.empty_like(left)
    for start, stop in blocks(len(left), how.group):
        for first in range(start, stop, how.group):
            last = first + how.group
            here, part = upper[first:last, first:last], left[first:last]
            needs = here.diagonal().square().reciprocal()
            grid = round_to_grid(part.T, needs, how.bits, how.group, how.offset, in_steps=False)
            grids.append(grid)
            steps = Steps.of(grid.scale[:, 0], grid.lowest()[:, 0], how.bits, how.offset == "none")
            codes[first:last], errors[first:last] = round_columns(part, here, steps)
            left[last:stop].addmm_(upper[first:last, last:stop].T, errors[first:last], alpha=-1)
        left[stop:].addmm_(upper[start:stop, stop:].T, errors[start:stop], alpha=-1)
    minima = [grid.minimum for grid in grids if grid.minimum is not None]
    return Grid(
        codes.T.contiguous(),
        torch.cat([grid.scale for grid in grids], 1),
        torch.cat(minima, 1) if minima else None,
        how.bits,
    )


def inverse_factor(moments: Tensor) -> Tensor:
    """The upper triangular U with U^T U the inverse of moments [k, k]: the inverse of their
    Cholesky factor from the other end, which takes half the operations of inverting moments."""
    factor: Tensor = torch.linalg.cholesky(moments.flip(0, 1))
    _invert(factor)
    return factor.flip(0, 1)


def _invert(lower: Tensor) -> None:
    """Invert a lower triangular matrix [k, k] by its quarters, in its own memory."""
    if (size := len(lower)) <= LEAF:
        one = torch.eye(size, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, one, upper=False))
        return
    first, last = lower[: size // 2, : size // 2], lower[size // 2 :, size // 2 :]
    _invert(first)
    _invert(last)
    below = lower[size // 2 :, : size // 2]
    below.copy_((last @ below) @ first).neg_()
