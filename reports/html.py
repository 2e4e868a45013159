"""A report as one HTML page that needs nothing else.

Everything that comes from the results is escaped, once, where it enters the page: names, reasons
and tracebacks are text, whatever they hold. The page's policy lets no other script run than ours.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from reports.plots.theme import css_variables
from reports.tables import columns
from reports.templating import environment
from reports.text import anchor, breakable, plain_unless_markup


def page(template: str, facts: Mapping[str, Any]) -> str:
    """The page that a template makes of `facts`."""
    jinja = environment(autoescape=True)
    jinja.finalize = plain_unless_markup
    jinja.filters |= {"breakable": breakable, "anchor": anchor, "drawn": Markup}
    script = asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return jinja.get_template(template).render(
        facts,
        style=Markup(asset("style.css")),
        plot_variables=Markup(css_variables()),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        signs=columns.SIGNS,
    )


def asset(name: str) -> str:
    """The text of a file beside the templates."""
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8").strip()
