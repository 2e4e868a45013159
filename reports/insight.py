"""The token heat map: a page that colours a text's tokens by the compute that each of them got."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reports.templating import environment
from reports.text import plain_unless_markup


def to_html(insight: dict[str, Any], name: str) -> str:
    """The page, which needs no other file. `insight` is what `gateskip insight --json` prints."""
    shares = [token["compute"] for token in insight["tokens"]]
    jinja = environment(autoescape=True)
    jinja.finalize = plain_unless_markup
    return jinja.get_template("insight.html.j2").render(
        name=name,
        budget=insight["budget"],
        tokens=[
            token | {"intensity": intensity(token["compute"], shares)}
            for token in insight["tokens"]
        ],
        kinds=insight["summary"]["kinds"],
        low=min(shares),
        high=max(shares),
        mean=sum(shares) / len(shares),
    )


def intensity(share: float, shares: Sequence[float]) -> float:
    """A token's place in the colour scale: 0 for its text's least share, 1 for the largest."""
    low, high = min(shares), max(shares)
    return (share - low) / (high - low) if high > low else 1.0
