"""Second moments of a layer's inputs, and the share of them that is noise.

On few tokens, mean products of two inputs are noisy, and compensation by them overfits the text.
Products of different inputs are therefore shrunk by the share in which two halves of the text
disagree (Ledoit and Wolf 2004, with the diagonal as target and correlations for the distance).

A CPU multiplies bytes twice as fast as bfloat16. So inputs in bfloat16 become 8-bit numbers for
their products, with a scale for each input and some thousand tokens; sums of products are exact.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PARTS = 8  # parts of the columns: nine sixteenths of a symmetric product are computed
ROWS = 512  # rows that are compared at once
IN_CACHE = 64  # rows that become 8-bit numbers at once
GATHERED = 8192  # inputs in bfloat16 that are multiplied at once; a sum of 2^17 fits 32 bits
LARGEST = 127  # of an 8-bit number


class Moments:
    """Sums of products of inputs, of two halves of the text."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._halves = [torch.zeros(width, width, device=device) for _ in range(2)]
        self._counts = [0, 0]
        self._waiting: list[list[Tensor]] = [[], []]

    def add(self, rows: Tensor) -> None:
        """Inputs [tokens, k]: the first half of them to one sum, the rest to the other. Products of
        float32 are float32; those of bfloat16 have an error that is small beside the noise of the
        text."""
        for number, part in enumerate(rows.tensor_split(2)):
            self._counts[number] += len(part)
            waiting = self._waiting[number]
            waiting.append(part)
            if sum(map(len, waiting)) >= GATHERED:
                self._multiply(number)

    def _multiply(self, number: int) -> None:
        """Add the products of the inputs that wait for it."""
        if waiting := self._waiting[number]:
            _add_products(self._halves[number], torch.cat(waiting))
            waiting.clear()

    def chance(self) -> float:
        """The share of the squared correlations of different inputs, over all text, that is noise,
        estimated from the difference between the halves."""
        self._finish()
        first, second = (
            half.diagonal().div(max(1, count))
            for half, count in zip(self._halves, self._counts, strict=True)
        )
        scale = (first + second).div(2).sqrt().clamp_min(1e-12).reciprocal()
        within = across = 0.0
        for start in range(0, len(scale), ROWS):
            by = scale[start : start + ROWS].unsqueeze(1) * scale
            one, other = (
                (half[start : start + ROWS] * by).div_(max(1, count)).triu_(start + 1)
                for half, count in zip(self._halves, self._counts, strict=True)
            )
            across += float((one * other).sum(dtype=torch.float64))
            within += float((one.square() + other.square()).sum(dtype=torch.float64)) / 2
        noise, signal = max(within - across, 0.0) / 2, max(across, 0.0)  # half of a half's
        return noise / (noise + signal) if noise else 0.0

    def _finish(self) -> None:
        for number in range(2):
            self._multiply(number)

    def mean(self) -> Tensor:
        """Mean products [k, k] of all inputs. Consumes the sums: call it last."""
        self._finish()
        count, total = sum(self._counts), self._halves.pop(0)
        total.add_(self._halves.pop()).div_(max(1, count))
        for start in range(0, len(total), ROWS):
            end = start + ROWS
            block = total[start:end, start:end].triu_()
            block += block.triu(1).T
            total[end:, start:end] = total[start:end, end:].T
        return total


def _add_products(total: Tensor, rows: Tensor) -> None:
    """Add the products of rows [tokens, k] to total [k, k] on and above the diagonal, and to some
    places below it."""
    if rows.dtype == torch.bfloat16 and rows.device.type == "cpu":
        _add_byte_products(total, rows)
        return
    for done, part in _parts(len(total)):
        total[:done, part] += rows[:, :done].T @ rows[:, part]


def _add_byte_products(total: Tensor, rows: Tensor) -> None:
    """`_add_products` with each column in 8 bits."""
    largest = torch.maximum(rows.amax(0), -rows.amin(0)).float()  # [k]
    scale = largest.clamp_min(1e-30) / LARGEST
    quantized = torch.empty(rows.shape, dtype=torch.int8)
    for some, part in zip(quantized.split(IN_CACHE), rows.split(IN_CACHE), strict=True):
        some.copy_((part / scale).round_())
    for done, part in _parts(len(total)):
        products = torch._int_mm(quantized[:, :done].T, quantized[:, part])
        for start in range(0, done, ROWS):
            some = slice(start, min(start + ROWS, done))
            total[some, part].addcmul_(products[some] * scale[part], scale[some].unsqueeze(1))


def _parts(width: int) -> Iterator[tuple[int, slice]]:
    """Parts of the columns, each with its end."""
    step = -(-width // PARTS)
    for start in range(0, width, step):
        end = min(start + step, width)
        yield end, slice(start, end)
