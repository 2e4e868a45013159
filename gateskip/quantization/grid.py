"""Integer grids: codes, scales and minima of groups of weights, and the packing of codes in files.

A weight is `scale * code + minimum`, with codes 0 to 2**bits - 1 and a scale and a minimum for
every `group` weights of a row. A grid without minima is symmetric: its code stands for `code -
2**(bits - 1)`.

Scales and minima are numbers that bfloat16 and float16 both hold exactly, and so is the offset at
the middle code, `minimum + 2**(bits - 1) * scale`. So the same codes give the same weights, bit by
bit, in our kernels (bfloat16 minima), in a Q4_1 block of GGUF (float16 minima) and in torchao's
int4 layout (bfloat16 offsets at code 8).

In fewer than 8 bits, each row has a step, a power of two: scales are multiples of it, and minima of
2**(bits - 1) steps, by whole numbers up to 255, which files and kernels hold as bytes (the scales
of llama.cpp's K-quants take six bits). Grids with integer zero points, and grids of other formats,
have no steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIGNIFICANT = 8  # bits of a bfloat16 number
SMALLEST = 2.0**-24  # step of the smallest float16 numbers
MOST_STEPS = 255  # of a scale or a minimum
AT_ONCE = 1 << 20  # codes that are packed or unpacked at a time


@dataclass(frozen=True)
class Grid:
    """A weight [n, k] as codes in groups of k / groups columns."""

    codes: Tensor
    """uint8 [n, k]"""
    scale: Tensor
    """float32 [n, groups]"""
    minimum: Tensor | None
    """float32 [n, groups]; None where codes are symmetric around 2**(bits - 1)"""
    bits: int

    @property
    def group(self) -> int:
        """Weights that share a scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    @property
    def middle(self) -> int:
        """The code of the value zero in a symmetric grid."""
        return middle(self.bits)

    def cpu(self) -> Grid:
        """The grid on the CPU."""
        minimum = None if self.minimum is None else self.minimum.cpu()
        return Grid(self.codes.cpu(), self.scale.cpu(), minimum, self.bits)

    def offset(self) -> Tensor | None:
        """The values of the middle code [n, groups]; None where they are zero."""
        return None if self.minimum is None else self.minimum + self.middle * self.scale

    def zero_points(self) -> Tensor:
        """The codes [n, groups], whole numbers as floats, whose values are nearest to zero; 0 where
        a group's scale is zero."""
        assert self.minimum is not None, "the middle code of a symmetric grid is zero"
        scale = torch.where(self.scale == 0, torch.ones_like(self.scale), self.scale)
        return (-self.minimum / scale).round()

    def lowest(self) -> Tensor:
        """The values of code 0 [n, groups]."""
        return -self.middle * self.scale if self.minimum is None else self.minimum

    def rows(self, part: slice) -> Grid:
        """Some rows of the grid."""
        low = None if self.minimum is None else self.minimum[part]
        return Grid(self.codes[part], self.scale[part], low, self.bits)

    def split(self, rows: Sequence[int]) -> list[Grid]:
        """The grid in parts of that many rows."""
        minima = [None] * len(rows) if self.minimum is None else self.minimum.split(list(rows))
        parts = zip(self.codes.split(list(rows)), self.scale.split(list(rows)), minima, strict=True)
        return [Grid(*part, self.bits) for part in parts]

    def weight(self) -> Tensor:
        """The weights [n, k] in float32."""
        codes = self.codes.float().unflatten(1, (-1, self.group))
        if self.minimum is None:
            values = (codes - self.middle) * self.scale.unsqueeze(2)
        else:
            values = codes * self.scale.unsqueeze(2) + self.minimum.unsqueeze(2)
        flat: Tensor = values.flatten(1)
        return flat


@dataclass(frozen=True)
class Lines:
    """Scales and minima of a grid as whole numbers of their row's step."""

    scale: Tensor
    """uint8 [n, groups]"""
    minimum: Tensor | None
    """uint8 [n, groups]: each times -middle steps"""
    exponent: Tensor
    """int8 [n]: a row's step is two to the power of it"""

    @classmethod
    def of(cls, scale: Tensor, minimum: Tensor | None, bits: int) -> Lines | None:
        """Those of scales and minima [n, groups]; None where they are no whole numbers of steps."""
        step = row_steps(scale, minimum, bits).unsqueeze(1)
        counts = [scale / step]
        if minimum is not None:
            counts.append(-minimum / (middle(bits) * step))
        whole = [each.to(torch.uint8) for each in counts]
        if not all(torch.equal(a.float(), b) for a, b in zip(whole, counts, strict=True)):
            return None
        exponent = torch.frexp(step.squeeze(1)).exponent - 1
        return cls(whole[0], None if minimum is None else whole[1], exponent.to(torch.int8))

    def numbers(self, bits: int) -> tuple[Tensor, Tensor | None]:
        """The scales and minima, float32 [n, groups] each."""
        rows = self.exponent.unsqueeze(1)
        scale = torch.ldexp(self.scale.float(), rows)
        if self.minimum is None:
            return scale, None
        return scale, torch.ldexp(-middle(bits) * self.minimum.float(), rows)


