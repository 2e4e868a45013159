"""Where two answers to a question part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def common_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many tokens or characters two answers share from the start.

    >>> common_prefix([5, 6, 7, 2], [5, 6, 8])
    2
    """
    pairs = zip(first, second, strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    return min(len(first), len(second)) if shared is None else shared
