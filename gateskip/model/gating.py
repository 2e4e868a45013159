"""What a pass over the model asks of gates: a Protocol, and two numbers that all passes share."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Literal, Protocol

from torch import Tensor

ANCHORS = 1
"""Tokens at the start of a sequence that enter every branch, whatever their gates say.

Models park surplus attention on the first token, through activations that a few branches build up
there (arXiv 2309.17453). Skip one of these and every later token collapses, so it is never done.
"""

NEVER_SKIP = -math.inf
"""The threshold of a branch that every token enters."""

Place = Literal["after", "before"]
"""Where a gate that scales is applied: to a branch's output, or to its input."""


class BranchShortcuts(Protocol):
    """What skipped tokens get instead of a branch's output."""

    def __call__(self, branch: int, x: Tensor) -> Tensor:
        """x [..., H], what the branch reads -> [..., H]."""
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
        """What skipped branches add; None is nothing."""
        ...

    def logit(self, branch: int, x: Tensor) -> Tensor:
        """Importance of each token at a branch, as a logit. x [..., H] -> [...], in float32."""
        ...

    def gate(self, branch: int, x: Tensor) -> Tensor:
        """What a branch is multiplied by. x [..., H] -> [..., 1] or [..., H], between 0 and 1."""
        ...

    def opened(self) -> AbstractContextManager[None]:
        """A context in which the parameters of all branches come from one cut."""
        ...

    def macs(self) -> int:
        """Multiply-adds that one branch's gate spends on one token."""
        ...
