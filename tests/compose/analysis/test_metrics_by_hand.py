"""Metrics of cells, their intervals, and what `pick` says, beside numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import pytest

from compose.analysis import metrics as table
from compose.analysis.intervals import (
    _estimate,
    exp_mean_ratio,
    mean_interval,
    mean_of_ratios,
    paired_speed_ratio,
    wilson,
)
from compose.analysis.metrics import (
    gain,
    half_width,
    interval_of,
    metric_of,
    metrics,
    over_seeds,
    retained_basis,
    task_retained,
)
from compose.analysis.pick import Constraint, Lossless, pick, retained_bound
from compose.analysis.relate import relate
from compose.errors import UserError
from compose.results.schema import CellResult, Results


def run_of(*cells: dict[str, Any]) -> Results:
    full = [{"chain": [], "status": "ok", **cell} for cell in cells]
    return Results.model_validate({"run": "test", "cells": full})


def text(value: float | None, ratio_ci95: Any = None, dataset: str = "t", **more: Any) -> Any:
    perplexity = {"dataset": dataset, "value": value, "ratio_ci95": ratio_ci95} | more
    return {"quality": {"perplexity": perplexity}}


def scores(**tasks: Any) -> dict[str, Any]:
    return {"quality": {"tasks": {n: {"metric": "acc", "value": v} for n, v in tasks.items()}}}


SPREAD = {"value": 1.5, "low": 1.25, "high": 1.75, "n": 5}


class TestIntervals:
    def test_each_metric_has_its_own(self) -> None:
        cell: dict[str, Any] = text(25.0, (1.2, 1.25))
        cell["quality"] |= {"kl_to_baseline": 0.5, "kl_ci95": (0.4, 0.6)}
        cell["speculation"] = {"speedup": 1.5, "speedup_ci95": (1.4, 1.6)}
        cell["speculation"] |= {"acceptance_rate": 0.5, "acceptance_rate_ci95": (0.45, 0.55)}
        cell["speculation"] |= {"mean_accepted_tokens_ci95": (1.7, 1.9)}
        cell["speed"] = {"decode_ratio": SPREAD, "prefill_ratio": SPREAD | {"high": 2.5}}
        results = run_of({"name": "dense"} | text(20.0), {"name": "nf4"} | cell, {"name": "bare"})
        own, bare = results.cell("nf4"), results.cell("bare")
        wanted = {
            "kl": (0.4, 0.6),
            "speedup": (1.4, 1.6),
            "acceptance": (0.45, 0.55),
            "accepted": (1.7, 1.9),
            "perplexity-ratio": (1.2, 1.25),
            "retained": (0.8, 1 / 1.2),  # one over each end, in turn
            "decode-ratio": (1.25, 1.75),
            "prefill-ratio": (1.25, 2.5),
        }
        for name, ends in wanted.items():
            assert interval_of(results, name, own) == pytest.approx(ends), name
            assert interval_of(results, name, bare) is None, name
        assert interval_of(results, "decode", own) is None
        assert metric_of(results, "decode-ratio", own) == 1.5
        assert metric_of(results, "decode-ratio", bare) is None
        with pytest.raises(UserError, match=r"^there is no metric 'kll'\n.*did you mean 'kl'"):
            interval_of(results, "kll", own)
        with pytest.raises(UserError, match=r"^there is no metric 'kll'\n.*did you mean 'kl'"):
            metric_of(results, "kll", own)

    def test_of_tasks_retained(self) -> None:
        cell = scores(a=0.4)
        results = run_of({"name": "dense"} | scores(a=0.5), {"name": "x"} | cell)
        assert interval_of(results, "retained", results.cell("x")) is None
        cell["quality"]["retained"] = SPREAD
        results = run_of({"name": "dense"} | scores(a=0.5), {"name": "x"} | cell)
        assert interval_of(results, "retained", results.cell("x")) == (1.25, 1.75)
        assert metric_of(results, "retained", results.cell("x")) == 1.5

    def test_without_text_or_ratio(self) -> None:
        results = run_of(
            {"name": "dense"} | text(20.0),
            {"name": "no ends"} | text(25.0),
            {"name": "no text"} | scores(a=0.5),
        )
        for name in ("no ends", "no text"):
            assert interval_of(results, "perplexity-ratio", results.cell(name)) is None
            assert interval_of(results, "retained", results.cell(name)) is None

    def test_two_values_are_enough(self) -> None:
        """Student's t with one degree of freedom is 12.7062: 12.7062 x 1 / sqrt 2 x sqrt 2 = ..."""
        found = mean_interval([1, 3])
        assert found is not None
        assert (found.value, found.low) == pytest.approx((2.0, 2 - 12.7062), rel=1e-4)
        assert exp_mean_ratio([1.0, 2.0], [1.0, 2.0]) is not None
        assert paired_speed_ratio([1.0, 2.0], [1.0, 2.0]) is not None
        assert wilson(1.0, 1) == pytest.approx((0.2065, 1.0), abs=1e-4)

    def test_tasks_are_drawn_by_themselves(self) -> None:
        """Two tasks alike: the deviation of their mean is that of one over the root of two."""
        task = [1.0, 0.0, 1.0, 0.0] * 50, [1.0, 1.0, 0.0, 0.0] * 50
        one, two = mean_of_ratios([task]), mean_of_ratios([task, task])
        assert one is not None and two is not None and one.value == two.value
        share = (two.high - two.low) / (one.high - one.low)
        assert share == pytest.approx(0.5**0.5, abs=0.04)

    def test_percentiles_of_draws(self) -> None:
        found = _estimate(0.5, np.linspace(0.0, 1.0, 1001), 7)
        assert found is not None and found.n == 7 and found.value == 0.5
        assert (found.low, found.high) == pytest.approx((0.025, 0.975))
        assert found.different, "1 lies above"
        assert _estimate(0.5, np.array([0.5, math.inf]), 7) is None

    def test_seeds(self) -> None:
        """2, 4 and 6: deviation 2, standard error 2 / sqrt 3, Student's t 4.3027."""
        assert half_width([2.0, 4.0, 6.0]) == pytest.approx(4.3027 * 2 / 3**0.5, rel=1e-4)
        quality = text(20.0)["quality"]
        seeds = [
            {"seed": 1} | text(24.0) | {"compute": {"saved_net": 0.2}},
            {"seed": 2, "quality": {}, "compute": {"saved_net": 0.3}},
        ]
        cell = {"name": "x", "quality": quality, "compute": {"saved_net": 0.1}, "seeds": seeds}
        results = run_of({"name": "dense"}, cell, {"name": "bare"})
        assert over_seeds(results, "perplexity", results.cell("x")) == (20.0, 24.0)
        assert over_seeds(results, "saved", results.cell("x")) == (0.1, 0.2, 0.3)
        assert over_seeds(results, "saved", results.cell("bare")) == ()


