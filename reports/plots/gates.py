"""The heat map of gates: which share of each kind of token enters each branch."""

from __future__ import annotations

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reports.load import Report
from reports.plots.canvas import Frame, PictureSpec


def gates(report: Report) -> PictureSpec | None:
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
    return PictureSpec("gates", title, alt, caption, 120 + 34 * len(names), draw)
