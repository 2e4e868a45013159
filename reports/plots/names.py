"""Names beside numbered marks: where they cover nothing, the farther ones with a line to the mark.

Names are placed one after another, in several orders; the order that places most of them is kept.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence, Set
from functools import cache
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.transforms import ScaledTranslation, Transform

from reports.load import Row
from reports.plots.canvas import NAME, Frame, short

Spot = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, lower, right and upper edge, in pixels."""

ORDERS, TURNS = 12, 5
"""Orders by chance that are tried after those by width, crowd and position, and how often each is
tried again with those names first that found no place."""

MARK = 9.0
"""Half of a mark's width, in pixels."""


class Place(NamedTuple):
    """Where a name is tried: its offset in points, its alignment, whether a line leads to it."""

    dx: float
    dy: float
    ha: str
    va: str
    leader: bool


class Name(NamedTuple):
    """A name to be placed: the index of its mark, and its width and height in pixels."""

    mark: int
    width: float
    height: float


def write_names(
    axes: Axes,
    frame: Frame,
    rows: Sequence[Row],
    points: Sequence[Spot],
    shifts: Sequence[float],
    named: Sequence[Row],
    beyond: Mapping[int, str],
) -> None:
    """Write names beside marks; where none fits, the number has to do.

    `beyond` is row number -> the number of a row that is off the scale, which follows its name.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    pixels = figure.dpi / 72
    spots = axes.transData.transform(points).tolist()
    centres = [(x + dx * pixels, y) for (x, y), dx in zip(spots, shifts, strict=True)]
    names, words = [], {}
    for index, row in enumerate(rows):
        if row in named:
            far = f" ↓ {beyond[row.number]}" if row.number in beyond else ""
            words[index] = short(row.cell.name, 22 if frame.narrow else NAME) + far
            names.append(_measured(axes, frame, index, words[index]))
    inside = axes.get_window_extent()
    limits = (inside.x0 + 2, inside.y0 + 2, inside.x1 + 6, inside.y1 + 4)
    for index, place in best_places(names, centres, limits, pixels).items():
        at = axes.transData + ScaledTranslation(shifts[index] / 72, 0, figure.dpi_scale_trans)
        _write(axes, frame, words[index], points[index], at, place)


def _measured(axes: Axes, frame: Frame, index: int, words: str) -> Name:
    text = axes.text(0, 0, words, fontsize=frame.text - 0.5)
    extent = text.get_window_extent()
    text.remove()
    return Name(index, extent.width + 3, extent.height)


def _write(axes: Axes, frame: Frame, words: str, point: Spot, at: Transform, place: Place) -> None:
    line = {"arrowstyle": "-", "color": frame.theme.muted, "lw": 0.7, "shrinkA": 0, "shrinkB": 6}
    line["relpos"] = (ACROSS[place.ha], 0.5)
    label = axes.annotate(
        words,
        point,
        xycoords=at,
        xytext=(place.dx, place.dy),
        textcoords="offset points",
        ha=place.ha,
        va=place.va,
        fontsize=frame.text - 0.5,
        zorder=3.5,
        annotation_clip=False,
        arrowprops=line if place.leader else None,
        bbox={"fc": frame.theme.ground, "ec": "none", "alpha": 0.8, "pad": 0.6},
    )
    label.set_in_layout(False)


def best_places(
    names: Sequence[Name], centres: Sequence[Spot], limits: Box, pixels: float
) -> dict[int, Place]:
    """Index of a mark -> the place of its name; those for which no place was found are left out.

    `centres` are the marks and `limits` is the picture, in pixels; a point has `pixels` of them.
    """

    def crowd(name: Name) -> float:
        mark = centres[name.mark]
        return sum(1 / (1 + math.dist(mark, other)) for other in centres)

    orders = [
        sorted(names, key=lambda name: name.width),
        sorted(names, key=crowd, reverse=True),
        sorted(names, key=lambda name: centres[name.mark][0]),
    ]
    chance = random.Random(0)  # the same orders each time, so the same picture
    orders += [chance.sample(names, len(names)) for _ in range(ORDERS)]
    marks = [_box(x, y, MARK, MARK) for x, y in centres]

    @cache  # asked for in each order again, hundreds of thousands of times for 200 marks
    def boxes(name: Name, place: Place) -> list[Box]:
        return _boxes(name, place, centres, marks, limits, pixels)

    best: dict[int, Place] = {}
    for order in orders:
        hard: set[int] = set()
        for _ in range(TURNS):
            placed = _placed(order, hard, boxes)
            if len(placed) > len(best):
                best = placed
            if len(best) == len(names):
                return best
            hard |= {name.mark for name in names} - placed.keys()
    return best


def _placed(
    order: Sequence[Name], hard: Set[int], boxes: Callable[[Name, Place], list[Box]]
) -> dict[int, Place]:
    """Names in the order given: the hard ones at any place, the others at a near place, and what is
    left at a farther one."""
    taken: list[Box] = []
    placed: dict[int, Place] = {}
    for places, first in (((*NEAR, *FAR), True), (NEAR, False), (FAR, False)):
        for name in order:
            if name.mark in placed or (first and name.mark not in hard):
                continue
            for place in places:
                parts = boxes(name, place)
                if parts and _is_clear(parts, taken):
                    taken += parts
                    placed[name.mark] = place
                    break
    return placed


def _boxes(
    name: Name,
    place: Place,
    centres: Sequence[Spot],
    marks: Sequence[Box],
    limits: Box,
    pixels: float,
) -> list[Box]:
    """The boxes of a name and its line at a place; none where the name leaves the picture, covers a
    mark or stands at another one, whatever names are beside it."""
    x, y = centres[name.mark]
    box = _aligned(x + place.dx * pixels, y + place.dy * pixels, name, place)
    if not _is_within(box, limits):
        return []
    if not place.leader and not _is_nearest(box, centres, name.mark):
        return []
    parts = [box, *(_between((x, y), box, place) if place.leader else ())]
    others = [*marks[: name.mark], *marks[name.mark + 1 :]]
    return parts if _is_clear(parts, others) else []


def _box(x: float, y: float, half_width: float, half_height: float) -> Box:
    return x - half_width, y - half_height, x + half_width, y + half_height


def _aligned(x: float, y: float, name: Name, place: Place) -> Box:
    """The box of a name that stands at a point with a place's alignment."""
    left = x - name.width * ACROSS[place.ha]
    low = y - name.height * {"bottom": 0.0, "center": 0.5, "top": 1.0}[place.va]
    return left, low, left + name.width, low + name.height


