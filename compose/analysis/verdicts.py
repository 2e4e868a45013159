"""One line a cell: ACCEPT, TRADE-OFF, REGRESSION or NO EVIDENCE, from intervals.

A cell is compared with the baseline; one that speculates, with the cell of the same weights that
decodes plainly (`CellResult.plain`), because it has to beat that cell.

Quality is *kept*, *lost*, or unknown:

- kept: at least `MIN_QUESTIONS` questions, among them a task whose answers the cell writes; the
  lower end of the mean share retained (`Quality.retained`) is at least `KEEP`; and no single task
  is shown to keep less than `KEEP`. Where the run asks no tasks at all: the upper end of the
  perplexity ratio is at most 1 / `KEEP`. Also kept: what gives the baseline's predictions, with a
  KL of at most `SAME_KL` in every block.
- lost: not kept, and the interval of the share retained (of all tasks, or of one against `KEEP`)
  or of the perplexity ratio lies wholly on the losing side of 1. Tasks count from `MIN_QUESTIONS`
  on; perplexity always does.
- unknown: anything else. Few questions never make a claim.

A cell *gains* where the interval of its decode or prefill speed ratio lies above 1, or where it
takes at least `LEAST_BYTES` less on disk or in memory. It *loses* speed where the interval lies
below 1, and bytes where it takes as much more.

| verdict | when, in this order |
|---|---|
| REGRESSION | it speculates, and was seen to give other tokens than plain decoding |
| ACCEPT | quality kept, something gained, no speed lost |
| TRADE-OFF | something gained, and quality or speed lost |
| REGRESSION | nothing gained, and quality, speed or bytes lost |
| NO EVIDENCE | all else: an interval includes gain and loss, or there are too few questions |
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from compose.analysis.families import lossless_to
from compose.analysis.intervals import MIN_QUESTIONS
from compose.numbers import PLAIN, three_decimals, two_places
from compose.results.parts import Outcome, Quality, SpeedNumbers, Verdict
from compose.results.schema import CellResult, Results
from compose.table import Tone

TONES: dict[Outcome, Tone] = {
    "ACCEPT": "good",
    "TRADE-OFF": "fair",
    "REGRESSION": "poor",
    "NO EVIDENCE": "unknown",
}
"""Verdict -> its tone in tables, best first."""

KEEP = 0.95
"""The share of the baseline's quality that a cell must keep to be accepted."""

LEAST_BYTES = 0.01
"""Share of bytes below which sizes count as equal: gates alone add some kilobytes."""

BASELINE, WITHOUT_DRAFTS = "the baseline", "the same weights without drafts"
"""What a cell is compared with, in words."""

SAME_KL = 1e-6
"""Nats a token: below, predictions are the same but for the order of float32 sums."""


@dataclass(frozen=True)
class QualityVerdict:
    """Whether quality was kept or lost, and the reason in words."""

    state: Literal["kept", "lost", "unknown"]
    why: str


def verdict_of(results: Results, cell: CellResult, keep: float = KEEP) -> Verdict | None:
    """The verdict of a measured cell; None for the baseline and for what was not measured."""
    if cell.status != "ok" or cell.name == results.baseline:
        return None
    check = cell.lossless_check
    if cell.speculates and (check is None or check.lossless is None):
        why = "It was not checked whether its drafts change the output."
        return Verdict(verdict="NO EVIDENCE", why=why)
    if check is not None and check.lossless is False:
        weights = lossless_to(results, cell)
        why = f"Its drafts change the output: its tokens are not those of {weights} without drafts."
        return Verdict(verdict="REGRESSION", why=why)
    quality = judge_quality(results, cell, keep)
    faster, slower = _speeds(results, cell)
    smaller, larger = _bytes(results, cell)
    gains = [*faster, *smaller]
    worse = [quality.why] if quality.state == "lost" else []
    if quality.state == "kept" and gains and not slower:
        return _verdict("ACCEPT", [quality.why, *gains], larger)
    if gains and (worse or slower):
        quality_kept = [quality.why] if quality.state == "kept" else []
        return _verdict("TRADE-OFF", [*quality_kept, *gains], [*worse, *slower, *larger])
    if not gains and (worse or slower or larger):
        nothing_gained = "it is neither faster nor smaller"
        return _verdict("REGRESSION", [*worse, *slower, *larger, nothing_gained])
    if quality.state == "unknown":
        return _verdict("NO EVIDENCE", [quality.why, *gains], larger)
    other = WITHOUT_DRAFTS if _is_compared_with_plain(results, cell) else BASELINE
    return _verdict(
        "NO EVIDENCE", [quality.why], [f"it is not shown to be faster or smaller than {other}"]
    )


