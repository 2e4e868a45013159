"""The verdicts that a run and a pick end with in the terminal.

The results here are test data, made in code; no number in them was measured.
"""

from __future__ import annotations

import io

from rich.console import Console

from compose.results.schema import Results
from compose.terminal.show import cell_json, cell_text, verdict_table


def made_up() -> Results:
    ratio = {"value": 1.5, "low": 1.4, "high": 1.6, "n": 5, "different": True}
    nf4 = {
        "verdict": {"verdict": "ACCEPT", "why": "It keeps [enough]."},
        "speed": {"decode_tokens_per_s": {"median": 30.0}, "decode_ratio": ratio},
    }
    rows = [{"name": "dense"}, {"name": "nf4", **nf4}, {"name": "lost", "status": "failed"}]
    cells = [{"chain": [], "status": "ok", **row} for row in rows]
    return Results.model_validate({"run": "test", "cells": cells})


def shown(what: object) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(what)
    return console.export_text()


def test_a_run_ends_with_a_line_a_cell() -> None:
    lines = shown(verdict_table(made_up().cells)).splitlines()
    assert lines[0].strip() == "Verdicts"
    assert [line.split()[:2] for line in lines[2:]] == [["nf4", "ACCEPT"]]
    assert "It keeps [enough]." in lines[2], "brackets are no markup"


def test_a_picked_cell_shows_intervals_and_its_verdict() -> None:
    results = made_up()
    text = shown(cell_text(results, results.cell("nf4")))
    assert "1.4 to 1.6" in text
    assert "ACCEPT: It keeps [enough]." in text
    told = cell_json(results, results.cell("nf4"))
    assert told["ci95"] == {"decode-ratio": (1.4, 1.6)}
    assert told["cell"]["verdict"]["verdict"] == "ACCEPT"
