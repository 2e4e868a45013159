"""The heat map of gates: which share of each kind of token enters each branch."""

from __future__ import annotations

from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
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
        f"Share of tokens of each kind for which a branch is computed, in variant {row.number} "
        f"({row.cell.name}). Full colour means all tokens, and no colour means no token."
    )

    def draw(figure: Figure, frame: Frame) -> None:
        both = figure.subplots(2, 1, sharex=True)
        for place, kind in enumerate(("attention", "MLP")):
            axes = both[place]
            axes.add_collection(_tiles([s[place::2] for s in shares], frame.theme.series[1]))
            axes.set_xlim(-0.5, layers - 0.5)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_yticks(range(len(names)), names, color=frame.theme.ink)
            axes.set_title(kind, loc="left", fontsize=frame.text, color=frame.theme.ink)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        both[1].set_xlabel("layer")
        both[1].xaxis.set_major_locator(MaxNLocator(min(layers, 8), integer=True))

    title = "Tokens for which each branch is computed"
    alt = f"{title}: kept shares of {len(names)} kinds of tokens at {layers} layers."
    return PictureSpec("gates", title, alt, caption, 120 + 34 * len(names), draw)


def _tiles(shares: list[list[float]], colour: str) -> PatchCollection:
    """A square a branch, as opaque as its share: an image would not follow the page's theme."""
    tiles = [
        Rectangle((x - 0.5, y - 0.5), 1, 1)
        for y, line in enumerate(shares)
        for x in range(len(line))
    ]
    faces = [to_rgba(colour, share) for line in shares for share in line]
    return PatchCollection(tiles, facecolors=faces, linewidths=0)
