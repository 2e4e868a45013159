"""The section `limits`: time and memory that a step or a cell may use. Limits change no key.

`SECTION` holds the rules by which every section of a file is read: frozen, unknown keys refused.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

SECTION = ConfigDict(
    frozen=True,
    extra="forbid",
    use_attribute_docstrings=True,
    allow_inf_nan=False,
    populate_by_name=True,
)
"""pydantic's settings for every section of a pipeline file."""


Amount = Annotated[float, Field(gt=0)]


class _Section(BaseModel):
    model_config = SECTION


class Limit(_Section):
    """Limits for making one model folder (a step), or for measuring one variant (a cell). Without a
    value, there is no limit."""

    seconds: Amount | None = None
    """Maximum working time of one process, in seconds. The time in which the process waits for its
    turn does not count."""

    memory_mb: Amount | None = None
    """Maximum memory of one process, in megabytes, checked once a second."""


class Limits(_Section):
    """Limits that stop a step (making a model folder) or a cell (measuring a variant). The result
    names the exceeded limit, and the other steps and cells continue. `gateskip run --retry-failed`
    tries again."""

    step: Limit = Limit()
    """Limits for making one model folder, and for loading it again as a check."""

    cell: Limit = Limit()
    """Limits for loading, scoring and timing one variant."""
