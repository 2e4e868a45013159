"""Runs compared: the first is what was before; each other one is compared with it.

Writes `comparison.html`, `comparison.md` and `comparison.json` with the same numbers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compose.analysis.compare import Change, Outcome, compare, regressions
from compose.numbers import DASH, PAGE, THIN, TIMES, bytes_text, three_decimals
from compose.results.schema import Results
from compose.table import Tone, text_table
from reports import html
from reports.render import markdown_of, write
from reports.text import day

TONES: dict[Outcome, Tone] = {
    "worse": "poor",
    "better": "good",
    "not comparable": "unknown",
    "no difference": "same",
}
"""Outcome -> its tone, in the order in which a reader wants them."""

HEADS = ("Variant", "Metric", "Before", "After", "Change", "Outcome", "Why")


@dataclass(frozen=True)
class Pair:
    """Two runs and what became of every number."""

    before: Results
    after: Results
    changes: tuple[Change, ...]

    @property
    def counts(self) -> list[tuple[Outcome, int]]:
        """Outcome -> how many numbers had it."""
        seen = Counter(change.outcome for change in self.changes)
        return [(outcome, seen[outcome]) for outcome in TONES if seen[outcome]]

    @property
    def regressions(self) -> tuple[Change, ...]:
        """The changes for the worse, beyond what chance explains."""
        return regressions(self.changes)


@dataclass(frozen=True)
class Compared:
    """Where a comparison was written, and its pairs."""

    html: Path
    markdown: Path
    json: Path
    pairs: tuple[Pair, ...]


def compare_runs(runs: Sequence[Results], out: Path) -> Compared:
    """Compare the first run with each other one; the files go into the folder `out`."""
    first, *others = runs
    pairs = tuple(Pair(first, other, compare(first, other)) for other in others)
    done = Compared(out / "comparison.html", out / "comparison.md", out / "comparison.json", pairs)
    facts = {
        "pairs": [_facts(pair) for pair in pairs],
        "tones": TONES,
        "before": _name(first),
        "pictures": {},
        "folder": "",
    }
    write(done.html, html.page("comparison.html.j2", facts))
    write(done.markdown, markdown_of("comparison.md.j2", facts))
    write(done.json, json.dumps([_as_json(pair) for pair in pairs], indent=1) + "\n")
    return done


def line(pair: Pair) -> str:
    """A pair in one line for the terminal."""
    words = ", ".join(f"{count} {outcome}" for outcome, count in pair.counts) or "nothing in common"
    return f"{_name(pair.before)} -> {_name(pair.after)}: {words}"


def _facts(pair: Pair) -> dict[str, Any]:
    """A pair for the templates: the telling outcomes as tables, each in the order of the cells."""
    tables = {
        outcome: text_table(HEADS, [row(c) for c in pair.changes if c.outcome == outcome])
        for outcome, _ in pair.counts
    }
    return {"after": _name(pair.after), "counts": pair.counts, "tables": tables}


def row(change: Change) -> tuple[str, ...]:
    """A change as a line of the table."""
    before, after = (_number(change, value) for value in (change.before, change.after))
    why = change.why or ("" if change.p is None else f"p {change.p:.2g}")
    return (change.cell, change.metric, before, after, _effect(change), change.outcome, why)


def in_words(change: Change) -> str:
    """A change in one line for the terminal."""
    cell, metric, before, after, effect, _, why = row(change)
    numbers = "" if change.before is None else f" {before} -> {after}, {effect}"
    return f"{cell}, {metric}:{numbers}{f' {why}' if why else ''}"


def _number(change: Change, value: float | None) -> str:
    if value is None:
        return DASH
    kind = change.metric.partition(",")[0]
    if kind in ("decode", "prefill"):
        return PAGE.times(value)
    if kind in ("size", "resident"):
        return bytes_text(value)
    return PAGE.percent(value) if kind in ("accuracy", "saved") else PAGE.number(value)


def _effect(change: Change) -> str:
    """What the second run has over the first, with its own 95 % interval."""
    effect = change.effect
    if effect is None:
        return DASH
    if change.metric == "accuracy":
        points = [100 * value for value in (effect.value, effect.low, effect.high)]
        return f"{points[0]:+.1f} ({PAGE.span(points[1], points[2], '{:+.1f}'.format)}){THIN}points"
    return f"{TIMES}{three_decimals(effect.value)} ({PAGE.span(*effect.ci95, three_decimals)})"


def _as_json(pair: Pair) -> dict[str, Any]:
    changes = []
    for change in pair.changes:
        record = {name: value for name, value in asdict(change).items() if value is not None}
        if change.effect is not None:
            record["effect"] = change.effect.model_dump(mode="json")
        changes.append(record)
    return {"before": _name(pair.before), "after": _name(pair.after), "changes": changes}


def _name(results: Results) -> str:
    """A run by its name, commit and day."""
    env = results.environment
    commit = env.get("git_commit")
    parts = [str(commit)[:10] if commit else None, day(env.get("date"))]
    details = ", ".join(part for part in parts if part)
    return f"{results.run} ({details})" if details else results.run
