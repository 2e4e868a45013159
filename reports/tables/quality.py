"""Columns of quality: perplexity, KL, tasks, the dense model's own answers, seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from compose.analysis.metrics import half_width, over_seeds, task_retained
from compose.numbers import PAGE, unless_one
from compose.results.parts import OwnAnswers, Quality, TaskScore, TextCompute
from compose.table import Entry
from reports.load import Report, Row
from reports.tables.columns import IDENTICAL, Column, Make, predicts_like_baseline, tone

RATIO_HELP = (
    "Perplexity of the variant divided by the perplexity of the dense model. The number"
    " below is the 95 % interval."
)
KL_HELP = (
    "Mean KL divergence from the dense model, in nats per token. The number below is the 95"
    " % interval."
)
AGREE_HELP = (
    "Share of text positions at which the variant and the dense model have the same most"
    " likely token."
)
ROUNDING_HELP = (
    "Mean KL, in nats per token, between the predictions of decoding, which rounds activations to"
    " 8 bits, and those of scoring, which does not."
)
OWN_KL_HELP = (
    "Mean KL divergence from the dense model, measured on greedy answers of the dense model."
)
WRITTEN_HELP = (
    "Task score divided by the dense model's score, mean over the tasks whose answers the model"
    " writes."
)
RANKED_HELP = "Task score divided by the dense model's score, mean over the multiple-choice tasks."
PREFIX_HELP = (
    "Number of tokens after which a greedy answer first differs from the dense model's"
    " greedy answer."
)


def task_score_column(report: Report, task: str, *, detail: bool) -> Column:
    """The score of a task; in detail, with its interval below it and n in the heading."""

    def make(report: Report, row: Row) -> Entry:
        score = _score(report, row, task)
        if score is None or score.value is None:
            return Entry()
        ends = score.ci95 if detail else None
        note = "" if ends is None else PAGE.span(*ends, PAGE.share)
        return Entry(PAGE.share(score.value), note, score.value)

    scores = [score for row in report.rows if (score := _score(report, row, task)) is not None]
    counts = sorted({score.n for score in scores if score.n is not None})
    metric = ", ".join(dict.fromkeys(score.metric for score in scores))
    kinds = ", ".join(dict.fromkeys(score.kind for score in scores if score.kind))
    how = ", ".join(filter(None, (metric, kinds)))
    help = f"Score on the lm-eval task {task} ({how})."
    if not detail:
        name, _, kind = task.partition("_")
        return Column(name, f"{kind}, %" if kind else "%", help, make)
    unit = f"%, n {counts[0]}" if len(counts) == 1 else "%"
    return Column(task, unit, f"{help} The number below is the 95 % interval.", make)


def task_kept_column(task: str) -> Column:
    """A task's score over the dense model's, for the column beside its score."""

    def make(report: Report, row: Row) -> Entry:
        retained = None if row.is_baseline else task_retained(report.results, row.cell, task)
        if retained is None:
            return Entry()
        if predicts_like_baseline(report, row):
            return Entry(IDENTICAL, sort=retained, tone="good")
        score = _score(report, row, task)
        ends = None if score is None else score.retained_ci95
        note = "" if ends is None else PAGE.span(*ends, PAGE.share)
        text = unless_one(PAGE.share(retained), ends)
        return Entry(text, note, retained, tone=None if ends is None else tone("retained", ends[0]))

    help = (
        "Task score in the column to the left, divided by the dense model's score. The number"
        " below is the paired 95 % interval."
    )
    return Column("Keeps", "%", help, make)


def spent_columns(report: Report) -> list[Column]:
    """What cells that skip saved on the very text that was scored: a column a written task, and
    one of the dense model's own answers."""
    columns = [_spent_column(task, _of_task(task)) for task in report.tasks]
    columns.append(_spent_column("Own answers", _of_answers))
    filled = [
        any(not column.make(report, row).is_absent for row in report.rows) for column in columns
    ]
    return [column for column, has in zip(columns, filled, strict=True) if has]


