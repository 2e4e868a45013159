"""Columns of a report's tables: heading, help, and how an entry is computed."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from compose.results.metrics import (
    METRICS,
    gain,
    half_width,
    over_seeds,
    retained_basis,
    task_retained,
)
from compose.results.parts import SpeedNumbers, TaskScore
from reports.load import KEEPS, Report, Row
from reports.numbers import DASH, THIN, TIMES, divergence, number, share, times

Tone = Literal["good", "fair", "poor"]

SIGNS: dict[Tone, str] = {"good": "●", "fair": "◐", "poor": "○"}
"""A tone's shape: what it says must not hang on its colour."""

STEPS: dict[str, tuple[float, float]] = {
    "retained": (KEEPS, 0.80),
    "perplexity-ratio": (1.05, 1.25),
}
"""Where a metric stops being good, and where it starts being poor."""


@dataclass(frozen=True)
class Entry:
    """One place in a table: text, a smaller note, what it sorts by, its bar (0 to 1), its tone."""

    text: str = DASH
    note: str = ""
    sort: float | None = None
    bar: float | None = None
    tone: Tone | None = None

    @property
    def is_absent(self) -> bool:
        """Whether nothing was measured here."""
        return self.text == DASH


@dataclass(frozen=True)
class Column:
    """A column: its heading, its unit, its help, and the function that gives a row's entry."""

    head: str
    unit: str
    help: str
    make: Callable[[Report, Row], Entry]


@dataclass(frozen=True)
class Table:
    """Rows of entries under columns. `absent` names the columns of which nothing was measured."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Row, tuple[Entry, ...]], ...]
    absent: tuple[str, ...] = ()


POSITION_HELP = "Accepted at this place of a draft, where all before it was."
SHOWN_POSITIONS = 4
DECODE_HELP = (
    "New tokens a second at batch 1, median of the repeats; beside it, over the dense model."
)
PREFILL_HELP = "Prompt tokens read a second at batch 1; beside it, over the dense model."
SAVED_HELP = (
    "Multiply-adds of the dense model's layers not computed: cut off, or skipped with gates,"
    " shortcuts and kept keys/values paid for."
)
RATIO_HELP = "Perplexity over the dense model's; 1 is no loss."
KL_HELP = "Mean KL divergence from the dense model, a token."
AGREE_HELP = "Positions where the dense model puts the same token first."
ROUNDING_HELP = (
    "Mean KL, a token, of decoding with activations rounded to 8 bits to scoring without."
)
ACCEPTED_HELP = "Drafted tokens that the whole model confirmed."
MEAN_HELP = "Tokens gained by one pass of the whole model; plain decoding has 1."
LOSSLESS_HELP = "Whether speculative greedy decoding gave plain decoding's tokens, every one."


def retained_help(report: Report) -> str:
    """What the share retained is a share of, in this run."""
    if retained_basis(report.results) == "tasks":
        return "Task scores over the dense model's, mean over the tasks."
    return "The dense model's perplexity over the cell's: no tasks were asked in this run."


def table_of(report: Report, rows: tuple[Row, ...], columns: list[Column]) -> Table:
    """The table of `rows` under those of `columns` that any row has a number for."""
    table = [[column.make(report, row) for column in columns] for row in rows]
    shown = [i for i in range(len(columns)) if any(not entries[i].is_absent for entries in table)]
    hidden = [columns[i] for i in range(len(columns)) if i not in shown] if rows else []
    names = dict.fromkeys(f"{c.head} ({c.unit})" if c.unit else c.head for c in hidden)
    return Table(
        columns=tuple(columns[i] for i in shown),
        rows=tuple(
            (row, tuple(entries[i] for i in shown))
            for row, entries in zip(rows, table, strict=True)
        ),
        absent=tuple(names),
    )


def metric_column(
    name: str,
    head: str,
    unit: str,
    help: str,
    show: Callable[[float], str],
    *,
    show_gain: bool = False,
    bar: bool | Literal["unit"] = False,
) -> Column:
    """A column of one metric. A bar is drawn against the table's largest value, or against 1."""

    def make(report: Report, row: Row) -> Entry:
        value = row.get(name)
        if value is None:
            return Entry()
        over = gain(report.results, name, row.cell) if show_gain and not row.is_baseline else None
        top = max(r.values.get(name, 0.0) for r in report.rows) if bar is True else 1.0
        return Entry(
            text=show(value),
            note="" if over is None else times(over),
            sort=value,
            bar=min(1.0, value / top) if bar and top > 0 else None,
            tone=tone(name, value),
        )

    return Column(head, unit, help, make)


