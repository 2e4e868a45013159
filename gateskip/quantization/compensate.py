"""Rounding to a grid with error compensation: each weight makes up for the errors of others.

What counts is the error of a layer's output, (W - Q) H (W - Q)^T with H the second moments of its
inputs. Columns are rounded one after another, and the columns still to come take over what each
lost (GPTQ, arXiv 2210.17323, section 3). Groups are taken by falling input, each gets its range
when its turn comes, from weights that have taken over earlier errors. Then the same error is
lowered further with what GPTQ leaves alone: scales and minima by least squares for the codes found,
and codes one column at a time for those scales (coordinate descent).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gateskip.quantization.grid import Grid, Offset, exact_minimum, exact_scale
from gateskip.quantization.rounding import round_to_grid

DAMP = 0.01  # of the mean second moment, added to all
ROUNDS = 2  # of least squares and descent after GPTQ
SWEEPS = 2  # of descent over all columns in each
AT_ONCE = 1 << 25  # numbers of the largest tensor of the least squares
HELD = 1e-4  # how strongly scales are held where the least squares leave them free


@dataclass(frozen=True)
class Rounding:
    """How a layer's weights are put on a grid."""

    bits: int = 4
    group: int = 32
    offset: Offset = "real"
    damp: float = DAMP
    rounds: int = ROUNDS


@torch.no_grad()
def round_compensated(weight: Tensor, moments: Tensor, how: Rounding) -> Grid:
    """Weights [n, k] on a grid; moments [k, k] are the mean products of the layer's inputs."""
    moments = _damped(moments.float(), how.damp)
    order = _by_input(moments.diagonal(), how.group)
    back = order.argsort()
    moments, ordered = moments[order.unsqueeze(1), order], weight.float()[:, order]
    grid = _gptq(ordered, moments, how)
    for _ in range(how.rounds):
        grid = _descend(ordered, moments, _refit(ordered, moments, grid, how.offset))
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


def _damped(moments: Tensor, damp: float) -> Tensor:
    mean = moments.diagonal().mean().clamp_min(1e-12)
    damped = moments.clone()
    damped.diagonal().add_(damp * mean)
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
    grids, codes = [], torch.empty(left.shape, dtype=torch.uint8)
    for first in range(0, len(left), how.group):
        last = first + how.group
        here, part = upper[first:last, first:last], left[first:last]
        needs = here.diagonal().square().reciprocal()
        grid = round_to_grid(part.T, needs, how.bits, how.group, how.offset)
        grids.append(grid)
        steps = _Steps.of(grid, 0)
        errors = torch.empty_like(part)
        for i in range(how.group):
            code, value = steps.nearest(part[i])
            codes[first + i] = code
            errors[i] = (part[i] - value) / here[i, i]
            part[i + 1 :] -= torch.outer(here[i, i + 1 :], errors[i])
        left[last:] -= upper[first:last, last:].T @ errors
    minima = [grid.minimum for grid in grids if grid.minimum is not None]
    return Grid(
        codes.T.contiguous(),
        torch.cat([grid.scale for grid in grids], 1),
        torch.cat(minima, 1) if minima else None,
        how.bits,
    )


