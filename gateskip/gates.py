"""Gate modules: one number per token and branch that says how much the branch matters there.

A gate is g(x) = sigmoid(w x + b), with x what the branch itself reads (GateSkip, arXiv 2510.13876,
section 3.1). Only its ranking decides what is skipped: a branch is entered where the logit
w x + b reaches a calibrated threshold, so the sigmoid is needed in training alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

GATE_KINDS = ("scalar",)

ANCHORS = 1
"""Tokens at the start of a sequence that enter every branch, whatever their gates say.

Models park surplus attention on the first token, through activations that a few branches build up
there (arXiv 2309.17453). Skip one of these and every later token collapses, so it is never done.
"""


class ScalarGates(nn.Module):
    """One linear read-out a branch, H -> 1. All branches live in one matrix.

    weight [branches, H] and bias [branches] start as the paper's: W ~ N(0, 0.01), b = 5, so that
    sigmoid(b) = 0.993 and an attached gate changes nothing.
    """

    kind = "scalar"

    def __init__(self, branches: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(branches, hidden_size) * 0.01)
        self.bias = nn.Parameter(torch.full((branches,), 5.0))

    def logit(self, branch: int, x: Tensor) -> Tensor:
        """Importance of each token at a branch. x [..., H] -> [...], in float32."""
        return x.float() @ self.weight[branch] + self.bias[branch]

    @property
    def branches(self) -> int:
        """How many branches these gates were made for."""
        return self.weight.shape[0]

    def macs(self) -> int:
        """Multiply-adds one branch's gate spends on one token."""
        return self.weight.shape[1]

    def rows(self, kept: list[int]) -> ScalarGates:
        """The gates of some branches only, in the given order: what is left after a layer drop."""
        chosen = ScalarGates(len(kept), self.weight.shape[1])
        with torch.no_grad():
            chosen.weight.copy_(self.weight[kept])
            chosen.bias.copy_(self.bias[kept])
        return chosen
