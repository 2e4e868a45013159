"""Single numbers in a document's sentences."""

from __future__ import annotations

from typing import Any

from compose.errors import UserError, suggest
from compose.numbers import PLAIN
from compose.results.parts import Estimate, Measured
from compose.results.schema import Results
from reports.documents.text import factor, measured

SHAPES = ("auto", "number", "percent", "points", "x", "mb", "text")
INTERVALS = {"ratio_to_baseline": "ratio_ci95", "kl_to_baseline": "kl_ci95", "value": "ci95"}
"""Fields whose interval is beside them under another name than theirs with `_ci95`."""


def figure(
    results: Results, cell: str, path: str, form: str = "auto", interval: str = "yes"
) -> str:
    """The number at a dotted path of a cell's record, or of the whole result (cell `-`).

    `form` is `number`, `x` (1.49x), `percent` (a share), `points` (the same without the sign),
    `mb` or `text`; `auto` writes an Estimate as a factor and a Measured as a number. The 95 %
    interval, or the quartiles of repeats, follow in brackets unless `interval=no`.

    Raises:
        UserError: there is nothing at that path, or `form` is unknown.
    """
    if form not in SHAPES:
        raise UserError(f"a figure has no form {form!r}: {suggest(form, SHAPES)}")
    record: Any = results if cell == "-" else results.cell(cell)
    if cell != "-" and path.startswith("quality."):
        record, path = results.quality(results.cell(cell)), path.removeprefix("quality.")
    value, ends = _at(record, path)
    if value is None:
        raise UserError(f"cell {cell!r} of {results.run} has nothing at {path!r}")
    alone = interval == "no"
    if isinstance(value, Estimate):
        if form == "auto":
            return PLAIN.times(value.value) if alone else factor(value)
        return _written(value.value, None if alone else value.ci95, form)
    if isinstance(value, Measured):
        if form == "auto":
            return PLAIN.number(value.median) if alone else measured(value)
        return _written(value.median, None if alone else value.quartiles, form)
    return _written(value, None if alone else ends, form)


def _at(record: Any, path: str) -> tuple[Any, tuple[float, float] | None]:
    """The value at a dotted path, and the interval that is stored beside it."""
    ends = None
    for name in path.split("."):
        inner = _get(record, name)
        ends = _get(record, INTERVALS.get(name, f"{name}_ci95"))
        record = inner
    return record, ends


def _get(record: Any, name: str) -> Any:
    if isinstance(record, dict):
        return record.get(name, record.get(int(name)) if name.isdigit() else None)
    return getattr(record, name, None) if name else None


def _written(value: Any, ends: tuple[float, float] | None, form: str) -> str:
    if form == "text" or not isinstance(value, int | float):
        return str(value)
    if form == "mb":
        return f"{PLAIN.whole(value / 1e6)} MB"
    if form == "percent":
        return PLAIN.percent(value, ends)
    if form == "points":
        return f"{PLAIN.share(value)}{PLAIN.within(ends, 100.0)}"
    if isinstance(value, int) and form == "auto":
        return str(value)
    text = PLAIN.times(value) if form == "x" else PLAIN.number(value)
    return f"{text}{PLAIN.within(ends)}"
