"""Codes chosen column by column: compiled kernels against torch's operators, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gateskip.kernels import build
from gateskip.rounding.columns import Steps, descend_columns, round_columns

needs_library = pytest.mark.skipif(build.library() is None, reason="no compiled kernels")


def group_of(n: int, width: int, bits: int, symmetric: bool) -> tuple[Steps, Tensor, Tensor]:
    """Steps, columns [width, n], and moments [width, width] that are positive definite."""
    torch.manual_seed(n + width + bits)
    columns, inputs = torch.randn(width, n), torch.randn(2 * width, width)
    scale = (4 + 2 * torch.rand(n)) / (1 << bits)
    scale[0] = 0  # a group without a range
    middle = 1 << (bits - 1)
    lowest = -middle * scale if symmetric else -2 - torch.rand(n)
    return Steps.of(scale, lowest, bits, symmetric), columns, inputs.T @ inputs / len(inputs)


@needs_library
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("n", "width", "bits"), [(2, 32, 4), (37, 32, 2), (160, 64, 8), (15, 128, 3)]
)
def test_kernels_give_the_same_bits(
    n: int, width: int, bits: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, columns, moments = group_of(n, width, bits, symmetric)
    upper = torch.linalg.cholesky(moments, upper=True)

    compiled = round_columns(columns, upper, steps)
    monkeypatch.setattr(Steps, "native", lambda *_: None)
    for here, there in zip(round_columns(columns, upper, steps), compiled, strict=True):
        assert torch.equal(here, there)


@pytest.mark.parametrize("symmetric", [False, True])
def test_descending_lowers_the_error_of_every_row(symmetric: bool) -> None:
    steps, columns, moments = group_of(50, 32, 3, symmetric)
    codes, _ = round_columns(columns, torch.eye(32), steps)  # each weight by itself
    values = torch.stack([steps.scale * row + steps.lowest for row in codes])

    def error() -> Tensor:
        lost = columns - values
        return (lost * (moments @ lost)).sum(0)

    before = error()
    descend_columns(values, codes, moments @ (columns - values), moments, steps)
    assert (error() <= before * (1 + 1e-5)).all() and error()[1:].sum() < 0.9 * before[1:].sum()
    again = torch.stack([steps.scale * row + steps.lowest for row in codes])
    assert torch.equal(again, values)
    assert codes.min() >= steps.min_code and codes.max() <= steps.max_code
