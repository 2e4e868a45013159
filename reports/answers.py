"""What the cells answer to the same questions; equal answers stand together."""

from __future__ import annotations

from dataclasses import dataclass

from compose.results.quality import common_prefix
from reports.load import Report


@dataclass(frozen=True)
class Answer:
    """One answer, and the cells that give it, in the order of the tables."""

    names: tuple[str, ...]
    same: str
    """How it begins, as long as that is what the dense model says."""
    rest: str
    """How it goes on."""


@dataclass(frozen=True)
class Question:
    """A question, and the answers that differ, the dense model's first."""

    text: str
    answers: tuple[Answer, ...]


def answers(report: Report) -> tuple[Question, ...]:
    """Every question whose answers were kept. Cells that speculate are not among them: they were
    not asked, since they give the answers of the cell that they are checked against."""
    baseline = report.results.find(report.results.baseline)
    if baseline is None or baseline.quality is None:
        return ()
    base = baseline.quality.own_answers
    if base is None or not base.questions or not base.texts:
        return ()
    texts = {baseline.name: base.texts}
    for row in report.rows:
        written = row.cell.quality.own_answers if row.cell.quality else None
        if written is not None and written.texts:
            texts.setdefault(row.cell.name, written.texts)
    return tuple(
        Question(text, _answers({name: rows[i] for name, rows in texts.items() if i < len(rows)}))
        for i, text in enumerate(base.questions)
    )


def _answers(texts: dict[str, str]) -> tuple[Answer, ...]:
    names: dict[str, list[str]] = {}
    for name, text in texts.items():
        names.setdefault(text, []).append(name)
    dense = next(iter(names), "")
    parts = [(tuple(cells), text, common_prefix(dense, text)) for text, cells in names.items()]
    return tuple(Answer(cells, text[:shared], text[shared:]) for cells, text, shared in parts)