class TestRatios:
    def test_of_perplexity(self) -> None:
        """A stored ratio counts first; else the values, of one text and where both are there."""
        dense = {"name": "dense"} | text(20.0)
        for cell, wanted in (
            (text(25.0), 1.25),
            (text(25.0, ratio_to_baseline=1.5), 1.5),
            (text(25.0, dataset="other"), None),
            (text(None), None),
            (scores(a=0.5), None),
        ):
            results = run_of(dense, {"name": "x"} | cell)
            assert metric_of(results, "perplexity-ratio", results.cell("x")) == wanted
        for base in (text(None), scores(a=0.5), {}):
            results = run_of({"name": "dense"} | base, {"name": "x"} | text(25.0))
            assert metric_of(results, "perplexity-ratio", results.cell("x")) is None
        results = run_of({"name": "x"} | text(25.0))
        assert metric_of(results, "perplexity-ratio", results.cell("x")) is None

    def test_of_tasks(self) -> None:
        stored = scores(a=0.4)
        stored["quality"]["tasks"]["a"]["retained"] = 0.7
        results = run_of(
            {"name": "dense"} | scores(a=0.5, b=0.0),
            {"name": "x"} | scores(a=0.4, b=0.3, c=0.1),
            {"name": "stored"} | stored,
            {"name": "unknown"} | scores(a=None),
            {"name": "bare"},
        )
        assert task_retained(results, results.cell("x"), "a") == pytest.approx(0.8)
        assert task_retained(results, results.cell("stored"), "a") == 0.7
        for name, task in (("x", "b"), ("x", "c"), ("x", "d"), ("unknown", "a"), ("bare", "a")):
            assert task_retained(results, results.cell(name), task) is None, (name, task)
        for alone in (
            run_of({"name": "x"} | scores(a=0.4)),
            run_of({"name": "dense"}, {"name": "x"} | scores(a=0.4)),
        ):
            assert task_retained(alone, alone.cell("x"), "a") is None

    def test_means_need_all_tasks(self) -> None:
        results = run_of(
            {"name": "dense"} | scores(a=0.5, b=0.8),
            {"name": "x"} | scores(a=0.25, b=0.8),
            {"name": "half"} | scores(a=0.25, b=None),
        )
        assert retained_basis(results) == "tasks"
        assert metric_of(results, "retained", results.cell("x")) == pytest.approx(0.75)
        assert metric_of(results, "accuracy", results.cell("x")) == pytest.approx(0.525)
        assert metric_of(results, "retained", results.cell("half")) is None
        assert metric_of(results, "accuracy", results.cell("half")) is None

    def test_the_basis(self) -> None:
        assert retained_basis(run_of({"name": "dense"} | text(20.0))) == "perplexity"
        assert retained_basis(run_of({"name": "dense"} | text(None))) is None
        assert retained_basis(run_of({"name": "dense"} | scores(a=0.0))) is None
        assert retained_basis(run_of({"name": "dense"})) is None
        assert retained_basis(run_of({"name": "x"} | text(20.0))) is None
        both = text(20.0)
        both["quality"] |= scores(a=0.5, b=0.0)["quality"]
        assert retained_basis(run_of({"name": "dense"} | both)) == "perplexity"

    def test_gains(self) -> None:
        results = run_of({"name": "dense"} | text(20.0), {"name": "x"} | text(25.0), {"name": "y"})
        assert gain(results, "perplexity", results.cell("x")) == 1.25
        assert gain(results, "perplexity", results.cell("y")) is None
        other = run_of({"name": "dense"}, {"name": "x"} | text(25.0))
        assert gain(other, "perplexity", other.cell("x")) is None


