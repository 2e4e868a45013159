"""Common settings of all sections of the pipeline language: frozen, unknown keys refused."""

from __future__ import annotations

from pydantic import ConfigDict

SECTION = ConfigDict(
    frozen=True,
    extra="forbid",
    use_attribute_docstrings=True,
    allow_inf_nan=False,
    populate_by_name=True,
)
"""The settings of the models that a pipeline file is read into."""
