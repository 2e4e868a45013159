"""A page that colours a text's tokens by how much compute each of them got."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def to_html(found: dict[str, Any], name: str) -> str:
    """The page, which needs nothing else. `found` is what `gateskip insight --json` prints."""
    shares = [token["compute"] for token in found["tokens"]]
    low, high = min(shares), max(shares)
    room = (high - low) or 1.0
    environment = Environment(
        loader=PackageLoader("reports"), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("insight.html.j2").render(
        name=name,
        budget=found["budget"],
        tokens=[token | {"heat": (token["compute"] - low) / room} for token in found["tokens"]],
        kinds=found["summary"]["kinds"],
        low=low,
        high=high,
        mean=sum(shares) / len(shares),
    )
