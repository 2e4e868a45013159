"""Pictures of a run: fronts, accuracy against compute saved, every repeat, training curves, gates.

Each is drawn light and dark, wide and narrow, as SVG for the page, and once as PNG for Markdown.
Colour tells how weights are stored, shape how the cell decodes, and a number in each mark is the
cell's number in the tables, so that nothing depends on colour alone.
"""

from __future__ import annotations

from reports.load import Report
from reports.plots.canvas import Picture, render
from reports.plots.gates import gates
from reports.plots.lines import repeats, training
from reports.plots.tradeoffs import accuracy, front

__all__ = ["Picture", "pictures"]


def pictures(report: Report) -> dict[str, Picture]:
    """Every picture that the results have numbers for, by key."""
    specs = (
        front(report, "decode"),
        front(report, "size"),
        accuracy(report),
        repeats(report),
        training(report),
        gates(report),
    )
    return {spec.key: render(spec) for spec in specs if spec is not None}
