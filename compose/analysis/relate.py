"""Relates the cells of a run to its baseline: ratios with intervals, verdicts, curves.

`relate` is pure: it returns the same results with these fields filled from the cells' outcomes.
Speeds are related in `compose.outputs.gather`, where the rounds are known.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

from compose.analysis.intervals import exp_mean_ratio, mean_interval, mean_of_ratios, paired_ratio
from compose.analysis.published_metrics import skipping_curves
from compose.analysis.verdicts import verdict_of
from compose.results.parts import Estimate, OwnAnswers, Perplexity, Quality, Record, TaskScore
from compose.results.quality import TaskKind
from compose.results.schema import CellResult, Results

R = TypeVar("R", bound=Record)


def relate(results: Results) -> Results:
    """The results with intervals of quality, a verdict for each cell, and skipping curves."""
    baseline = results.find(results.baseline)
    base = None if baseline is None else baseline.quality
    cells = tuple(_beside(cell, base, is_baseline=cell is baseline) for cell in results.cells)
    related = _with(results, cells=cells)
    judged = tuple(_with(cell, verdict=verdict_of(related, cell)) for cell in cells)
    curves = skipping_curves(related)
    return _with(related, cells=judged, skipping_curves=curves or None)


def _with(record: R, **fields: Any) -> R:
    """A copy with other fields, without the record's cached values."""
    return type(record)(**dict(record) | fields)


def _beside(cell: CellResult, base: Quality | None, *, is_baseline: bool) -> CellResult:
    """A cell with its quality, and that of every further seed, related to the baseline's."""
    fields: dict[str, Any] = {"quality": _related(cell.quality, base, is_baseline=is_baseline)}
    if cell.seeds is not None:
        fields["seeds"] = tuple(
            _with(run, quality=_related(run.quality, base, is_baseline=False)) for run in cell.seeds
        )
    return _with(cell, **fields)


def _related(quality: Quality | None, base: Quality | None, *, is_baseline: bool) -> Quality | None:
    if quality is None:
        return None
    fields: dict[str, Any] = {}
    if quality.block_kl:
        fields["kl_ci95"] = _ends(mean_interval(quality.block_kl), least=0.0)
    if quality.own_answers is not None:
        fields["own_answers"] = _answers(quality.own_answers)
    if base is not None:
        if quality.perplexity is not None and base.perplexity is not None:
            fields["perplexity"] = _perplexity(quality.perplexity, base.perplexity)
        if quality.tasks is not None:
            theirs = base.tasks or {}
            fields["tasks"] = {
                name: _task(score, theirs.get(name)) for name, score in quality.tasks.items()
            }
        if not is_baseline:
            fields["retained"] = _retained(quality, base)
            fields["written_retained"] = _retained(quality, base, "generative")
            fields["ranked_retained"] = _retained(quality, base, "likelihood")
    return _with(quality, **fields)


def _perplexity(score: Perplexity, base: Perplexity) -> Perplexity:
    if score.dataset != base.dataset or score.value is None or not base.value:
        return score
    if score.dense_nll is not None:
        return _after_prompts(score, score.dense_nll)
    fields: dict[str, Any] = {"ratio_to_baseline": score.value / base.value}
    if score is not base and paired_blocks(score, base):
        fields["ratio_ci95"] = _ends(exp_mean_ratio(score.block_nll or (), base.block_nll or ()))
    return _with(score, **fields)


def _after_prompts(score: Perplexity, dense: tuple[float, ...]) -> Perplexity:
    """Relate to the dense model's losses of the same tokens, which are only a part of the
    text's."""
    losses = score.block_nll or ()
    fields: dict[str, Any] = {"ratio_ci95": _ends(exp_mean_ratio(losses, dense))}
    if len(losses) == len(dense):
        change = sum(losses) - sum(dense)
        fields["ratio_to_baseline"] = math.exp(change / len(dense))
    return _with(score, **fields)


def paired_blocks(score: Perplexity, base: Perplexity) -> bool:
    """Whether both have the losses of the same blocks of the same text."""
    same = score.dataset == base.dataset and score.tokens == base.tokens
    ours, theirs = score.block_nll or (), base.block_nll or ()
    return same and bool(ours) and len(ours) == len(theirs)


def _task(score: TaskScore, base: TaskScore | None) -> TaskScore:
    if base is None or score.value is None or not base.value:
        return score
    fields: dict[str, Any] = {"retained": score.value / base.value}
    if score is not base and paired_questions(score, base):
        fields["retained_ci95"] = _ends(paired_ratio(score.outcomes or (), base.outcomes or ()))
    return _with(score, **fields)


def paired_questions(score: TaskScore, base: TaskScore) -> bool:
    """Whether both have the outcomes of the same questions."""
    same = score.questions is not None and score.questions == base.questions
    ours, theirs = score.outcomes or (), base.outcomes or ()
    return same and bool(ours) and len(ours) == len(theirs)


def _retained(quality: Quality, base: Quality, kind: TaskKind | None = None) -> Estimate | None:
    """Over all of the baseline's tasks, or over those of one kind."""
    pairs = []
    for name, theirs in (base.tasks or {}).items():
        if kind not in (None, theirs.kind):
            continue
        score = (quality.tasks or {}).get(name)
        if score is None or not paired_questions(score, theirs):
            return None
        pairs.append((score.outcomes or (), theirs.outcomes or ()))
    return mean_of_ratios(pairs)


def _answers(answers: OwnAnswers) -> OwnAnswers:
    if not answers.answer_kl:
        return answers
    return _with(answers, kl_ci95=_ends(mean_interval(answers.answer_kl), least=0.0))


def _ends(estimate: Estimate | None, least: float | None = None) -> tuple[float, float] | None:
    """Both ends of an interval, cut at the number's lower limit."""
    if estimate is None:
        return None
    low, high = estimate.ci95
    return (low, high) if least is None else (max(least, low), high)
