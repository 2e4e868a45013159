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
    own: str
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
        own = row.cell.quality.own_answers if row.cell.quality else None
        if own is not None and own.texts:
            texts.setdefault(row.cell.name, own.texts)
    return tuple(
        Question(asked, _answers({name: own[i] for name, own in texts.items() if i < len(own)}))
        for i, asked in enumerate(base.questions)
    )


def _answers(texts: dict[str, str]) -> tuple[Answer, ...]:
    names: dict[str, list[str]] = {}
    for name, text in texts.items():
        names.setdefault(text, []).append(name)
    dense = next(iter(names), "")
    parts = [(tuple(own), text, common_prefix(dense, text)) for text, own in names.items()]
    return tuple(Answer(own, text[:shared], text[shared:]) for own, text, shared in parts)
