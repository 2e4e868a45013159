"""The published figures of skipping, by both definitions, against ones worked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from compose.analysis.published_metrics import figures, skipped_share, skipping_curves
from compose.analysis.relate import relate
from compose.results.parts import SkippingPoint
from compose.results.schema import Results


def points(*pairs: tuple[float, float]) -> list[SkippingPoint]:
    return [SkippingPoint(cell="a", saved=saved, accuracy=score) for saved, score in pairs]


def test_accuracy_is_linear_between_points_and_nothing_beyond_them() -> None:
    """From 0.40 at 0 to 0.36 at 0.2: 0.01 for every 5 %; then to 0.16 at 0.3: 0.1 for 5 %."""
    found = figures(points((0.2, 0.36), (0.0, 0.40), (0.3, 0.16)))
    assert found.accuracy_at == pytest.approx(
        {0: 0.40, 5: 0.39, 10: 0.38, 15: 0.37, 20: 0.36, 25: 0.26, 30: 0.16}
    )
    assert [point.saved for point in found.points] == [0.0, 0.2, 0.3]


def test_saved_at_90_is_the_most_saved_that_keeps_it() -> None:
    """0.9 of the first point's 0.40 is 0.36: the point at 0.2 keeps it exactly, as does 0.5."""
    curve = points((0.0, 0.40), (0.2, 0.36), (0.3, 0.30), (0.5, 0.37), (0.6, 0.1))
    assert figures(curve).saved_at_90 == 0.5
    assert figures(curve[:3]).saved_at_90 == 0.2
    assert figures(curve, reference=0.42).saved_at_90 == 0.0, "0.378 is kept by the first alone"


def test_the_reference_may_keep_no_point() -> None:
    assert figures(points((0.1, 0.2)), reference=0.5).saved_at_90 is None
    assert figures(points((0.1, 0.2))).saved_at_90 == 0.1, "its own first point"
    assert figures(points((0.1, 0.2))).accuracy_at == {10: 0.2}


def skipping(name: str, score: float, kept: list[float], net: float) -> dict[str, Any]:
    return {
        "name": name,
        "chain": ["gates", name],
        "status": "ok",
        "plain": "gates",
        "steps": [{"name": "gates", "use": "gate"}, {"name": name, "use": "skip"}],
        "compute": {"kept_shares": kept, "saved_net": net},
        "quality": {"tasks": written(score)},
    }


def written(score: float, kind: str | None = "generative") -> dict[str, Any]:
    picked = {"metric": "acc", "value": score / 2, "kind": None if kind is None else "likelihood"}
    return {"sums": {"metric": "exact_match", "value": score, "kind": kind}, "pick": picked}


def run() -> Results:
    dense = {"name": "dense", "chain": [], "status": "ok", "quality": {"tasks": written(0.5)}}
    gates = {**dense, "name": "gates", "chain": ["gates"], "quality": {"tasks": written(0.4)}}
    gates["compute"] = {"saved_net": 0.0}
    cells = [
        dense,
        gates,
        skipping("skip90", 0.38, [1.0, 0.9, 0.9, 0.8], 0.04),
        skipping("skip80", 0.30, [1.0, 0.6, 0.8, 0.8], 0.12),
        {"name": "spec", "chain": ["gates", "spec"], "status": "ok", "quality_of": "gates"},
    ]
    return Results.model_validate({"run": "test", "cells": cells})


def test_both_definitions_on_one_family_worked_by_hand() -> None:
    """Branches skipped: 0.1 and 0.2 on average. Written scores 0.40, 0.38, 0.30; dense 0.50."""
    curve, likelihood = skipping_curves(run())
    assert (curve.weights, curve.kind, curve.tasks) == ("gates", "generative", ("sums",))
    assert (likelihood.kind, likelihood.tasks) == ("likelihood", ("pick",))
    published, ours = curve.published, curve.ours
    assert published is not None and ours is not None
    assert [point.saved for point in published.points] == pytest.approx([0.0, 0.1, 0.2])
    assert published.reference == 0.40
    assert published.saved_at_90 == pytest.approx(0.1), "0.38 is 95 % of 0.40"
    assert published.accuracy_at == pytest.approx({0: 0.40, 5: 0.39, 10: 0.38, 15: 0.34})
    assert [point.saved for point in ours.points] == [0.0, 0.04, 0.12]
    assert ours.reference == 0.50
    assert ours.saved_at_90 is None, "0.40 is 80 % of the dense model's"
    assert ours.accuracy_at == pytest.approx({0: 0.40, 5: 0.37, 10: 0.32})


def test_written_tasks_compare_at_what_their_own_text_kept() -> None:
    """The sums' own prompts and answers saved more than running text: their curve says so."""
    data = run().model_dump()
    for cell, saved in ((data["cells"][2], 0.07), (data["cells"][3], 0.18)):
        phase = {"tokens": 10, "kept": 0.9, "saved_net": saved}
        cell["quality"]["tasks"]["sums"]["compute"] = {**phase, "prompt": phase}
    curve, likelihood = skipping_curves(Results.model_validate(data))
    assert curve.ours is not None and likelihood.ours is not None
    assert [point.saved for point in curve.ours.points] == [0.0, 0.07, 0.18]
    assert [point.saved for point in likelihood.ours.points] == [0.0, 0.04, 0.12]


def test_curves_are_part_of_the_results() -> None:
    related = relate(run())
    assert related.skipping_curves == skipping_curves(run())
    assert Results.model_validate(related.model_dump(mode="json")) == related


def test_tasks_of_unknown_kind_are_one_curve() -> None:
    data = run().model_dump()
    for cell in data["cells"]:
        for score in (cell.get("quality") or {}).get("tasks", {}).values():
            score.pop("kind", None)
    (curve,) = skipping_curves(Results.model_validate(data))
    assert (curve.kind, curve.tasks) == ("all", ("sums", "pick"))
    assert curve.published is not None
    assert curve.published.reference == pytest.approx((0.4 + 0.2) / 2)


def test_without_tasks_or_skipping_there_is_no_curve() -> None:
    cells = run().cells
    assert skipping_curves(Results(run="test", cells=cells[:2])) == ()
    bare = [cell.model_copy(update={"quality": None}) for cell in cells]
    assert skipping_curves(Results(run="test", cells=tuple(bare))) == ()
    assert skipped_share(cells[0]) == 0.0
