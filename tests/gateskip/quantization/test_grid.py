"""Integer grids: numbers that all formats hold, codes in a file, and what compensation brings."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gateskip.kernels import build
from gateskip.quantization.grid import (
    Grid,
    exact_minimum,
    exact_scale,
    joined,
    middle,
    pack_bits,
    row_steps,
    unpack_bits,
)
from gateskip.quantization.grid_linear import GridLinear
from gateskip.quantization.offsets import Offset
from gateskip.quantization.packed_linear import PackedLinear
from gateskip.quantization.rounding import round_to_grid
from gateskip.rounding.compensate import Rounding, output_error, round_compensated

OFFSETS = ("real", "integer", "none")


def moments(k: int, seed: int = 0, tokens: int = 400) -> torch.Tensor:
    """Second moments of inputs that depend on each other, some far larger than others."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, k, generator=draw) @ torch.randn(k, k, generator=draw) / k**0.5
    rows = mixed * torch.exp(torch.randn(k, generator=draw))
    return rows.T @ rows / tokens


def weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=draw) * 0.05 + 0.01


@given(scale=st.floats(1e-7, 30), low=st.floats(-40, 40), bits=st.sampled_from((2, 3, 4)))
def test_scale_and_minimum_are_exact_in_every_format(scale: float, low: float, bits: int) -> None:
    s = exact_scale(torch.tensor([scale]))
    m = exact_minimum(torch.tensor([low]), s, bits)
    for each in (s, m, m + middle(bits) * s):
        assert torch.equal(each.bfloat16().float(), each)
    for each in (s, m):
        assert torch.equal(each.half().float(), each)
    assert -((1 << bits) - 1) * s <= m <= 0
    if -((1 << bits) - 1) * scale <= low <= 0:  # the rest is clamped
        assert abs(m - low) <= max(scale / 8, 2.0**-24) * (1 << bits) / 4


@given(
    bits=st.sampled_from((2, 3, 4, 5, 6, 8)),
    rows=st.integers(1, 5),
    eights=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_packed_bits_come_back(bits: int, rows: int, eights: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, 8 * eights), generator=draw).to(torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (rows, eights * bits)
    assert torch.equal(unpack_bits(packed, bits), codes)


def test_four_bits_put_the_even_column_low() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.uint8)
    assert pack_bits(codes, 4).tolist() == [[0x21, 0x43, 0x65, 0x87]]


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_is_as_near_as_its_bits_allow(bits: int, offset: str) -> None:
    w = weight(24, 96)
    grid = round_to_grid(w, torch.ones(96), bits, 32, offset)  # type: ignore[arg-type]
    groups = w.unflatten(1, (-1, 32))
    steps = (groups.amax(2).clamp_min(0) - groups.amin(2).clamp_max(0)) / ((1 << bits) - 1)
    if offset == "none":
        steps = groups.abs().amax(2) / ((1 << (bits - 1)) - 1)
    plain = steps.square().mean() / 12  # the mean square error of rounding to whole steps
    assert (grid.weight() - w).square().mean() < 1.05 * plain
    assert (grid.minimum is None) == (offset == "none")
    assert torch.equal(exact_scale(grid.scale), grid.scale)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.skipif(build.library() is None, reason="no compiled kernels")
