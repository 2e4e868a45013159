"""The base class of all gates: how much each branch matters to each token.

A gate is g(x) = sigmoid(W x + b), with x what the branch itself reads (GateSkip, arXiv 2510.13876,
section 3.1). Its importance, the mean of g over the gate's outputs, decides what is skipped: a
branch is entered where the importance, taken as a logit, reaches a calibrated threshold. Gates that
`scale` also multiply what an entered branch adds, as published; gates that do not leave the model
at full compute exactly what it was.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from gateskip.gates.shortcuts import Shortcuts
from gateskip.gates.stacked import Stacked
from gateskip.model.gating import Place

OPEN = 5.0  # bias of a new gate: sigmoid(5) = 0.993, the model starts unchanged
SPREAD = 0.01  # standard deviation of a new gate's weights


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
    folded: bool = False
    """Whether they read inputs of norms without weights (gates/norms.py)."""
    shortcuts: Shortcuts | None
    """What skipped branches add; None is nothing, as published."""
    harm: Tensor | None
    """Nats that a token of an answer loses where all tokens of its prompt skip a branch [branches],
    as far as that was measured: see calibration/reading.py."""

    def __init__(self, branches: int, hidden_size: int) -> None:
        super().__init__()
        self.register_module("shortcuts", None)
        self.register_buffer("harm", None)
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
        chosen.harm = None if self.harm is None else self.harm[kept]
        chosen.scales, chosen.place, chosen.folded = self.scales, self.place, self.folded
        return chosen