def tone(metric: str, value: float) -> Tone | None:
    """Good, fair or poor, for the metrics that `STEPS` judges."""
    if metric not in STEPS:
        return None
    rank = METRICS[metric].rank
    good, fair = STEPS[metric]
    return "good" if rank(value) >= rank(good) else "fair" if rank(value) >= rank(fair) else "poor"


def task_score_column(report: Report, task: str, *, detail: bool) -> Column:
    """The score of a task; in detail, with its interval below it and n in the heading."""

    def make(report: Report, row: Row) -> Entry:
        score = _score(report, row, task)
        if score is None or score.value is None:
            return Entry()
        ends = score.ci95 if detail else None
        note = "" if ends is None else f"{share(ends[0])}{DASH}{share(ends[1])}"
        return Entry(share(score.value), note, score.value)

    scores = [score for row in report.rows if (score := _score(report, row, task)) is not None]
    asked = sorted({score.n for score in scores if score.n is not None})
    metric = ", ".join(dict.fromkeys(score.metric for score in scores))
    help = f"{task}, {metric} of lm-eval."
    if not detail:
        name, _, kind = task.partition("_")
        return Column(name, f"{kind}, %" if kind else "%", help, make)
    unit = f"%, n {asked[0]}" if len(asked) == 1 else "%"
    return Column(task, unit, f"{help} Below it: the 95 % interval.", make)


def task_kept_column(task: str) -> Column:
    """A task's score over the dense model's, for the column beside its score."""

    def make(report: Report, row: Row) -> Entry:
        kept = None if row.is_baseline else task_retained(report.results, row.cell, task)
        return (
            Entry() if kept is None else Entry(share(kept), "", kept, tone=tone("retained", kept))
        )

    return Column("Keeps", "%", "The score to its left over the dense model's.", make)


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
    return Entry(number(perplexity.value), note, perplexity.value)


def rounding_entry(report: Report, row: Row) -> Entry:
    """KL of decoding with rounded activations to scoring without."""
    quality = report.results.quality(row.cell)
    value = None if quality is None else quality.kl_of_rounding
    return Entry() if value is None else Entry(number(value), sort=value)


def drafting_entry(report: Report, row: Row) -> Entry:
    """Share of the decoding time that went into drafts."""
    speculation = row.cell.speculation
    if speculation is None or speculation.draft_s is None or not speculation.verify_s:
        return Entry()
    part = speculation.draft_s / (speculation.draft_s + speculation.verify_s)
    return Entry(share(part), sort=part)


def accepted_entry(report: Report, row: Row) -> Entry:
    """Acceptance rate, with the tokens gained by one pass of the whole model."""
    rate, mean = row.get("acceptance"), row.get("accepted")
    if rate is None:
        return Entry()
    return Entry(share(rate), "" if mean is None else f"{mean:.2f} a pass", rate)


def spread_of(name: str, show: Callable[[float], str], batch: int = 1) -> Callable[..., Entry]:
    """The entry of a speed: its median, with the lowest and the highest repeat."""

    def make(report: Report, row: Row) -> Entry:
        speed: SpeedNumbers | None = row.cell.speed
        if batch != 1:
            speed = ((row.cell.speed.by_batch or {}) if row.cell.speed else {}).get(batch)
        measured = None if speed is None else getattr(speed, name)
        if measured is None:
            return Entry()
        runs = measured.repeats
        note = f"{show(min(runs))}{DASH}{show(max(runs))}" if len(runs) > 1 else ""
        return Entry(show(measured.median), note, measured.median)

    return make