def _spent_column(name: str, read: Callable[[Quality], TextCompute | None]) -> Column:
    def make(report: Report, row: Row) -> Entry:
        quality = report.results.quality(row.cell)
        spent = None if quality is None else read(quality)
        if spent is None:
            return Entry()
        phases = {"prompt": spent.prompt, "answer": spent.answer}
        parts = [
            f"{phase} {PAGE.share(use.kept)}" for phase, use in phases.items() if use is not None
        ]
        return Entry(PAGE.share(spent.saved_net), f"kept {', '.join(parts)}", spent.saved_net)

    help = (
        f"Net share of multiply-adds saved on the prompts and answers of {name}. The numbers below"
        " are the shares of the attention and MLP multiply-adds computed in prompts and in answers."
    )
    return Column(f"{name} saved", "net, %", help, make)


def _of_task(task: str) -> Callable[[Quality], TextCompute | None]:
    def read(quality: Quality) -> TextCompute | None:
        score = (quality.tasks or {}).get(task)
        return None if score is None else score.compute

    return read


def _of_answers(quality: Quality) -> TextCompute | None:
    return None if quality.own_answers is None else quality.own_answers.compute


def _score(report: Report, row: Row, task: str) -> TaskScore | None:
    quality = report.results.quality(row.cell)
    return None if quality is None else (quality.tasks or {}).get(task)


def perplexity_text(report: Report) -> str:
    """The text that perplexity was measured on, when it is one text."""
    qualities = [report.results.quality(row.cell) for row in report.rows]
    names = {q.perplexity.dataset for q in qualities if q is not None and q.perplexity is not None}
    return names.pop() if len(names) == 1 else ""


def perplexity_entry(report: Report, row: Row) -> Entry:
    """Perplexity, with the text's name where the run measured on several."""
    quality = report.results.quality(row.cell)
    perplexity = None if quality is None else quality.perplexity
    if perplexity is None or perplexity.value is None:
        return Entry()
    note = "" if perplexity_text(report) else perplexity.dataset
    return Entry(PAGE.number(perplexity.value), note, perplexity.value)


def quality_column(
    head: str, unit: str, help: str, read: Callable[[Quality], float | None]
) -> Column:
    """A column of one number of the quality record."""
    return Column(head, unit, help, _number_of(read))


def answers_column(
    head: str, unit: str, help: str, read: Callable[[OwnAnswers], float | None]
) -> Column:
    """A column of one number of the dense model's own answers."""

    def of_quality(quality: Quality) -> float | None:
        return None if quality.own_answers is None else read(quality.own_answers)

    return Column(head, unit, help, _number_of(of_quality))


def _number_of(read: Callable[[Quality], float | None]) -> Make:
    def make(report: Report, row: Row) -> Entry:
        quality = report.results.quality(row.cell)
        value = None if quality is None else read(quality)
        return Entry() if value is None else Entry(PAGE.number(value), sort=value)

    return make


def own_kl_entry(report: Report, row: Row) -> Entry:
    """KL on the dense model's own answers, with its interval."""
    quality = report.results.quality(row.cell)
    answers = None if quality is None else quality.own_answers
    if answers is None or answers.kl is None:
        return Entry()
    note = (
        ""
        if answers.kl_ci95 is None or row.is_baseline
        else PAGE.span(*answers.kl_ci95, PAGE.number)
    )
    return Entry(PAGE.number(answers.kl), note, answers.kl)


def seed_count_entry(report: Report, row: Row) -> Entry:
    """How many seeds the variant was run with."""
    number = 1 + len(row.cell.seeds or ())
    return Entry(str(number), "", number)


def seeds_mean(name: str, show: Callable[[float], str]) -> Make:
    """The entry of a metric's mean over seeds, with its interval's half width."""

    def make(report: Report, row: Row) -> Entry:
        values = over_seeds(report.results, name, row.cell)
        if len(values) < 2:
            return Entry()
        mean = statistics.fmean(values)
        return Entry(show(mean), f"± {show(half_width(values))}", mean, tone=tone(name, mean))

    return make
