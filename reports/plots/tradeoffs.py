"""Trade-off pictures: Pareto fronts, and quality kept against compute saved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from compose.results.metrics import retained_basis
from reports.load import KEEPS, Report, Row
from reports.plots.canvas import Frame, PictureSpec
from reports.plots.scatter import (
    better_corner,
    colours_of,
    draw_marks,
    legend,
    pad_x_axis,
    quality_axis,
    scale_of,
    write_names,
)

_NB = "\u00a0"


def front(report: Report, metric: str) -> PictureSpec | None:
    """Quality against `decode` speed or `size`, with the Pareto front through the cells."""
    quality = report.quality_axis
    rows = [row for row in report.rows if {metric, quality} <= row.values.keys()]
    if quality is None or len(rows) < 2:
        return None
    front = report.front(metric)
    scale = scale_of(quality, rows, front)
    against = {"decode": "decode speed", "size": "size on disk"}[metric]
    names = ", ".join(f"{row.number}{_NB}{row.cell.name}" for row in front)
    caption = f"On the front: {names}. Marks that would coincide stand side by side."
    if any(scale.beyond(row) for row in rows):
        caption += " An arrow marks cells beyond the scale."

    def draw(figure: Figure, frame: Frame) -> None:
        axes = figure.add_subplot()
        unit = 1e6 if metric == "size" else 1.0
        points = [(row.values[metric] / unit, scale.height(row)) for row in rows]
        quality_axis(axes, quality, [y for _, y in points])
        axes.set_xlabel("size on disk, MB" if metric == "size" else "decode, tokens/s")
        _stairs(axes, frame, points, rows, front, smaller_is_better=metric == "size")
        pad_x_axis(axes, [x for x, _ in points])
        better_corner(axes, frame, left=metric == "size")
        legend(figure, frame, report, rows)
        shifts = draw_marks(axes, frame, report, rows, points, {row.number for row in front}, scale)
        named = [row for row in rows if row in front or row.is_baseline]
        write_names(axes, frame, rows, points, shifts, [] if frame.narrow else named)

    title = f"Quality against {against}"
    alt = f"{title}, {len(rows)} cells. {caption}"
    return PictureSpec(f"front-{metric}", title, alt, caption, 400, draw)


def _stairs(
    axes: Axes,
    frame: Frame,
    points: Sequence[tuple[float, float]],
    rows: Sequence[Row],
    front: Sequence[Row],
    *,
    smaller_is_better: bool,
) -> None:
    """The edge of what is reachable: steps through the front."""
    steps = sorted(point for row, point in zip(rows, points, strict=True) if row in front)
    style: Any = "steps-post" if smaller_is_better else "steps-pre"
    xs, ys = [x for x, _ in steps], [y for _, y in steps]
    axes.plot(xs, ys, drawstyle=style, color=frame.theme.muted, lw=1.2, alpha=0.7, zorder=1)


def accuracy(report: Report) -> PictureSpec | None:
    """Quality kept against compute saved; speculation is left out, for it saves time, not work."""
    rows = [row for row in report.rows if row.decode != "speculate" and "saved" in row.values]
    metric = next(
        (m for m in ("retained", "agreement") if sum(m in row.values for row in rows) > 1), None
    )
    rows = [row for row in rows if metric in row.values]
    if metric is None or len({row.values["saved"] for row in rows}) < 2:
        return None
    what = "Accuracy" if retained_basis(report.results) == "tasks" else "Quality"
    title = f"{what} against compute saved"
    caption = "Share of the dense model's quality that is kept, over net multiply-adds saved."
    if any(row.decode == "skip" for row in rows):
        caption += " Lines join a cell to the same weights without skipping."
    if any(_half_width(report, row) for row in rows):
        caption += " Whiskers: 95\u202f% intervals, from the number of questions."
    scale = scale_of(metric, rows, rows)

    def draw(figure: Figure, frame: Frame) -> None:
        axes = figure.add_subplot()
        points = [(100 * row.values["saved"], scale.height(row)) for row in rows]
        half_widths = [100 * _half_width(report, row) for row in rows]
        ends = [y - half for (_, y), half in zip(points, half_widths, strict=True)]
        quality_axis(axes, metric, [*(y for _, y in points), *ends, 100.0])
        pad_x_axis(axes, [x for x, _ in points])
        axes.set_xlabel("compute saved, net, %")
        axes.axhline(100 * KEEPS, color=frame.theme.muted, lw=1, ls=(0, (4, 3)), zorder=1)
        colours = colours_of(report, frame.theme)
        places = {row.cell.name: point for row, point in zip(rows, points, strict=True)}
        for row, (x, y), half in zip(rows, points, half_widths, strict=True):
            colour = colours[row.weights]
            if half and not scale.beyond(row):
                axes.plot([x, x], [y - half, y + half], color=colour, lw=1, alpha=0.45)
            if row.decode == "skip" and row.cell.plain in places:
                plain = places[row.cell.plain]
                axes.plot([plain[0], x], [plain[1], y], color=colour, lw=1.2, alpha=0.8)
        better_corner(axes, frame, left=False)
        legend(figure, frame, report, rows)
        draw_marks(axes, frame, report, rows, points, {row.number for row in rows}, scale)

    return PictureSpec("accuracy", title, f"{title}, {len(rows)} cells.", caption, 400, draw)


def _half_width(report: Report, row: Row) -> float:
    """Half of the 95 % interval of `retained`, the tasks taken as independent; 0 when unknown."""
    quality, baseline = report.results.quality(row.cell), report.baseline
    dense = None if baseline is None else report.results.quality(baseline.cell)
    if quality is None or dense is None or retained_basis(report.results) != "tasks":
        return 0.0
    widths = []
    for task, score in (quality.tasks or {}).items():
        theirs = (dense.tasks or {}).get(task)
        if score.ci95 is None or theirs is None or not theirs.value:
            return 0.0
        widths.append((score.ci95[1] - score.ci95[0]) / 2 / theirs.value)
    return math.hypot(*widths) / len(widths) if widths else 0.0