def batch_columns(batch: int) -> list[Column]:
    """Decode and prefill speed at a batch size."""
    fields = [
        ("Decode", "decode_tokens_per_s", DECODE_HELP),
        ("Prefill", "prefill_tokens_per_s", ""),
    ]
    return [
        Column(
            f"{head} {TIMES}{batch}",
            "tok/s",
            f"{head} of a batch of {batch}, all rows together.",
            spread_of(field_name, number, batch),
        )
        for head, field_name, _ in fields
    ]


def arithmetic_entry(field: str, *, scoring: bool = False) -> Callable[[Report, Row], Entry]:
    """The entry of a field of the cell's arithmetic, of decoding or of scoring."""

    def make(report: Report, row: Row) -> Entry:
        arithmetic = row.cell.scoring_arithmetic if scoring else row.cell.arithmetic
        return Entry() if arithmetic is None else Entry(getattr(arithmetic, field))

    return make


def saved_model_entry(report: Report, row: Row) -> Entry:
    """Net share of the whole model's multiply-adds saved, the LM head counted."""
    saved = None if row.cell.compute is None else row.cell.compute.saved_model
    return Entry() if saved is None else Entry(share(saved), "", saved)


def speedup_entry(report: Report, row: Row) -> Entry:
    """Decode speed over that of the plain cell."""
    speculation = row.cell.speculation
    if speculation is None or speculation.speedup is None:
        return Entry()
    return Entry(times(speculation.speedup), sort=speculation.speedup)


def usual_draft_entry(report: Report, row: Row) -> Entry:
    """The most frequent draft length, with its share of the rounds."""
    speculation = row.cell.speculation
    lengths = {} if speculation is None else speculation.draft_length_histogram or {}
    total = sum(lengths.values())
    if not total:
        return Entry()
    usual = max(lengths, key=lambda n: (lengths[n], n))
    return Entry(
        str(usual) if usual else "none",
        f"{100 * lengths[usual] / total:.0f}{THIN}% of rounds",
        float(usual),
    )


def lossless_entry(report: Report, row: Row) -> Entry:
    """Whether speculation gave plain decoding's tokens."""
    check = row.cell.lossless_check
    if check is None or check.lossless is None:
        return Entry()
    return (
        Entry("yes", "", 1.0, tone="good") if check.lossless else Entry("no", "", 0.0, tone="poor")
    )


def diverged_entry(report: Report, row: Row) -> Entry:
    """The same with the place of the first divergence."""
    entry, check = lossless_entry(report, row), row.cell.lossless_check
    if check is None or check.first_divergence is None or check.lossless:
        return entry
    return replace(entry, note=divergence(check.first_divergence))


def seed_count_entry(report: Report, row: Row) -> Entry:
    """How many seeds the cell was run with."""
    number = 1 + len(row.cell.seeds or ())
    return Entry(str(number), "", number)


def seeds_mean(name: str, show: Callable[[float], str]) -> Callable[[Report, Row], Entry]:
    """The entry of a metric's mean over seeds, with its interval's half width."""

    def make(report: Report, row: Row) -> Entry:
        values = over_seeds(report.results, name, row.cell)
        if len(values) < 2:
            return Entry()
        mean = statistics.fmean(values)
        return Entry(show(mean), f"± {show(half_width(values))}", mean, tone=tone(name, mean))

    return make


def position_columns(rows: tuple[Row, ...]) -> list[Column]:
    """Acceptance at the first places of a draft, where any cell recorded it."""

    def rates(row: Row) -> tuple[float, ...]:
        speculation = row.cell.speculation
        return (speculation.acceptance_by_position or ()) if speculation is not None else ()

    def at(place: int) -> Callable[[Report, Row], Entry]:
        def make(report: Report, row: Row) -> Entry:
            own = rates(row)
            return Entry(share(own[place]), sort=own[place]) if place < len(own) else Entry()

        return make

    longest = max((len(rates(row)) for row in rows), default=0)
    return [
        Column(f"{place + 1}.", "%", POSITION_HELP, at(place))
        for place in range(min(longest, SHOWN_POSITIONS))
    ]
