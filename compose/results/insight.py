"""Which tokens entered which branches."""

from __future__ import annotations

from compose.results.record import Record


class BranchUse(Record):
    """What one branch's gate did, averaged over tokens."""

    gate: float
    """Mean gate, 0 to 1."""

    kept: float
    """Share of tokens that entered."""


class GroupUse(Record):
    """What a group of tokens got."""

    tokens: int
    """How many were seen."""

    compute: float
    """Mean share of the branches' multiply-adds, 0 to 1."""

    kept: tuple[float, ...]
    """Share of the group that entered each branch, in the order branches run."""


class Insight(Record):
    """Which tokens got how much compute, on the text of the perplexity."""

    branches: tuple[BranchUse, ...]
    """Attention 0, MLP 0, attention 1, ..."""

    kinds: dict[str, GroupUse]
    """Kind of token (first, punctuation, content, ...) -> its use."""

    positions: tuple[GroupUse, ...]
    """Stretches of equal length, from the beginning of a text to its end."""
