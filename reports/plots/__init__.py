"""Pictures of a run: fronts, skipping curves, every repeat, training curves, gates.

Each is drawn wide and narrow as SVG for the page, which colours it, and once as SVG and PNG file.
Colour tells how weights are stored, shape how the cell decodes or that it is another engine, and a
number in each mark is the cell's number in the tables, so that nothing depends on colour alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from reports.load import Report
from reports.plots.canvas import Picture, PictureSpec, dark_png, render
from reports.plots.curves import curves
from reports.plots.gates import gates
from reports.plots.lines import repeats, training
from reports.plots.tradeoffs import front

__all__ = ["Picture", "dark_pngs", "pictures"]


def pictures(report: Report) -> dict[str, Picture]:
    """Every picture that the results have numbers for, by key."""
    return {key: render(spec) for key, spec in _specs(report).items()}


def dark_pngs(report: Report, keys: Iterable[str]) -> dict[str, bytes]:
    """The pictures of these keys as PNG files for a dark page."""
    return {key: dark_png(spec) for key, spec in _specs(report).items() if key in set(keys)}


def _specs(report: Report) -> dict[str, PictureSpec]:
    specs = (
        front(report, "decode"),
        front(report, "size"),
        front(report, "saved"),
        curves(report),
        repeats(report),
        training(report),
        gates(report),
    )
    return {spec.key: spec for spec in specs if spec is not None}
