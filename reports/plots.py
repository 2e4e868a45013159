"""Pictures of a run: fronts, accuracy against compute saved, every repeat, training curves.

Each is drawn light and dark, wide and narrow, as SVG for the page, and once as PNG for Markdown.
Colour tells how weights are stored, shape how the cell decodes, and a number in each mark is the
cell's number in the tables, so that nothing hangs on colour alone.
"""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox, ScaledTranslation

from compose.results.metrics import retained_basis
from compose.results.parts import TrainingPoint
from reports.load import KEEPS, Report, Row
from reports.tables import TIMES, number, percent

FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
FURTHEST_RATIO = (
    10.0  # no axis goes further; what lies beyond is drawn at the edge, with its number
)
LOWEST_SHARE = 0.6  # the same for shares of quality: a cell below is ruined
MARKS = {"plain": 11.5, "skip": 10.5, "speculate": 10.0}  # points; the same area to the eye
SHAPES = {"plain": "o", "skip": "s", "speculate": "D"}
RATIO_TICKS = (1.0, 1.02, 1.05, 1.1, 1.2, 1.3, 1.5, 2.0, 3.0, 5.0, 10.0)


@dataclass(frozen=True)
class Theme:
    """Colours of one look. `series` is Okabe and Ito's palette, tuned to the ground it lies on."""

    name: str
    ground: str
    ink: str
    muted: str
    grid: str
    on_mark: str
    series: tuple[str, ...]


LIGHT = Theme(
    "light",
    "#ffffff",
    "#1d2329",
    "#5d6771",
    "#e3e7ea",
    "#ffffff",
    ("#3d4852", "#0072b2", "#c2570c", "#00805c", "#a8487f", "#8a6d00"),
)
DARK = Theme(
    "dark",
    "#171b20",
    "#e8ebee",
    "#a2acb6",
    "#2e353d",
    "#10151a",
    ("#c3ccd5", "#5bb8ec", "#f59a52", "#3fcf9f", "#e497c4", "#e0c14c"),
)


@dataclass(frozen=True)
class Frame:
    """How one rendering is laid out: CSS pixels, and whether there is room for names."""

    theme: Theme
    width: int
    narrow: bool

    @property
    def text(self) -> float:
        """Points of the running text in the picture."""
        return 8.5 if self.narrow else 9.0


@dataclass(frozen=True)
class Picture:
    """A drawn picture. `sources` has the data URI for each of light/dark x wide/narrow."""

    key: str
    title: str
    alt: str
    caption: str
    sources: dict[str, str]
    width: int
    height: int
    png: bytes


@dataclass(frozen=True)
class Sketch:
    """A picture before it is drawn."""

    key: str
    title: str
    alt: str
    caption: str
    height: int
    draw: Callable[[Figure, Frame], None]


def pictures(report: Report) -> dict[str, Picture]:
    """Every picture that the results have numbers for, by key."""
    sketches = (
        _front(report, "decode"),
        _front(report, "size"),
        _accuracy(report),
        _repeats(report),
        _training(report),
        _gates(report),
    )
    return {sketch.key: _render(sketch) for sketch in sketches if sketch is not None}


# --- rendering -----------------------------------------------------------------------------------


def _render(sketch: Sketch) -> Picture:
    frames = {
        f"{theme.name}-{'narrow' if narrow else 'wide'}": Frame(
            theme, 340 if narrow else 560, narrow
        )
        for theme in (LIGHT, DARK)
        for narrow in (False, True)
    }
    wide = frames["light-wide"]
    return Picture(
        key=sketch.key,
        title=sketch.title,
        alt=sketch.alt,
        caption=sketch.caption,
        sources={name: _svg(sketch, frame) for name, frame in frames.items()},
        width=wide.width,
        height=sketch.height,
        png=_draw(sketch, wide, "png", dpi=192),
    )


def _svg(sketch: Sketch, frame: Frame) -> str:
    text = _draw(sketch, frame, "svg", dpi=96).decode("utf-8")
    text = text.replace("'DejaVu Sans'", FONTS).replace("DejaVu Sans", FONTS)
    packed = base64.b64encode(text.encode("utf-8")).decode("ascii")
    return f"data:image/svg+xml;base64,{packed}"


