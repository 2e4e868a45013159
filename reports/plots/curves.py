"""Skipping curves: accuracy against compute saved, by the published definition and by ours."""

from __future__ import annotations

from matplotlib.figure import Figure

from compose.results.parts import SkippingFigures
from reports.load import Report
from reports.plots.canvas import Frame, PictureSpec, short

MOST = 6  # curves in one picture: as many as there are colours


def curves(report: Report) -> PictureSpec | None:
    """Each family of cells that skip with the same weights: full by ours, dashed as published."""
    shown = [
        (curve, curve.ours)
        for curve in report.results.skipping_curves or ()
        if curve.ours is not None and len(curve.ours.points) > 1
    ][:MOST]
    if not shown:
        return None
    caption = (
        "Full lines show the net compute saved. Dashed lines leave out the cost of gates, as in the"
        " GateSkip paper."
        " The horizontal line is 90 % of the dense model's score, for the first curve."
    )

    def draw(figure: Figure, frame: Frame) -> None:
        axes = figure.add_subplot()
        for place, (curve, ours) in enumerate(shown):
            colour = frame.theme.series[place % len(frame.theme.series)]
            axes.plot(*_line(ours), "-o", color=colour, ms=4, lw=1.5)
            if curve.published is not None:
                axes.plot(*_line(curve.published), "--", color=colour, lw=1, alpha=0.8)
            name = f"{short(curve.weights, 30)}, {curve.kind}"
            axes.plot([], [], color=colour, lw=2, label=name)
        level = 90 * shown[0][1].reference
        axes.axhline(level, color=frame.theme.muted, lw=1, ls=(0, (4, 3)), zorder=1)
        axes.set_xlabel("compute saved, %")
        axes.set_ylabel("mean task score, %")
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.legend(frameon=False, labelcolor=frame.theme.ink, fontsize=frame.text - 0.5)

    title = "Accuracy at each share of skipped compute"
    alt = f"{title}: {', '.join(curve.weights for curve, _ in shown)}. {caption}"
    return PictureSpec("curves", title, alt, caption, 360, draw)


def _line(figures: SkippingFigures) -> tuple[list[float], list[float]]:
    return (
        [100 * point.saved for point in figures.points],
        [100 * point.accuracy for point in figures.points],
    )
