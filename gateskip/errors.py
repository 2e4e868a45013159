"""The error for a file or folder that is refused. Imports no library."""

from __future__ import annotations


class FormatError(ValueError):
    """A file does not have the content that its name promises: it is damaged, of another version,
    or made for another model."""
