"""Coordinate descent after GPTQ: less error, and the compiled kernels beside torch's operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gateskip.kernels import autotune, build
from gateskip.quantization.grid import Grid
from gateskip.quantization.offsets import Offset
from gateskip.quantization.rounding import round_to_grid
from gateskip.rounding import descent
from gateskip.rounding.compensate import Rounding, _gptq, factor_from_the_end
from gateskip.rounding.descent import descend

needs_library = pytest.mark.skipif(build.library() is None, reason="no compiled kernels")
CASES = [
    (37, 96, 32, 4, "real"),
    (64, 288, 32, 3, "real"),
    (20, 256, 128, 2, "real"),
    (33, 192, 64, 4, "integer"),
    (50, 160, 32, 8, "none"),
]


def layer(n: int, k: int) -> tuple[Tensor, Tensor]:
    """Weights [n, k], and moments [k, k] of inputs that depend on each other."""
    torch.manual_seed(n + k)
    inputs = torch.randn(3 * k, k) @ (torch.eye(k) + 0.3 * torch.randn(k, k) / k**0.5)
    inputs *= 0.1 + torch.rand(k)
    return torch.randn(n, k), inputs.T @ inputs / len(inputs)


def error(weight: Tensor, moments: Tensor, grid: Grid) -> float:
    lost = weight - grid.weight()
    return float((lost @ moments * lost).sum())


@pytest.mark.parametrize(("n", "k", "group", "bits", "offset"), CASES)
@pytest.mark.parametrize("fast", [torch.float32, torch.bfloat16])
def test_every_sweep_lowers_the_error(
    n: int,
    k: int,
    group: int,
    bits: int,
    offset: Offset,
    fast: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(descent, "fast_type", lambda _: fast)
    weight, moments = layer(n, k)
    grid = round_to_grid(weight, moments.diagonal(), bits, group, offset)
    errors = [error(weight, moments, grid)]
    for _ in range(3):
        grid = descend(weight, moments, grid, offset, 1)
        errors.append(error(weight, moments, grid))
    assert errors[1] < 0.9 * errors[0]
    assert errors[1] > errors[2] > errors[3]
    assert int(grid.codes.max()) < 1 << bits
    if offset == "integer":  # a minimum is still a whole number of steps below zero
        assert torch.allclose(-grid.zero_points() * grid.scale, grid.lowest())


@needs_library
@pytest.mark.parametrize(("n", "k", "group", "bits", "offset"), CASES)
def test_kernels_choose_what_the_operators_choose(
    n: int, k: int, group: int, bits: int, offset: Offset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descent, "fast_type", lambda _: torch.float32)
    weight, moments = layer(n, k)
    grid = round_to_grid(weight, moments.diagonal(), bits, group, offset)
    compiled = descend(weight, moments, grid, offset, 2)
    monkeypatch.setattr(build, "library", lambda: None)
    plain = descend(weight, moments, grid, offset, 2)
    assert float((compiled.codes == plain.codes).float().mean()) > 0.995
    assert error(weight, moments, compiled) == pytest.approx(
        error(weight, moments, plain), rel=2e-3
    )


def test_fast_products_cost_no_quality() -> None:
    weight, moments = layer(96, 512)
    grid = round_to_grid(weight, moments.diagonal(), 4)
    errors = []
    for fast in (torch.float32, torch.bfloat16):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(descent, "fast_type", lambda _, fast=fast: fast)
            errors.append(error(weight, moments, descend(weight, moments, grid, "real", 6)))
    assert errors[1] == pytest.approx(errors[0], rel=0.01)
    assert autotune.fast_type("cpu") in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("size", [1, 96, 700])
def test_the_factor_is_one_of_the_moments(size: int) -> None:
    _, moments = layer(1, size)
    moments.diagonal().add_(0.01)
    factor = factor_from_the_end(moments)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor @ factor.T, moments, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("width", "group"), [(32, 32), (320, 32), (384, 128)])
def test_gptq_compensates_as_with_the_inverse(width: int, group: int) -> None:
    """Equation 3 of arXiv 2210.17323, column after column, for the grids that were fitted."""
    weight, moments = layer(24, width)
    moments.diagonal().add_(0.01 * moments.diagonal().mean())
    grid = _gptq(weight, moments, Rounding(4, group))
    left, moments = weight.double().clone(), moments.double()
    upper = torch.linalg.cholesky(moments.inverse(), upper=True)
    scale, lowest = (x.double().repeat_interleave(group, 1) for x in (grid.scale, grid.lowest()))
    codes = torch.empty_like(left)
    for i in range(width):
        codes[:, i] = ((left[:, i] - lowest[:, i]) / scale[:, i]).round().clamp(0, 15)
        error = left[:, i] - codes[:, i] * scale[:, i] - lowest[:, i]
        left[:, i:] -= torch.outer(error / upper[i, i], upper[i, i:])
    assert (codes != grid.codes).double().mean() < 0.01
