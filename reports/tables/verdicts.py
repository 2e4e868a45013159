"""A cell's verdict in a table, and how many cells got which."""

from __future__ import annotations

from collections import Counter

from compose.analysis.verdicts import TONES
from compose.results.parts import Outcome
from compose.table import Entry
from reports.load import Report, Row

VERDICT_HELP = (
    "From 95 % intervals, against the dense model: ACCEPT, TRADE-OFF, REGRESSION, or NO EVIDENCE"
    " where too little was measured to tell."
)


def verdict_entry(report: Report, row: Row) -> Entry:
    """The verdict as a badge; sorted by name, best first."""
    own = row.cell.verdict
    if own is None:
        return Entry()
    place = list(TONES).index(own.verdict)
    return Entry(own.verdict, "", -place, tone=TONES[own.verdict], badge=True)


def why_entry(report: Report, row: Row) -> Entry:
    """The sentence that a verdict rests on."""
    own = row.cell.verdict
    return Entry() if own is None else Entry(own.why, sort=own.why)


def counts(report: Report) -> list[tuple[Outcome, int]]:
    """Verdict -> how many cells have it, best first, without those that none has."""
    seen = Counter(row.cell.verdict.verdict for row in report.rows if row.cell.verdict)
    return [(verdict, seen[verdict]) for verdict in TONES if seen[verdict]]
