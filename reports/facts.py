"""What the templates of a run's report are given."""

from __future__ import annotations

from typing import Any

from compose.analysis.metrics import retained_basis
from compose.analysis.verdicts import TONES
from compose.numbers import duration_text
from compose.table import Table
from reports import plots
from reports.answers import answers
from reports.closing import GLOSSARY, next_commands
from reports.load import Report, Row
from reports.summary import original, summary
from reports.tables import cells, columns, run_tables, verdicts
from reports.tables.speculation import timed_histogram
from reports.text import day

PICTURES = "report-files"


def facts_of(report: Report, drawn: dict[str, plots.Picture]) -> dict[str, Any]:
    """Tables, pictures and sentences of a report, by the names that the templates use."""
    results = report.results
    shown = tables_of(report)
    return {
        "report": report,
        "results": results,
        "subtitle": subtitle(report),
        "counts": counts(report),
        "verdict_counts": verdicts.counts(report),
        "verdict_tones": TONES,
        "best": summary(report),
        "original": original(report),
        "choices": choices(report),
        "tables": shown,
        "columns": {c.label: c.help for table in shown.values() for c in table.columns if c.help},
        "histograms": [(row, h) for row in report.rows if (h := timed_histogram(row)).bars],
        "answers": answers(report),
        "insight": run_tables.insight(report),
        "contamination": run_tables.contamination(report),
        "noise_floor": run_tables.noise_floor(report),
        "curves": run_tables.curves(report),
        "peers": run_tables.peers(report),
        "stages": run_tables.stages(report),
        "fingerprints": run_tables.fingerprints(report),
        "pictures": drawn,
        "folder": PICTURES,
        "environment": run_tables.environment(results.environment),
        "notes": notes(report),
        "glossary": GLOSSARY,
        "next": next_commands(report),
        "commands": "\n".join(f"{line}  # {use}" for line, use in next_commands(report)),
        "retained_basis": retained_basis(results),
        "retained_help": columns.retained_help(report),
    }


def tables_of(report: Report) -> dict[str, Table[Row]]:
    """Every table of cells, by its section."""
    return {
        "cells": cells.overview(report),
        "verdicts": cells.verdicts(report),
        "quality": cells.quality(report),
        "seeds": cells.seeds(report),
        "speed": cells.speed(report),
        "memory": cells.memory(report),
        "speculation": cells.speculation(report),
        "lossless": cells.lossless(report),
        "arithmetic": cells.arithmetic(report),
    }


def counts(report: Report) -> str:
    """How many variants were measured, failed and left out."""
    left_out = sum(len(group.cells) for group in report.left_out)
    noun = "variant" if len(report.rows) == 1 else "variants"
    parts = [f"{len(report.rows)} {noun} measured"]
    parts += [f"{len(report.failed)} failed"] if report.failed else []
    parts += [f"{left_out} left out"] if left_out else []
    return ", ".join(parts)


def subtitle(report: Report) -> list[str]:
    """Model, number format, processor, threads, date: what the numbers belong to."""
    results, env = report.results, report.results.environment
    threads, commit = env.get("threads"), env.get("git_commit")
    parts = [
        results.model,
        results.dtype,
        env.get("accelerator") or env.get("processor"),
        None if threads is None else f"{threads} thread{'' if threads == 1 else 's'}",
        f"commit {commit[:10]}" if isinstance(commit, str) else None,
        day(env.get("date")),
        None if results.seconds is None else f"took {duration_text(results.seconds)}",
    ]
    return [str(part) for part in parts if part]


def choices(report: Report) -> dict[str, list[str]]:
    """What the cells may be filtered by: verdicts, families, quantizers, in the order met."""
    rows = report.rows
    return {
        "verdict": [verdict for verdict, _ in verdicts.counts(report)],
        "family": list(dict.fromkeys(row.family for row in rows)),
        "quantizer": list(dict.fromkeys(row.weights for row in rows)),
    }


def notes(report: Report) -> dict[str, str]:
    """Note -> the variants that bear it, in words: nothing for a note of the whole run."""
    by_note: dict[str, list[str]] = {}
    for cell in report.results.cells:
        for note in cell.notes or ():
            by_note.setdefault(note, []).append(cell.name)
    every = len(report.rows)
    names = {n: "all variants" if len(c) == every else ", ".join(c) for n, c in by_note.items()}
    return dict.fromkeys(report.results.notes or (), "") | names
