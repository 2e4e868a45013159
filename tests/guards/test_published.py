"""Every number of README and docs/performance.md has its committed results file.

`reports.documents` makes tables and figures between markers from files of reports/published; this
file holds the documents to it. `make figures` puts right what is out of date.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compose.cli import app
from compose.results.io import load_results
from reports.documents.markers import DOCUMENTS, PUBLISHED, ROOT, fill, markers, outside, unfinished
from reports.documents.provenance import missing_provenance
from reports.documents.publish import linked_pictures, publish
from reports.load import read
from reports.render import to_html, to_markdown
from reports.tables.csv_file import to_csv
from reports.tables.markdown import escape_markdown

RUNS = sorted(file.parent for file in (ROOT / PUBLISHED).glob("*/results.json"))
SMALLEST = min(RUNS, key=lambda run: (run / "results.json").stat().st_size)
MOST_FILES, MOST_BYTES = 60, 5_000_000
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


def kept_files() -> set[Path]:
    """What git keeps of reports/published: not the pages that `gateskip report` made there."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--", str(PUBLISHED)]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return {ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()}


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
def test_a_published_folder_is_read_like_a_run(run: Path) -> None:
    picked = CliRunner().invoke(app, ["pick", str(run), "--json"])
    assert picked.exit_code == 0, picked.output
    report = read(run)
    page, text, table = to_html(report, {}), to_markdown(report, {}), to_csv(report)
    for row in report.rows:
        assert row.cell.name in page and escape_markdown(row.cell.name) in text
        assert row.cell.name in table


def test_the_pages_of_a_published_run_are_drawn_again(tmp_path: Path) -> None:
    run = Path(shutil.copytree(SMALLEST, tmp_path / "run"))
    drawn = CliRunner().invoke(app, ["report", str(run)])
    assert drawn.exit_code == 0, drawn.output
    assert {"report.html", "report.md", "report.csv"} <= {file.name for file in run.iterdir()}
    assert list((run / "report-files").glob("*.svg"))


def test_what_is_published_is_small() -> None:
    files = kept_files()
    assert len(files) <= MOST_FILES
    assert sum(file.stat().st_size for file in files) <= MOST_BYTES


def test_only_what_nothing_else_makes_is_published() -> None:
    shown, files = linked_pictures(), kept_files()
    assert shown <= files
    others = {file for file in files - shown if file.suffix != ".json" and file.name != "report.md"}
    assert not others, "made by `gateskip report`"


def test_publishing_a_published_run_again_changes_nothing(tmp_path: Path) -> None:
    run = SMALLEST
    again = publish(run, run.name, tmp_path)
    results, text = (again / "results.json").read_text("utf-8"), (run / "results.json")
    assert results == text.read_text("utf-8") and results.count("\n") == 1
    assert sorted(file.name for file in again.rglob("*")) == ["report.md", "results.json"]
    (tmp_path / "README.md").write_text(
        f"![]({PUBLISHED}/{run.name}/report-files/repeats.png)", "utf-8"
    )
    publish(run, run.name, tmp_path)
    assert (again / "report-files" / "repeats.png").is_file()
    assert "report-files/repeats.png" in (again / "report.md").read_text("utf-8")


def test_markers_name_published_runs() -> None:
    named = {marker.run for d in DOCUMENTS for marker in markers((ROOT / d).read_text("utf-8"))}
    assert named <= {run.name for run in RUNS}
