"""Write a run's report: one HTML file that needs nothing else, and Markdown beside its pictures.

Everything that comes from the results is escaped, once, where it enters the page: names, reasons
and tracebacks are text, whatever they hold. The page's policy lets no other script run than ours.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from compose.results.metrics import gain, retained_basis
from compose.store import new_file
from compose.units import bytes_text, duration_text
from reports import columns, numbers, plots, tables
from reports.load import KEEPS, Report, Row, read

PICTURES = "report-files"


class Raw(str):
    """Markdown that is already escaped."""


@dataclass(frozen=True)
class Rendered:
    """Where the report was written."""

    html: Path
    markdown: Path


def render(results_path: str | Path, out_dir: str | Path) -> Rendered:
    """Read results and write `report.html`, `report.md` and `report-files/*.png` into `out_dir`.

    `results_path` is a results.json or a run's folder. What an earlier report left is replaced.

    Raises:
        UserError: the results cannot be read.
    """
    report, out = read(results_path), Path(out_dir)
    drawn = plots.pictures(report)
    files = out / PICTURES
    files.mkdir(parents=True, exist_ok=True)
    for old in files.glob("*.png"):
        if old.stem not in drawn:
            old.unlink()
    for key, picture in drawn.items():
        _write(files / f"{key}.png", picture.png)
    html, markdown = out / "report.html", out / "report.md"
    _write(html, to_html(report, drawn).encode("utf-8"))
    _write(markdown, to_markdown(report, drawn).encode("utf-8"))
    return Rendered(html, markdown)


def to_html(report: Report, drawn: dict[str, plots.Picture]) -> str:
    """The whole page."""
    environment = _environment(autoescape=True)
    environment.finalize = _plain_unless_markup
    environment.filters["breakable"] = breakable
    script = _asset("sort.js")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return environment.get_template("report.html.j2").render(
        _facts(report, drawn),
        style=Markup(_asset("style.css")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        signs=columns.SIGNS,
    )


def to_markdown(report: Report, drawn: dict[str, plots.Picture]) -> str:
    """The same report in Markdown; its pictures lie in `report-files/`."""
    environment = _environment(autoescape=False)
    environment.finalize = _escaped_unless_raw
    environment.filters |= {"table": markdown_table, "fenced": fenced, "bars": _bars}
    text = environment.get_template("report.md.j2").render(
        _facts(report, drawn), folder=Raw(PICTURES)
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _environment(*, autoescape: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("reports"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": numbers.number,
        "count": numbers.count,
        "percent": numbers.percent,
        "ratio": numbers.ratio,
        "times": numbers.times,
        "size": bytes_text,
        "duration": duration_text,
        "divergence": numbers.divergence,
    }
    return environment


def _facts(report: Report, drawn: dict[str, plots.Picture]) -> dict[str, Any]:
    """What both templates are given."""
    results = report.results
    shown = {
        "cells": tables.overview(report),
        "quality": tables.quality(report),
        "seeds": tables.seeds(report),
        "speed": tables.speed(report),
        "arithmetic": tables.arithmetic(report),
        "speculation": tables.speculation(report),
    }
    helps = {_heading(c): c.help for table in shown.values() for c in table.columns if c.help}
    return {
        "report": report,
        "results": results,
        "subtitle": subtitle(report),
        "counts": counts(report),
        "tables": shown,
        "columns": helps,
        "histograms": [(row, h) for row in report.rows if (h := tables.histogram(row)).bars],
        "insight": tables.insight(report),
        "contamination": tables.contamination(report),
        "pictures": drawn,
        "environment": tables.environment(results.environment),
        "notes": [(cell.name, note) for cell in results.cells for note in cell.notes or ()],
        "gain": lambda metric, row: gain(results, metric, row.cell),
        "tone": columns.tone,
        "keeps": KEEPS,
        "retained_basis": retained_basis(results),
        "retained_help": columns.retained_help(report),
    }


def counts(report: Report) -> str:
    """How many cells were measured, failed and left out."""
    left_out = sum(len(group.cells) for group in report.left_out)
    cells = "cell" if len(report.rows) == 1 else "cells"
    parts = [f"{len(report.rows)} {cells} measured"]
    parts += [f"{len(report.failed)} failed"] if report.failed else []
    parts += [f"{left_out} left out"] if left_out else []
    return ", ".join(parts)


def subtitle(report: Report) -> list[str]:
    """Model, number format, processor, threads, date: what the numbers belong to."""
    results, env = report.results, report.results.environment
    threads = env.get("threads")
    parts = [
        results.model,
        results.dtype,
        env.get("accelerator") or env.get("processor"),
        None if threads is None else f"{threads} thread{'' if threads == 1 else 's'}",
        _day(env.get("date")),
        None if results.seconds is None else f"took {duration_text(results.seconds)}",
    ]
    return [str(part) for part in parts if part]


def breakable(name: str) -> Markup:
    """A cell's name, escaped, that may break after each plus."""
    return Markup("+<wbr>").join(escape(part) for part in plain(name).split("+"))


def _plain_unless_markup(value: Any) -> Any:
    return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def plain(text: str) -> str:
    """Text without colour codes and other control characters; lines and tabs stay."""
    uncoloured = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", uncoloured)


# --- Markdown ------------------------------------------------------------------------------------


def escape_markdown(text: str) -> str:
    """Text that Markdown and the HTML inside it leave as it is, on one line."""
    text = plain(text)
    flat = " ".join(text.split()) if "\n" in text or "\r" in text else text
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~$!])", r"\\\1", flat)


def _escaped_unless_raw(value: Any) -> Any:
    return value if isinstance(value, Raw) else escape_markdown(str(value))


def fenced(text: str, language: str = "") -> Raw:
    """A code block whose fence is longer than any run of backticks in the text."""
    text = plain(text)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Raw(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def markdown_table(table: columns.Table) -> Raw:
    """A pipe table: number and name of the cell, then the columns."""
    heads = ["#", "cell", *(escape_markdown(_heading(column)) for column in table.columns)]
    lines = [_pipes(heads), _pipes(["---:", ":---", *["---:"] * len(table.columns)])]
    for row, entries in table.rows:
        lines.append(_pipes([*_identity(row), *map(_entry, entries)]))
    return Raw("\n".join(lines))


def _identity(row: Row) -> list[str]:
    name = escape_markdown(row.cell.name)
    return [str(row.number), f"**{name}**" if row.is_baseline else name]


def _entry(entry: columns.Entry) -> str:
    return escape_markdown(f"{entry.text} ({entry.note})" if entry.note else entry.text)


def _heading(column: columns.Column) -> str:
    return f"{column.head} ({column.unit})" if column.unit else column.head


def _pipes(parts: list[str]) -> str:
    return f"| {' | '.join(parts)} |"


def _bars(histogram: tables.Histogram) -> Raw:
    """A histogram in text: `length: rounds`."""
    return Raw(" · ".join(f"{n}:{numbers.THIN}{count}" for n, count, _ in histogram.bars))


# --- files ---------------------------------------------------------------------------------------


def _day(date: Any) -> str | None:
    if not isinstance(date, str):
        return None
    try:
        moment = datetime.fromisoformat(date)
    except ValueError:
        return date
    return f"{moment.day} {moment:%B %Y}"


def _asset(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8").strip()


def _write(path: Path, data: bytes) -> None:
    with new_file(path) as file:
        file.write_bytes(data)
