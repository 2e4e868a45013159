"""The template environment that HTML and Markdown share: strict, with filters for numbers."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from compose.numbers import PAGE, bytes_text, duration_text, three_decimals
from reports.tables.speculation import divergence


def environment(*, autoescape: bool) -> Environment:
    """An environment in which a name that is not there is an error."""
    jinja = Environment(
        loader=PackageLoader("reports"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters |= {
        "number": PAGE.number,
        "count": PAGE.whole,
        "percent": PAGE.percent,
        "ratio": three_decimals,
        "times": PAGE.times,
        "size": bytes_text,
        "duration": duration_text,
        "divergence": divergence,
    }
    return jinja