def judge_quality(results: Results, cell: CellResult, keep: float = KEEP) -> QualityVerdict:
    """Whether a cell keeps the share `keep` of the baseline's quality; see the top of this file.

    A cell that speculates has the quality of its plain cell.
    """
    quality = results.quality(cell)
    if quality is None:
        return QualityVerdict("unknown", "its quality was not measured")
    if gives_baselines_predictions(results, quality):
        return QualityVerdict("kept", "its predictions are identical to the baseline's")
    tasks, perplexity = _on_tasks(results, quality, keep), _on_perplexity(results, quality, keep)
    if tasks.state == "kept" and perplexity.state == "lost":
        return QualityVerdict("kept", f"{tasks.why}, and {perplexity.why}")
    return next((judged for judged in (tasks, perplexity) if judged.state != "unknown"), tasks)


def question_count(quality: Quality) -> int:
    """Questions of all tasks together."""
    return sum(score.n or 0 for score in (quality.tasks or {}).values())


def too_few(quality: Quality) -> str:
    """The reason given where its questions are too few for a verdict."""
    count = question_count(quality)
    return f"{count} questions are too few to judge quality: at least {MIN_QUESTIONS} are needed"


def gives_baselines_predictions(results: Results, quality: Quality) -> bool:
    """Whether a quality is the baseline's own, or at most `SAME_KL` from it in every block."""
    baseline = results.find(results.baseline)
    if baseline is not None and quality is baseline.quality:
        return True
    return bool(quality.block_kl) and max(quality.block_kl or ()) <= SAME_KL


def _on_tasks(results: Results, quality: Quality, keep: float) -> QualityVerdict:
    tasks = quality.tasks or {}
    if not tasks:
        return QualityVerdict("unknown", "its quality is unknown, because no questions were asked")
    if question_count(quality) < MIN_QUESTIONS:
        return QualityVerdict("unknown", too_few(quality))
    retained = quality.retained
    if retained is None:
        why = "its answers cannot be paired with the baseline's answers to the same questions"
        return QualityVerdict("unknown", why)
    seen = f"{_percents(*retained.ci95)} of the baseline's task scores ({retained.n} questions)"
    poor = [
        f"it keeps {_percents(*score.retained_ci95)} of the baseline's score on {name}"
        for name, score in tasks.items()
        if score.retained_ci95 is not None and score.retained_ci95[1] < keep
    ]
    if poor:
        return QualityVerdict("lost", " and ".join(poor))
    written = any(score.kind == "generative" for score in tasks.values())
    if retained.low >= keep and written:
        return QualityVerdict("kept", f"it keeps {seen}")
    if retained.high < 1:
        return QualityVerdict("lost", f"it keeps {seen}")
    if not written:
        return QualityVerdict(
            "unknown", f"it keeps {seen}, but no question asked for a written answer"
        )
    return QualityVerdict("unknown", f"it keeps {seen}, which is too uncertain for a verdict")


