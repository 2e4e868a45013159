"""Two runs beside each other: unchanged cells are never called different, planted changes are.

The results here are test data, made in code; no number in them was measured.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from compose.analysis.compare import Change, compare, regressions
from compose.analysis.intervals import paired_speed_ratio
from compose.analysis.quality_change import sign_flip_p
from compose.results.schema import Results

CELLS = 14
QUESTIONS = 500


def made_up_run(
    draw: np.random.Generator,
    *,
    noise: float = 0.015,
    repeats: int = 5,
    slower: float = 1.0,
    points: float = 0.0,
    **more: Any,
) -> Results:
    """14 cells, timed in noisy rounds; cell 3 decodes `slower`, cell 5 loses accuracy."""
    drift = draw.normal(0, 0.05, (2, repeats))
    base = np.exp(draw.normal(0, noise, (2, repeats)) + drift)
    cells = []
    for number in range(CELLS):
        own = np.exp(draw.normal(0, noise, (2, repeats)) + drift)
        ratios = [
            paired_speed_ratio(each * (slower if number == 3 and kind == 0 else 1.0), theirs)
            for kind, (each, theirs) in enumerate(zip(own, base, strict=True))
        ]
        decode, prefill = (ratio.model_dump() for ratio in ratios if ratio is not None)
        right = 200 + number - round(points * QUESTIONS * (number == 5))
        cell = {
            "name": "dense" if number == 0 else f"cell{number}",
            "chain": [],
            "status": "ok",
            "speed": {"decode_ratio": decode, "prefill_ratio": prefill} if number else {},
            "quality": {"tasks": {"sums": task(right)}, "perplexity": text(3.0)},
            "size": {"disk_bytes": 1000 + number, "resident_bytes": 2000},
        }
        cells.append(cell)
    return Results.model_validate({"run": "test", "cells": cells, **more})


def task(right: int, questions: int = QUESTIONS, asked: str = "0" * 16) -> dict[str, Any]:
    scores = [1.0] * right + [0.0] * (questions - right)
    return {
        **{"metric": "exact_match", "value": right / questions, "n": questions},
        **{"kind": "generative", "outcomes": scores, "questions": asked},
    }


def text(loss: float) -> dict[str, Any]:
    losses = [loss + step / 10 for step in range(8)]
    value = math.exp(sum(losses) / 8)
    return {"dataset": "wikitext2", "value": value, "tokens": 4088, "block_nll": losses}


def called(changes: tuple[Change, ...]) -> list[tuple[str, str, str]]:
    return [
        (change.cell, change.metric, change.outcome)
        for change in changes
        if change.outcome in ("better", "worse")
    ]


def test_twenty_runs_of_the_same_cells_have_no_difference() -> None:
    draw = np.random.default_rng(7)
    first = made_up_run(draw)
    for _ in range(20):
        changes = compare(first, made_up_run(draw))
        assert called(changes) == []
        assert len([change for change in changes if change.p is not None]) == 13 * 2 + 14 * 2


@pytest.mark.slow
def test_false_calls_are_rare_in_many_more() -> None:
    """Of 200 pairs of runs: the family of speeds is held at 0.5 %, so a handful at most."""
    draw = np.random.default_rng(8)
    wrong = sum(bool(called(compare(made_up_run(draw), made_up_run(draw)))) for _ in range(200))
    assert wrong <= 4


def test_planted_losses_are_flagged_on_a_machine_that_repeats_itself() -> None:
    """5 % of decode speed in cell 3 and 2 points of accuracy in cell 5, and nothing else."""
    draw = np.random.default_rng(9)
    steady = environment(decode=0.005, prefill=0.005)
    seen = 0
    for _ in range(20):
        first = made_up_run(draw, noise=0.01, **steady)
        second = made_up_run(draw, noise=0.01, slower=0.95, points=0.02, **steady)
        worse = called(compare(first, second))
        assert set(worse) <= {("cell3", "decode", "worse"), ("cell5", "accuracy", "worse")}
        assert ("cell5", "accuracy", "worse") in worse
        seen += ("cell3", "decode", "worse") in worse
    assert seen >= 14


def environment(**spread: float) -> dict[str, Any]:
    return {"environment": {"between_runs": {"runs": 21, **spread}}}


def test_what_differs_between_equal_runs_is_no_change() -> None:
    """Rounds that agree within a run say nothing of the next run: here runs lie 6 % apart."""
    draw = np.random.default_rng(11)
    between = environment(decode=0.06, prefill=0.06)
    wrong = 0
    for _ in range(20):
        shifts = np.exp(draw.normal(0, 0.06, 2))
        first, second = (
            made_up_run(draw, noise=0.003, slower=float(shift), **between) for shift in shifts
        )
        wrong += bool(called(compare(first, second)))
    assert wrong == 0
    far = made_up_run(draw, slower=0.6, **between)
    assert ("cell3", "decode", "worse") in called(compare(made_up_run(draw, **between), far))


def two(before: dict[str, Any], after: dict[str, Any], **more: Any) -> dict[str, Change]:
    """Changes of the only cell by metric."""
    rows = [{"name": "cell", "chain": [], "status": "ok", **each} for each in (before, after)]
    runs = [Results.model_validate({"run": "test", "cells": [row], **more}) for row in rows]
    return {change.metric: change for change in compare(*runs)}


def ratio(value: float, half: float, n: int = 5) -> dict[str, Any]:
    low, high = value * math.exp(-half), value * math.exp(half)
    return {"value": value, "low": low, "high": high, "n": n}


def test_a_speed_worked_by_hand() -> None:
    """Each run has the spread of equal runs; the change has root two of it, and t(20)."""
    speeds = [{"speed": {"decode_ratio": ratio(value, 0.02)}} for value in (2.0, 1.8)]
    change = two(*speeds, **environment(decode=0.03, prefill=0.1))["decode"]
    assert change.effect is not None
    assert change.effect.value == pytest.approx(0.9)
    half = 2.085963 * 0.03 * math.sqrt(2)
    assert change.effect.low == pytest.approx(0.9 * math.exp(-half), rel=1e-5)
    assert change.effect.high == pytest.approx(0.9 * math.exp(half), rel=1e-5)


def test_the_sign_flips_are_an_exact_test() -> None:
    """Ten of ten to one side: two of 1024 ways. And against counting all ways of unequal steps."""
    assert sign_flip_p(np.full(10, -0.01)) == pytest.approx(2 / 1024)
    steps = np.array([0.3, -0.1, 0.25, 0.05, 0.2])
    ways = [np.dot(signs, np.abs(steps)) for signs in itertools.product((-1, 1), repeat=5)]
    wanted = np.mean([abs(way) >= steps.sum() - 1e-12 for way in ways])
    assert sign_flip_p(steps) == pytest.approx(wanted)
    assert sign_flip_p(np.zeros(4)) == 1.0
    assert sign_flip_p(np.full(30, 0.01)) == pytest.approx(math.erfc(math.sqrt(30 / 2)))


@pytest.mark.parametrize(
    ("before", "after", "outcome", "why"),
    [
        (task(200), task(190), "worse", None),
        (task(200), task(214), "better", None),
        (task(200), task(197), "no difference", None),
        (task(200), task(200, asked="f" * 16), "no difference", None),
        (task(200), task(120, asked="f" * 16), "worse", None),
        (task(20, 50), task(10, 50), "not comparable", "50 questions are too few"),
        (task(200), {**task(200), "outcomes": []}, "not comparable", "no outcomes"),
    ],
)
def test_accuracy(
    before: dict[str, Any], after: dict[str, Any], outcome: str, why: str | None
) -> None:
    rows = [{"quality": {"tasks": {"sums": each}}} for each in (before, after)]
    change = two(*rows)["accuracy"]
    assert change.outcome == outcome
    assert why is None or why in (change.why or "")
    other = {"quality": {"tasks": {"other": after}}}
    assert two(rows[0], other)["accuracy"].why == "the runs asked different tasks"


def test_accuracy_has_an_interval_in_points() -> None:
    rows = [{"quality": {"tasks": {"sums": task(right)}}} for right in (200, 190)]
    effect = two(*rows)["accuracy"].effect
    assert effect is not None
    assert effect.value == pytest.approx(-0.02)
    assert -0.04 < effect.low < -0.02 < effect.high < 0


@pytest.mark.parametrize(
    ("before", "after", "outcome"),
    [
        (text(3.0), text(3.1), "worse"),
        (text(3.0), text(2.9), "better"),
        (text(3.0), text(3.0), "no difference"),
        (text(3.0), text(3.0005), "no difference"),
        (text(3.0), text(3.1) | {"dataset": "other"}, "not comparable"),
    ],
)
def test_perplexity(before: dict[str, Any], after: dict[str, Any], outcome: str) -> None:
    rows = [{"quality": {"perplexity": each}} for each in (before, after)]
    assert two(*rows)["perplexity"].outcome == outcome


def test_numbers_that_do_not_vary() -> None:
    before = {
        "size": {"disk_bytes": 100, "resident_bytes": 100},
        "compute": {"saved_net": 0.2},
        "lossless_check": {"lossless": True},
    }
    after = {
        "size": {"disk_bytes": 110, "resident_bytes": 100.5},
        "compute": {"saved_net": 0.25},
        "lossless_check": {"lossless": False},
    }
    after["size"]["resident_bytes"] = 100
    changes = two(before, after)
    outcomes = {metric: change.outcome for metric, change in changes.items()}
    assert outcomes == {
        "size": "worse",
        "resident": "no difference",
        "saved": "better",
        "lossless": "worse",
    }
    assert two(before, before).keys() == {"size", "resident", "saved"}


def test_a_cell_that_fails_now_is_worse() -> None:
    changes = two({}, {"status": "failed"})
    assert changes["status"].outcome == "worse"
    assert regressions(tuple(changes.values())) == tuple(changes.values())
    assert two({"status": "failed"}, {})["status"].outcome == "better"


def test_what_cannot_be_compared_says_why() -> None:
    draw = np.random.default_rng(11)
    here = {"processor": "A", "threads": 2}
    first = made_up_run(draw, environment=here)
    other = compare(first, made_up_run(draw, environment=here | {"threads": 4}))
    speeds = [change for change in other if change.metric == "decode"]
    assert {change.outcome for change in speeds} == {"not comparable"}
    assert "threads 2, then 4" in (speeds[1].why or "")
    assert "drift" in (speeds[0].why or ""), "the baseline itself"
    longer = made_up_run(draw, environment=here, benchmark={"speed": {"new_tokens": 9}})
    speeds = [change for change in compare(first, longer) if change.metric == "decode"]
    assert "different workloads" in (speeds[1].why or "")
    less = Results(run="test", environment=here, cells=first.cells[:-1])
    (alone,) = [change for change in compare(less, first) if change.cell == "cell13"]
    assert alone.why == "the variant is only in the second run"
    assert compare(first, less)[-1].why == "the variant is only in the first run"
