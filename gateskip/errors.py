"""What a file or folder is refused with. Imports no library."""

from __future__ import annotations


class FormatError(ValueError):
    """A file is not what its name says: damaged, of another version, or made for another model."""