def test_kernels_find_the_ranges_that_the_operators_find(
    bits: int, offset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In rows and in columns, for one importance of all rows and for one of each."""
    w, squares = weight(50, 192), torch.rand(192) ** 3
    w[:, :32] *= 1e-6  # scales below float16's normal numbers
    w[3, 32:64] = 0
    for rows, important in ((w, squares), (w.T.contiguous().T, squares.expand(50, -1) ** 2)):
        grids = []
        for found in (build.library(), None):
            monkeypatch.setattr(build, "library", lambda found=found: found)
            grids.append(round_to_grid(rows, important, bits, 32, offset))  # type: ignore[arg-type]
            monkeypatch.undo()
        compiled, plain = grids
        assert float((compiled.codes == plain.codes).float().mean()) > 0.999
        assert float((compiled.scale == plain.scale).float().mean()) > 0.99
        lost = [(important * (grid.weight() - w).square()).sum() for grid in grids]
        assert float(lost[0]) == pytest.approx(float(lost[1]), rel=1e-3)


def test_integer_zero_points_are_codes() -> None:
    grid = round_to_grid(weight(16, 64), torch.ones(64), 4, 32, "integer")
    assert grid.minimum is not None
    zeros = -grid.minimum / grid.scale
    assert torch.equal(zeros, zeros.round()) and zeros.min() >= 0 and zeros.max() <= 15


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_compensation_lowers_the_outputs_error(bits: int, offset: str) -> None:
    """And each part of it does: GPTQ against plain rounding, refitting against GPTQ alone."""
    w, h = weight(48, 128, 3), moments(128)
    plain = round_to_grid(w, h.diagonal(), bits, 32, offset)  # type: ignore[arg-type]
    gptq = round_compensated(w, h, Rounding(bits, 32, offset, sweeps=0))  # type: ignore[arg-type]
    full = round_compensated(w, h, Rounding(bits, 32, offset))  # type: ignore[arg-type]
    errors = [output_error(w, h, grid) for grid in (plain, gptq, full)]
    assert errors[1] < 0.95 * errors[0]
    assert errors[2] < 0.97 * errors[1]
    assert torch.equal(exact_scale(full.scale), full.scale)
    if offset == "real":
        assert full.minimum is not None
        assert torch.equal(exact_minimum(full.minimum, full.scale, bits), full.minimum)
    if offset == "none":
        assert full.codes.min() >= 1
    assert in_steps(full) == (offset != "integer" and bits < 8)


def in_steps(grid: Grid) -> bool:
    """Whether scales, and minima over half of the codes, are whole numbers of a power of two for
    each row, 255 at most."""
    parts = [grid.scale]
    if grid.minimum is not None:
        parts.append(-grid.minimum / middle(grid.bits))
    step = row_steps(grid.scale, grid.minimum, grid.bits).unsqueeze(1)
    counts = torch.cat(parts, 1) / step
    assert torch.equal(torch.frexp(step).mantissa, torch.full_like(step, 0.5))
    assert counts.amax() <= 255 and counts.amin() >= 0
    return bool((counts == counts.round()).all())


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("offset", ["real", "none"])
def test_lines_are_whole_steps_of_their_row(
    bits: int, offset: str, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At little cost, in rows of any size, and of weights of one sign too."""
    w = weight(40, 96) * torch.logspace(-6, 3, 40).unsqueeze(1)
    w[3:7] = w[3:7].abs()
    w[7:9] = -w[7:9].abs()
    w[9] = 0
    if not kernels:
        monkeypatch.setattr(build, "library", lambda: None)
    ones, kind = torch.ones(96), cast(Offset, offset)
    free = round_to_grid(w, ones, bits, 32, kind, in_steps=False)
    grid = round_to_grid(w, ones, bits, 32, kind)
    assert in_steps(grid) and not in_steps(free)
    if grid.minimum is not None:
        assert torch.equal(exact_minimum(grid.minimum, grid.scale, bits), grid.minimum)
    lost, least = ((each.weight() - w).square().sum(1) for each in (grid, free))
    large = w.abs().amax(1) > 1e-3  # below, float16's smallest step is coarse
    more = lost[large] / least[large].clamp_min(1e-30)
    assert more.max() < 1.15 and more.mean() < 1.04


def test_what_fits_a_grid_is_kept() -> None:
    """Weights that lie on a grid come back exactly, whatever the inputs are."""
    grid = round_to_grid(weight(16, 64), torch.ones(64))
    again = round_compensated(grid.weight(), moments(64), Rounding())
    assert output_error(grid.weight(), moments(64), again) < 0.02


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("offset", ["real", "none"])
def test_a_grid_is_the_same_weights_in_a_file_and_in_kernels(bits: int, offset: str) -> None:
    grid = round_to_grid(weight(40, 96), torch.ones(96), bits, 32, offset)  # type: ignore[arg-type]
    layer = GridLinear.of(grid)
    assert torch.equal(layer.grid().weight(), grid.weight())
    assert layer.codes.nbytes == 40 * 96 * bits // 8
    packed = PackedLinear.of(layer.grid())
    assert (packed.unpacked() - grid.weight()).abs().max() <= 1e-7
    x = torch.randn(3, 96)
    torch.testing.assert_close(layer(x), x @ grid.weight().T)


def test_joined_grids_are_one() -> None:
    parts = [round_to_grid(weight(n, 64, n), torch.ones(64)) for n in (8, 24)]
    whole: Grid = joined(parts)
    assert torch.equal(whole.weight(), torch.cat([part.weight() for part in parts]))
