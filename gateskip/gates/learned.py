"""Gate modules: how much each branch matters to each token.

A gate is g(x) = sigmoid(W x + b), with x what the branch itself reads (GateSkip, arXiv 2510.13876,
section 3.1). Its importance, the mean of g over the gate's outputs, decides what is skipped: a
branch is entered where the importance, taken as a logit, reaches a calibrated threshold. Gates that
`scale` also multiply what an entered branch adds, as published; gates that do not leave the model
at full compute exactly what it was.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from gateskip.gates.shortcuts import Shortcuts

ANCHORS = 1
"""Tokens at the start of a sequence that enter every branch, whatever their gates say.

Models park surplus attention on the first token, through activations that a few branches build up
there (arXiv 2309.17453). Skip one of these and every later token collapses, so it is never done.
"""

OPEN = 5.0  # bias of a new gate: sigmoid(5) = 0.993, the model starts unchanged
SPREAD = 0.01  # standard deviation of a new gate's weights
Place = Literal["after", "before"]


class Stacked(nn.Module):
    """Parameters that hold all branches' parts, one after the other."""

    _opened: dict[str, tuple[Tensor, ...]] | None = None

    def part(self, name: str, index: int) -> Tensor:
        """Part `index` of parameter `name`."""
        if self._opened is not None:
            return self._opened[name][index]
        whole: Tensor = getattr(self, name)
        return whole[index]

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Within this context all parts, those of modules inside too, come from one cut. The
        gradient of a part that is cut on its own is as large as the whole, and zero elsewhere."""
        inside = [module for module in self.modules() if isinstance(module, Stacked)]
        for each in inside:
            each._opened = {name: p.unbind(0) for name, p in each.named_parameters(recurse=False)}
        try:
            yield
        finally:
            for each in inside:
                each._opened = None


class Gates(Stacked):
    """The gates of all branches; subclasses say what one gate computes.

    `scales`: whether an entered branch's output [.., H] is multiplied by the gate. `place` says
    what is multiplied: the branch's output (`after`, as published) or its input (`before`, an
    ablation that asks for `scales`).
    """

    kind: ClassVar[str]
    per_branch: ClassVar[tuple[str, ...]]
    """Parameters whose first dimension counts branches."""

    scales: bool = False
    place: Place = "after"
    shortcuts: Shortcuts | None
    """What skipped branches add; None is nothing, as published."""

    def __init__(self, branches: int, hidden_size: int) -> None:
        super().__init__()
        self.register_module("shortcuts", None)
        self.branches, self.hidden_size = branches, hidden_size

    @abstractmethod
    def logit(self, branch: int, x: Tensor) -> Tensor:
        """Importance of each token at a branch, as a logit. x [..., H] -> [...], in float32."""

    def gate(self, branch: int, x: Tensor) -> Tensor:
        """What a branch is multiplied by. x [..., H] -> [..., 1] or [..., H], between 0 and 1."""
        return torch.sigmoid(self.logit(branch, x)).unsqueeze(-1)

    def attach(self, model: Any) -> None:
        """Take from the model what the decision needs beside a branch's input: mostly nothing."""

    @abstractmethod
    def macs(self) -> int:
        """Multiply-adds one branch's gate spends on one token."""

    @abstractmethod
    def start(self, weight: Tensor, bias: Tensor, mean: Tensor) -> None:
        """Take over linear read-outs: weight [branches, H], bias [branches].

        `mean` [branches, H] is the mean input, for kinds that can only approximate them.
        """

    def sizes(self) -> dict[str, int]:
        """Constructor arguments beyond the number of branches and H."""
        return {}

    def rows(self, kept: list[int]) -> Self:
        """The gates of some branches only, in the given order: what is left after a layer drop."""
        chosen = type(self)(len(kept), self.hidden_size, **self.sizes())
        own = dict(self.named_parameters())
        with torch.no_grad():
            for name, parameter in chosen.named_parameters():
                parameter.copy_(own[name][kept] if name in self.per_branch else own[name])
        chosen.shortcuts = None if self.shortcuts is None else self.shortcuts.rows(kept)
        chosen.scales, chosen.place = self.scales, self.place
        return chosen


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
        """Every channel begins as the read-out; the small noise it was made with stays on top."""
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
            own = self.weight[torch.arange(self.branches) % 2]
            self.bias.copy_(bias + ((weight - own) * mean).sum(1))


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