def joined(grids: Sequence[Grid]) -> Grid:
    """Grids of the same columns, bits and groups as one, row after row."""
    minima = [grid.minimum for grid in grids if grid.minimum is not None]
    return Grid(
        torch.cat([grid.codes for grid in grids]),
        torch.cat([grid.scale for grid in grids]),
        torch.cat(minima) if minima else None,
        grids[0].bits,
    )


def middle(bits: int) -> int:
    """The middle code of a grid."""
    return 1 << (bits - 1)


def row_steps(scale: Tensor, minimum: Tensor | None, bits: int) -> Tensor:
    """The step of each row [n]: the smallest power of two of which no scale or minimum [n, groups]
    needs more than MOST_STEPS, but at least float16's smallest step."""
    largest = scale.amax(1)
    if minimum is not None:
        largest = torch.maximum(largest, -minimum.amin(1) / middle(bits))
    fraction, exponent = torch.frexp((largest / MOST_STEPS).clamp_min(SMALLEST))
    return torch.ldexp(torch.ones_like(largest), exponent - (fraction == 0.5).int())


def scale_in_steps(scale: Tensor, step: Tensor) -> Tensor:
    """The nearest whole numbers of steps."""
    return (scale / step).round().clamp(0, MOST_STEPS) * step


def minimum_in_steps(minimum: Tensor, scale: Tensor, step: Tensor, bits: int) -> Tensor:
    """The nearest minima in steps. A group's range includes zero: minima are between those of all
    negative and all positive weights."""
    unit = middle(bits) * step
    most = (((1 << bits) - 1) * scale / unit).floor().clamp_max(MOST_STEPS)
    return torch.minimum((-minimum / unit).round().clamp_min(0), most) * -unit


def exact_scale(scale: Tensor) -> Tensor:
    """The nearest numbers, in float32, that bfloat16 and float16 both hold."""
    return scale.bfloat16().half().float()


def exact_minimum(minimum: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Minima, in float32, that bfloat16 and float16 hold exactly, together with the middle code's
    value.

    A group's range includes zero: minima are between those of all negative and all positive
    weights. They are multiples of the last bit of the larger of |minimum| and middle * scale, so
    that both, and their sum, need eight bits at most. Scales are positive and exact.
    """
    largest = ((1 << bits) - 1) * scale
    minimum = torch.minimum(torch.maximum(minimum, -largest), torch.zeros_like(minimum))
    size = torch.maximum(minimum.abs(), middle(bits) * scale)
    step = _last_bit(size)
    whole = (minimum / step).round() * step
    whole = torch.where(whole < -largest, whole + step, whole)
    grown = _last_bit(torch.maximum(whole.abs(), size))  # rounding may reach the next power of two
    return torch.where(grown > step, (minimum / grown).round() * grown, whole)


def _last_bit(size: Tensor) -> Tensor:
    """The value of a number's eighth bit, but no less than float16's smallest step."""
    exponent = torch.frexp(size.clamp_min(SMALLEST)).exponent
    return torch.ldexp(torch.ones_like(size), exponent - SIGNIFICANT).clamp_min(SMALLEST)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes [n, k] as bytes [n, k * bits / 8]: each row a stream of bits, lowest first.

    Raises ValueError where eight codes do not fill whole bytes.
    """
    n, k = codes.shape
    if k % 8:
        raise ValueError(f"rows of {k} codes do not fill whole bytes: use a multiple of 8")
    packed = torch.empty(n, k * bits // 8, dtype=torch.uint8)
    if bits == 8:
        return packed.copy_(codes)
    shifts = torch.arange(8) * bits
    for rows in row_parts(n, k):
        words = (codes[rows].long().view(-1, k // 8, 8) << shifts).sum(2)  # [rows, k / 8]
        eighths = words.unsqueeze(2) >> (8 * torch.arange(bits))
        packed[rows] = (eighths & 255).to(torch.uint8).flatten(1)
    return packed


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """The codes, uint8 [n, k], of bytes [n, k * bits / 8]."""
    if bits == 8:
        return packed
    n, k = packed.shape[0], packed.shape[1] * 8 // bits
    codes = torch.empty(n, k, dtype=torch.uint8, device=packed.device)
    if bits == 4:
        codes[:, 0::2], codes[:, 1::2] = packed & 15, packed >> 4
        return codes
    shifts = torch.arange(8, device=packed.device) * bits
    for rows in row_parts(n, k):
        words = packed[rows].long().view(-1, k // 8, bits)
        words = (words << (8 * torch.arange(bits, device=packed.device))).sum(2, keepdim=True)
        codes[rows] = ((words >> shifts) & ((1 << bits) - 1)).to(torch.uint8).flatten(1)
    return codes


def row_parts(n: int, k: int) -> list[slice]:
    """Rows [n, k] in parts that are packed or unpacked one after the other."""
    step = max(1, AT_ONCE // k)
    return [slice(first, first + step) for first in range(0, n, step)]
