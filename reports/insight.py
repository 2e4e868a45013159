"""A page that colours a text's tokens by how much compute each of them got."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def to_html(found: dict[str, Any], name: str) -> str:
    """The page, which needs nothing else. `found` is what `gateskip insight --json` prints."""
    shares = [token["compute"] for token in found["tokens"]]
    environment = Environment(
        loader=PackageLoader("reports"), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("insight.html.j2").render(
        name=name,
        budget=found["budget"],
        tokens=[token | {"heat": heat(token["compute"], shares)} for token in found["tokens"]],
        kinds=found["summary"]["kinds"],
        low=min(shares),
        high=max(shares),
        mean=sum(shares) / len(shares),
    )


def heat(share: float, shares: Sequence[float]) -> float:
    """Where a share lies between the least and the most of its text, 0 to 1."""
    low, high = min(shares), max(shares)
    return (share - low) / (high - low) if high > low else 1.0
