"""The message and the exit code of an error that ends a command."""

from __future__ import annotations

from compose.errors import ComposeError, StepError
from compose.extras import missing_extra


def message_and_code(error: Exception) -> tuple[str, int]:
    """The message and the exit code of what ended a command."""
    missing = missing_extra(error) if isinstance(error, ModuleNotFoundError) else None
    cause = missing or error
    if isinstance(cause, ComposeError):
        return str(cause), cause.exit_code
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}", StepError.exit_code
    why = f"{type(error).__name__}: {error}"
    return (
        f"{why}\n  fix: this is a bug in gateskip; `gateskip --debug ...` shows where it happened",
        1,
    )
