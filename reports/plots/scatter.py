"""The quality axis, colours, shapes and legend that the trade-off pictures share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from compose.analysis.families import NOT_QUANTIZED
from compose.numbers import PAGE, TIMES
from reports.load import Report, Row
from reports.plots.canvas import Frame, short
from reports.plots.marks import SHAPES
from reports.plots.theme import Theme

FURTHEST_RATIO = 10.0  # the axis ends here; cells beyond it stand at the edge, with their number
FURTHEST_KL = 3.0  # the same in nats
LOWEST_SHARE = 0.6  # the same for shares of quality
RATIO_TICKS = (1.0, 1.02, 1.05, 1.1, 1.2, 1.3, 1.5, 2.0, 3.0, 5.0, 10.0)


@dataclass(frozen=True)
class Scale:
    """The quality axis: higher is better, and what is worse than `floor` stands at the edge.

    `intervals` is row number -> 95 % interval of the metric.
    """

    metric: str
    floor: float
    intervals: Mapping[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def falls(self) -> bool:
        """Whether a smaller number is the better one."""
        return self.metric in ("perplexity-ratio", "kl")

    def height(self, row: Row) -> float:
        """Where a row stands."""
        return self._height(row.values[self.metric])

    def ends(self, row: Row) -> tuple[float, float] | None:
        """The ends of a row's whisker, or None: not measured, or beyond the scale."""
        interval = self.intervals.get(row.number)
        if interval is None or self.beyond(row):
            return None
        return self._height(interval[0]), self._height(interval[1])

    def beyond(self, row: Row) -> str:
        """The number of a row that stands at the edge, or nothing."""
        value = row.values[self.metric]
        if (value <= self.floor) if self.falls else (value >= self.floor):
            return ""
        if self.metric == "perplexity-ratio":
            return f"{TIMES}{PAGE.number(value)}"
        return PAGE.number(value) if self.metric == "kl" else PAGE.percent(value)

    def _height(self, value: float) -> float:
        if self.metric == "perplexity-ratio":
            return -math.log(min(value, self.floor))
        if self.metric == "kl":
            return -min(value, self.floor)
        return 100 * max(value, self.floor)


def scale_of(report: Report, metric: str, rows: Sequence[Row], front: Sequence[Row]) -> Scale:
    """An axis on which the front fills the picture, whatever ruined cells there are."""
    ends = {row.number: span for row in rows if (span := report.interval(row, metric)) is not None}
    values = [row.values[metric] for row in rows]
    worst = max((row.values[metric] for row in front), default=1.0)
    if metric == "perplexity-ratio":
        return Scale(metric, min(FURTHEST_RATIO, max(1.5, 1.3 * worst)), ends)
    if metric == "kl":
        return Scale(metric, min(FURTHEST_KL, max(0.4, 1.3 * worst)), ends)
    lively = [value for value in values if value >= LOWEST_SHARE]
    return Scale(metric, max(LOWEST_SHARE, min(lively) - 0.1) if lively else 0.0, ends)


def quality_axis(axes: Axes, quality: str, heights: Sequence[float]) -> None:
    """Set the vertical axis of a quality metric: limits, label and ticks."""
    low, high = min(heights), max(heights)
    pad = 0.1 * (high - low or 0.1)
    axes.set_ylim(low - pad, high + 1.6 * pad)  # names stand above the best
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    if quality == "kl":
        axes.set_ylabel("KL to dense, nats a token")
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):.2g}")
        return
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
    spaced: list[float] = []
    for tick in ticks:
        if not spaced or math.log(tick) - math.log(spaced[-1]) >= least:
            spaced.append(tick)
    return spaced


def colours_of(report: Report, theme: Theme) -> dict[str, str]:
    """Weights of our own cells -> colour, the same in every picture of the report."""
    kinds = sorted(
        {row.weights for row in report.rows if row.cell.peer is None},
        key=lambda kind: (kind != NOT_QUANTIZED, kind),
    )
    return {kind: theme.series[i % len(theme.series)] for i, kind in enumerate(kinds)}


def colour_of(report: Report, row: Row, theme: Theme) -> str:
    """A row's colour: its weights', or the one of all other engines."""
    return theme.peer if row.cell.peer else colours_of(report, theme)[row.weights]


EDGE = 0.08
"""Room at an end of the horizontal axis, as a share of the range."""


def pad_x_axis(axes: Axes, xs: Sequence[float], *, left: float = EDGE) -> None:
    """Set the horizontal axis so that no mark touches its ends; `left` is the room on the left end,
    as a share of the range."""
    low, high = min(xs), max(xs)
    span = high - low or abs(high) or 1.0
    axes.set_xlim(low - left * span, high + EDGE * span)
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
    ours = [row for row in rows if row.cell.peer is None]
    weights = [kind for kind in colours if any(row.weights == kind for row in ours)]
    modes = [mode for mode in SHAPES if any(row.decode == mode for row in ours)]
    marks = [_key("o", colours[k], short(k, 24)) for k in weights] if len(weights) > 1 else []
    if len(modes) > 1:
        marks += [_key(SHAPES[m], frame.theme.muted, m, hollow=True) for m in modes]
    if len(ours) < len(rows):
        marks.append(_key(SHAPES["peer"], frame.theme.peer, "other engines"))
    if marks:
        figure.legend(
            handles=marks,
            loc="outside lower center",
            ncols=3 if frame.narrow else math.ceil(len(marks) / math.ceil(len(marks) / 6)),
            frameon=False,
            handletextpad=0.1,
            columnspacing=1.1,
            labelcolor=frame.theme.muted,
            fontsize=frame.text - 0.5,
        )


def _key(shape: str, colour: str, label: str, *, hollow: bool = False) -> Line2D:
    face = "none" if hollow else colour
    return Line2D([], [], ls="", marker=shape, ms=6.5, mfc=face, mec=colour, label=label)
