"""Chooses the codes of one group of columns of a weight, one column after the other.

Columns [group, n] are contiguous, and rows do not depend on each other. On the CPU a compiled
kernel rounds them (gateskip/kernels/src/linear/rounding.cpp), with results equal to those of the
operators here, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gateskip.kernels import abi, build, ops


@dataclass(frozen=True)
class Steps:
    """The values that a group of columns can have, for all rows [n]."""

    scale: Tensor
    inverse: Tensor
    lowest: Tensor
    """The value of code 0."""
    min_code: int
    max_code: int

    @classmethod
    def of(cls, scale: Tensor, lowest: Tensor, bits: int, symmetric: bool) -> Steps:
        """The steps of codes of some bits; a symmetric grid does not use its lowest code."""
        scale, lowest = scale.contiguous(), lowest.contiguous()
        inverse = torch.where(scale == 0, torch.zeros_like(scale), scale.reciprocal())
        return cls(scale, inverse, lowest, int(symmetric), (1 << bits) - 1)

    def nearest(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The codes nearest to weights [n], as floats, and their values."""
        code = ((weight - self.lowest) * self.inverse).round_().clamp_(self.min_code, self.max_code)
        return code, code * self.scale + self.lowest

    def native(self, group: int) -> abi.GroupSteps | None:
        """The same for the kernels; None where they are not available."""
        if self.scale.device.type != "cpu" or build.library() is None:
            return None
        pointers = (part.data_ptr() for part in (self.scale, self.inverse, self.lowest))
        sizes = len(self.scale), group, self.min_code, self.max_code, torch.get_num_threads()
        return abi.GroupSteps(*pointers, *sizes)


def round_columns(left: Tensor, upper: Tensor, steps: Steps) -> tuple[Tensor, Tensor]:
    """Nearest codes, uint8, of columns left [group, n], and each column's error divided by
    `upper`'s diagonal [group, n]. Later columns compensate for it by upper [group, group] (arXiv
    2210.17323, equation 3)."""
    codes, errors = torch.empty_like(left, dtype=torch.uint8), torch.empty_like(left)
    left, upper = left.contiguous(), upper.contiguous()
    if (native := steps.native(len(left))) is not None:
        ops.round_columns(native, upper, left, codes, errors)
        return codes, errors
    left = left.clone()
    for i, column in enumerate(left):
        codes[i], value = steps.nearest(column)
        errors[i] = (column - value) / upper[i, i]
        left[i + 1 :] -= torch.outer(upper[i, i + 1 :], errors[i])
    return codes, errors


def descend_columns(
    values: Tensor, codes: Tensor, want: Tensor, moments: Tensor, steps: Steps
) -> None:
    """Better codes, uint8 [group, n], and their values [group, n], in place. The error of a row is
    quadratic in its values: `want` [group, n] is minus half its gradient, moments [group, group]
    half its curvature. Each column in turn moves to the minimum, all others fixed."""
    want, curves = want.clone(), moments.diagonal().reciprocal()
    for i in range(len(values)):
        code, value = steps.nearest(values[i] + want[i] * curves[i])
        want[i + 1 :] -= torch.outer(moments[i, i + 1 :], value - values[i])
        codes[i], values[i] = code, value