def _is_within(box: Box, limits: Box) -> bool:
    return (
        box[0] >= limits[0] and box[1] >= limits[1] and box[2] <= limits[2] and box[3] <= limits[3]
    )


def _is_clear(parts: Sequence[Box], others: Sequence[Box]) -> bool:
    """Whether no part of a name covers a mark or another name."""
    return not any(
        a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for a in parts for b in others
    )


def _is_nearest(box: Box, centres: Sequence[Spot], index: int) -> bool:
    """Whether a name without a line stands clearly nearer to its own mark than to any other."""

    def away(mark: Spot) -> float:
        across = max(box[0] - mark[0], 0.0, mark[0] - box[2])
        return math.hypot(across, max(box[1] - mark[1], 0.0, mark[1] - box[3]))

    own = away(centres[index])
    return all(away(mark) > 1.4 * own + 2 for place, mark in enumerate(centres) if place != index)


def _between(mark: Spot, box: Box, place: Place) -> list[Box]:
    """Small boxes along the line from a mark to a name, which other names stay clear of."""
    x, y = box[0] + (box[2] - box[0]) * ACROSS[place.ha], (box[1] + box[3]) / 2
    steps = max(1, round(math.dist(mark, (x, y)) / 5))
    spots = (
        (mark[0] + (x - mark[0]) * k / steps, mark[1] + (y - mark[1]) * k / steps)
        for k in range(1, steps)
    )
    return [
        _box(px, py, 1, 1)
        for px, py in spots
        if not (box[0] < px < box[2] and box[1] < py < box[3]) and math.dist((px, py), mark) > 9
    ]


ACROSS = {"left": 0.0, "center": 0.5, "right": 1.0}
"""Where along a name the point lies by which it is aligned."""

NEAR = tuple(
    Place(*each, leader=False)
    for each in (
        (0, 8, "center", "bottom"),
        (5, 7, "left", "bottom"),
        (-5, 7, "right", "bottom"),
        (9, 0, "left", "center"),
        (0, -8, "center", "top"),
        (5, -7, "left", "top"),
        (-5, -7, "right", "top"),
        (-9, 0, "right", "center"),
    )
)
"""Places at a mark."""

FAR = tuple(
    Place(
        round(radius * math.cos(turn * math.pi / 8)),
        round(radius * math.sin(turn * math.pi / 8)),
        "left" if turn in (0, 1, 2, 3, 13, 14, 15) else "center" if turn in (4, 12) else "right",
        "center",
        leader=True,
    )
    for radius in (18, 24, 30, 36, 44, 52, 60, 70, 80, 92, 104, 120, 140)
    for turn in range(16)
)
"""Places with a line to the mark, nearest first."""
