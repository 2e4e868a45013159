"""The cells that the summary shows: the baseline, and the best by each aim, from lower bounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compose.analysis.metrics import METRICS, gain
from compose.analysis.pick import fastest_that_keeps, retained_bound
from compose.analysis.verdicts import KEEP
from compose.numbers import DASH, PAGE, THIN, TIMES, bytes_text, three_decimals
from compose.table import Tone
from reports.load import Report, Row
from reports.tables.columns import gain_note, sure_tone

NO_EVIDENCE = "no evidence"


def _whole_percent(share: float) -> str:
    return PAGE.whole(100 * share)


_KEEPS = f"{_whole_percent(KEEP)}{THIN}%"
Fact = tuple[str, str, Tone | None]


@dataclass(frozen=True)
class Best:
    """A card: its aim, its cell, the figure in large, and facts below it. Without a cell, why."""

    aim: str
    row: Row | None
    figure: str = DASH
    unit: str = ""
    facts: tuple[Fact, ...] = ()
    note: str = ""


def summary(report: Report) -> tuple[Best, ...]:
    """The dense model and the winners. Other engines do not compete: they cannot be exported."""
    ours = [row for row in report.rows if row.cell.peer is None]
    lossless = [r for r in ours if r.cell.lossless_check and r.cell.lossless_check.lossless]
    return (
        _dense(report),
        _fastest_that_keeps(report, ours),
        _smallest(report, ours),
        _winner(
            report,
            "Fastest lossless speculation",
            _top(lossless, "decode"),
            note="" if lossless else "No speculative cell was seen to be lossless.",
        ),
    )


def keeps(report: Report, row: Row) -> bool | None:
    """Whether the least that a cell retains reaches `KEEP`; None where that is not known."""
    bound = retained_bound(report.results, row.cell)
    return None if bound is None else bound >= KEEP


def _dense(report: Report) -> Best:
    row = report.baseline
    if row is None:
        return Best("Dense model", None, note="The baseline was not measured.")
    speed = row.get("decode")
    facts: list[Fact] = _facts(
        ("Size", row.get("size"), bytes_text),
        ("Prefill", row.get("prefill"), lambda value: f"{PAGE.number(value)} tok/s"),
        ("Mean task score", row.get("accuracy"), PAGE.percent),
        ("Perplexity", row.get("perplexity"), PAGE.number),
    )
    figure = DASH if speed is None else PAGE.number(speed)
    return Best("Dense model", row, figure, "tokens/s, decode", tuple(facts))


def _fastest_that_keeps(report: Report, ours: Sequence[Row]) -> Best:
    aim = f"Fastest that keeps {_KEEPS}"
    if all(keeps(report, row) is None for row in ours if not row.is_baseline):
        note = "What other cells keep is not known: too few questions, or none, were asked."
        return Best(aim, None, NO_EVIDENCE, note=note)
    cell = fastest_that_keeps(report.results, KEEP)
    row = next((row for row in ours if row.cell is cell), None)
    if row is None or row.is_baseline:
        note = f"No cell faster than the dense model keeps {_KEEPS} at its lower bound."
        return Best(aim, None, "none", note=note)
    return _winner(report, aim, row)


def _smallest(report: Report, ours: Sequence[Row]) -> Best:
    row = _top(ours, "size")
    if row is None:
        return Best("Smallest", None, note="No size was measured.")
    sure = _top([candidate for candidate in ours if keeps(report, candidate)], "size")
    note = ""
    if sure is None or sure.is_baseline:
        note = f"Whether any smaller cell keeps {_KEEPS}: {NO_EVIDENCE}."
    elif sure != row:
        note = f"Smallest that keeps {_KEEPS}: {sure.cell.name}, {bytes_text(sure.values['size'])}"
    smaller = None if row.is_baseline else gain(report.results, "size", row.cell)
    unit = "on disk" if smaller is None else f"{PAGE.times(smaller)} of dense"
    facts = _facts(("Decode", row.get("decode"), lambda value: f"{PAGE.number(value)} tok/s"))
    facts += _quality_facts(report, row)
    return Best("Smallest", row, bytes_text(row.values["size"]), unit, tuple(facts), note)


def _winner(report: Report, aim: str, row: Row | None, note: str = "") -> Best:
    if row is None:
        return Best(aim, None, note=note)
    speed = row.get("decode")
    figure = DASH if speed is None else PAGE.number(speed)
    against = gain_note(report, row, "decode")
    unit = "tokens/s, decode" + (f", {against} of dense" if against.startswith(TIMES) else "")
    if against and not against.startswith(TIMES):
        unit += f", {against} to dense"
    facts = _facts(("Size", row.get("size"), bytes_text)) + _quality_facts(report, row)
    record = row.cell.speculation
    if record is not None and record.speedup is not None:
        facts.append(("Over plain", PAGE.ratio(record.speedup, record.speedup_ci95), None))
    return Best(aim, row, figure, unit, tuple(facts), note)


def _quality_facts(report: Report, row: Row) -> list[Fact]:
    facts: list[Fact] = []
    retained = row.get("retained")
    if retained is not None and not row.is_baseline:
        ends = report.interval(row, "retained")
        bounded = retained_bound(report.results, row.cell) is not None and ends is not None
        within = PAGE.span(*ends, _whole_percent) if bounded and ends else NO_EVIDENCE
        facts.append(
            ("Keeps", f"{PAGE.percent(retained)} ({within})", sure_tone(report, row, "retained"))
        )
    return facts + _facts(
        ("Perplexity", row.get("perplexity-ratio"), lambda value: f"{TIMES}{three_decimals(value)}")
    )


def _facts(*shown: tuple[str, float | None, Callable[[float], str]]) -> list[Fact]:
    return [(label, show(value), None) for label, value, show in shown if value is not None]


def _top(rows: Sequence[Row], metric: str) -> Row | None:
    """The best row by `metric`; ties are broken by quality retained, then by speed."""

    def rank(row: Row) -> tuple[float, float, float]:
        first = METRICS[metric].rank(row.values[metric])
        return first, row.get("retained") or 0.0, row.get("decode") or 0.0

    return max((row for row in rows if metric in row.values), key=rank, default=None)
