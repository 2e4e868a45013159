"""Trade-off pictures: fronts of quality against decode speed, size and compute saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from compose.numbers import PAGE, THIN, TIMES, three_decimals
from reports.load import Report, Row
from reports.plots.canvas import Frame, PictureSpec
from reports.plots.marks import CROWD, draw_marks
from reports.plots.names import write_names
from reports.plots.scatter import (
    EDGE,
    better_corner,
    colour_of,
    legend,
    pad_x_axis,
    quality_axis,
    scale_of,
)
from reports.plots.spread import XAxis, x_axis

_NB = "\u00a0"
MANY, ROOM = 20, 0.31  # from so many cells on, names have so much more room on the left
NAMED_MOST = 8  # more names than this on a front, and the caption counts them instead


def front(report: Report, metric: str) -> PictureSpec | None:
    """Quality against `decode` speed, `size` or compute `saved`, with the front through the cells.

    Whiskers on both axes are 95 % intervals, where the results have them.
    """
    quality = report.quality_axis
    rows = [row for row in report.rows if {metric, quality} <= row.values.keys()]
    if quality is None or len({row.values[metric] for row in rows}) < 2:
        return None
    front = report.front(metric)
    scale, xs = scale_of(report, quality, rows, front), x_axis(report, rows, metric)
    beyond = {row.number: words for row in rows if (words := scale.beyond(row))}
    many = len(rows) >= MANY  # names need more room

    def draw(figure: Figure, frame: Frame) -> None:
        axes = figure.add_subplot()
        points = [(xs.at(row), scale.height(row)) for row in rows]
        across = [end for row in rows for end in xs.ends(row) or ()]
        up = [end for row in rows for end in scale.ends(row) or ()]
        quality_axis(axes, quality, [*(y for _, y in points), *up])
        axes.set_xlabel(xs.label)
        _stairs(axes, frame, points, rows, front, smaller_is_better=xs.smaller_is_better)
        pad_x_axis(axes, [*(x for x, _ in points), *across], left=ROOM if many else EDGE)
        better_corner(axes, frame, left=xs.smaller_is_better)
        legend(figure, frame, report, rows)
        colours = {row.number: colour_of(report, row, frame.theme) for row in rows}
        inks = [colours[row.number] for row in rows]
        _whiskers(axes, inks, points, [xs.ends(r) for r in rows], [scale.ends(r) for r in rows])
        strong = {row.number for row in front}
        shifts = draw_marks(axes, frame, rows, points, colours, strong)
        named = rows
        if len(rows) >= CROWD:
            named = [row for row in rows if row in front or row.is_baseline or row.cell.peer]
        write_names(axes, frame, rows, points, shifts, named, beyond)

    whiskers = any(xs.ends(row) or scale.ends(row) for row in rows)
    caption = _caption(rows, front, whiskers=whiskers, beyond=bool(beyond))
    alt = f"{xs.title}, {len(rows)} variants. {caption}"
    marks = {row.number: (row.cell.name, _says(report, row, xs, quality)) for row in rows}
    height = 520 if many else 440
    return PictureSpec(f"front-{metric}", xs.title, alt, caption, height, draw, marks)


def _caption(rows: Sequence[Row], front: Sequence[Row], *, whiskers: bool, beyond: bool) -> str:
    names = ", ".join(f"{row.number}{_NB}{row.cell.name}" for row in front[:NAMED_MOST])
    more = len(front) - NAMED_MOST
    parts = [f"Best trade-offs: {names}{f' and {more} more' if more > 0 else ''}."]
    if whiskers:
        parts.append(
            f"Whiskers are 95{THIN}% intervals: variants whose whiskers overlap may not differ."
        )
    if any(row.cell.peer for row in rows):
        parts.append("Pentagons are other engines.")
    if beyond:
        parts.append("An arrow marks variants beyond the scale.")
    return " ".join(parts)


def _says(report: Report, row: Row, xs: XAxis, quality: str) -> str:
    """What a mark says when it is pointed at."""
    show = {"perplexity-ratio": three_decimals, "kl": PAGE.number}.get(quality, PAGE.share)
    words = {
        "perplexity-ratio": f"perplexity {TIMES}",
        "kl": "KL ",
        "retained": "keeps % ",
        "agreement": "agrees % ",
    }
    ends = report.interval(row, quality)
    spread = "" if ends is None else f" ({show(ends[0])}–{show(ends[1])})"
    size = "" if row.get("size") is None else f", {PAGE.megabytes(row.values['size'])} MB"
    return (
        f"{row.number} {row.cell.name}: {xs.says(row)}{size if xs.metric != 'size' else ''}, "
        f"{words[quality]}{show(row.values[quality])}{spread}"
    )


def _whiskers(
    axes: Axes,
    colours: Sequence[str],
    points: Sequence[tuple[float, float]],
    across: Sequence[tuple[float, float] | None],
    up: Sequence[tuple[float, float] | None],
) -> None:
    """Interval lines through the marks, as one artist: a hundred of them slow the drawing."""
    lines, inks = [], []
    for (x, y), colour, ends, heights in zip(points, colours, across, up, strict=True):
        if ends is not None:
            lines.append([(ends[0], y), (ends[1], y)])
            inks.append(colour)
        if heights is not None:
            lines.append([(x, heights[0]), (x, heights[1])])
            inks.append(colour)
    drawn = LineCollection(lines, colors=inks, linewidths=1.1, alpha=0.55, zorder=1.5)
    axes.add_collection(drawn, autolim=False)


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
