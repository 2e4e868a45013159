"""Second moments of inputs, and the share of them that is chance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gateskip.rounding.compensate import Rounding, output_error, round_compensated
from gateskip.rounding.moments import Moments


def inputs(tokens: int, width: int, seed: int, mixed: bool = False) -> Tensor:
    """Rows of independent inputs of different sizes, or of mixtures of a few."""
    random = torch.Generator().manual_seed(seed)
    if not mixed:
        return torch.randn(tokens, width, generator=random) * torch.linspace(0.1, 5, width)
    few = torch.randn(tokens, 3, generator=random)
    return few @ torch.randn(3, width, generator=torch.Generator().manual_seed(1))


def of(rows: Tensor, parts: int = 1) -> Moments:
    moments = Moments(rows.shape[1], rows.device)
    for part in rows.tensor_split(parts):
        moments.add(part)
    return moments


@pytest.mark.parametrize(("tokens", "width", "parts"), [(50, 7, 1), (51, 64, 5), (40, 1030, 3)])
def test_the_mean_is_that_of_all_products(tokens: int, width: int, parts: int) -> None:
    rows = inputs(tokens, width, 3)
    found = of(rows, parts).mean()
    torch.testing.assert_close(found, rows.T @ rows / tokens, rtol=1e-4, atol=1e-4)
    assert torch.equal(found, found.T)


def test_products_of_independent_inputs_are_chance() -> None:
    assert of(inputs(2000, 64, 4)).chance() > 0.8
    assert of(inputs(2000, 64, 4, mixed=True)).chance() < 0.01


def test_what_is_chance_falls_with_the_text() -> None:
    """Four times the tokens, a quarter of the squared error beside what is no chance."""
    rows = inputs(4000, 256, 6) + inputs(4000, 256, 7, mixed=True)
    shares = [of(rows[:tokens]).chance() for tokens in (250, 1000, 4000)]
    odds = [share / (1 - share) for share in shares]
    assert odds[0] / odds[1] == pytest.approx(4, rel=0.2)
    assert odds[1] / odds[2] == pytest.approx(4, rel=0.2)


def test_inputs_that_never_come_are_no_chance() -> None:
    rows = inputs(100, 32, 8, mixed=True)
    rows[:, 5] = 0
    assert 0 <= of(rows).chance() < 0.05
    assert of(torch.zeros(10, 8)).chance() == 0
    assert of(inputs(1, 8, 9)).mean().isfinite().all()


def test_scales_of_inputs_change_nothing() -> None:
    rows = inputs(300, 48, 10) + inputs(300, 48, 11, mixed=True)
    scaled = rows * torch.logspace(-2, 2, 48)
    assert of(scaled).chance() == pytest.approx(of(rows).chance(), rel=1e-3)


@pytest.mark.parametrize("tokens", [200, 600])
def test_rounding_that_knows_what_is_chance_errs_less_on_other_text(tokens: int) -> None:
    seen = inputs(tokens, 128, 12) + inputs(tokens, 128, 13, mixed=True)
    other = inputs(8000, 128, 14) + inputs(8000, 128, 15, mixed=True)
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(16))
    chance, moments = of(seen).chance(), of(seen).mean()
    grids = [round_compensated(weight, moments, Rounding(), share) for share in (0.0, chance)]
    trusting, careful = (output_error(weight, of(other).mean(), grid) for grid in grids)
    assert careful < 0.99 * trusting
