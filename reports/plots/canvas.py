"""How a picture is drawn: its sizes, and its rendering as SVG for the page, SVG file and PNG."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from html import unescape
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from reports.plots.svg import inline, whole
from reports.plots.theme import DARK, LIGHT, Theme

Width = Literal["wide", "narrow"]

NAME = 34
"""Letters of a name in a wide picture; longer ones are cut."""


def short(name: str, most: int) -> str:
    """A name of at most so many letters, without what an SVG cannot hold."""
    clean = "".join(letter if letter.isprintable() else "\ufffd" for letter in name)
    return clean if len(clean) <= most else f"{clean[: most - 1]}…"


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
    """A drawn picture. `inline` is the page's `<svg>` of each width; `svg` is a whole file."""

    key: str
    title: str
    alt: str
    caption: str
    inline: dict[Width, str]
    svg: bytes
    png: bytes
    names: tuple[str, ...] = ()
    """Number and name of each mark, where marks are numbered."""


@dataclass(frozen=True)
class PictureSpec:
    """A picture before it is drawn. `marks` is row number -> (cell's name, what its mark says)."""

    key: str
    title: str
    alt: str
    caption: str
    height: int
    draw: Callable[[Figure, Frame], None]
    marks: Mapping[int, tuple[str, str]] = field(default_factory=dict)


def render(spec: PictureSpec) -> Picture:
    """Draw a picture in both widths for the page, and once each as SVG and PNG file."""
    wide, narrow = Frame(LIGHT, 560, narrow=False), Frame(LIGHT, 340, narrow=True)
    drawn = {w: _text(spec, frame) for w, frame in (("wide", wide), ("narrow", narrow))}
    unnamed = _unnamed(spec, drawn["wide"])
    more = f" Marks without a name: {', '.join(unnamed)}." if unnamed else ""
    return Picture(
        key=spec.key,
        title=spec.title,
        alt=spec.alt,
        caption=spec.caption + more,
        inline={
            "wide": inline(drawn["wide"], f"{spec.key}-w-", spec.marks),
            "narrow": inline(drawn["narrow"], f"{spec.key}-n-", spec.marks),
        },
        svg=whole(drawn["wide"]).encode("utf-8"),
        png=_draw(spec, wide, "png", dpi=192, ground=LIGHT.ground),
        names=tuple(_numbered(number, name) for number, (name, _) in spec.marks.items()),
    )


def _numbered(number: int, name: str) -> str:
    return f"{number}\u00a0{name}"


def _unnamed(spec: PictureSpec, svg: str) -> list[str]:
    """Number and name of the marks whose names are not in the picture."""
    texts = {unescape(text).partition(" ↓ ")[0] for text in re.findall(r">([^<>]+)</text>", svg)}
    return [
        _numbered(number, name)
        for number, (name, _) in spec.marks.items()
        if short(name, NAME) not in texts
    ]


def dark_png(spec: PictureSpec) -> bytes:
    """The picture as a PNG file for a dark page."""
    return _draw(spec, Frame(DARK, 560, narrow=False), "png", dpi=192, ground=DARK.ground)


def _text(spec: PictureSpec, frame: Frame) -> str:
    return _draw(spec, frame, "svg", dpi=96, ground="none").decode("utf-8")


def _draw(spec: PictureSpec, frame: Frame, format: str, dpi: int, ground: str) -> bytes:
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
        "svg.hashsalt": spec.key,
    }
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing"
        )  # the page's fonts may have it
        size = (frame.width / 96, spec.height / 96)
        figure = Figure(figsize=size, dpi=96, layout="constrained", facecolor=ground)
        FigureCanvasAgg(figure)
        spec.draw(figure, frame)
        out = io.BytesIO()
        metadata = {"Date": None} if format == "svg" else {"Software": None}
        figure.savefig(out, format=format, dpi=dpi, metadata=metadata)
        return out.getvalue()
