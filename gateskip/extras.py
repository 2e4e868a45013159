"""Names the extra that installs a missing library which the core does not need. Imports no
library."""

from __future__ import annotations

from importlib.util import find_spec

EXTRA = "compress"
"""The extra with the libraries of packed weights and of training."""


def need(purpose: str, *libraries: str, extra: str = EXTRA) -> None:
    """Raise early where one of `libraries` (import names), which `purpose` needs, is not installed.

    Raises ModuleNotFoundError for the first one that is missing; its message names
    `extra`.
    """
    for library in libraries:
        if find_spec(library) is None:
            raise ModuleNotFoundError(
                f"{purpose} needs {library}, which is not installed: pip install"
                f" 'gateskip-compose[{extra}]'",
                name=library,
            )
