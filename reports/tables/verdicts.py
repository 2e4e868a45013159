"""A cell's verdict in a table, and how many cells got which."""

from __future__ import annotations

from collections import Counter

from compose.analysis.verdicts import TONES
from compose.results.parts import Outcome
from compose.table import Entry
from reports.load import Report, Row

VERDICT_HELP = (
    "Verdict from 95 % intervals: ACCEPT, TRADE-OFF, REGRESSION or NO EVIDENCE. Variants without"
    " drafts are compared with the dense model. Variants with drafts are compared with the same"
    " weights without drafts."
)


def verdict_entry(report: Report, row: Row) -> Entry:
    """The verdict as a badge; sorted by name, best first."""
    verdict = row.cell.verdict
    if verdict is None:
        return Entry()
    place = list(TONES).index(verdict.verdict)
    return Entry(verdict.verdict, "", -place, tone=TONES[verdict.verdict], badge=True)


def why_entry(report: Report, row: Row) -> Entry:
    """The sentence that a verdict rests on."""
    verdict = row.cell.verdict
    return Entry() if verdict is None else Entry(verdict.why, sort=verdict.why)


def counts(report: Report) -> list[tuple[Outcome, int]]:
    """Verdict -> how many cells have it, best first, without those that none has."""
    seen = Counter(row.cell.verdict.verdict for row in report.rows if row.cell.verdict)
    return [(verdict, seen[verdict]) for verdict in TONES if seen[verdict]]
