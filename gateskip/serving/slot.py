"""A row of the cache that many requests share."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass
class Slot:
    """A row of the cache."""

    number: int
    prompt: tuple[int, ...] = ()
    read: int = 0
    """Tokens of the prompt whose keys and values the row has, as prefill computes them."""
    settings: Hashable = None
    """How they skipped; None for full compute."""
    busy: bool = False
    released: int = 0
    """How many rows had been released before it."""
    taken: int = 0
    """How often it was taken or forgotten: until that changes, its prompt stays in the cache."""
    blocks: Sequence[str] = ()
    """Names of the blocks of its prompt on disk."""
    looks: bool = True
    """Whether its next block may be on disk."""
