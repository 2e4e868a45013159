"""Every budget says what it keeps, or is refused: at, between, above and below calibrated ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gateskip
from gateskip.calibration.budgets import OFF, CalibratedBudgets, with_gaps_filled
from gateskip.calibration.thresholds import calibrate_everywhere, kept_by
from gateskip.calibration.warm_start import warm_start
from gateskip.checkpoint import META_FILE, GateFile, load_gates, save_gates
from gateskip.quantization.folders import load_model

NEVER = -math.inf


def two(**measured: Any) -> CalibratedBudgets:
    return CalibratedBudgets({0.7: [2.0, NEVER], 0.8: [0.0, NEVER]}, **measured)


def test_calibrated_budgets_are_what_they_are() -> None:
    found = two(kept={0.7: 0.72, 0.8: 0.79})
    assert found.at(1.0) is None and found.kept_at(1.0) == 1
    assert found.at(0.7) == [2.0, NEVER] and found.kept_at(0.7) == 0.72
    assert two().kept_at(0.8) == 0.8, "what a file does not say is the budget"


def test_between_two_that_are_near() -> None:
    found = two(kept={0.7: 0.7, 0.8: 0.8}, between={0.75: 0.76})
    assert found.at(0.75) == [pytest.approx(1.0), NEVER]
    assert found.at(0.725) == [pytest.approx(1.5), NEVER], "nearer to the lower one's"
    assert found.kept_at(0.75) == 0.76
    assert found.kept_at(0.725) == pytest.approx((0.7 + 0.76) / 2)
    assert found.kept_at(0.775) == pytest.approx((0.8 + 0.76) / 2)
    assert two().kept_at(0.73) == pytest.approx(0.73), "older folders measured nothing in between"


def test_a_curve_goes_on_below_the_lowest() -> None:
    low, high, rows = two().curve(9)
    assert (low, high) == (pytest.approx(0.4), 0.8)
    assert [row[0] for row in rows] == pytest.approx([8 - n for n in range(9)])
    assert {row[1] for row in rows} == {NEVER}
    assert CalibratedBudgets({0.4: [2.0], 0.8: [0.0]}).curve(3)[0] == 0


def test_what_would_keep_something_else_is_refused() -> None:
    """With `budgets: [0.8]`, 0.9 skipped what 0.8 skips, without a word."""
    with pytest.raises(
        ValueError, match=r"0\.9 would keep 0\.80 .* calibrated budget \(0\.7, 0\.8"
    ):
        two().at(0.9)
    with pytest.raises(ValueError, match=r"add 0\.9 to the gate stage's budgets"):
        two().at(0.9)
    with pytest.raises(ValueError, match=r"the lowest is 0\.7"):
        two().at(0.69)
    with pytest.raises(ValueError, match="the lowest is none"):
        CalibratedBudgets({}).at(0.5)
    skewed = two(between={0.75: 0.78})
    with pytest.raises(ValueError, match=r"0\.75 would keep 0\.78"):
        skewed.at(0.75)
    wide = CalibratedBudgets({0.5: [2.0], 0.9: [0.0]})
    with pytest.raises(ValueError, match=r"budget 0\.7 keeps was never measured: use 0\.5 or 0\.9"):
        wide.at(0.7)


def test_near_the_highest_budget_its_thresholds_serve() -> None:
    found = CalibratedBudgets({0.97: [1.0]}, {0.97: 0.968})
    assert found.at(0.98) == [1.0] and found.kept_at(0.98) == 0.968
    assert found.at(0.99) is None and found.kept_at(0.99) == 1, "nearer to full compute"


def test_gaps_are_filled() -> None:
    assert with_gaps_filled([0.8]) == [0.8, 0.885, 0.97]
    assert with_gaps_filled([0.9, 0.5]) == [0.5, 0.6, 0.7, 0.8, 0.9, 0.97]
    assert with_gaps_filled([0.99]) == [0.99]
    assert with_gaps_filled([1.0]) == []


@pytest.fixture(scope="module")
def calibrated(tiny_llama: Path) -> tuple[Any, Any, torch.Tensor, CalibratedBudgets]:
    model = load_model(tiny_llama, "float32")
    blocks = torch.randint(3, 512, (8, 64), generator=torch.Generator().manual_seed(0))
    gates, _ = warm_start(model, blocks)
    gates = gates.requires_grad_(False)
    return model, gates, blocks, calibrate_everywhere(model, gates, blocks, [0.6])


def test_every_budget_is_calibrated(calibrated: Any) -> None:
    """From the lowest asked one to full compute, on the text itself: what is said is kept."""
    model, gates, blocks, found = calibrated
    assert set(found.thresholds) >= {0.6, 0.97}
    for hundredths in range(60, 100):
        budget = hundredths / 100
        row = found.at(budget)
        kept = 1.0 if row is None else kept_by(model, gates, blocks, row)
        assert abs(kept - budget) <= OFF + 0.01, budget
        assert kept == pytest.approx(found.kept_at(budget), abs=0.01), budget


def test_a_folder_says_what_budgets_keep(
    calibrated: Any, tiny_llama: Path, tmp_path: Path, gated_copy: Callable[[Path], Path]
) -> None:
    _, gates, _, found = calibrated
    folder = gated_copy(tmp_path / "model")
    save_gates(folder, GateFile.of(gates, "project", found))
    file = load_gates(folder)
    assert file is not None and file.between == dict(found.between) != {}
    decoder = gateskip.load(folder)
    assert decoder.kept(0.75) == found.kept_at(0.75)
    assert decoder.thresholds(0.75) == pytest.approx(found.at(0.75))
    # a folder of an earlier version: one budget, and nothing between
    meta = json.loads((folder / META_FILE).read_text())
    del meta["kept_between"]
    meta["thresholds"] = {"0.6": meta["thresholds"]["0.6"]}
    (folder / META_FILE).write_text(json.dumps(meta))
    old = gateskip.load(folder)
    with pytest.raises(ValueError, match=r"budget 0\.75 would keep 0\.6"):
        old.generate([[1, 2, 3]], 4, "skip", budget=0.75)
    assert old.generate([[1, 2, 3]], 4, "skip", budget=0.6).tokens


@pytest.fixture
def gated_copy(tiny_llama: Path) -> Callable[[Path], Path]:
    import shutil

    return lambda target: Path(shutil.copytree(tiny_llama, target))
