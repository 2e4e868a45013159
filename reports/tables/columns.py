"""Columns of a report's tables, and those that one metric fills."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from compose.analysis.metrics import METRICS, gain, retained_basis
from compose.analysis.pick import retained_bound
from compose.analysis.verdicts import KEEP, gives_baselines_predictions
from compose.numbers import PAGE, unless_one
from compose.results.parts import Estimate
from compose.table import Column as TableColumn
from compose.table import Entry, Table, Tone
from reports.load import Report, Row

SIGNS: dict[Tone, str] = {"good": "●", "fair": "◐", "poor": "○", "unknown": "?", "same": "="}
"""A tone's shape: what it says must not hang on its colour."""

STEPS: dict[str, tuple[float, float]] = {
    "retained": (KEEP, 0.80),
    "perplexity-ratio": (1.05, 1.25),
}
"""Where a metric stops being good, and where it starts being poor."""


Make = Callable[[Report, Row], Entry]


@dataclass(frozen=True)
class Column(TableColumn):
    """A column of a table of cells, with the function that gives a row's entry."""

    make: Make


def table_of(report: Report, rows: tuple[Row, ...], columns: Sequence[Column]) -> Table[Row]:
    """The table of `rows` under those of `columns` that any row has a number for."""
    entries = ((row, tuple(column.make(report, row) for column in columns)) for row in rows)
    return Table(tuple(columns), tuple(entries)).without_absent()


def metric_column(
    name: str,
    head: str,
    unit: str,
    help: str,
    show: Callable[[float], str],
    *,
    show_gain: bool | Literal["short"] = False,
    bar: bool | Literal["unit"] = False,
) -> Column:
    """A column of one metric. A bar is drawn against the table's largest value, or against 1.

    Below the number stands the gain over the baseline (`show_gain`; "short" leaves its interval
    out), else its 95 % interval. A ratio whose interval includes 1 is written "no difference".
    """

    def make(report: Report, row: Row) -> Entry:
        value = row.get(name)
        if value is None:
            return Entry()
        if name == "retained" and predicts_like_baseline(report, row):
            return Entry(IDENTICAL, sort=value, tone="good")
        ends = None if show_gain or row.is_baseline else report.interval(row, name)
        note = gain_note(report, row, name) if show_gain else PAGE.span(*ends, show) if ends else ""
        return Entry(
            text=unless_one(show(value), ends if name in RATIOS else None),
            note=note.partition(" (")[0] if show_gain == "short" else note,
            sort=value,
            bar=_bar(report, name, value, bar),
            tone=sure_tone(report, row, name),
        )

    return Column(head, unit, help, make)


IDENTICAL = "identical predictions"


def predicts_like_baseline(report: Report, row: Row) -> bool:
    """Whether a variant's predictions are the baseline's, so that no question can tell them
    apart."""
    quality = report.results.quality(row.cell)
    check = row.cell.lossless_check
    if row.is_baseline or quality is None or (check is not None and check.lossless is False):
        return False
    return gives_baselines_predictions(report.results, quality)


RATIOS = frozenset({"retained", "perplexity-ratio", "speedup"})
"""Metrics that are ratios to another cell's number."""


def gain_note(report: Report, row: Row, name: str) -> str:
    """A metric over the baseline's: paired, with its interval, where speed was; nothing at it."""
    if row.is_baseline:
        return ""
    paired = paired_ratio(row, name)
    if paired is not None:
        return PAGE.ratio(paired.value, paired.ci95)
    over = gain(report.results, name, row.cell)
    return "" if over is None else PAGE.times(over)


def paired_ratio(row: Row, name: str) -> Estimate | None:
    """The ratio of `decode` or `prefill` speed to the baseline's, paired round by round."""
    if row.cell.speed is None or name not in ("decode", "prefill"):
        return None
    return row.cell.speed.decode_ratio if name == "decode" else row.cell.speed.prefill_ratio


def _bar(report: Report, name: str, value: float, bar: bool | Literal["unit"]) -> float | None:
    if not bar:
        return None
    top = 1.0 if bar == "unit" else max(row.values.get(name, 0.0) for row in report.rows)
    return min(1.0, value / top) if top > 0 else None


def tone(metric: str, value: float) -> Tone | None:
    """Good, fair or poor, for the metrics that `STEPS` judges."""
    if metric not in STEPS:
        return None
    rank = METRICS[metric].rank
    good, fair = STEPS[metric]
    return "good" if rank(value) >= rank(good) else "fair" if rank(value) >= rank(fair) else "poor"


def sure_tone(report: Report, row: Row, metric: str) -> Tone | None:
    """The tone of what the metric is at least, or at most; None where nothing is known of it."""
    value = row.get(metric)
    if value is None or row.is_baseline or metric not in STEPS:
        return None
    if metric == "retained":
        bound = retained_bound(report.results, row.cell)
        return None if bound is None else tone(metric, bound)
    ends = report.interval(row, metric) or (value, value)
    return tone(metric, min(ends, key=METRICS[metric].rank))


def retained_help(report: Report) -> str:
    """What the share retained is a share of, in this run."""
    if retained_basis(report.results) == "tasks":
        return "Task score divided by the dense model's score, mean over the tasks."
    return (
        "Perplexity of the dense model divided by the variant's perplexity, because this run asked"
        " no questions."
    )
