"""Every number of README and docs/performance.md has its committed results file, and none is old.

`reports.documents` makes tables and figures between markers from files of reports/published; this
file holds the documents to it. `make figures` puts right what is out of date.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from compose.results.io import load_results
from reports.documents.markers import DOCUMENTS, PUBLISHED, ROOT, fill, markers, outside, unfinished
from reports.documents.provenance import (
    MOST_COMMITS,
    commits_since,
    is_shallow,
    missing_provenance,
)

RUNS = sorted(file.parent for file in (ROOT / PUBLISHED).glob("*/results.json"))
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
NUMBER = r"[*±~−-]{0,3}\d[\d.,]*"
CELL = re.compile(rf"{NUMBER}\s*(?:x|%|MB|GB|ms|s)?\**(?:\s*\(.*\))?")
"""A cell of a table that is a number, with or without unit and interval."""

CLAIM = re.compile(
    rf"(?<![\w.`-]){NUMBER}(?:\s(?:to|and)\s{NUMBER})?\s?"
    r"(?:x\b|times\b|tok/s|tokens/s|tokens a second|GB/s|GFLOP/s|TFLOP/s|ms\b|%|points\b|percent\b)"
)
"""A measured number in a sentence."""

NOT_MEASURED = re.compile(r"\b95 %")
"""The level of an interval, or a bound that a user sets, is no measurement."""


def numeric_tables(text: str) -> Iterator[str]:
    """First lines of the Markdown tables that have a cell with nothing but a number."""
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        first, *rows = block.splitlines()
        cells = [cell.strip() for row in rows for cell in row.strip("|").split("|")]
        if any(CELL.fullmatch(cell) for cell in cells):
            yield first


def claims(text: str) -> list[str]:
    """Measured numbers in sentences, outside of tables, code and links' targets."""
    prose = re.sub(r"^\|.*$", "", text, flags=re.MULTILINE)
    prose = re.sub(r"`[^`]*`|\]\([^)]*\)", "", prose)
    return [match[0] for match in CLAIM.finditer(NOT_MEASURED.sub("", prose))]


def written(document: Path) -> str:
    """What a person wrote in a document: without generated text and code."""
    return FENCE.sub("", outside((ROOT / document).read_text("utf-8")))


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_generated_text_is_what_the_results_give(document: Path) -> None:
    text = (ROOT / document).read_text("utf-8")
    assert not unfinished(text)
    assert fill(text, document) == text, "out of date: make figures"


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_no_number_without_a_results_file(document: Path) -> None:
    text = written(document)
    assert not list(numeric_tables(text)), "put it between markers: reports/documents/markers.py"
    assert not claims(text), "write it as <!-- figure: RUN CELL PATH --><!-- end -->"


def test_what_the_guard_sees() -> None:
    """Numbers that were in README before, and words that are none."""
    table = "| | perplexity |\n|---|---|\n| nf4 | **1.27** |\n"
    assert list(numeric_tables(table)) == ["| | perplexity |"]
    assert list(numeric_tables("| a | b |\n|---|---|\n| x | 441 (401 to 467) |\n"))
    assert not list(numeric_tables("| a | b |\n|---|---|\n| `gptq` | 2, 3, 4 or 8 bits |\n"))
    assert claims("decodes 1.7 to 2.0 times as fast, at 96 % of their mean") == [
        "1.7 to 2.0 times",
        "96 %",
    ]
    assert not claims("an interval of 95 %; weights of 4 and 8 bits; arXiv 2510.13876; `0.8 x`")
    generated = "<!-- figure: a b c -->1.49x<!-- end -->"
    assert not claims(outside(f"decodes {generated} as fast"))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_published_result_says_where_it_comes_from(run: Path) -> None:
    results = load_results(run)  # refuses every schema but today's
    assert not missing_provenance(results)
    assert not results.environment["git_commit"].endswith("-dirty"), "measured on changed sources"


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_published_result_is_not_old(run: Path) -> None:
    commit = load_results(run).environment["git_commit"]
    since = commits_since(commit, ROOT)
    if since is None:
        known = not is_shallow(ROOT)
        if known and os.environ.get("CI"):
            pytest.fail(f"commit {commit} is not in this history: measure {run.name} again")
        pytest.skip(f"git does not know commit {commit} here" + ("" if known else " (shallow)"))
    assert since <= MOST_COMMITS, f"{since} commits changed what {run.name} measured: run it again"


def test_markers_name_published_runs() -> None:
    named = {marker.run for d in DOCUMENTS for marker in markers((ROOT / d).read_text("utf-8"))}
    assert named <= {run.name for run in RUNS}
