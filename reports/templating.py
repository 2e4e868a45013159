"""The template environment that HTML and Markdown share: strict, with filters for numbers."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from compose.units import bytes_text, duration_text
from reports.tables import numbers


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
        "number": numbers.number,
        "count": numbers.count,
        "percent": numbers.percent,
        "ratio": numbers.ratio,
        "times": numbers.times,
        "size": bytes_text,
        "duration": duration_text,
        "divergence": numbers.divergence,
    }
    return jinja
