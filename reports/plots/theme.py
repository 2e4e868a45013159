"""The colours of the pictures, light and dark, and how the page's CSS names them."""

from __future__ import annotations

from dataclasses import dataclass

FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"


@dataclass(frozen=True)
class Theme:
    """Colours of one theme. `series` is Okabe and Ito's palette, tuned to the ground it lies on."""

    ground: str
    ink: str
    muted: str
    grid: str
    on_mark: str
    peer: str
    series: tuple[str, ...]

    def variables(self) -> dict[str, str]:
        """Colour -> its name in the page; every colour is there once."""
        named = ("ground", "ink", "muted", "grid", "on_mark", "peer")
        colours = {getattr(self, name): name.replace("_", "-") for name in named}
        return colours | {colour: f"s{place}" for place, colour in enumerate(self.series)}


LIGHT = Theme(
    ground="#ffffff",
    ink="#1d2329",
    muted="#5d6771",
    grid="#e3e7ea",
    on_mark="#fefefe",
    peer="#b3123f",
    series=("#3d4852", "#0072b2", "#c2570c", "#00805c", "#a8487f", "#8a6d00"),
)
DARK = Theme(
    ground="#171b20",
    ink="#e8ebee",
    muted="#a2acb6",
    grid="#2e353d",
    on_mark="#10151a",
    peer="#ff8aa3",
    series=("#c3ccd5", "#5bb8ec", "#f59a52", "#3fcf9f", "#e497c4", "#e0c14c"),
)


def css_variables() -> str:
    """`--p-ink: light-dark(#1d2329, #e8ebee); ...` for the page's style sheet."""
    light, dark = LIGHT.variables(), {name: c for c, name in DARK.variables().items()}
    return " ".join(f"--p-{name}: light-dark({c}, {dark[name]});" for c, name in light.items())
