"""Shortcuts: what a token gets at a branch that it skips, for a few percent of the branch's price.

A branch is not nothing where it is least needed: a third to a half of what it adds, measured on the
tokens that would skip it, is a linear function of what it reads, and of low rank. So a skipped
branch adds U (V x) + c, which a closed form fits before any training (linear shortcuts between
layers: arXiv 2303.09435; reduced-rank regression: Izenman 1975). The published method passes the
hidden state on unchanged; without shortcuts, so do we. They act on skipped tokens only: the model
at full compute stays what it was.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gateskip.gates.stacked import Stacked

STORED = torch.float16


class Shortcuts(Stacked):
    """U (V x) + c a branch: down [branches, r, H], up [branches, H, r], bias [branches, H].

    Ranks may differ: r is the largest, and what a branch of a smaller one does not use is 0.
    """

    def __init__(self, branches: int, hidden_size: int, rank: int | Sequence[int]) -> None:
        """`rank` is that of all branches, or that of each.

        Raises ValueError where that is not one for each branch, or one is below 0.
        """
        super().__init__()
        self.ranks = (rank,) * branches if isinstance(rank, int) else tuple(rank)
        if len(self.ranks) != branches or min(self.ranks, default=0) < 0:
            raise ValueError(f"ranks {self.ranks} for {branches} branches")
        rank = max(self.ranks, default=0)
        self.down = nn.Parameter(torch.zeros(branches, rank, hidden_size))
        self.up = nn.Parameter(torch.zeros(branches, hidden_size, rank))
        self.bias = nn.Parameter(torch.zeros(branches, hidden_size))

    def of(self, branch: int) -> tuple[Tensor, Tensor, Tensor]:
        """A branch's down [r, H], up [H, r] and bias [H], of its own rank."""
        down, up, bias = (self.part(name, branch) for name in ("down", "up", "bias"))
        own = self.ranks[branch]
        return (down, up, bias) if own == len(down) else (down[:own], up[:, :own], bias)

    def forward(self, branch: int, x: Tensor) -> Tensor:
        """What skipping tokens get at a branch that reads x [..., H] -> [..., H], as x's dtype."""
        down, up, bias = self.of(branch)
        narrow = F.linear(x, down.to(x.dtype))
        return F.linear(narrow, up.to(narrow.dtype), bias.to(narrow.dtype))

    def settle(self) -> None:
        """Round to what a file keeps (float16), so that loading changes nothing."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(parameter.to(STORED))

    def macs(self, branch: int) -> int:
        """Multiply-adds of one skipping token at a branch: 2 r H."""
        return 2 * self.ranks[branch] * self.bias.shape[1]

    def rows(self, kept: list[int]) -> Shortcuts:
        """Those of some branches only, in the given order."""
        chosen = Shortcuts(len(kept), self.bias.shape[1], [self.ranks[branch] for branch in kept])
        with torch.no_grad():
            for each, own in enumerate(kept):
                for to, part in zip(chosen.of(each), self.of(own), strict=True):
                    to.copy_(part)
        return chosen
