"""Write a run's report: HTML, Markdown, CSV, and its pictures as SVG and PNG beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compose.store import new_file
from reports import html, plots
from reports.facts import PICTURES, facts_of
from reports.load import Report, read
from reports.tables import markdown
from reports.tables.csv_file import to_csv
from reports.templating import environment


@dataclass(frozen=True)
class Rendered:
    """Where the report was written."""

    html: Path
    markdown: Path
    csv: Path


def render(results_path: str | Path, out_dir: str | Path) -> Rendered:
    """Read results and write `report.html`, `.md`, `.csv` and `report-files/` into `out_dir`.

    `results_path` is a results.json or a run's folder. Files of an earlier report are replaced.
    JSON with the same numbers is results.json itself.

    Raises:
        UserError: the results cannot be read.
    """
    report, out = read(results_path), Path(out_dir)
    drawn = plots.pictures(report)
    _write_pictures(drawn, out / PICTURES)
    done = Rendered(out / "report.html", out / "report.md", out / "report.csv")
    write(done.html, to_html(report, drawn))
    write(done.markdown, to_markdown(report, drawn))
    write(done.csv, to_csv(report))
    return done


def to_html(report: Report, drawn: dict[str, plots.Picture]) -> str:
    """The whole page."""
    return html.page("report.html.j2", facts_of(report, drawn))


def to_markdown(report: Report, drawn: dict[str, plots.Picture]) -> str:
    """The same report in Markdown; its pictures lie in `report-files/`."""
    return markdown_of("report.md.j2", facts_of(report, drawn))


def markdown_of(template: str, facts: Mapping[str, Any]) -> str:
    """The Markdown that a template makes of `facts`."""
    jinja = environment(autoescape=False)
    jinja.finalize = markdown.escaped_unless_raw
    jinja.filters |= {
        "cells": markdown.cells_markdown,
        "table": markdown.markdown_table,
        "fenced": markdown.fenced,
        "bars": markdown.bars,
        "raw": markdown.Raw,
    }
    text = jinja.get_template(template).render(facts)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def write(path: Path, text: str | bytes) -> None:
    """Write a file in one move: a reader meets the old one or the new one, whole."""
    data = text.encode("utf-8") if isinstance(text, str) else text
    with new_file(path) as file:
        file.write_bytes(data)


def _write_pictures(drawn: Mapping[str, plots.Picture], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.png"), *folder.glob("*.svg")):
        if old.stem not in drawn:
            old.unlink()
    for key, picture in drawn.items():
        write(folder / f"{key}.png", picture.png)
        write(folder / f"{key}.svg", picture.svg)
