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
    """Limits on the process that makes one model folder (a step) or measures one variant (a
    cell)."""

    seconds: Amount | None = None
    """Maximum working time of one process, in seconds. The time that a process waits for its turn
    does not count as working time."""

    memory_mb: Amount | None = None
    """Maximum memory of one process, in megabytes; the memory is checked once a second."""


class Limits(_Section):
    """Limits that stop the making of a model folder (a step) or the measurement of a variant (a
    cell). If a limit stops a process, the results name the limit, and the run continues with the
    others. `gateskip run --retry-failed` repeats the work that a limit stopped."""

    step: Limit = Limit()
    """Limits for making one model folder, and for loading the folder again as a check."""

    cell: Limit = Limit()
    """Limits for loading one variant and measuring its quality and speed."""
