"""Rounds weights to integer grids, with a searched range for each group.

A weight's rounding error matters in proportion to its input, and some inputs of a layer are
hundreds of times larger than others. So the range of each group of weights is chosen for the least
error of the layer's output, with each input weighted by its mean square (activation-aware rounding:
arXiv 2306.00978; llama.cpp's importance matrices do the same).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gateskip.kernels import abi, build, ops
from gateskip.quantization.grid import (
    MOST_STEPS,
    Grid,
    exact_minimum,
    exact_scale,
    joined,
    middle,
    minimum_in_steps,
    row_steps,
)
from gateskip.quantization.offsets import Offset, has_steps

AT_ONCE = 1 << 17  # weights that are rounded at a time
MOST_COLUMNS = 128  # of a group, in the compiled kernels
GROUP = 32  # weights that share a scale by default
CUTS = {2: (0.0, 0.1, 0.2, 0.3, 0.4), 3: (0.0, 0.06, 0.12, 0.18, 0.24, 0.3)}
USUAL_CUTS = (0.0, 0.04, 0.08, 0.12, 0.16, 0.2)  # parts of a group's range that may be cut off
Fit = tuple[Tensor, Tensor, Tensor, Tensor]
"""Error, codes, scale and lowest value of each group; [n, groups, 1 or group]."""


def round_to_grid(
    weight: Tensor,
    squares: Tensor,
    bits: int = 4,
    group: int = GROUP,
    offset: Offset = "real",
    in_steps: bool = True,
) -> Grid:
    """Weights [n, k] on a grid; squares [k] or [n, k] are the weights of each squared error.

    Of several ranges for each group the one with the least sum of weighted squared errors wins.
    Within a range, scale and minimum follow from the codes by least squares and are rounded to
    numbers that all formats hold (grid.py); then codes are chosen again. With `in_steps`, scales
    and minima of a grid that has steps at last become whole numbers of them, and codes are chosen
    once more. On the CPU the compiled kernels do it
    (gateskip/kernels/src/linear/ranges.cpp); sums there have another order than those of torch's
    operators. Those take a few rows at a time, so that intermediate tensors stay in the processor's
    cache.
    """
    in_steps = in_steps and has_steps(bits, offset)
    importance = squares / squares.mean().clamp_min(1e-12) + 1e-6  # [k] or [n, k]
    importance = importance.expand(len(weight), -1)
    if weight.device.type == "cpu" and build.library() is not None and group <= MOST_COLUMNS:
        return _searched(weight.float(), importance.float(), bits, group, offset, in_steps)
    rows = max(1, AT_ONCE // weight.shape[1])
    parts = zip(weight.split(rows), importance.split(rows), strict=True)
    return joined([_round_rows(*part, bits, group, offset, in_steps) for part in parts])


def _searched(
    weight: Tensor, importance: Tensor, bits: int, group: int, offset: Offset, in_steps: bool
) -> Grid:
    """`round_to_grid` by the compiled kernels: weights and their importance, [n, k] each."""
    n, k = weight.shape
    importance = importance if importance.stride(1) == 1 else importance.contiguous()
    cuts = torch.tensor(CUTS.get(bits, USUAL_CUTS))
    codes = torch.empty(n, k, dtype=torch.uint8)
    scale, lowest = torch.empty(2, n, k // group)
    tensors = weight, importance, cuts, codes, scale, lowest
    strides = *weight.stride(), importance.stride(0)
    kind = abi.GroupOffset[f"OFFSET_{offset.upper()}"]
    sizes = n, k, group, bits, kind, len(cuts), int(in_steps), torch.get_num_threads()
    pointers = (part.data_ptr() for part in tensors)
    ops.search_ranges(abi.RangeSearch(*pointers, *strides, *sizes))
    return Grid(codes, scale, None if offset == "none" else lowest, bits)


def _round_rows(
    weight: Tensor, importance: Tensor, bits: int, group: int, offset: Offset, in_steps: bool
) -> Grid:
    """`round_to_grid` of some rows: weights and their importance, [n, k] each."""
    groups, importance = (part.unflatten(1, (-1, group)) for part in (weight, importance))
    fit = _FITS[offset]
    best: Fit | None = None
    for low, high in _ranges(groups, bits, offset):
        candidate = fit(groups, importance, low, high, bits)
        best = candidate if best is None else _better(candidate, best)
    assert best is not None, "there are ranges to choose from"
    if in_steps:
        best = _settled(groups, importance, best, bits, offset)
    _, codes, scale, lowest = best
    minimum = None if offset == "none" else lowest.squeeze(2)
    return Grid(codes.flatten(1).to(torch.uint8), scale.squeeze(2), minimum, bits)


def _ranges(groups: Tensor, bits: int, offset: Offset) -> Iterator[tuple[Tensor, Tensor]]:
    """Lowest and highest value [n, groups, 1] of each range to try; all include zero."""
    low = groups.amin(2, keepdim=True).clamp_max(0)
    high = groups.amax(2, keepdim=True).clamp_min(0)
    if offset == "none":
        high = torch.maximum(high, -low)
        low = -high
    for cut in CUTS.get(bits, USUAL_CUTS):
        margin = (high - low) * (cut / 2)
        yield low + margin, high - margin


def _better(candidate: Fit, best: Fit) -> Fit:
    better = candidate[0] < best[0]
    chosen = [torch.where(better, a, b) for a, b in zip(candidate, best, strict=True)]
    return chosen[0], chosen[1], chosen[2], chosen[3]


def _settled(groups: Tensor, importance: Tensor, fit: Fit, bits: int, offset: Offset) -> Fit:
    """The line of whole steps nearest to each one: its scale is rounded down or up, and the middle
    of its range stays."""
    _, _, scale, lowest = fit
    minimum = None if offset == "none" else lowest.squeeze(2)
    step = row_steps(scale.squeeze(2), minimum, bits).view(-1, 1, 1)
    max_code, candidates = (1 << bits) - 1, []
    for more in (0, 1):
        near = ((scale / step).floor() + more).clamp_max(MOST_STEPS) * step
        if offset == "none":
            candidates.append(_signed(groups, importance, near, bits))
        else:
            low = minimum_in_steps(lowest + (scale - near) * (max_code / 2), near, step, bits)
            candidates.append(_rounded(groups, importance, near, low, max_code))
    down, up = candidates
    return _better(up, down)


def _fit_real(groups: Tensor, importance: Tensor, low: Tensor, high: Tensor, bits: int) -> Fit:
    """A scale and a minimum: the line through codes and weights."""
    max_code = (1 << bits) - 1
    codes = _codes(groups, (high - low) / max_code, low, max_code)
    total = importance.sum(2, keepdim=True)
    mean_code = (importance * codes).sum(2, keepdim=True) / total
    mean = (importance * groups).sum(2, keepdim=True) / total
    spread = (importance * (codes - mean_code).square()).sum(2, keepdim=True)
    scale = (importance * (codes - mean_code) * (groups - mean)).sum(2, keepdim=True)
    alike = spread == 0  # one code for the whole group: no line goes through one point
    scale = torch.where(alike, (high - low) / max_code, scale / spread.clamp_min(1e-20))
    scale = exact_scale(scale.clamp_min(0))
    low = exact_minimum(mean - scale * mean_code, scale, bits)
    return _rounded(groups, importance, scale, low, max_code)


def _fit_integer(groups: Tensor, importance: Tensor, low: Tensor, high: Tensor, bits: int) -> Fit:
    """A scale and the integer code of the value zero."""
    max_code = (1 << bits) - 1
    scale = ((high - low) / max_code).clamp_min(1e-12)
    zero = (-low / scale).round().clamp(0, max_code)
    signed = _codes(groups, scale, -zero * scale, max_code) - zero
    squares = (importance * signed.square()).sum(2, keepdim=True).clamp_min(1e-20)
    scale = exact_scale((importance * signed * groups).sum(2, keepdim=True) / squares)
    return _rounded(groups, importance, scale, -zero * scale, max_code)


def _fit_none(groups: Tensor, importance: Tensor, low: Tensor, high: Tensor, bits: int) -> Fit:
    """A scale only: codes around the middle one, equally many below and above."""
    half = middle(bits) - 1
    scale = exact_scale(high / half)
    signed = (groups / _divisor(scale)).round().clamp(-half, half)
    squares = (importance * signed.square()).sum(2, keepdim=True).clamp_min(1e-20)
    scale = exact_scale((importance * signed * groups).sum(2, keepdim=True) / squares)
    return _signed(groups, importance, scale, bits)


_FITS: dict[Offset, Callable[[Tensor, Tensor, Tensor, Tensor, int], Fit]] = {
    "real": _fit_real,
    "integer": _fit_integer,
    "none": _fit_none,
}


def _signed(groups: Tensor, importance: Tensor, scale: Tensor, bits: int) -> Fit:
    half = middle(bits) - 1
    signed = (groups / _divisor(scale)).round().clamp(-half, half)
    error = (importance * (scale * signed - groups).square()).sum(2, keepdim=True)
    return error, signed + middle(bits), scale, scale


def _rounded(groups: Tensor, importance: Tensor, scale: Tensor, low: Tensor, max_code: int) -> Fit:
    codes = _codes(groups, scale, low, max_code)
    error = (importance * (scale * codes + low - groups).square()).sum(2, keepdim=True)
    return error, codes, scale, low


def _codes(groups: Tensor, scale: Tensor, low: Tensor, max_code: int) -> Tensor:
    return ((groups - low) / _divisor(scale)).round_().clamp_(0, max_code)


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)
