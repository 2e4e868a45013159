"""Names the extra that installs a library which the core does without. Imports no library."""

from __future__ import annotations

from importlib.util import find_spec

EXTRA = "gateskip-compose[compress]"
"""What installs the libraries of packed weights and of training."""


def need(purpose: str, *libraries: str) -> None:
    """Refuse early, and by name, what `libraries` (import names) are needed for.

    Raises ModuleNotFoundError for the first one that is not installed; its message names the extra.
    """
    for library in libraries:
        if find_spec(library) is None:
            raise ModuleNotFoundError(
                f"{purpose} needs {library}, which is not installed: pip install '{EXTRA}'",
                name=library,
            )
