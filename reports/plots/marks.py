"""Numbered marks of cells, and names beside them where they cover nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.transforms import Bbox, ScaledTranslation

from reports.families import Decode
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
    beyond: Mapping[int, str],
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
        shifts = [shift * 72 / figure.dpi for shift in side_by_side(spots)]
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
        words = [] if small else [(str(row.number), 0.0, "center", True)]
        if row.number in beyond and not crowded:
            words.append((f"↓ {beyond[row.number]}", 9.0, "left", False))
        for text, dx, ha, inside in words:
            ink = (frame.theme.on_mark if lead else colour) if inside else frame.theme.muted
            label = axes.annotate(
                text,
                points[index],
                xytext=(shift + dx, 0),
                textcoords="offset points",
                ha=ha,
                va="center_baseline",
                color=ink,
                fontsize=6.2 if inside else frame.text - 1,
                fontweight="bold" if inside else "normal",
                zorder=5 if lead else 3,
                annotation_clip=False,
            )
            label.set_in_layout(False)
    return shifts


def side_by_side(spots: Sequence[Sequence[float]], apart: float = 14.0) -> list[float]:
    """Sideways shifts for marks that nearly coincide: in their order, around their middle.

    `spots` are centres and `apart` is a mark's width, in pixels; the shifts are in pixels too.
    """
    shifts = [0.0] * len(spots)
    left = list(range(len(spots)))
    while left:
        near = [i for i in left if math.dist(spots[i], spots[left[0]]) < apart]
        near.sort(key=lambda i: spots[i][0])
        middle = sum(spots[i][0] for i in near) / len(near)
        for place, index in enumerate(near):
            goal = middle + apart * (place - (len(near) - 1) / 2)
            shifts[index] = goal - spots[index][0]
        left = [i for i in left if i not in near]
    return shifts


def write_names(
    axes: Axes,
    frame: Frame,
    rows: Sequence[Row],
    points: Sequence[tuple[float, float]],
    shifts: Sequence[float],
    named: Sequence[Row],
) -> None:
    """Write names beside marks where they cover nothing; where none fits, the number has to do."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    pixels = figure.dpi / 72
    spots = axes.transData.transform(points).tolist()
    centres = [(x + dx * pixels, y) for (x, y), dx in zip(spots, shifts, strict=True)]
    taken = [Bbox.from_extents(x - 9, y - 9, x + 9, y + 9) for x, y in centres]
    inside = axes.get_window_extent()
    for row in sorted(named, key=lambda row: len(row.cell.name)):
        index = list(rows).index(row)
        label = axes.annotate(
            short(row.cell.name, 34),
            points[index],
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=frame.text - 0.5,
            zorder=3.5,
            bbox={"fc": frame.theme.ground, "ec": "none", "alpha": 0.8, "pad": 0.6},
        )
        label.set_in_layout(False)
        for dx, dy, ha, va in _AROUND:
            label.set(ha=ha, va=va, position=(dx + shifts[index], dy))
            box = label.get_window_extent()
            fits = box.x0 >= inside.x0 and box.x1 <= inside.x1 + 6
            fits = fits and box.y0 >= inside.y0 and box.y1 <= inside.y1 + 8
            if fits and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
        else:
            label.remove()


_AROUND = (
    (0, 8, "center", "bottom"),
    (5, 7, "left", "bottom"),
    (-5, 7, "right", "bottom"),
    (9, 0, "left", "center"),
    (0, -8, "center", "top"),
    (5, -7, "left", "top"),
    (-5, -7, "right", "top"),
    (-9, 0, "right", "center"),
    (12, 18, "left", "bottom"),
    (-12, 18, "right", "bottom"),
    (12, -18, "left", "top"),
    (-12, -18, "right", "top"),
)
"""Offsets in points at which a name is tried, and the alignments that go with them."""


def short(name: str, most: int) -> str:
    """A name of at most so many letters, without what an SVG cannot hold."""
    clean = "".join(letter if letter.isprintable() else "\ufffd" for letter in name)
    return clean if len(clean) <= most else f"{clean[: most - 1]}…"
