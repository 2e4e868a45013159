"""Places in a pipeline file, their lines, and problems that point at them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from compose.errors import ComposeError

Loc = tuple[str | int, ...]
"""A place in the file: keys and indices from the top."""
Mark = tuple[int, int]
"""Line and column, from 1."""
Error = TypeVar("Error", bound=ComposeError)


@dataclass(frozen=True)
class Problem:
    """A mistake in a pipeline, and its place."""

    loc: Loc
    message: str
    fix: str | None = None
    at_key: bool = False
    """Whether the problem is the key at `loc`, not its value."""


@dataclass(frozen=True)
class SourceMap:
    """Lines and columns (from 1) of everything in a YAML file."""

    file: str
    values: Mapping[Loc, Mark] = field(default_factory=dict)
    keys: Mapping[Loc, Mark] = field(default_factory=dict)

    def locate(self, error: Error, loc: Loc, *, at_key: bool = False) -> Error:
        """Write file, line and column of `loc` into `error`, and return it.

        Where the file does not state `loc`, the nearest place around it is taken.
        """
        marks = self.keys if at_key else self.values
        while loc and loc not in marks:
            loc, marks = loc[:-1], self.keys
        error.file = self.file
        error.line, error.column = marks.get(loc) or self.values.get(()) or (1, 1)
        return error
