"""Every exception of this package, and the context that is added to one on its way out.

ComposeError            the root: a message, and how to fix it
├── UserError           the user can fix it (exit code 2); also a ValueError
│   ├── PipelineError   the YAML file is not valid
│   ├── PlanError       the file is valid, but its chains do not make a plan
│   │   └── RuleBroken  a stage breaks a rule on the order of stages; carries its name
│   ├── AssetError      a model or data set is not available
│   └── ArtifactError   a folder does not hold what it should
└── StepError           a step or cell failed while it ran (exit code 1)
    └── WorkerLost      its process ended without an answer; carries how
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

MOST_LISTED = 200
"""Limits of a hint: how many names it compares and lists, and how many letters of a name."""


class ComposeError(Exception):
    """Root of the tree: one message, how to fix it, and where it happened.

    `fix` is a sentence on what to do. `file`, `line` and `column` (from 1), `stage` and `cell` are
    the place. A raiser passes those that it knows; `context` adds the others on the way out.
    """

    exit_code: ClassVar[int] = 1
    """Exit code of the command that this error ends."""

    def __init__(
        self,
        message: str,
        *,
        fix: str | None = None,
        file: str | Path | None = None,
        line: int | None = None,
        column: int | None = None,
        stage: str | None = None,
        cell: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix
        self.file = None if file is None else str(file)
        self.line = line
        self.column = column
        self.stage = stage
        self.cell = cell

    def headline(self) -> str:
        """The message without place and fix."""
        return self.message

    def place(self) -> str:
        """`file:line:column`, as far as known; empty when the file is unknown."""
        if self.file is None:
            return ""
        numbers = [] if self.line is None else [self.line]
        if numbers and self.column is not None:
            numbers.append(self.column)
        return ":".join([self.file, *map(str, numbers)])

    def text(self) -> str:
        """The message with its place, without the fix."""
        roles = [("cell", self.cell), ("stage", self.stage)]
        who = ", ".join(f"{role} {name!r}" for role, name in roles if name is not None)
        return ": ".join(part for part in (self.place(), who, self.headline()) if part)

    def __str__(self) -> str:
        text = self.text()
        return text if self.fix is None else f"{text}\n  fix: {self.fix}"


class UserError(ComposeError, ValueError):
    """A mistake that the user can fix."""

    exit_code = 2


class PipelineError(UserError):
    """The pipeline file is not valid: it has a key, a name or a value that the language does not
    know."""


class PlanError(UserError):
    """The pipeline file is valid, but no plan can be made of it."""


class RuleBroken(PlanError):
    """A stage breaks a rule on the order of stages; `rule` is its name in `RULES` of the stages."""

    def __init__(self, rule: str, message: str, *, fix: str | None = None) -> None:
        super().__init__(message, fix=fix)
        self.args = (rule, message)  # what pickle rebuilds the error from
        self.rule = rule

    def headline(self) -> str:
        """The message with the rule's name."""
        return f"{self.message} [rule {self.rule}]"


class AssetError(UserError):
    """A model or data set is not available; the message lists what was tried."""


class ArtifactError(UserError):
    """A folder does not hold the artifact that it should."""


class StepError(ComposeError):
    """A step or a cell failed while it ran."""


class WorkerLost(StepError):
    """A worker ended without an answer: it crashed, was killed, hit a limit, or its node was lost.

    `ending` says how, as far as known: a dictionary with the fields of
    `compose.processes.endings.Ending`.
    """

    def __init__(self, message: str, ending: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.ending = ending or {}


@contextmanager
def context(
    *,
    file: str | Path | None = None,
    line: int | None = None,
    column: int | None = None,
    stage: str | None = None,
    cell: str | None = None,
) -> Iterator[None]:
    """Add the place to a `ComposeError` that passes through. Places that it states already do not
    change.

    A line belongs to a file: `line` and `column` are added only to an error whose file was unknown.

    >>> with context(file="a.yaml", line=3):
    ...     raise PlanError("no chain")
    Traceback (most recent call last):
    compose.errors.PlanError: a.yaml:3: no chain
    """
    try:
        yield
    except ComposeError as error:
        if error.file is None and error.line is None:
            error.line, error.column = line, column
        if error.file is None and file is not None:
            error.file = str(file)
        error.stage = stage if error.stage is None else error.stage
        error.cell = cell if error.cell is None else error.cell
        raise


def suggest(name: str, candidates: Iterable[str]) -> str:
    """A hint for an unknown `name`: the most similar known name, if one is similar, then all names.

    >>> suggest("gatess", ["gates", "heal"])
    "did you mean 'gates'? known: gates, heal"
    """
    names = list(candidates)
    if not names:
        return "none are known here"
    more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    names = names[:MOST_LISTED]
    lowered = {option.lower(): option for option in names}
    near = difflib.get_close_matches(name[:MOST_LISTED].lower(), lowered, n=1, cutoff=0.6)
    listing = f"known: {', '.join(names)}{more}"
    return f"did you mean {lowered[near[0]]!r}? {listing}" if near else listing


def shortened(text: str, most: int = 100) -> str:
    """Text for a message: at most `most` characters of it, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."
