"""Learned gates, from the published H x H one to H x 1."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gateskip.gates.base import OPEN, SPREAD, Gates


class ScalarGates(Gates):
    """One linear read-out a branch, H -> 1. All branches live in one matrix."""

    kind = "scalar"
    per_branch = ("weight", "bias")

    def __init__(self, branches: int, hidden_size: int) -> None:
        super().__init__(branches, hidden_size)
        self.weight = nn.Parameter(torch.randn(branches, hidden_size) * SPREAD)
        self.bias = nn.Parameter(torch.full((branches,), OPEN))

    def logit(self, branch: int, x: Tensor) -> Tensor:
        """w . x + b."""
        return x.float() @ self.part("weight", branch) + self.part("bias", branch)

    def macs(self) -> int:
        """H."""
        return self.hidden_size

    def start(self, weight: Tensor, bias: Tensor, mean: Tensor) -> None:
        """Exactly the read-outs."""
        with torch.no_grad():
            self.weight.copy_(weight)
            self.bias.copy_(bias)


class VectorGates(Gates):
    """The published gate, H -> H: one gate a channel; importance is their mean."""

    kind = "vector"
    per_branch = ("weight", "bias")

    def __init__(self, branches: int, hidden_size: int) -> None:
        super().__init__(branches, hidden_size)
        self.weight = nn.Parameter(torch.randn(branches, hidden_size, hidden_size) * SPREAD)
        self.bias = nn.Parameter(torch.full((branches, hidden_size), OPEN))

    def gate(self, branch: int, x: Tensor) -> Tensor:
        """sigmoid(W x + b)."""
        return torch.sigmoid(
            F.linear(x.float(), self.part("weight", branch), self.part("bias", branch))
        )

    def logit(self, branch: int, x: Tensor) -> Tensor:
        """Logit of the gate vector's mean."""
        return _mean_logit(self.gate(branch, x))

    def macs(self) -> int:
        """H * H."""
        return self.hidden_size * self.hidden_size

    def start(self, weight: Tensor, bias: Tensor, mean: Tensor) -> None:
        """Every channel begins as the read-out; its small initial noise stays on top."""
        with torch.no_grad():
            self.weight.add_(weight.unsqueeze(1))
            self.bias.copy_(bias.unsqueeze(1).expand_as(self.bias))


class LowRankGates(Gates):
    """A vector gate through a bottleneck: sigmoid(U (V x) + b) with V [r, H] and U [H, r]."""

    kind = "low-rank"
    per_branch = ("down", "up", "bias")

    def __init__(self, branches: int, hidden_size: int, rank: int = 8) -> None:
        super().__init__(branches, hidden_size)
        self.rank = rank
        self.down = nn.Parameter(torch.randn(branches, rank, hidden_size) * SPREAD)
        self.up = nn.Parameter(torch.randn(branches, hidden_size, rank) * SPREAD)
        self.bias = nn.Parameter(torch.full((branches, hidden_size), OPEN))

    def gate(self, branch: int, x: Tensor) -> Tensor:
        """sigmoid(U (V x) + b)."""
        low = F.linear(x.float(), self.part("down", branch))
        return torch.sigmoid(F.linear(low, self.part("up", branch), self.part("bias", branch)))

    def logit(self, branch: int, x: Tensor) -> Tensor:
        """Logit of the gate vector's mean."""
        return _mean_logit(self.gate(branch, x))

    def macs(self) -> int:
        """2 * r * H."""
        return 2 * self.rank * self.hidden_size

    def sizes(self) -> dict[str, int]:
        """The rank."""
        return {"rank": self.rank}

    def start(self, weight: Tensor, bias: Tensor, mean: Tensor) -> None:
        """The first of the r directions carries the read-out to every channel."""
        with torch.no_grad():
            self.down[:, 0] = weight
            self.up[:, :, 0] = 1.0
            self.bias.copy_(bias.unsqueeze(1).expand_as(self.bias))


class SharedGates(Gates):
    """One scalar gate for all attention branches and one for all MLPs; a bias each branch."""

    kind = "shared"
    per_branch = ("bias",)

    def __init__(self, branches: int, hidden_size: int) -> None:
        super().__init__(branches, hidden_size)
        self.weight = nn.Parameter(torch.randn(2, hidden_size) * SPREAD)  # attention, MLP
        self.bias = nn.Parameter(torch.full((branches,), OPEN))

    def logit(self, branch: int, x: Tensor) -> Tensor:
        """w . x + b, with w by the branch's kind: attention and MLP take turns."""
        return x.float() @ self.part("weight", branch % 2) + self.part("bias", branch)

    def macs(self) -> int:
        """H."""
        return self.hidden_size

    def start(self, weight: Tensor, bias: Tensor, mean: Tensor) -> None:
        """The mean read-out of each kind; biases keep each branch's mean logit."""
        with torch.no_grad():
            for kind in range(2):
                self.weight[kind] = weight[kind::2].mean(0)
            weights = self.weight[torch.arange(self.branches, device=self.weight.device) % 2]
            self.bias.copy_(bias + ((weight - weights) * mean).sum(1))


class MlpGates(Gates):
    """A two-layer gate, H -> r -> 1, with SiLU between."""

    kind = "mlp"
    per_branch = ("inner", "inner_bias", "outer", "bias")

    def __init__(self, branches: int, hidden_size: int, rank: int = 8) -> None:
        super().__init__(branches, hidden_size)
        self.rank = rank
        self.inner = nn.Parameter(torch.randn(branches, rank, hidden_size) * SPREAD)
        self.inner_bias = nn.Parameter(torch.zeros(branches, rank))
        self.outer = nn.Parameter(torch.randn(branches, rank) * SPREAD)
        self.bias = nn.Parameter(torch.full((branches,), OPEN))

    def logit(self, branch: int, x: Tensor) -> Tensor:
        """u . silu(W x + c) + b."""
        inner = F.silu(
            F.linear(x.float(), self.part("inner", branch), self.part("inner_bias", branch))
        )
        return inner @ self.part("outer", branch) + self.part("bias", branch)

    def macs(self) -> int:
        """r * (H + 1)."""
        return self.rank * (self.hidden_size + 1)

    def sizes(self) -> dict[str, int]:
        """The width of the inner layer."""
        return {"rank": self.rank}

    def start(self, weight: Tensor, bias: Tensor, mean: Tensor) -> None:
        """Exactly the read-outs, through two inner units: silu(a) - silu(-a) = a."""
        with torch.no_grad():
            self.inner[:, 0], self.inner[:, 1] = weight, -weight
            self.outer[:, 0], self.outer[:, 1] = 1.0, -1.0
            self.bias.copy_(bias)


def _mean_logit(gate: Tensor) -> Tensor:
    """Logit of the mean over channels. gate [..., H] -> [...]."""
    return torch.logit(gate.mean(-1), eps=1e-6)
