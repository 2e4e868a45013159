"""Verdicts: what each rests on, the order of the rules, and that too little evidence says so.

The results here are test data, made in code; no number in them was measured.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from compose.analysis.metrics import interval_of, metric_of
from compose.analysis.relate import relate
from compose.analysis.verdicts import SAME_KL, _bytes, verdict_of
from compose.results.parts import Verdict
from compose.results.schema import CellResult, Results

ASKED = "0123456789abcdef"


def outcomes(right: int, questions: int) -> list[float]:
    return [1.0] * right + [0.0] * (questions - right)


def task(scores: list[float], kind: str = "generative") -> dict[str, Any]:
    value = sum(scores) / len(scores)
    return {
        **{"metric": "exact_match", "value": value, "n": len(scores)},
        **{"kind": kind, "outcomes": scores, "questions": ASKED},
    }


def speed(decode: tuple[float, float], prefill: tuple[float, float] = (0.9, 1.1)) -> dict[str, Any]:
    def ratio(low: float, high: float) -> dict[str, Any]:
        different = not low <= 1 <= high
        return {"value": math.sqrt(low * high), "low": low, "high": high, "n": 5} | {
            "different": different
        }

    return {
        "decode_tokens_per_s": {"median": 10.0},
        "decode_ratio": ratio(*decode),
        "prefill_ratio": ratio(*prefill),
    }


def run_of(dense: dict[str, Any], **cells: dict[str, Any]) -> Results:
    size = {"disk_bytes": 1000, "resident_bytes": 2000}
    rows = [{"name": "dense", "size": size, **dense}]
    rows += [{"name": name, "size": size, **cell} for name, cell in cells.items()]
    full = [{"chain": [], "status": "ok", **row} for row in rows]
    return relate(Results.model_validate({"run": "test", "cells": full}))


def judged(quality: dict[str, Any] | None, base: dict[str, Any], **more: Any) -> Verdict:
    own = {} if quality is None else {"quality": quality}
    verdict = run_of({"quality": base}, cell=own | more).cell("cell").verdict
    assert verdict is not None
    return verdict


DENSE = {"tasks": {"sums": task(outcomes(1000, 2000))}}
KEPT = {"tasks": {"sums": task(outcomes(995, 2000))}}
LOST = {"tasks": {"sums": task(outcomes(700, 2000))}}
FASTER, SLOWER, EQUAL = speed((1.4, 1.6)), speed((0.8, 0.9)), speed((0.98, 1.03))
SMALLER = {"disk_bytes": 400, "resident_bytes": 800}


@pytest.mark.parametrize(
    ("quality", "more", "verdict"),
    [
        (KEPT, {"speed": FASTER}, "ACCEPT"),
        (KEPT, {"speed": EQUAL, "size": SMALLER}, "ACCEPT"),
        (KEPT, {"speed": SLOWER, "size": SMALLER}, "TRADE-OFF"),
        (KEPT, {"speed": speed((1.4, 1.6), (0.5, 0.6))}, "TRADE-OFF"),
        (LOST, {"speed": FASTER}, "TRADE-OFF"),
        (LOST, {"speed": EQUAL}, "REGRESSION"),
        (KEPT, {"speed": SLOWER}, "REGRESSION"),
        (KEPT, {"speed": EQUAL}, "NO EVIDENCE"),
        (KEPT, {"size": {"disk_bytes": 1500}}, "REGRESSION"),
        (KEPT, {"size": {"disk_bytes": 1005}}, "NO EVIDENCE"),
        (None, {"speed": FASTER}, "NO EVIDENCE"),
        (None, {"speed": SLOWER}, "REGRESSION"),
    ],
)
def test_the_table_of_verdicts(
    quality: dict[str, Any] | None, more: dict[str, Any], verdict: str
) -> None:
    assert judged(quality, DENSE, **more).verdict == verdict


def test_the_sentence_says_what_it_rests_on() -> None:
    found = judged(KEPT, DENSE, speed=FASTER, size=SMALLER | {"resident_bytes": 2400})
    assert found.why.startswith("It keeps 99.")
    assert "of the baseline's task scores (2000 questions)" in found.why
    assert "It decodes 1.40 to 1.60 times as fast as the baseline. " in found.why
    assert "It takes 40 % of the disk space of the baseline. " in found.why
    assert "But it takes 120 % of the memory of the baseline." in found.why


def test_another_engines_memory_is_not_compared_with_ours() -> None:
    """Theirs is what a process holds, ours what the tensors hold."""
    size = SMALLER | {"resident_bytes": 5000}
    peer = {"engine": "llama.cpp", "format": "q4_0"}
    for more, told in (({}, True), ({"peer": peer}, False)):
        found = run_of({"quality": DENSE}, cell={"quality": KEPT, "size": size, **more})
        smaller, larger = _bytes(found, found.cell("cell"))
        assert smaller == ["it takes 40 % of the disk space of the baseline"]
        assert larger == (["it takes 250 % of the memory of the baseline"] if told else [])


def test_25_questions_make_no_claim_however_good_they_look() -> None:
    """122 % of 25 questions was published as "keeps 95 %"."""
    few = {"tasks": {"sums": task(outcomes(11, 25))}}, {"tasks": {"sums": task(outcomes(9, 25))}}
    found = judged(*few, speed=FASTER)
    assert found.verdict == "NO EVIDENCE"
    assert found.why == (
        "25 questions are too few to judge quality: at least 200 are needed. It decodes 1.40 to"
        " 1.60 times as fast as the baseline."
    )


def nll(*losses: float) -> dict[str, Any]:
    value = math.exp(sum(losses) / len(losses))
    return {"dataset": "wikitext2", "value": value, "tokens": 511, "block_nll": losses}


def test_perplexity_alone_can_show_a_loss_where_questions_are_few() -> None:
    few = {"tasks": {"sums": task(outcomes(10, 25))}}
    own = few | {"perplexity": nll(3.4, 3.6, 3.5, 3.7)}
    base = few | {"perplexity": nll(3.0, 3.2, 3.1, 3.3)}
    found = judged(own, base, speed=FASTER)
    assert found.verdict == "TRADE-OFF"
    assert "its perplexity is" in found.why and "times the baseline's" in found.why
    assert judged(own, base, speed=EQUAL).verdict == "REGRESSION"


def test_perplexity_alone_accepts_only_where_no_tasks_were_asked() -> None:
    base, own = {"perplexity": nll(3.0, 3.2, 3.1, 3.3)}, {"perplexity": nll(3.01, 3.21, 3.11, 3.31)}
    assert judged(own, base, speed=FASTER).verdict == "ACCEPT"
    few = {"tasks": {"sums": task(outcomes(10, 25))}}
    assert judged(own | few, base | few, speed=FASTER).verdict == "TRADE-OFF"


def test_tasks_without_an_answer_that_is_written_accept_nothing() -> None:
    base = {"tasks": {"pick": task(outcomes(1000, 2000), "likelihood")}}
    own = {"tasks": {"pick": task(outcomes(998, 2000), "likelihood")}}
    found = judged(own, base, speed=FASTER)
    assert found.verdict == "NO EVIDENCE"
    assert "no question asked for a written answer" in found.why


def test_one_ruined_task_is_not_hidden_by_a_mean() -> None:
    """Twenty tasks that keep all, and written arithmetic that keeps a third."""
    names = [f"pick{i}" for i in range(20)]
    base = {name: task(outcomes(1000, 2000), "likelihood") for name in names}
    own, base = (
        base | {"sums": task(outcomes(320, 2000))},
        base | {"sums": task(outcomes(1000, 2000))},
    )
    found = judged({"tasks": own}, {"tasks": base}, speed=FASTER)
    assert found.verdict == "TRADE-OFF"
    assert "score on sums" in found.why


def test_the_baseline_s_predictions_need_no_questions() -> None:
    own = {"block_kl": [SAME_KL / 10, 0.0], "tasks": {"sums": task(outcomes(9, 25))}}
    base = {"tasks": {"sums": task(outcomes(9, 25))}}
    assert judged(own, base, speed=FASTER).verdict == "ACCEPT"
    own["block_kl"] = [SAME_KL * 10, 0.0]
    assert judged(own, base, speed=FASTER).verdict == "NO EVIDENCE"


def test_outcomes_of_other_questions_do_not_pair() -> None:
    other = {"tasks": {"sums": task(outcomes(990, 2000)) | {"questions": "f" * 16}}}
    found = judged(other, DENSE, speed=FASTER)
    assert found.verdict == "NO EVIDENCE"
    assert "cannot be paired" in found.why


# --- speculation: compared with the cell of the same weights that decodes plainly ----------------


def speculating(lossless: bool | None, speedup: tuple[float, float] | None, **more: Any) -> Verdict:
    spec: dict[str, Any] = {"plain": "nf4", "quality_of": "nf4", "speed": FASTER}
    spec["lossless_check"] = {"lossless": lossless}
    if speedup is not None:
        spec["speculation"] = {"speedup": speedup[0], "speedup_ci95": speedup}
    nf4 = {"quality": KEPT, "speed": FASTER}
    found = run_of({"quality": DENSE}, nf4=nf4, spec=spec | more).cell("spec").verdict
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("lossless", "speedup", "verdict", "why"),
    [
        (True, (1.2, 1.3), "ACCEPT", "as fast as the same weights without drafts"),
        (True, (0.73, 0.75), "REGRESSION", "0.73 to 0.75 times as fast as the same weights"),
        (
            True,
            (0.98, 1.02),
            "NO EVIDENCE",
            "not shown to be faster or smaller than the same weights without drafts",
        ),
        (
            True,
            None,
            "NO EVIDENCE",
            "not shown to be faster or smaller than the same weights without drafts",
        ),
        (
            False,
            (1.2, 1.3),
            "REGRESSION",
            "Its drafts change the output: its tokens are not those of its own weights without"
            " drafts.",
        ),
        (
            None,
            (1.2, 1.3),
            "NO EVIDENCE",
            "It was not checked whether its drafts change the output.",
        ),
    ],
)
def test_speculation_has_to_beat_its_plain_cell(
    lossless: bool | None, speedup: tuple[float, float] | None, verdict: str, why: str
) -> None:
    """It is 1.4 times the baseline's speed in every case: that is its weights' merit."""
    found = speculating(lossless, speedup)
    assert found.verdict == verdict
    assert why in found.why


def test_speculation_on_weights_that_lost_quality_is_a_trade_off() -> None:
    spec = {"plain": "nf4", "quality_of": "nf4", "lossless_check": {"lossless": True}}
    spec["speculation"] = {"speedup_ci95": (1.2, 1.3)}
    results = run_of({"quality": DENSE}, nf4={"quality": LOST, "speed": FASTER}, spec=spec)
    assert results.cell("spec").verdict.verdict == "TRADE-OFF"  # type: ignore[union-attr]


def test_who_gets_no_verdict() -> None:
    results = run_of({"quality": DENSE}, broken={"status": "failed"}, fine={"quality": KEPT})
    assert results.cell("dense").verdict is None
    assert results.cell("broken").verdict is None
    fine = results.cell("fine")
    assert verdict_of(results, fine) == fine.verdict


# --- what relates cells to the baseline ----------------------------------------------------------


def test_what_is_related_is_worked_by_hand() -> None:
    """Losses differ by 0.1, 0.2 and 0.3: t with two degrees of freedom is 4.302653."""
    base = {
        "perplexity": nll(3.0, 3.1, 3.2),
        "tasks": {"sums": task(outcomes(100, 400)), "pick": task(outcomes(200, 400), "likelihood")},
    }
    own = {
        "perplexity": nll(3.1, 3.3, 3.5),
        "block_kl": [0.1, 0.2, 0.3],
        "own_answers": {"kl": 0.2, "answer_kl": [0.1, 0.2, 0.3]},
        "tasks": {"sums": task(outcomes(90, 400)), "pick": task(outcomes(200, 400), "likelihood")},
    }
    results = run_of({"quality": base}, cell={"quality": own})
    cell = results.cell("cell")
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert metric_of(results, "perplexity-ratio", cell) == pytest.approx(math.exp(0.2))
    assert interval_of(results, "perplexity-ratio", cell) == pytest.approx(
        (math.exp(0.2 - half), math.exp(0.2 + half)), rel=1e-5
    )
    assert cell.quality is not None and cell.quality.own_answers is not None
    assert interval_of(results, "kl", cell) == cell.quality.own_answers.kl_ci95
    assert interval_of(results, "kl", cell) == pytest.approx((0.0, 0.2 + half)), "no KL below 0"
    assert metric_of(results, "retained", cell) == pytest.approx((0.9 + 1.0) / 2)
    low, high = interval_of(results, "retained", cell) or (0.0, 0.0)
    assert 0.9 < low < 0.95 < high < 1.02
    dense = results.cell("dense").quality
    assert dense is not None and dense.retained is None
    assert metric_of(results, "retained", results.cell("dense")) == 1.0


def test_relating_twice_changes_nothing() -> None:
    results = run_of({"quality": DENSE}, cell={"quality": KEPT, "speed": FASTER, "notes": ["a"]})
    assert relate(results) == results
    assert relate(results).model_dump() == results.model_dump()


def test_what_was_not_measured_stays_absent() -> None:
    bare = Results(run="test", cells=(CellResult(name="dense", chain=(), status="ok"),))
    assert relate(bare) == bare