def _draw(sketch: Sketch, frame: Frame, format: str, dpi: int) -> bytes:
    theme = frame.theme
    style: Any = {
        "font.family": "DejaVu Sans",
        "font.size": frame.text,
        "text.color": theme.ink,
        "text.parse_math": False,  # a cell's name may hold a dollar sign
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.muted,
        "axes.facecolor": "none",
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "svg.fonttype": "none",
        "svg.hashsalt": sketch.key,
    }
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing"
        )  # the page's fonts may have it
        size = (frame.width / 96, sketch.height / 96)
        ground = theme.ground if format == "png" else "none"
        figure = Figure(figsize=size, dpi=96, layout="constrained", facecolor=ground)
        FigureCanvasAgg(figure)
        sketch.draw(figure, frame)
        out = io.BytesIO()
        metadata = {"Date": None} if format == "svg" else {"Software": None}
        figure.savefig(out, format=format, dpi=dpi, metadata=metadata)
        return out.getvalue()


# --- fronts --------------------------------------------------------------------------------------


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


def _scale(metric: str, rows: Sequence[Row], front: Sequence[Row]) -> Scale:
    """An axis on which the front fills the picture, whatever ruined cells there are."""
    values = [row.values[metric] for row in rows]
    if metric == "perplexity-ratio":
        worst = 1.3 * max((row.values[metric] for row in front), default=1.0)
        return Scale(metric, min(FURTHEST_RATIO, max(1.5, worst)))
    lively = [value for value in values if value >= LOWEST_SHARE]
    return Scale(metric, max(LOWEST_SHARE, min(lively) - 0.1) if lively else 0.0)


def _front(report: Report, metric: str) -> Sketch | None:
    quality = report.quality_axis
    rows = [row for row in report.rows if {metric, quality} <= row.values.keys()]
    if quality is None or len(rows) < 2:
        return None
    front = report.front(metric)
    scale = _scale(quality, rows, front)
    against = {"decode": "decode speed", "size": "size on disk"}[metric]
    names = ", ".join(f"{row.number}{_NB}{row.cell.name}" for row in front)
    caption = f"On the front: {names}. Marks that would coincide stand side by side."
    if any(scale.beyond(row) for row in rows):
        caption += " An arrow marks cells beyond the scale."

    def draw(figure: Figure, frame: Frame) -> None:
        axes = figure.add_subplot()
        unit = 1e6 if metric == "size" else 1.0
        points = [(row.values[metric] / unit, scale.height(row)) for row in rows]
        _quality_axis(axes, quality, [y for _, y in points])
        axes.set_xlabel("size on disk, MB" if metric == "size" else "decode, tokens/s")
        _stairs(axes, frame, points, rows, front, smaller_is_better=metric == "size")
        _roomy(axes, [x for x, _ in points])
        _better(axes, frame, left=metric == "size")
        _legend(figure, frame, report, rows)
        shifts = _marks(axes, frame, report, rows, points, {row.number for row in front}, scale)
        named = [row for row in rows if row in front or row.is_baseline]
        _name(axes, frame, rows, points, shifts, [] if frame.narrow else named)

    title = f"Quality against {against}"
    alt = f"{title}, {len(rows)} cells. {caption}"
    return Sketch(f"front-{metric}", title, alt, caption, 400, draw)


_NB = "\u00a0"


def _quality_axis(axes: Axes, quality: str, heights: Sequence[float]) -> None:
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


