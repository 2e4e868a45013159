"""Numbered marks on a quality axis, with legend and names: what the trade-off pictures share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox, ScaledTranslation

from reports.load import Report, Row
from reports.numbers import TIMES, number, percent
from reports.plots.canvas import Frame, Theme

FURTHEST_RATIO = 10.0  # the axis ends here; cells beyond it stand at the edge, with their number
LOWEST_SHARE = 0.6  # the same for shares of quality
MARKS = {"plain": 11.5, "skip": 10.5, "speculate": 10.0}  # points; the same area to the eye
SHAPES = {"plain": "o", "skip": "s", "speculate": "D"}
RATIO_TICKS = (1.0, 1.02, 1.05, 1.1, 1.2, 1.3, 1.5, 2.0, 3.0, 5.0, 10.0)


@dataclass(frozen=True)
class Scale:
    """The quality axis: higher is better, and what is worse than `floor` stands at the edge."""

    metric: str
    floor: float

    def height(self, row: Row) -> float:
        """Where a row stands."""
        value = row.values[self.metric]
        if self.metric == "perplexity-ratio":
            return -math.log(min(value, self.floor))
        return 100 * max(value, self.floor)

    def beyond(self, row: Row) -> str:
        """The number of a row that stands at the edge, or nothing."""
        value = row.values[self.metric]
        if self.metric == "perplexity-ratio":
            return f"{TIMES}{number(value)}" if value > self.floor else ""
        return percent(value) if value < self.floor else ""


def scale_of(metric: str, rows: Sequence[Row], front: Sequence[Row]) -> Scale:
    """An axis on which the front fills the picture, whatever ruined cells there are."""
    values = [row.values[metric] for row in rows]
    if metric == "perplexity-ratio":
        worst = 1.3 * max((row.values[metric] for row in front), default=1.0)
        return Scale(metric, min(FURTHEST_RATIO, max(1.5, worst)))
    lively = [value for value in values if value >= LOWEST_SHARE]
    return Scale(metric, max(LOWEST_SHARE, min(lively) - 0.1) if lively else 0.0)


def quality_axis(axes: Axes, quality: str, heights: Sequence[float]) -> None:
    """Set the vertical axis of a quality metric: limits, label and ticks."""
    low, high = min(heights), max(heights)
    pad = 0.1 * (high - low or 0.1)
    axes.set_ylim(low - pad, high + pad)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    if quality != "perplexity-ratio":
        words = {"retained": "quality retained, %", "agreement": "greedy agreement, %"}
        axes.set_ylabel(words[quality])
        axes.yaxis.set_major_locator(MaxNLocator(6))
        return
    axes.set_ylabel("perplexity, times dense")
    ticks = _spaced([t for t in RATIO_TICKS if low - pad <= -math.log(t)], (high - low) / 8)
    axes.yaxis.set_major_locator(FixedLocator([-math.log(tick) for tick in ticks]))
    axes.yaxis.set_major_formatter(FixedFormatter([f"{TIMES}{tick:g}" for tick in ticks]))
    axes.yaxis.set_minor_locator(NullLocator())


def _spaced(ticks: Sequence[float], least: float) -> list[float]:
    """Ticks that stand at least so far apart on a log axis, the first one kept."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or math.log(tick) - math.log(kept[-1]) >= least:
            kept.append(tick)
    return kept


def draw_marks(
    axes: Axes,
    frame: Frame,
    report: Report,
    rows: Sequence[Row],
    points: Sequence[tuple[float, float]],
    strong: set[int],
    scale: Scale,
) -> list[float]:
    """One numbered mark a row; those in `strong` stand in front, in full colour.

    Marks that would cover each other stand side by side: how far each was moved, in points, is
    returned. Call it when the axes are set.
    """
    figure, colours = axes.get_figure(root=True), colours_of(report, frame.theme)
    assert figure is not None
    figure.draw_without_rendering()
    spots = axes.transData.transform(points).tolist()
    shifts = [shift * 72 / figure.dpi for shift in side_by_side(spots)]
    for index in sorted(range(len(rows)), key=lambda i: rows[i].number in strong):
        row, shift = rows[index], shifts[index]
        lead, colour = row.number in strong, colours[row.weights]
        axes.plot(
            *([value] for value in points[index]),
            SHAPES[row.decode],
            ms=MARKS[row.decode] * (0.92 if frame.narrow else 1),
            mfc=colour if lead else frame.theme.ground,
            mec=colour,
            mew=1.2,
            zorder=4 if lead else 2,
            clip_on=False,
            transform=axes.transData + ScaledTranslation(shift / 72, 0, figure.dpi_scale_trans),
        )
        beyond = scale.beyond(row)
        for text, dx, ha, style in (
            (str(row.number), 0, "center", {"fontsize": 6.2, "fontweight": "bold"}),
            (f"↓ {beyond}" if beyond else "", 9, "left", {"fontsize": frame.text - 1}),
        ):
            axes.annotate(
                text,
                points[index],
                xytext=(shift + dx, 0),
                textcoords="offset points",
                ha=ha,
                va="center_baseline",
                color=frame.theme.muted if dx else frame.theme.on_mark if lead else colour,
                zorder=5 if lead else 3,
                annotation_clip=False,
                **style,
            )
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


def colours_of(report: Report, theme: Theme) -> dict[str, str]:
    """Weights -> colour, the same in every picture of the report."""
    kinds = sorted({row.weights for row in report.rows}, key=lambda k: (k != "not quantized", k))
    return {kind: theme.series[i % len(theme.series)] for i, kind in enumerate(kinds)}


def pad_x_axis(axes: Axes, xs: Sequence[float]) -> None:
    """Set the horizontal axis so that no mark touches its ends."""
    low, high = min(xs), max(xs)
    pad = 0.08 * (high - low or abs(high) or 1.0)
    axes.set_xlim(low - pad, high + pad)
    axes.xaxis.set_major_locator(MaxNLocator(6))


def better_corner(axes: Axes, frame: Frame, *, left: bool) -> None:
    """Write which corner of the picture is better."""
    axes.annotate(
        "better ↖" if left else "better ↗",
        (0.0 if left else 1.0, 1.0),
        xytext=(0, 4),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="left" if left else "right",
        va="bottom",
        color=frame.theme.muted,
        fontsize=frame.text - 1,
    )


def legend(figure: Figure, frame: Frame, report: Report, rows: Sequence[Row]) -> None:
    """Colours for weights, shapes for decoding; an encoding with one value is not explained."""
    colours = colours_of(report, frame.theme)
    weights = [kind for kind in colours if any(row.weights == kind for row in rows)]
    modes = [mode for mode in SHAPES if any(row.decode == mode for row in rows)]
    marks = [_key("o", colours[k], short(k, 24)) for k in weights] if len(weights) > 1 else []
    if len(modes) > 1:
        marks += [_key(SHAPES[m], frame.theme.muted, m, hollow=True) for m in modes]
    if marks:
        figure.legend(
            handles=marks,
            loc="outside lower center",
            ncols=3 if frame.narrow else len(marks),
            frameon=False,
            handletextpad=0.1,
            columnspacing=1.1,
            labelcolor=frame.theme.muted,
            fontsize=frame.text - 0.5,
        )


def _key(shape: str, colour: str, label: str, *, hollow: bool = False) -> Line2D:
    face = "none" if hollow else colour
    return Line2D([], [], ls="", marker=shape, ms=6.5, mfc=face, mec=colour, label=label)


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