def bound(limit: float, at_least: bool, value: float | None) -> Constraint:
    return Constraint("size", "--at-most-mb", lambda cell: value, limit, at_least, "{:.1f}".format)


CELL = CellResult(name="x", chain=(), status="ok")


class TestConstraints:
    @pytest.mark.parametrize(
        ("limit", "at_least", "value", "missing"),
        [
            *((4.0, False, 5.0, 0.25), (4.0, False, 4.0, 0.0), (4.0, False, 1.0, 0.0)),
            *((4.0, True, 3.0, 0.25), (4.0, True, 4.0, 0.0), (0.0, False, 0.5, 0.5)),
            *((0.0, False, -1.0, 0.0), (-4.0, True, -5.0, 0.25), (4.0, True, None, 10.0)),
        ],
    )
    def test_how_far_off(
        self, limit: float, at_least: bool, value: float | None, missing: float
    ) -> None:
        assert bound(limit, at_least, value).shortfall(CELL) == missing

    def test_in_words(self) -> None:
        own = bound(4.0, True, 3.0)
        assert (own.required(), own.seen(CELL)) == ("size >= 4.0", "size 3.0")
        assert bound(4.0, False, None).required() == "size <= 4.0"
        assert bound(4.0, False, None).seen(CELL) == "size not measured"
        assert own.remedy == "loosen --at-most-mb"

    @pytest.mark.parametrize(
        ("more", "missing", "words"),
        [
            ({}, 0.0, "no drafts"),
            ({"lossless_check": {"lossless": True}}, 0.0, "lossless"),
            ({"lossless_check": {"lossless": False}}, 1.0, "not lossless"),
            ({"lossless_check": {}}, 10.0, "lossless check not made"),
            ({"speculation": {}}, 10.0, "lossless check not made"),
        ],
    )
    def test_lossless(self, more: dict[str, Any], missing: float, words: str) -> None:
        cell = run_of({"name": "x"} | more).cells[0]
        assert (Lossless().shortfall(cell), Lossless().seen(cell)) == (missing, words)
        assert Lossless().required() == "lossless drafts"


