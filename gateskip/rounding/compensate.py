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
OUTPUTS = 256  # of a layer whose error is recorded, at most
SWEEPS = 3  # over all groups after GPTQ; more gain less than the interval of KL


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
    three digits, and of a few hundred outputs where it has more."""
    fast, step = fast_type(weight.device.type), -(-len(weight) // OUTPUTS)
    some = slice(None, None, step)
    moments, weight, grid = moments.to(fast), weight[some], grid.rows(some)

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
    """Column after column; a group's grid is fitted when its first column's turn comes. Groups
    compensate for earlier ones by the Cholesky factor of the moments, which gives the results of
    its inverse (LDLQ: arXiv 2307.13304, section 4.1)."""
    wanted = weight.T.contiguous()  # [k, n]: a column of weights lies together
    factor, lost = factor_from_the_end(moments), torch.empty_like(wanted)
    grids, codes = [], torch.empty_like(wanted, dtype=torch.uint8)
    for start, stop in blocks(len(wanted), how.group):
        pulls = factor[:start, start:stop].T @ lost[:start]
        for first in range(start, stop, how.group):
            last = first + how.group
            here = _inverse(factor[first:last, first:last])
            pull = pulls[first - start : last - start]
            pull.addmm_(factor[start:first, first:last].T, lost[start:first])
            part = torch.addmm(wanted[first:last], here.T, pull)
            needs = here.diagonal().square().reciprocal()
            grid = round_to_grid(part.T, needs, how.bits, how.group, how.offset, in_steps=False)
            grids.append(grid)
            steps = Steps.of(grid.scale[:, 0], grid.lowest()[:, 0], how.bits, how.offset == "none")
            codes[first:last], errors = round_columns(part, here, steps)
            torch.mm(here.T, errors - pull, out=lost[first:last])
    minima = [grid.minimum for grid in grids if grid.minimum is not None]
    return Grid(
        codes.T.contiguous(),
        torch.cat([grid.scale for grid in grids], 1),
        torch.cat(minima, 1) if minima else None,
        how.bits,
    )


def factor_from_the_end(moments: Tensor) -> Tensor:
    """The upper triangular F with F F^T = moments [k, k]."""
    factor: Tensor = torch.linalg.cholesky(moments.flip(0, 1))
    return factor.flip(0, 1)


def _inverse(upper: Tensor) -> Tensor:
    """Of an upper triangular matrix."""
    one = torch.eye(len(upper), device=upper.device)
    inverse: Tensor = torch.linalg.solve_triangular(upper, one, upper=True)
    return inverse
