"""How a picture is drawn: its themes, its sizes, and its rendering as SVG and PNG."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"


@dataclass(frozen=True)
class Theme:
    """Colours of one theme. `series` is Okabe and Ito's palette, tuned to the ground it lies on."""

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
class PictureSpec:
    """A picture before it is drawn."""

    key: str
    title: str
    alt: str
    caption: str
    height: int
    draw: Callable[[Figure, Frame], None]


def render(spec: PictureSpec) -> Picture:
    """Draw a picture in every theme and width, and as PNG."""
    frames = {
        f"{theme.name}-{'narrow' if narrow else 'wide'}": Frame(
            theme, 340 if narrow else 560, narrow
        )
        for theme in (LIGHT, DARK)
        for narrow in (False, True)
    }
    wide = frames["light-wide"]
    return Picture(
        key=spec.key,
        title=spec.title,
        alt=spec.alt,
        caption=spec.caption,
        sources={name: _svg(spec, frame) for name, frame in frames.items()},
        width=wide.width,
        height=spec.height,
        png=_draw(spec, wide, "png", dpi=192),
    )


def _svg(spec: PictureSpec, frame: Frame) -> str:
    text = _draw(spec, frame, "svg", dpi=96).decode("utf-8")
    text = text.replace("'DejaVu Sans'", FONTS).replace("DejaVu Sans", FONTS)
    packed = base64.b64encode(text.encode("utf-8")).decode("ascii")
    return f"data:image/svg+xml;base64,{packed}"


def _draw(spec: PictureSpec, frame: Frame, format: str, dpi: int) -> bytes:
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
        ground = theme.ground if format == "png" else "none"
        figure = Figure(figsize=size, dpi=96, layout="constrained", facecolor=ground)
        FigureCanvasAgg(figure)
        spec.draw(figure, frame)
        out = io.BytesIO()
        metadata = {"Date": None} if format == "svg" else {"Software": None}
        figure.savefig(out, format=format, dpi=dpi, metadata=metadata)
        return out.getvalue()