def fast(decode: float, size: int, **more: Any) -> dict[str, Any]:
    speed = {"decode_tokens_per_s": {"median": decode}}
    return {"speed": speed, "size": {"disk_bytes": size, "resident_bytes": 2 * size}} | more


class TestPick:
    def test_what_stands_in_the_way(self) -> None:
        results = run_of(
            {"name": "dense"} | fast(20.0, 500),
            {"name": "small"} | fast(15.0, 300, lossless_check={"lossless": False}),
            {"name": "tiny"} | fast(10.0, 300, lossless_check={"lossless": False}),
        )
        with pytest.raises(UserError) as caught:
            pick(results, max_bytes=200, max_resident=500)
        message = str(caught.value)
        assert message.startswith(
            "no variant meets disk <= 200 B and memory <= 500 B (3 were measured); "
            "the nearest is 'small': disk 300 B, memory 600 B, not lossless"
        ), message
        assert (
            "loosen --at-most-mb, loosen --at-most-memory-mb, pass --no-require-lossless" in message
        )
        with pytest.raises(UserError) as caught:
            pick(results, max_bytes=300)
        assert str(caught.value).startswith(
            "no variant meets all limits together: 2 of 3 meet disk <= 300 B, "
            "1 of 3 meet lossless drafts; the nearest is 'dense': disk 500 B"
        ), str(caught.value)

    def test_bounds_of_the_baseline_are_one(self) -> None:
        results = run_of({"name": "dense"} | text(20.0) | fast(20.0, 400))
        dense = results.cell("dense")
        assert retained_bound(results, dense) == 1.0
        assert pick(results, min_retained=1.0, max_perplexity_ratio=1.0) == dense
        for limits in ({"min_retained": 1.001}, {"max_perplexity_ratio": 0.999}):
            with pytest.raises(UserError, match="the nearest is 'dense'"):
                pick(results, **limits)

    def test_what_is_unknown_is_said(self) -> None:
        few = {"a": {"metric": "acc", "value": 0.5, "n": 199}}
        for base, cell, words in (
            (text(20.0), {}, "not measured"),
            (text(20.0), text(21.0), "unknown: no 95 % interval"),
            (
                text(20.0),
                text(21.0, (1.0, 1.1)) | {"lossless_check": {"lossless": False}},
                "unknown: drafts change its output",
            ),
            ({"quality": {"tasks": few}}, {"quality": {"tasks": few}}, "unknown: 199 questions"),
            (
                {"quality": {"tasks": {"a": few["a"] | {"n": 200}}}},
                {"quality": {"tasks": {"a": few["a"] | {"n": 200}}}},
                "unknown: no 95 % interval",
            ),
        ):
            results = run_of(
                {"name": "dense"} | fast(20.0, 9) | base, {"name": "x"} | fast(30.0, 9) | cell
            )
            with pytest.raises(UserError) as caught:
                pick(results, min_retained=0.9, require_lossless=False)
            wanted = f"no evidence for retained (at least) >= 0.900: {words}"
            assert str(caught.value).startswith(wanted), str(caught.value)


