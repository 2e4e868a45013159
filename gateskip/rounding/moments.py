"""Second moments of a layer's inputs, and the share of them that is noise.

On few tokens, mean products of two inputs are noisy, and compensation by them overfits the text.
Products of different inputs are therefore shrunk by the share in which two halves of the text
disagree (Ledoit and Wolf 2004, with the diagonal as target and correlations for the distance).
"""

from __future__ import annotations

import torch
from torch import Tensor

PARTS = 4  # parts of the columns: five eighths of a symmetric product are computed
ROWS = 512  # rows that are compared at once


class Moments:
    """Sums of products of inputs, of two halves of the text."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._halves = [torch.zeros(width, width, device=device) for _ in range(2)]
        self._counts = [0, 0]

    def add(self, rows: Tensor) -> None:
        """Inputs [tokens, k]: the first half of them to one sum, the rest to the other. Products of
        bfloat16 inputs are bfloat16 numbers, whose error is small beside the noise of the text."""
        for number, part in enumerate(rows.tensor_split(2)):
            _add_products(self._halves[number], part)
            self._counts[number] += len(part)

    def chance(self) -> float:
        """The share of the squared correlations of different inputs, over all text, that is noise,
        estimated from the difference between the halves."""
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

    def mean(self) -> Tensor:
        """Mean products [k, k] of all inputs. Consumes the sums: call it last."""
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
    width = len(total)
    step = -(-width // PARTS)
    for start in range(0, width, step):
        end = min(start + step, width)
        total[:end, start:end] += rows[:, :end].T @ rows[:, start:end]
