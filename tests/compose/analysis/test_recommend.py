"""Recommendations and their prices: one sentence each, from published runs and by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from compose.analysis.families import lossless_to
from compose.analysis.recommend import AIMS, recommendations, sentence
from compose.analysis.relate import relate
from compose.results.io import load_results
from compose.results.schema import Results

PUBLISHED = Path(__file__).resolve().parents[3] / "reports" / "published"
SMALLER = {"disk_bytes": 360, "resident_bytes": 720}
ASKED = "0123456789abcdef"


def ratio(low: float, high: float) -> dict[str, Any]:
    return {"value": math.sqrt(low * high), "low": low, "high": high, "n": 5}


def task(right: int, questions: int, kind: str = "generative") -> dict[str, Any]:
    outcomes = [1.0] * right + [0.0] * (questions - right)
    scored = {"value": right / questions, "n": questions, "outcomes": outcomes}
    return {"metric": "exact_match", "kind": kind, "questions": ASKED, **scored}


def run_of(dense: dict[str, Any], **cells: dict[str, Any]) -> Results:
    size = {"disk_bytes": 1000, "resident_bytes": 2000}
    rows = [
        {"name": name, "size": size, **cell} for name, cell in {"dense": dense, **cells}.items()
    ]
    full = [{"chain": [], "status": "ok", **row} for row in rows]
    return relate(Results.model_validate({"run": "test", "dtype": "bfloat16", "cells": full}))


def said(results: Results, name: str = "cell") -> str:
    return sentence(results, results.cell(name))


DENSE = {"quality": {"tasks": {"sums": task(100, 200)}}}
FASTER = {"decode_ratio": ratio(4.2, 4.6)}
FOUR_TIMES = "It decodes 4.4x as fast as the original model."
IDENTICAL = " Its predictions are identical to those of the original model."


@pytest.mark.parametrize(
    ("right", "words"),
    [
        (100, "On 200 questions no loss was found, and a loss of up to 3 % of the score cannot"),
        (96, "On 200 questions it lost 4 % of the score, which can be chance; a loss of up to"),
        (60, "On 200 questions it lost 40 % of the score (95 % interval: 3"),
    ],
)
def test_a_sentence_says_what_was_gained_and_what_was_lost(right: int, words: str) -> None:
    quality = {"tasks": {"sums": task(right, 200)}}
    found = said(run_of(DENSE, cell={"quality": quality, "speed": FASTER, "size": SMALLER}))
    assert found.startswith(f"{FOUR_TIMES} It takes 36 % of the original model's disk space. ")
    assert words in found
    assert found.endswith(".") and "None" not in found


def test_what_was_not_measured_is_not_mentioned() -> None:
    bare = run_of({}, cell={"size": None}, fast={"speed": FASTER, "size": None})
    assert said(bare) == "Its quality was not measured."
    assert said(bare, "fast") == f"{FOUR_TIMES} Its quality was not measured."
    assert (
        said(bare, "dense") == "This is the original model, with which the variants are compared."
    )
    failed = bare.cell("cell").model_copy(update={"status": "failed", "reason": "It ended."})
    assert sentence(bare, failed) == "This variant was not measured: It ended."
    small = run_of({}, cell={"size": SMALLER, "quality": {"kl_to_baseline": 0.0213}})
    assert said(small) == (
        "It takes 36 % of the original model's disk space. Its KL from the original model is 0.021"
        " nats per token."
    )


def test_a_price_in_speed_of_prompts_and_in_memory_is_named() -> None:
    speed = {"decode_ratio": ratio(0.98, 1.02), "prefill_ratio": ratio(0.4, 0.5)}
    found = said(run_of(DENSE, cell={"speed": speed, "size": {"resident_bytes": 2800}}))
    assert found.startswith(
        "No difference in decode speed is shown. It processes prompts 0.45x as fast as the original"
        " model. It takes 1.40x the memory of the original model. "
    )


def test_few_questions_make_no_claim() -> None:
    few = {"tasks": {"sums": task(9, 25)}}
    results = run_of({"quality": few}, cell={"quality": few, "speed": FASTER, "size": SMALLER})
    assert said(results).endswith(
        " Only 25 questions were asked, which are too few to judge quality."
    )
    answers = recommendations(results)
    assert [answer.cell for answer in answers] == [None, None, None]
    assert answers[0].sentence == (
        "Nothing is recommended for speed, because 25 questions are too few to judge quality: at"
        " least 200 are needed."
    )


def speculating(lossless: bool | None, steps: list[dict[str, Any]]) -> dict[str, Any]:
    drafts = {"name": "drafts", "use": "speculate", "role": "decode"}
    check = {"lossless_check": {"lossless": lossless}}
    return {
        "plain": "int4",
        "quality_of": "int4",
        "speed": FASTER,
        "steps": [*steps, drafts],
    } | check


def test_lossless_says_to_what() -> None:
    int4 = [{"name": "int4", "use": "int4", "role": "quantize", "stored_as": "int4"}]
    plain = {"quality": {"tasks": {"sums": task(96, 200)}}, "steps": int4, "size": SMALLER}
    results = run_of(
        DENSE,
        int4=plain,
        cell=speculating(True, int4),
        wrong=speculating(False, int4),
        exact=speculating(True, []) | {"plain": "dense", "quality_of": "dense"},
    )
    assert ". Its drafts do not change the output of its int4 weights (lossless). On 200" in said(
        results
    )
    assert "Its drafts change the output of its int4 weights." in said(results, "wrong")
    assert said(results, "exact").endswith(IDENTICAL)
    assert lossless_to(results, results.cell("exact")) == "its bfloat16 weights"


def test_a_variant_that_lost_is_not_recommended_and_the_fastest_of_the_others_is() -> None:
    def cell(right: int, low: float, bytes: int) -> dict[str, Any]:
        quality = {"tasks": {"sums": task(right, 200)}, "kl_to_baseline": (101 - right) / 100}
        return {
            "quality": quality,
            "speed": {"decode_ratio": ratio(low, 1.1 * low)},
            "size": {"disk_bytes": bytes},
        }

    results = run_of(
        DENSE,
        ruined=cell(40, 6.0, 100),
        fast=cell(98, 4.0, 400),
        small=cell(97, 2.0, 300),
        exact=cell(100, 1.2, 990),
        peer=cell(100, 9.0, 10) | {"peer": {"engine": "llama.cpp"}},
        refuted=cell(100, 8.0, 10) | {"lossless_check": {"lossless": False}},
    )
    answers = {answer.aim: answer.cell for answer in recommendations(results)}
    names = {aim: cell and cell.name for aim, cell in answers.items()}
    assert names == {"speed": "fast", "size": "small", "exactness": "exact"}
    alone = run_of(DENSE, ruined=cell(40, 6.0, 100))
    assert recommendations(alone)[1].sentence == (
        "Nothing is recommended for size, because every smaller variant is shown to lose quality."
    )


@pytest.mark.parametrize(("low", "name"), [(1.05, "drafts"), (0.97, "int4")])
def test_drafts_are_recommended_where_they_are_shown_to_be_faster(low: float, name: str) -> None:
    """Both are faster than the baseline, the variant with drafts by far."""
    int4 = [{"name": "int4", "use": "int4", "role": "quantize", "stored_as": "int4"}]
    plain = {"quality": {"tasks": {"sums": task(100, 200)}}, "steps": int4, "speed": FASTER}
    gain = {"speculation": {"speedup": 1.6, "speedup_ci95": [low, 3.5]}}
    drafts = {"speed": {"decode_ratio": ratio(6.0, 9.0)}}
    results = run_of(DENSE, int4=plain, drafts=speculating(True, int4) | drafts | gain)
    answer = recommendations(results)[0]
    assert answer.cell is not None and answer.cell.name == name


def test_nothing_to_recommend_has_its_reason() -> None:
    def why(results: Results) -> str:
        return recommendations(results)[0].sentence

    assert "no variant was measured beside the original model" in why(run_of(DENSE))
    assert "no variant is shown to be faster than the original" in why(run_of(DENSE, cell={}))
    failed = Results.model_validate(
        {"run": "x", "cells": [{"name": "dense", "chain": [], "status": "failed"}]}
    )
    assert "the original model was not measured" in why(failed)


@pytest.mark.parametrize(
    "run", sorted(PUBLISHED.glob("*/results.json")), ids=lambda p: p.parent.name
)
def test_every_published_variant_has_its_sentence(run: Path) -> None:
    results = load_results(run)
    for cell in results.cells:
        found = sentence(results, cell)
        assert found.endswith(".") and not found.endswith("..")
        assert "None" not in found and "nan" not in found and "  " not in found
    answers = recommendations(results)
    assert tuple(answer.aim for answer in answers) == AIMS
    assert all(answer.cell is None or answer.cell.peer is None for answer in answers)


def test_the_answers_of_a_published_run() -> None:
    results = load_results(PUBLISHED / "small-matrix")
    speed, size, exact = recommendations(results)
    assert speed.cell is not None and size.cell is not None and exact.cell is not None
    assert (speed.cell.name, exact.cell.name) == ("int8+network-draft", "bf16+int4-draft")
    assert size.sentence.startswith("It decodes 6.3x as fast as the original model. It takes 55 %")
    assert exact.sentence.endswith(IDENTICAL)


@pytest.mark.parametrize(("furthest", "is_fit"), [(0.049, True), (0.053, False), (0.09, False)])
def test_a_loss_on_text_must_be_shown_to_be_small(furthest: float, is_fit: bool) -> None:
    """Tasks show no loss; the interval of KL decides, by its upper end: -ln 0.95 is 0.0513."""
    quality = {
        "tasks": {"sums": task(97, 200)},
        "kl_to_baseline": 0.04,
        "kl_ci95": [0.03, furthest],
    }
    answer = recommendations(run_of(DENSE, cell={"quality": quality, "speed": FASTER}))[0]
    assert (answer.cell is not None) is is_fit
    if not is_fit:
        assert answer.sentence == (
            "Nothing is recommended for speed, because no faster variant is shown to keep 95 % of"
            " the original model's quality."
        )