@dataclass(frozen=True)
class _Steps:
    """The values of one group of columns, for all rows [n]."""

    scale: Tensor
    inverse: Tensor
    lowest: Tensor
    """What code 0 stands for."""
    least: int
    most: int

    @classmethod
    def of(cls, grid: Grid, group: int) -> _Steps:
        scale = grid.scale[:, group].contiguous()
        inverse = torch.where(scale == 0, torch.zeros_like(scale), scale.reciprocal())
        least = int(grid.minimum is None)  # a symmetric grid leaves its lowest code out
        return cls(scale, inverse, _lowest(grid)[:, group], least, (1 << grid.bits) - 1)

    def nearest(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The codes nearest to weights [n], as floats, and their values."""
        code = ((weight - self.lowest) * self.inverse).round_().clamp_(self.least, self.most)
        return code, code * self.scale + self.lowest


def _lowest(grid: Grid) -> Tensor:
    """What code 0 stands for [n, groups]."""
    return -grid.middle * grid.scale if grid.minimum is None else grid.minimum


def _descend(weight: Tensor, moments: Tensor, grid: Grid, sweeps: int = SWEEPS) -> Grid:
    """Codes chosen again column by column, all others as they are: the error only falls."""
    left, values = weight.T.contiguous(), grid.weight().T.contiguous()  # [k, n]
    codes = grid.codes.T.contiguous()
    steps = [_Steps.of(grid, group) for group in range(grid.scale.shape[1])]
    curves = moments.diagonal().reciprocal()
    for _ in range(sweeps):
        for number, step in enumerate(steps):
            first, last = number * grid.group, (number + 1) * grid.group
            here = moments[first:last, first:last]
            # half the slope of the error in each value of the group: what its columns still want
            want = moments[first:last] @ (left - values)  # [group, n]
            for i in range(grid.group):
                old = values[first + i]
                code, new = step.nearest(old + want[i] * curves[first + i])
                want[i + 1 :] -= torch.outer(here[i + 1 :, i], new - old)
                values[first + i], codes[first + i] = new, code
    return Grid(codes.T.contiguous(), grid.scale, grid.minimum, grid.bits)


def _refit(weight: Tensor, moments: Tensor, grid: Grid, offset: Offset) -> Grid:
    """Scales and minima of least error for the codes as they are; integer zero points stay."""
    zero = None if offset != "integer" else grid.zero_points()
    columns = grid.codes.float().unflatten(1, (-1, grid.group))  # [n, groups, group]
    if grid.minimum is None:
        columns = columns - grid.middle
    elif zero is not None:
        columns = columns - zero.unsqueeze(2)
    bases = [columns] if offset != "real" else [columns, torch.ones_like(columns)]
    known = [grid.scale] if offset != "real" else [grid.scale, _lowest(grid)]
    found = _least_squares(weight, moments, bases, torch.cat(known, 1))
    scale = exact_scale(found[:, : grid.scale.shape[1]].clamp_min(0))
    if offset == "real":
        minimum = exact_minimum(found[:, grid.scale.shape[1] :], scale, grid.bits)
        return Grid(grid.codes, scale, minimum, grid.bits)
    return Grid(grid.codes, scale, None if zero is None else -zero * scale, grid.bits)


def _least_squares(weight: Tensor, moments: Tensor, bases: list[Tensor], known: Tensor) -> Tensor:
    """Factors [n, bases * groups] of columns [n, groups, group] that come nearest to weights.

    The normal equations of each row; they hold what the moments leave free at the values `known`.
    """
    solved = [
        _solved(weight[rows], moments, [base[rows] for base in bases], known[rows])
        for rows in _chunks(bases[0])
    ]
    return torch.cat(solved)


def _chunks(base: Tensor) -> list[slice]:
    """Rows [n] of [n, groups, group] that are solved at a time, within some 200 MB."""
    n, groups, group = base.shape
    step = max(1, AT_ONCE // (groups * groups * group))
    return [slice(first, first + step) for first in range(0, n, step)]


def _solved(weight: Tensor, moments: Tensor, bases: list[Tensor], known: Tensor) -> Tensor:
    """The same for rows that fit into memory at once."""
    groups, group = bases[0].shape[1:]
    blocks = moments.view(groups, group, -1)  # [groups, group, k]
    wanted = (weight @ moments).unflatten(1, (groups, group))
    right = torch.cat([(wanted * base).sum(2) for base in bases], 1)  # [n, bases * groups]
    parts = []
    for base in bases:
        seen = torch.einsum("ngi,gik->ngk", base, blocks).unflatten(2, (groups, group))
        parts.append(torch.cat([(seen * other.unsqueeze(1)).sum(3) for other in bases], 2))
    left = torch.cat(parts, 1)  # [n, bases * groups, bases * groups]
    hold = HELD * left.diagonal(dim1=1, dim2=2).clamp_min(1e-12)
    left = left + torch.diag_embed(hold)
    found: Tensor = torch.linalg.solve(left, right + hold * known)
    return found
