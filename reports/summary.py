"""The report's first block: which variant to take for speed, size and exactness, at which price."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compose.analysis.recommend import AIMS, Recommendation, recommendations
from compose.numbers import PAGE, bytes_text
from reports.load import Report, Row


@dataclass(frozen=True)
class Card:
    """One recommendation: its aims in words, its row, the figure in large, the price.

    Without a row, the price says why nothing is recommended.
    """

    aim: str
    row: Row | None
    figure: str
    price: str


def summary(report: Report) -> tuple[Card, ...]:
    """A card for each variant that is recommended, and for each aim for which none is.

    A variant that is recommended for several aims has one card.
    """
    rows = {row.cell.name: row for row in report.rows}
    by_answer: dict[tuple[str | None, str], list[Recommendation]] = {}
    for answer in recommendations(report.results):
        same = (None if answer.cell is None else answer.cell.name, answer.because)
        by_answer.setdefault(same, []).append(answer)
    return tuple(
        _card(answers, rows.get(answers[0].cell.name) if answers[0].cell else None)
        for answers in by_answer.values()
    )


def _card(answers: list[Recommendation], row: Row | None) -> Card:
    aims = [answer.aim for answer in answers]
    words = f"For {_listed(aims)}"
    if row is not None:
        return Card(words, row, _figure(row), answers[0].sentence)
    all_aims = len(aims) == len(AIMS)
    what = "" if all_aims else f" for {_listed(aims)}"
    return Card(words, None, "", f"Nothing is recommended{what}, because {answers[0].because}.")


def _listed(aims: Sequence[str]) -> str:
    """speed; speed and size; speed, size and exactness."""
    return " and ".join(filter(None, (", ".join(aims[:-1]), aims[-1])))


def _figure(row: Row) -> str:
    """Decode speed and size, as far as they were measured."""
    speed, size = row.get("decode"), row.get("size")
    parts = [
        None if speed is None else f"{PAGE.number(speed)} tokens/s",
        None if size is None else bytes_text(size),
    ]
    return ", ".join(part for part in parts if part)


def original(report: Report) -> str:
    """The baseline in one sentence: everything is compared with it."""
    row = report.baseline
    if row is None:
        return "The original model was not measured."
    prefill, score, perplexity = (row.get(m) for m in ("prefill", "accuracy", "perplexity"))
    parts = [
        _figure(row),
        None if prefill is None else f"{PAGE.number(prefill)} tokens/s in prefill",
        None if score is None else f"mean task score {PAGE.percent(score)}",
        None if perplexity is None else f"perplexity {PAGE.number(perplexity)}",
    ]
    known = ", ".join(part for part in parts if part)
    values = f": {known}" if known else ""
    return f"All variants are compared with {row.cell.name}, the original model{values}."