class TestReaders:
    """The functions that the table of metrics is made of, made anew."""

    CELL: ClassVar[dict[str, Any]] = {
        "size": {"disk_bytes": 10, "resident_bytes": 20},
        "speed": {
            "decode_tokens_per_s": {"median": 2.5},
            "decode_ratio": SPREAD,
        },
        "quality": {"kl_to_baseline": 0.5, "own_answers": {"kl": 0.25, "answers": 7}},
    }

    def test_parts(self) -> None:
        results = run_of({"name": "x"} | self.CELL, {"name": "bare"}, {"name": "empty", "size": {}})
        own, bare, empty = results.cells
        disk = table._number("size", "disk_bytes")
        assert [disk(results, cell) for cell in (own, bare, empty)] == [10.0, None, None]
        assert isinstance(disk(results, own), float)
        assert table._number("size", "resident_bytes")(results, own) == 20.0
        kl = table._number("quality", "kl_to_baseline")
        assert [kl(results, cell) for cell in (own, bare)] == [0.5, None]
        agreement = table._number("quality", "greedy_agreement")
        assert agreement(results, own) is None

    def test_speculation_has_the_quality_of_its_plain_cell(self) -> None:
        spec = {"name": "spec", "quality_of": "x", "plain": "x"}
        results = run_of({"name": "x"} | self.CELL, spec)
        cell = results.cell("spec")
        assert table._number("quality", "kl_to_baseline")(results, cell) == 0.5
        assert table._number("quality", "own_answers", "kl")(results, cell) == 0.25

    def test_speeds(self) -> None:
        results = run_of(
            {"name": "x"} | self.CELL, {"name": "bare"}, {"name": "empty", "speed": {}}
        )
        own, bare, empty = results.cells
        cells = (own, bare, empty)
        median = table._number("speed", "decode_tokens_per_s", "median")
        assert [median(results, cell) for cell in cells] == [2.5, None, None]
        gained = table._number("speed", "decode_ratio", "value")
        assert [gained(results, cell) for cell in cells] == [1.5, None, None]
        ends = table._read("speed", "decode_ratio", "ci95")
        assert [ends(results, cell) for cell in cells] == [(1.25, 1.75), None, None]
        assert table._read("speed", "prefill_ratio")(results, own) is None

    def test_written_and_ranked_tasks_are_retained_apart(self) -> None:
        def tasks(sums: list[float], passages: list[float], ranked: list[float]) -> dict[str, Any]:
            kinds = {"sums": "generative", "passages": "generative", "ranked": "likelihood"}
            many = [10 * each for each in (sums, passages, ranked)]
            rows = zip(kinds.items(), many, strict=True)
            scores = {
                name: {
                    "metric": "acc",
                    "value": sum(outcomes) / len(outcomes),
                    "kind": kind,
                    "outcomes": outcomes,
                    "questions": name,
                }
                for (name, kind), outcomes in rows
            }
            return {"quality": {"tasks": scores}}

        dense = {"name": "dense"} | tasks([1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0])
        cell = {"name": "x"} | tasks([1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0])
        results = relate(run_of(dense, cell))
        found = results.cell("x")
        assert metric_of(results, "written", found) == pytest.approx(0.75)
        assert metric_of(results, "ranked", found) == pytest.approx(1.0)
        assert metric_of(results, "retained", found) == pytest.approx((0.5 + 1 + 1) / 3)
        low, high = interval_of(results, "written", found) or (1.0, 0.0)
        assert low < 0.75 < high

    def test_own_answers(self) -> None:
        results = run_of(
            {"name": "x"} | self.CELL, {"name": "bare"}, {"name": "empty", "quality": {}}
        )
        fields = ("kl", "answers", "common_prefix")
        kl, count, prefix = (table._number("quality", "own_answers", name) for name in fields)
        assert [kl(results, cell) for cell in results.cells] == [0.25, None, None]
        assert (count(results, results.cells[0]), prefix(results, results.cells[0])) == (7.0, None)

    def test_all_of_a_cell(self) -> None:
        results = run_of({"name": "x"} | self.CELL)
        assert metrics(results, results.cells[0]) == {
            **{"decode": 2.5, "size": 10.0, "resident": 20.0, "decode-ratio": 1.5},
            **{"kl": 0.5, "answer-kl": 0.25},
        }

    def test_ranks(self) -> None:
        assert table.METRICS["decode"].rank(2.0) == 2.0 and table.METRICS["size"].rank(2.0) == -2.0


