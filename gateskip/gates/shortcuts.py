"""Shortcuts: a low-rank output for skipped branches, at a few percent of a branch's cost.

Even where a branch matters least its output is not zero. A third to a half of it, measured on the
tokens that would skip the branch, is a linear function of its input, of low rank. So a skipped
branch adds U (V x) + c, which a closed form fits before any training (linear shortcuts between
layers: arXiv 2303.09435; reduced-rank regression: Izenman 1975). The published method, and gates
without shortcuts, pass the hidden state on unchanged. Shortcuts act on skipped tokens only: the
model at full compute does not change.
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

    Ranks may differ: r is the largest, and the unused part of branches with smaller ones is 0.
    """

    def __init__(self, branches: int, hidden_size: int, rank: int | Sequence[int]) -> None:
        """`rank` is one for all branches, or a sequence with one for each.

        Raises ValueError where a sequence has not one for each branch, or a rank is below 0.
        """
        super().__init__()
        self.ranks = (rank,) * branches if isinstance(rank, int) else tuple(rank)
        if len(self.ranks) != branches or min(self.ranks, default=0) < 0:
            raise ValueError(
                f"{branches} branches need as many ranks of at least 0, not {self.ranks}"
            )
        rank = max(self.ranks, default=0)
        self.down = nn.Parameter(torch.zeros(branches, rank, hidden_size))
        self.up = nn.Parameter(torch.zeros(branches, hidden_size, rank))
        self.bias = nn.Parameter(torch.zeros(branches, hidden_size))

    def of(self, branch: int) -> tuple[Tensor, Tensor, Tensor]:
        """A branch's down [r, H], up [H, r] and bias [H], of its own rank."""
        down, up, bias = (self.part(name, branch) for name in ("down", "up", "bias"))
        rank = self.ranks[branch]
        return (down, up, bias) if rank == len(down) else (down[:rank], up[:, :rank], bias)

    def forward(self, branch: int, x: Tensor) -> Tensor:
        """A skipped branch's output: x [..., H], its input -> [..., H], in x's dtype."""
        down, up, bias = self.of(branch)
        narrow = F.linear(x, down.to(x.dtype))
        return F.linear(narrow, up.to(narrow.dtype), bias.to(narrow.dtype))

    def settle(self) -> None:
        """Round to the type of the file (float16), so that saving and loading change nothing."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(parameter.to(STORED))

    def macs(self, branch: int) -> int:
        """Multiply-adds of one skipping token at a branch: 2 r H."""
        return 2 * self.ranks[branch] * self.bias.shape[1]

    def rows(self, branches: list[int]) -> Shortcuts:
        """The shortcuts of some branches only, in the given order."""
        ranks = [self.ranks[branch] for branch in branches]
        chosen = Shortcuts(len(branches), self.bias.shape[1], ranks)
        with torch.no_grad():
            for row, branch in enumerate(branches):
                for to, part in zip(chosen.of(row), self.of(branch), strict=True):
                    to.copy_(part)
        return chosen
