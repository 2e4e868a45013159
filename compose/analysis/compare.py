"""Compares two runs of the same cells: changes that chance does not explain.

| metric | compared through | test |
|---|---|---|
| speeds | the ratio to each run's own baseline, so that drift cancels | t of their spread |
| accuracy | the same questions, tasks weighed alike | sign flips of questions that changed |
| accuracy, other questions | both means | z |
| perplexity | the same blocks of text | t of the losses' differences |
| size, memory, compute saved | the numbers, which do not vary | more than a tolerance |

Many numbers are compared at once, so each family of tests is held together by Holm's method: in a
family, any false call has at most the family's probability. For speeds that is `SPEED_ERROR`:
twenty runs of unchanged code pass in nine cases of ten without one false call. For quality it is
`QUALITY_ERROR`, since unchanged code gives unchanged answers.

The noise of a speed is the spread between equal runs on this machine (spread.py). It is far larger
than the spread of one run's rounds: neighbours and the placement of memory change from run to run.
Where this machine was not measured, the spread of another machine is assumed. A change below the
tolerances is never reported.

The smallest changes that can be detected: 5 % of decode speed where equal runs differ by 1 %, and
20 % on a shared machine where they differ by 6 %. On such a machine, compare versions as systems of
one `gateskip bench`, by the interval of the rounds that they share (`Estimate.rounds_ci95`,
tools/side_by_side.py). For accuracy: 2 points from 500 questions a cell on.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from compose.analysis.intervals import MIN_QUESTIONS
from compose.analysis.quality_change import Tested, accuracy_change, perplexity_change
from compose.analysis.spread import ASSUMED, Spread, spread_in
from compose.analysis.verdicts import LEAST_BYTES
from compose.results.parts import Estimate, Perplexity, SpeedNumbers
from compose.results.schema import CellResult, Results

SPEED_ERROR = 0.005
"""Probability of any false call among all speeds of two runs."""

QUALITY_ERROR = 0.05
"""The same among all accuracies, and among all perplexities."""

SAME_SPEED = 0.005
"""Change of a log speed ratio that is never reported: the placement of memory changes it."""

SAVED_POINTS = 0.005
"""Change of the share of compute saved that is never reported."""

MACHINE = ("processor", "cores", "threads", "accelerator")
SETTINGS = ("prompt_tokens", "new_tokens", "prompts")

Outcome = Literal["better", "worse", "no difference", "not comparable"]


@dataclass(frozen=True)
class Change:
    """The change of one number of one cell from the first run to the second."""

    cell: str
    metric: str
    """`decode`, `prefill`, `decode, batch 8`, `accuracy`, `perplexity`, `size`, `resident`,
    `saved`, `lossless`, or `status`."""
    outcome: Outcome
    before: float | None = None
    """In the first run. For speeds, over its baseline."""
    after: float | None = None
    effect: Estimate | None = None
    """`after` over `before`, for accuracy `after` less `before`, with its own 95 % interval; the
    outcome is stricter, because it holds for all comparisons together."""
    p: float | None = None
    """Probability of such a change by chance, this comparison alone."""
    why: str | None = None
    """Why it cannot be compared, or a change that is not a number."""


def compare(before: Results, after: Results) -> tuple[Change, ...]:
    """Every number of every cell of two runs, cells in the order of the second run."""
    changes: list[Change] = []
    for cell in after.cells:
        old = before.find(cell.name)
        if old is not None and "left-out" not in (old.status, cell.status):
            changes += _of_status(old, cell)
    both = [
        (old, cell)
        for cell in after.measured
        if (old := before.find(cell.name)) is not None and old.status == "ok"
    ]
    changes += _of_speeds(before, after, both)
    changes += _of_quality(both)
    for old, cell in both:
        changes += _of_numbers(old, cell)
    names = {cell.name: place for place, cell in enumerate(after.cells)}
    alone = [*_only_in(before, after, "first"), *_only_in(after, before, "second")]
    return (*sorted(changes, key=lambda change: names[change.cell]), *alone)


def regressions(changes: tuple[Change, ...]) -> tuple[Change, ...]:
    """The changes for the worse."""
    return tuple(change for change in changes if change.outcome == "worse")


def _only_in(one: Results, other: Results, which: str) -> Iterator[Change]:
    for cell in one.measured:
        if other.find(cell.name) is None:
            yield Change(
                cell.name, "status", "not comparable", why=f"the variant is only in the {which} run"
            )


def _of_status(old: CellResult, new: CellResult) -> Iterator[Change]:
    if old.status != new.status:
        outcome: Outcome = "worse" if new.status == "failed" else "better"
        yield Change(
            new.name, "status", outcome, why=f"status {old.status} before, {new.status} now"
        )


# --- speed ---------------------------------------------------------------------------------------


def _of_speeds(
    before: Results, after: Results, both: list[tuple[CellResult, CellResult]]
) -> list[Change]:
    reason = _other_conditions(before, after)
    measured = [spread_in(run.environment) for run in (before, after)]
    spread = next((candidate for candidate in reversed(measured) if candidate is not None), ASSUMED)
    pairs: list[tuple[Change, Tested | None]] = []
    for old, new in both:
        if new.name == after.baseline and new.speed is not None:
            why = "this is the baseline: the other speeds are divided by its speed against drift"
            pairs.append((Change(new.name, "decode", "not comparable", why=why), None))
            continue
        earlier = dict(_ratios(old))
        for metric, ratio in _ratios(new):
            if metric in earlier:
                first = earlier[metric]
                change = Change(new.name, metric, "not comparable", first.value, ratio.value)
                test = None if reason else _speed_test(first, ratio, metric, spread)
                pairs.append((replace(change, why=reason), test))
    return _judged(pairs, SPEED_ERROR, higher_is_better=True)


def _ratios(cell: CellResult) -> Iterator[tuple[str, Estimate]]:
    """The speed ratios of a cell by metric, in every shape that was timed."""
    if cell.speed is None:
        return
    shapes: list[tuple[str, SpeedNumbers]] = [("", cell.speed)]
    shapes += [(f", batch {n}", shape) for n, shape in (cell.speed.by_batch or {}).items()]
    shapes += [(f", context {n}", shape) for n, shape in (cell.speed.by_context or {}).items()]
    shapes += [(f", {name}", shape) for name, shape in (cell.speed.by_category or {}).items()]
    for suffix, numbers in shapes:
        for kind, ratio in (("decode", numbers.decode_ratio), ("prefill", numbers.prefill_ratio)):
            if ratio is not None and ratio.n > 1:
                yield f"{kind}{suffix}", ratio


def _other_conditions(before: Results, after: Results) -> str | None:
    """Why no speed of two runs is comparable, or None."""
    if before.baseline != after.baseline:
        return f"the runs have different baselines: {before.baseline}, then {after.baseline}"
    for key in MACHINE:
        old, new = before.environment.get(key), after.environment.get(key)
        if old != new:
            return f"the runs differ in machine or settings: {key} {old}, then {new}"
    speeds = [(run.benchmark or {}).get("speed") or {} for run in (before, after)]
    for key in SETTINGS:
        old, new = (speed.get(key) for speed in speeds)
        if old != new:
            return f"the runs timed different workloads: {key} {old}, then {new}"
    return None


def _speed_test(old: Estimate, new: Estimate, metric: str, spread: Spread) -> Tested:
    """Log of the ratio of two ratios, each with the spread between runs."""
    change, variance = math.log(new.value / old.value), spread.of(metric) ** 2
    return Tested(change, variance, per=2, degrees=spread.runs - 1, tolerance=SAME_SPEED)


# --- quality -------------------------------------------------------------------------------------


def _of_quality(both: list[tuple[CellResult, CellResult]]) -> list[Change]:
    accuracies: list[tuple[Change, Tested | None]] = []
    perplexities: list[tuple[Change, Tested | None]] = []
    for old, new in both:
        if old.quality is None or new.quality is None:
            continue
        if old.quality.tasks and new.quality.tasks:
            accuracies.append(_accuracy(new.name, old.quality.tasks, new.quality.tasks))
        if old.quality.perplexity is not None and new.quality.perplexity is not None:
            perplexities.append(
                _perplexity(new.name, old.quality.perplexity, new.quality.perplexity)
            )
    return [
        *_judged(accuracies, QUALITY_ERROR, higher_is_better=True),
        *_judged(perplexities, QUALITY_ERROR, higher_is_better=False),
    ]


def _accuracy(
    cell: str, old: Mapping[str, Any], new: Mapping[str, Any]
) -> tuple[Change, Tested | None]:
    change = Change(cell, "accuracy", "not comparable", _mean_score(old), _mean_score(new))
    if set(old) != set(new):
        return replace(change, why="the runs asked different tasks"), None
    if any(not score.outcomes for score in (*old.values(), *new.values())):
        return replace(change, why="a run has no outcomes of single questions"), None
    count = min(sum(score.n or 0 for score in tasks.values()) for tasks in (old, new))
    if count < MIN_QUESTIONS:
        why = f"{count} questions are too few to judge quality: at least {MIN_QUESTIONS} are needed"
        return replace(change, why=why), None
    return change, accuracy_change([(old[name], new[name]) for name in old])


def _mean_score(tasks: Mapping[str, Any]) -> float | None:
    values = [score.value for score in tasks.values() if score.value is not None]
    return statistics.fmean(values) if values else None


def _perplexity(cell: str, old: Perplexity, new: Perplexity) -> tuple[Change, Tested | None]:
    change = Change(cell, "perplexity", "not comparable", old.value, new.value)
    test = perplexity_change(old, new)
    why = (
        "the runs scored different text, or have no losses of single blocks"
        if test is None
        else None
    )
    return replace(change, why=why), test


# --- numbers that do not vary --------------------------------------------------------------------


def _of_numbers(old: CellResult, new: CellResult) -> Iterator[Change]:
    for metric, field in (("size", "disk_bytes"), ("resident", "resident_bytes")):
        before, after = (_field(cell.size, field) for cell in (old, new))
        if before and after:
            yield _plain(new.name, metric, before, after, after / before - 1, LEAST_BYTES, -1)
    before, after = (_field(cell.compute, "saved_net") for cell in (old, new))
    if before is not None and after is not None:
        yield _plain(new.name, "saved", before, after, after - before, SAVED_POINTS, 1)
    was, now = (_field(cell.lossless_check, "lossless") for cell in (old, new))
    if was is not None and now is not None and was != now:
        words = (
            "its drafts change the output now" if was else "its drafts no longer change the output"
        )
        yield Change(new.name, "lossless", "worse" if was else "better", why=words)


def _field(record: Any, name: str) -> Any:
    return None if record is None else getattr(record, name)


def _plain(
    cell: str, metric: str, before: float, after: float, by: float, tolerance: float, sign: int
) -> Change:
    outcome: Outcome = "no difference"
    if abs(by) > tolerance:
        outcome = "better" if by * sign > 0 else "worse"
    return Change(cell, metric, outcome, before, after)


# --- all tests of a family together --------------------------------------------------------------


def _judged(
    pairs: list[tuple[Change, Tested | None]], error: float, *, higher_is_better: bool
) -> list[Change]:
    """Outcomes by Holm's method: the smallest of m probabilities is held against error / m, the
    next against error / (m - 1), until one is too large."""
    tests = [test for _, test in pairs if test is not None]
    called: set[int] = set()
    for rank, test in enumerate(sorted(tests, key=lambda test: test.p)):
        if test.p > error / (len(tests) - rank):
            break
        called.add(id(test))
    return [
        change if test is None else _called(change, test, id(test) in called, higher_is_better)
        for change, test in pairs
    ]


def _called(change: Change, test: Tested, called: bool, higher_is_better: bool) -> Change:
    outcome: Outcome = "no difference"
    if called:
        outcome = "better" if (test.value > 0) == higher_is_better else "worse"
    return replace(change, outcome=outcome, effect=test.effect(), p=test.p)