def _marks(
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
    figure, colours = axes.get_figure(root=True), _colours(report, frame.theme)
    assert figure is not None
    figure.draw_without_rendering()
    spots = axes.transData.transform(points).tolist()
    shifts = [shift * 72 / figure.dpi for shift in _side_by_side(spots)]
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


def _side_by_side(spots: Sequence[Sequence[float]], apart: float = 14.0) -> list[float]:
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


def _colours(report: Report, theme: Theme) -> dict[str, str]:
    """Weights -> colour, the same in every picture of the report."""
    kinds = sorted({row.weights for row in report.rows}, key=lambda k: (k != "not quantized", k))
    return {kind: theme.series[i % len(theme.series)] for i, kind in enumerate(kinds)}


def _roomy(axes: Axes, xs: Sequence[float]) -> None:
    low, high = min(xs), max(xs)
    pad = 0.08 * (high - low or abs(high) or 1.0)
    axes.set_xlim(low - pad, high + pad)
    axes.xaxis.set_major_locator(MaxNLocator(6))


def _better(axes: Axes, frame: Frame, *, left: bool) -> None:
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


def _legend(figure: Figure, frame: Frame, report: Report, rows: Sequence[Row]) -> None:
    """Colours for weights, shapes for decoding; an encoding with one value is not explained."""
    colours = _colours(report, frame.theme)
    weights = [kind for kind in colours if any(row.weights == kind for row in rows)]
    modes = [mode for mode in SHAPES if any(row.decode == mode for row in rows)]
    marks = [_key("o", colours[k], _short(k, 24)) for k in weights] if len(weights) > 1 else []
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


def _name(
    axes: Axes,
    frame: Frame,
    rows: Sequence[Row],
    points: Sequence[tuple[float, float]],
    shifts: Sequence[float],
    named: Sequence[Row],
) -> None:
    """Write names beside marks where they cover nothing; one without room is left to its number."""
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
            _short(row.cell.name, 34),
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


def _short(name: str, most: int) -> str:
    """A name of at most so many letters, without what an SVG cannot hold."""
    clean = "".join(letter if letter.isprintable() else "\ufffd" for letter in name)
    return clean if len(clean) <= most else f"{clean[: most - 1]}…"


# --- accuracy against compute saved --------------------------------------------------------------


def _accuracy(report: Report) -> Sketch | None:
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
    scale = _scale(metric, rows, rows)

    def draw(figure: Figure, frame: Frame) -> None:
        axes = figure.add_subplot()
        points = [(100 * row.values["saved"], scale.height(row)) for row in rows]
        halves = [100 * _half_width(report, row) for row in rows]
        ends = [y - half for (_, y), half in zip(points, halves, strict=True)]
        _quality_axis(axes, metric, [*(y for _, y in points), *ends, 100.0])
        _roomy(axes, [x for x, _ in points])
        axes.set_xlabel("compute saved, net, %")
        axes.axhline(100 * KEEPS, color=frame.theme.muted, lw=1, ls=(0, (4, 3)), zorder=1)
        colours = _colours(report, frame.theme)
        places = {row.cell.name: point for row, point in zip(rows, points, strict=True)}
        for row, (x, y), half in zip(rows, points, halves, strict=True):
            colour = colours[row.weights]
            if half and not scale.beyond(row):
                axes.plot([x, x], [y - half, y + half], color=colour, lw=1, alpha=0.45)
            if row.decode == "skip" and row.cell.plain in places:
                plain = places[row.cell.plain]
                axes.plot([plain[0], x], [plain[1], y], color=colour, lw=1.2, alpha=0.8)
        _better(axes, frame, left=False)
        _legend(figure, frame, report, rows)
        _marks(axes, frame, report, rows, points, {row.number for row in rows}, scale)

    return Sketch("accuracy", title, f"{title}, {len(rows)} cells.", caption, 400, draw)


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


# --- every repeat --------------------------------------------------------------------------------


def _repeats(report: Report) -> Sketch | None:
    """Decode speed of every repeat, a line for each cell."""
    rows = [row for row in report.rows if len(_runs(row)) > 1]
    if not rows:
        return None
    caption = "Each repeat is a dot, the median a bar."

    def draw(figure: Figure, frame: Frame) -> None:
        axes = figure.add_subplot()
        colours = _colours(report, frame.theme)
        for place, row in enumerate(rows):
            runs, colour = _runs(row), colours[row.weights]
            axes.plot(runs, [place] * len(runs), "o", ms=5, mfc=colour, mec="none", alpha=0.45)
            median = row.values["decode"]
            axes.plot([median] * 2, [place - 0.32, place + 0.32], color=colour, lw=2)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        labels = [
            f"{_short(row.cell.name, 18 if frame.narrow else 30)}  {row.number}" for row in rows
        ]
        axes.set_yticks(range(len(rows)), labels, color=frame.theme.ink)
        axes.tick_params(length=0)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.spines["left"].set_visible(False)
        axes.set_xlim(left=0)
        axes.set_xlabel("decode, tokens/s")

    title = "Spread of the repeats"
    height = 76 + 19 * len(rows)
    return Sketch("repeats", title, f"{title}, {len(rows)} cells.", caption, height, draw)


def _runs(row: Row) -> tuple[float, ...]:
    measured = None if row.cell.speed is None else row.cell.speed.decode_tokens_per_s
    return () if measured is None else measured.repeats


# --- training ------------------------------------------------------------------------------------


def _training(report: Report) -> Sketch | None:
    """Loss over the steps of every fine-tune, once for each."""
    curves = dict(_curves(report))
    if not curves:
        return None
    caption = "Thin: training loss. With dots: loss on held-out text."

    def draw(figure: Figure, frame: Frame) -> None:
        axes = figure.add_subplot()
        colours = frame.theme.series[1:]
        for place, (label, curve) in enumerate(curves.items()):
            colour = colours[place % len(colours)]
            loss = [(p.step, p.loss) for p in curve if p.loss is not None]
            valid = [(p.step, p.valid) for p in curve if p.valid is not None]
            if loss:
                axes.plot(*_columns(loss), color=colour, lw=0.9, alpha=0.6)
            if valid:
                axes.plot(*_columns(valid), color=colour, lw=1.6, marker="o", ms=3.5)
            axes.plot([], [], color=colour, lw=2, label=_short(label, 26 if frame.narrow else 48))
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.legend(frameon=False, labelcolor=frame.theme.ink, fontsize=frame.text - 0.5)

    title = "Training"
    alt = f"Training loss of {', '.join(curves)}."
    return Sketch("training", title, alt, caption, 360, draw)


def _curves(report: Report) -> Iterator[tuple[str, tuple[TrainingPoint, ...]]]:
    """(chain up to the stage, curve), each different curve once."""
    for row in report.rows:
        for stage, curve in (row.cell.training or {}).items():
            chain = row.cell.chain
            known = chain[: chain.index(stage) + 1] if stage in chain else (stage,)
            if curve:
                yield "+".join(known), curve


# --- gates ---------------------------------------------------------------------------------------


def _gates(report: Report) -> Sketch | None:
    """Kinds of tokens down, branches across: who enters, in the first cell that skips."""
    row = next((row for row in report.rows if row.cell.insight is not None), None)
    if row is None or row.cell.insight is None:
        return None
    insight = row.cell.insight
    layers = len(insight.branches) // 2
    names = ["all", *insight.kinds]
    shares = [[use.kept for use in insight.branches]]
    shares += [list(group.kept) for group in insight.kinds.values()]
    caption = (
        f"Share of tokens of each kind that enter a branch, in cell {row.number} "
        f"({row.cell.name}): dark is all of them, empty is none."
    )

    def draw(figure: Figure, frame: Frame) -> None:
        axes = figure.subplots(2, 1, sharex=True)
        shade = LinearSegmentedColormap.from_list(
            "kept", [frame.theme.ground, frame.theme.series[1]]
        )
        for place, kind in enumerate(("attention", "MLP")):
            values = [share[place::2] for share in shares]
            axes[place].imshow(values, aspect="auto", cmap=shade, vmin=0, vmax=1)
            axes[place].set_yticks(range(len(names)), names, color=frame.theme.ink)
            axes[place].set_title(kind, loc="left", fontsize=frame.text, color=frame.theme.ink)
            axes[place].tick_params(length=0)
            axes[place].spines[:].set_visible(False)
        axes[1].set_xlabel("layer")
        axes[1].xaxis.set_major_locator(MaxNLocator(min(layers, 8), integer=True))

    title = "What the gates let in"
    alt = f"{title}: kept shares of {len(names)} kinds of tokens at {layers} layers."
    return Sketch("gates", title, alt, caption, 120 + 34 * len(names), draw)


def _columns(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    pairs = list(points)
    return [x for x, _ in pairs], [y for _, y in pairs]