def _on_perplexity(results: Results, quality: Quality, keep: float) -> QualityVerdict:
    ends = None if quality.perplexity is None else quality.perplexity.ratio_ci95
    if ends is None:
        return QualityVerdict("unknown", "its perplexity has no interval")
    seen = f"its perplexity is {PLAIN.span(*ends, three_decimals)} times the baseline's"
    if not _asks_tasks(results) and ends[1] <= 1 / keep:
        return QualityVerdict("kept", f"{seen}, and no questions were asked")
    return QualityVerdict("lost" if ends[0] > 1 else "unknown", seen)


def _asks_tasks(results: Results) -> bool:
    baseline = results.find(results.baseline)
    return baseline is not None and baseline.quality is not None and bool(baseline.quality.tasks)


def _is_compared_with_plain(results: Results, cell: CellResult) -> bool:
    return cell.speculates and results.find(cell.plain) is not None


def _speeds(results: Results, cell: CellResult) -> tuple[list[str], list[str]]:
    """The speeds that are shown to be higher, and those shown to be lower, in words."""
    faster: list[str] = []
    slower: list[str] = []
    for verb, ends, than in _speed_intervals(results, cell):
        if ends is not None and not ends[0] <= 1 <= ends[1]:
            words = f"it {verb} {PLAIN.span(*ends, two_places)} times as fast as {than}"
            (faster if ends[0] > 1 else slower).append(words)
    return faster, slower


def _speed_intervals(
    results: Results, cell: CellResult
) -> Iterable[tuple[str, tuple[float, float] | None, str]]:
    if _is_compared_with_plain(results, cell):
        ends = None if cell.speculation is None else cell.speculation.speedup_ci95
        yield "decodes", ends, WITHOUT_DRAFTS
        return
    numbers: SpeedNumbers | None = cell.speed
    if cell.speed is not None and cell.speed.decode_tokens_per_s is None and cell.speed.by_batch:
        numbers = cell.speed.by_batch[min(cell.speed.by_batch)]  # no batch of one was asked for
    for verb, name in (("decodes", "decode_ratio"), ("processes prompts", "prefill_ratio")):
        estimate = None if numbers is None else getattr(numbers, name)
        yield verb, None if estimate is None else estimate.ci95, BASELINE


def _bytes(results: Results, cell: CellResult) -> tuple[list[str], list[str]]:
    """Where it takes fewer bytes, and where more, in words. The memory of other engines is that of
    their process, not of their tensors, so it is not compared with ours."""
    plain = _is_compared_with_plain(results, cell)
    other = results.find(cell.plain if plain else results.baseline)
    named = WITHOUT_DRAFTS if plain else BASELINE
    smaller: list[str] = []
    larger: list[str] = []
    for place, field in (("disk space", "disk_bytes"), ("memory", "resident_bytes")):
        ours = None if cell.size is None else getattr(cell.size, field)
        theirs = None if other is None or other.size is None else getattr(other.size, field)
        alike = other is not None and (cell.peer is None) == (other.peer is None)
        if field == "resident_bytes" and not alike:
            continue
        if not ours or not theirs or abs(ours / theirs - 1) < LEAST_BYTES:
            continue
        words = f"it takes {PLAIN.whole(100 * ours / theirs)} % of the {place} of {named}"
        (smaller if ours < theirs else larger).append(words)
    return smaller, larger


def _verdict(verdict: Outcome, facts: list[str], but: list[str] | None = None) -> Verdict:
    """A verdict with a sentence for each fact; those of `but` speak against the others."""
    against = [f"but {fact}" if place == 0 else fact for place, fact in enumerate(but or ())]
    return Verdict(verdict=verdict, why=" ".join(map(as_sentence, [*facts, *against])))


def as_sentence(clause: str) -> str:
    """A clause with a capital letter and a full stop."""
    return f"{clause[:1].upper()}{clause[1:]}."


def _percents(low: float, high: float) -> str:
    return f"{PLAIN.span(low, high, PLAIN.share)} %"
