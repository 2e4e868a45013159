"""Recipes: which variants a wish asks for, as a pipeline that is valid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compose.errors import UserError
from compose.planning.prepare import load_plan
from compose.recipes.recipe import Request, effort_of, pipeline_of, pipeline_text


def request(**wishes: Any) -> Request:
    return Request(**{"model": "smollm2-135m-instruct", "to": Path("exports/small"), **wishes})


@pytest.mark.parametrize(
    ("wishes", "variants"),
    [
        ({}, ["int8", "int8+drafts", "int4", "int4+drafts"]),
        ({"drafts": False}, ["int8", "int4"]),
        ({"bits": 4}, ["int4", "int4+drafts"]),
        ({"bits": 4, "effort": "best", "drafts": False}, ["int4-healed"]),
        ({"bits": 8, "effort": "best", "drafts": False}, ["int8"]),
        ({"bits": 3, "drafts": False}, ["int3-healed"]),
        ({"bits": 3, "effort": "quick", "drafts": False}, ["int3"]),
        ({"at_most_mb": 80, "drafts": False}, ["int8", "int4", "int3-healed"]),
    ],
)
def test_a_wish_asks_for_these_variants(wishes: dict[str, Any], variants: list[str]) -> None:
    assert list(pipeline_of(request(**wishes), "small")["pipelines"]) == variants


@pytest.mark.parametrize("effort", ["quick", "normal", "best"])
@pytest.mark.parametrize("bits", [None, 8, 4, 3])
def test_every_recipe_is_a_valid_pipeline_file(
    bits: int | None, effort: Any, make_tiny: Any, tmp_path: Path
) -> None:
    model = str(make_tiny("llama"))
    recipe = pipeline_of(request(model=model, bits=bits, effort=effort), "small")
    file = tmp_path / "pipeline.yaml"
    file.write_text(pipeline_text(recipe, "gateskip compress X --to exports/small"))
    plan = load_plan(file, tmp_path / "cache")
    assert {cell.name for cell in plan.cells} == {"dense", *recipe["pipelines"]}
    assert plan.pipeline.model.source == model


@pytest.mark.parametrize("effort", ["quick", "normal", "best"])
def test_four_bits_for_vllm_have_no_minima(effort: Any, make_tiny: Any, tmp_path: Path) -> None:
    wish = request(model=str(make_tiny("llama")), effort=effort, compressed_tensors=True)
    recipe = pipeline_of(wish, "small")
    assert recipe["stages"]["int4"]["offset"] == "integer"
    (tmp_path / "pipeline.yaml").write_text(pipeline_text(recipe, "gateskip compress"))
    assert load_plan(tmp_path / "pipeline.yaml", tmp_path / "cache").steps


def test_quick_fits_nothing_to_text() -> None:
    stages = pipeline_of(request(effort="quick"), "small")["stages"]
    assert stages["int4"]["calibrate"] is False
    assert "calibrate" not in pipeline_of(request(), "small")["stages"]["int4"]


def test_bits_and_bounds_say_what_may_be_lost() -> None:
    assert not request().is_bounded
    assert all(request(**wish).is_bounded for wish in ({"bits": 4}, {"at_most_kl": 0.05}))


@pytest.mark.parametrize(
    "wishes",
    [
        {"bits": 5},
        {"bits": 3, "compressed_tensors": True},
        {"at_most_mb": 0},
        {"at_most_kl": -1.0},
        {"at_most_kl": float("nan")},
    ],
)
def test_a_wish_that_cannot_be_met_is_refused_at_once(wishes: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        request(**wishes)


def test_quick_and_best_exclude_each_other() -> None:
    assert effort_of(quick=True, best=False) == "quick"
    assert effort_of(quick=False, best=True) == "best"
    assert effort_of(quick=False, best=False) == "normal"
    with pytest.raises(UserError, match="exclude each other"):
        effort_of(quick=True, best=True)
