"""The interface between gates and passes: Protocols, and two constants that all passes share."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Literal, Protocol

from torch import Tensor

ANCHORS = 1
"""Tokens at the start of a sequence that enter every branch, whatever their gates say.

Models direct surplus attention to the first token, through activations that a few branches build up
there (arXiv 2309.17453). Skipping one of these branches would break every later token.
"""

NEVER_SKIP = -math.inf
"""The threshold of a branch that every token enters."""

Place = Literal["after", "before"]
"""Where a gate that scales is applied: to a branch's output, or to its input."""


class BranchShortcuts(Protocol):
    """The output of skipped branches."""

    def __call__(self, branch: int, x: Tensor) -> Tensor:
        """x [..., H], the branch's input -> [..., H]."""
        ...

    def macs(self, branch: int) -> int:
        """Multiply-adds of one skipped token at a branch."""
        ...


class TokenGates(Protocol):
    """One gate for each branch: how much the branch matters to each token."""

    scales: bool
    place: Place

    @property
    def shortcuts(self) -> BranchShortcuts | None:
        """The output of skipped branches; None for zero."""
        ...

    def logit(self, branch: int, x: Tensor) -> Tensor:
        """Importance of each token at a branch, as a logit. x [..., H] -> [...], in float32."""
        ...

    def gate(self, branch: int, x: Tensor) -> Tensor:
        """The factor of a branch, 0 to 1. x [..., H] -> [..., 1] or [..., H]."""
        ...

    def opened(self) -> AbstractContextManager[None]:
        """A context in which the parameters of all branches come from one `unbind`."""
        ...

    def macs(self) -> int:
        """Multiply-adds that one branch's gate spends on one token."""
        ...
