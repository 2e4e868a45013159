"""Numbered marks of cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.transforms import ScaledTranslation

from compose.analysis.families import Decode
from reports.load import Row
from reports.plots.canvas import Frame
from reports.plots.svg import MARK

SHAPES: dict[Decode, str] = {"plain": "o", "skip": "s", "speculate": "D", "peer": "p"}
SIZES: dict[Decode, float] = {"plain": 11.5, "skip": 10.5, "speculate": 10.0, "peer": 13.5}
"""Points; the same area to the eye."""

CROWD = 60
"""From so many cells on, those off the front are small marks without a number."""


def draw_marks(
    axes: Axes,
    frame: Frame,
    rows: Sequence[Row],
    points: Sequence[tuple[float, float]],
    colours: Mapping[int, str],
    strong: set[int],
) -> list[float]:
    """One mark a row; those in `strong` stand in front, in full colour.

    `colours` and `beyond` (what stands beside a mark at the edge of the scale) are by row number.
    Marks that would cover each other stand side by side: how far each was moved, in points, is
    returned. Call it when the axes are set.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    crowded = len(rows) >= CROWD
    spots = axes.transData.transform(points).tolist()
    shifts = [0.0] * len(rows)
    if not crowded:
        shifts = [shift * 72 / figure.dpi for shift in apart(spots)]
    for index in sorted(range(len(rows)), key=lambda i: rows[i].number in strong):
        row, shift = rows[index], shifts[index]
        lead, colour = row.number in strong, colours[row.number]
        small = crowded and not lead
        line = axes.plot(
            *([value] for value in points[index]),
            SHAPES[row.decode],
            ms=SIZES[row.decode] * (0.45 if small else 0.92 if frame.narrow else 1),
            mfc=colour if lead else frame.theme.ground,
            mec=colour,
            mew=1.2,
            zorder=4 if lead else 2,
            clip_on=False,
            transform=axes.transData + ScaledTranslation(shift / 72, 0, figure.dpi_scale_trans),
        )
        line[0].set_gid(f"{MARK}{row.number}")
        line[0].set_in_layout(False)  # inside the axes: measuring hundreds would take seconds
        if small:
            continue
        label = axes.annotate(
            str(row.number),
            points[index],
            xytext=(shift, 0),
            textcoords="offset points",
            ha="center",
            va="center_baseline",
            color=frame.theme.on_mark if lead else colour,
            fontsize=6.2,
            fontweight="bold",
            zorder=5 if lead else 3,
            annotation_clip=False,
        )
        label.set_in_layout(False)
    return shifts


def apart(spots: Sequence[Sequence[float]]) -> list[float]:
    """Sideways shifts, in pixels, after which no marks coincide: `side_by_side`, a few times."""
    moved = [list(spot) for spot in spots]
    for _ in range(5):
        shifts = side_by_side(moved)
        if not any(shifts):
            break
        moved = [[x + shift, y] for (x, y), shift in zip(moved, shifts, strict=True)]
    return [new[0] - old[0] for new, old in zip(moved, spots, strict=True)]


def side_by_side(spots: Sequence[Sequence[float]], apart: float = 14.0) -> list[float]:
    """Sideways shifts for marks that nearly coincide: in their order, around their middle.

    `spots` are centres and `apart` is a mark's width, in pixels; the shifts are in pixels too.
    """
    shifts = [0.0] * len(spots)
    left = list(range(len(spots)))
    while left:
        near = [left[0]]
        for at in near:  # grows: those near to one that is near are near, too
            near += [i for i in left if i not in near and math.dist(spots[i], spots[at]) < apart]
        near.sort(key=lambda i: spots[i][0])
        middle = sum(spots[i][0] for i in near) / len(near)
        for place, index in enumerate(near):
            goal = middle + apart * (place - (len(near) - 1) / 2)
            shifts[index] = goal - spots[index][0]
        left = [i for i in left if i not in near]
    return shifts
