"""Pictures of series: the decode speed of every repeat, and training curves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from compose.results.parts import TrainingPoint
from reports.load import Report, Row
from reports.plots.canvas import Frame, PictureSpec, short
from reports.plots.scatter import colour_of

MOST_CURVES = 12
"""Training curves in one picture."""

FEWEST_STEPS = 20
"""Training of fewer steps makes no curve."""

MOST = 40
"""Cells of which every repeat is drawn; of a larger run, those on a front and other engines."""


def repeats(report: Report) -> PictureSpec | None:
    """Decode speed of every repeat, a line for each cell."""
    rows = [row for row in report.rows if len(_runs(row)) > 1]
    if not rows:
        return None
    caption = "Each dot is one repeat, and each bar is a median."
    if len(rows) > MOST:
        rows = [r for r in rows if r.is_baseline or r.cell.peer or r.number in report.on_a_front]
        caption += " Only the baseline, other engines and the best trade-offs are drawn."

    def draw(figure: Figure, frame: Frame) -> None:
        axes = figure.add_subplot()
        for place, row in enumerate(rows):
            runs, colour = _runs(row), colour_of(report, row, frame.theme)
            axes.plot(runs, [place] * len(runs), "o", ms=5, mfc=colour, mec="none", alpha=0.45)
            median = row.values["decode"]
            axes.plot([median] * 2, [place - 0.32, place + 0.32], color=colour, lw=2)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        labels = [
            f"{short(row.cell.name, 18 if frame.narrow else 30)}  {row.number}" for row in rows
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
    return PictureSpec("repeats", title, f"{title}, {len(rows)} variants.", caption, height, draw)


def _runs(row: Row) -> tuple[float, ...]:
    measured = None if row.cell.speed is None else row.cell.speed.decode_tokens_per_s
    return () if measured is None else measured.repeats


def training(report: Report) -> PictureSpec | None:
    """Loss over the steps of every fine-tune, once for each."""
    curves = dict(_curves(report))
    if not curves:
        return None
    curves = dict(list(curves.items())[:MOST_CURVES])
    caption = "Thin lines show the training loss. Lines with dots show the loss on held-out text."

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
            axes.plot([], [], color=colour, lw=2, label=short(label, 26 if frame.narrow else 48))
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
    return PictureSpec("training", title, alt, caption, 360, draw)


def _curves(report: Report) -> Iterator[tuple[str, tuple[TrainingPoint, ...]]]:
    """(chain up to the stage, curve), each different curve once."""
    for row in report.rows:
        for stage, curve in (row.cell.training or {}).items():
            chain = row.cell.chain
            stages = chain[: chain.index(stage) + 1] if stage in chain else (stage,)
            if curve and curve[-1].step >= FEWEST_STEPS:
                yield "+".join(stages), curve


def _columns(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    pairs = list(points)
    return [x for x, _ in pairs], [y for _, y in pairs]
