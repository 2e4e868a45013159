"""Reports of a run: tables, Pareto fronts and pictures, as HTML and as Markdown."""

from __future__ import annotations

from reports.load import Report, Row, pareto, read
from reports.render import Rendered, render

__all__ = ["Rendered", "Report", "Row", "pareto", "read", "render"]
