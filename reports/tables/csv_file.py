"""report.csv: one row a cell, every number of it unrounded, for spreadsheets and scripts."""

from __future__ import annotations

import csv
import io
from typing import Any

from compose.analysis.families import family_of, weights_of
from compose.analysis.metrics import METRICS
from compose.results.parts import Speculation, TextCompute
from compose.results.schema import CellResult
from compose.units import printable
from reports.load import Report, Row

WITH_INTERVALS = ("decode-ratio", "retained", "perplexity-ratio", "kl")
"""Metrics whose interval has its columns even where no cell has one."""
TIMED: tuple[str, ...] = ("plain_steps", "fell_back", "looked_up_share")


def to_csv(report: Report) -> str:
    """The table, a line a cell: those measured in the report's order, then failed and left out.

    Shares and ratios are fractions, sizes bytes, speeds tokens a second, times seconds. What was
    not measured is empty.
    """
    records = [_measured(report, row) for row in report.rows]
    records += [
        _identity(cell) for cell in report.results.cells if cell.status in ("failed", "left-out")
    ]
    heads = list(dict.fromkeys(name for record in records for name in record))
    out = io.StringIO()
    writer = csv.DictWriter(out, heads, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _text(value) for name, value in record.items()} for record in records)
    return out.getvalue()


def _identity(cell: CellResult) -> dict[str, Any]:
    return {
        "number": None,
        "cell": cell.name,
        "status": cell.status,
        "family": family_of(cell),
        "quantizer": weights_of(cell),
        "verdict": None if cell.verdict is None else cell.verdict.verdict,
        "why": cell.reason if cell.verdict is None else cell.verdict.why,
    }


def _measured(report: Report, row: Row) -> dict[str, Any]:
    cell = row.cell
    record = _identity(cell) | {"number": row.number} | {name: row.get(name) for name in METRICS}
    for name in METRICS:
        ends = report.interval(row, name)
        if name in WITH_INTERVALS or ends is not None:
            low, high = ends or (None, None)
            record |= {f"{name}-low": low, f"{name}-high": high}
    own_speculation = cell.speculation or Speculation()
    record |= {name.replace("_", "-"): getattr(own_speculation, name) for name in TIMED}
    check = cell.lossless_check
    record["lossless"] = None if check is None else check.lossless
    quality = report.results.quality(cell)
    for task in report.tasks:
        score = None if quality is None else (quality.tasks or {}).get(task)
        low, high = (None, None) if score is None or score.ci95 is None else score.ci95
        record |= {task: None if score is None else score.value}
        record |= {f"{task}-low": low, f"{task}-high": high}
        record |= {f"{task}-n": None if score is None else score.n}
        record |= _spent(task, None if score is None else score.compute)
    answers = None if quality is None else quality.own_answers
    return record | _spent("own-answers", None if answers is None else answers.compute)


def _spent(name: str, compute: TextCompute | None) -> dict[str, float]:
    """What was saved and kept on text that was scored; nothing where nothing skipped."""
    if compute is None:
        return {}
    phases = {"prompt": compute.prompt, "answer": compute.answer}
    shares = {phase: use.kept for phase, use in phases.items() if use is not None}
    return {f"{name}-saved": compute.saved_net, f"{name}-kept": compute.kept} | {
        f"{name}-{phase}-kept": share for phase, share in shares.items()
    }


def _text(value: Any) -> Any:
    """A value as it is written; a name that a spreadsheet would compute is set in quotes."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
