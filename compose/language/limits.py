"""The section `limits`: what a step and a cell may take of the machine. No part of any key.

`SECTION` is how every section of a file is read: frozen, unknown keys refused.
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
"""The settings of the models that a pipeline file is read into."""


Amount = Annotated[float, Field(gt=0)]


class _Section(BaseModel):
    model_config = SECTION


class Limit(_Section):
    """Limits of one step or one cell; a limit that is left out does not apply."""

    seconds: Amount | None = None
    """How long one of its processes may work, in seconds. Time in which a process waits for its
    turn is not counted."""

    memory_mb: Amount | None = None
    """The most memory that one of its processes may hold, in megabytes. It is looked at once a
    second."""


class Limits(_Section):
    """Limits at which a step or a cell is ended. Its result names the limit; the others go on, and
    `gateskip run --retry-failed` tries it again."""

    step: Limit = Limit()
    """Limits of making one model folder, and of loading it again."""

    cell: Limit = Limit()
    """Limits of loading and scoring one cell, and of its turns of speed."""