class TestBoundsInWords:
    def bound(self, **limits: Any) -> str:
        results = run_of(
            {"name": "dense"} | text(20.0) | fast(20.0, 9),
            {"name": "x"} | text(22.0, (1.05, 1.15)) | fast(30.0, 9),
            {"name": "y"} | text(21.0, (1.02, 1.08)) | fast(30.0, 9),
        )
        with pytest.raises(UserError) as caught:
            pick(results, **limits)
        return str(caught.value)

    def test_of_quality(self) -> None:
        for limits, wanted, option in (
            ({"min_retained": 1.5}, "retained (at least) >= 1.500", "--min-retained"),
            ({"min_retained": 1.5, "by_estimate": True}, "retained >= 1.500", "--min-retained"),
            (
                {"max_perplexity_ratio": 0.5},
                "perplexity ratio (at most) <= 0.500",
                "--at-most-perplexity-ratio",
            ),
            (
                {"max_perplexity_ratio": 0.5, "by_estimate": True},
                "perplexity ratio <= 0.500",
                "--at-most-perplexity-ratio",
            ),
        ):
            message = self.bound(**limits)
            assert message.startswith(f"no variant meets {wanted} (3 were measured)"), message
            assert message.endswith(f"fix: loosen {option}"), message

    def test_the_nearest_where_there_is_no_evidence(self) -> None:
        results = run_of(
            {"name": "dense"} | text(20.0) | fast(20.0, 9),
            {"name": "far"} | text(25.0) | fast(30.0, 9),
            {"name": "near"} | text(21.0) | fast(30.0, 9),
            {"name": "zero"} | text(24.0) | fast(30.0, 9),
        )
        with pytest.raises(UserError) as caught:
            pick(results, min_retained=0.9)
        assert str(caught.value) == (
            "no evidence for retained (at least) >= 0.900: unknown: no 95 % interval; "
            "the nearest by estimate is 'near': retained 0.952\n"
            "  fix: ask more questions (benchmark.quality.limit), or pass --by-estimate"
        )

    def test_aims(self) -> None:
        results = run_of({"name": "dense"} | text(20.0))
        with pytest.raises(UserError) as caught:
            pick(results, maximize="ttft")
        assert str(caught.value) == (
            "no variant of run 'test' has a measurement of seconds to the first token\n  fix: "
            "choose a metric that the run measured, or measure this one (`benchmark`)"
        )
        with pytest.raises(UserError, match=r"^cannot maximize 'tfft'\n.*did you mean 'ttft'"):
            pick(results, maximize="tfft")

    def test_a_refuted_cell_has_no_ratio(self) -> None:
        spec = text(21.0, (1.02, 1.08)) | {"lossless_check": {"lossless": False}}
        results = run_of(
            {"name": "dense"} | text(20.0) | fast(20.0, 9), {"name": "spec"} | spec | fast(30.0, 9)
        )
        with pytest.raises(UserError, match="no evidence for perplexity ratio"):
            pick(results, max_perplexity_ratio=2.0, require_lossless=False)

    def test_without_any_estimate(self) -> None:
        results = run_of(
            {"name": "dense"} | text(20.0) | fast(20.0, 9), {"name": "x"} | fast(30.0, 9)
        )
        with pytest.raises(UserError) as caught:
            pick(results, min_retained=0.9)
        first = str(caught.value).splitlines()[0]
        assert first == "no evidence for retained (at least) >= 0.900: not measured"

    def test_200_questions_are_enough(self) -> None:
        for n, wanted in ((199, None), (200, 1.25)):
            cell = {"tasks": {"a": {"metric": "acc", "value": 0.5, "n": n}}}
            results = run_of(
                {"name": "dense", "quality": cell},
                {"name": "x", "quality": cell | {"retained": SPREAD}},
            )
            assert retained_bound(results, results.cell("x")) == wanted
