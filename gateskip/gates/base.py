"""The base class of all gates: how much each branch matters to each token.

A gate is g(x) = sigmoid(W x + b), with x the branch's input (GateSkip, arXiv 2510.13876, section
3.1). Its importance, the mean of g over the gate's outputs, decides which tokens skip: a token
enters a branch where the importance, as a logit, reaches a calibrated threshold. Gates that `scale`
also multiply an entered branch's output, as published. Gates that do not scale leave the model at
full compute exactly as it was.
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
    """The gates of all branches; subclasses define the computation of one gate.

    `scales`: whether an entered branch is multiplied by its gate. `place`: whether the gate
    multiplies the branch's output [..., H] (`after`, as published) or its input (`before`, an
    ablation that needs `scales`).
    """

    kind: ClassVar[str]
    per_branch: ClassVar[tuple[str, ...]]
    """Parameters whose first dimension counts branches."""

    scales: bool = False
    place: Place = "after"
    folded: bool = False
    """Whether the gates read inputs of norms without weights (gates/norms.py)."""
    shortcuts: Shortcuts | None
    """The output of skipped branches; None for zero, as published."""
    harm: Tensor | None
    """`prompt_sensitivity`, under its name in files."""

    def __init__(self, branches: int, hidden_size: int) -> None:
        super().__init__()
        self.register_module("shortcuts", None)
        self.register_buffer("harm", None)
        self.branches, self.hidden_size = branches, hidden_size

    @property
    def prompt_sensitivity(self) -> Tensor | None:
        """Loss in nats of an answer's token where all tokens of its prompt skip a branch
        [branches]; None where it was not measured: see calibration/reading.py."""
        return self.harm

    @prompt_sensitivity.setter
    def prompt_sensitivity(self, nats: Tensor | None) -> None:
        self.harm = nats

    @abstractmethod
    def logit(self, branch: int, x: Tensor) -> Tensor:
        """Importance of each token at a branch, as a logit. x [..., H] -> [...], in float32."""

    def gate(self, branch: int, x: Tensor) -> Tensor:
        """The factor of a branch, 0 to 1. x [..., H] -> [..., 1] or [..., H]."""
        return torch.sigmoid(self.logit(branch, x)).unsqueeze(-1)

    def attach(self, model: Any) -> None:
        """Take from the model whatever the gates read besides a branch's input; most kinds need
        nothing."""

    @abstractmethod
    def macs(self) -> int:
        """Multiply-adds one branch's gate spends on one token."""

    @abstractmethod
    def start(self, weight: Tensor, bias: Tensor, mean: Tensor) -> None:
        """Initialize from linear read-outs: weight [branches, H], bias [branches].

        `mean` [branches, H] is the mean input, for kinds that can only approximate them.
        """

    def sizes(self) -> dict[str, int]:
        """Constructor arguments beyond the number of branches and H."""
        return {}

    def rows(self, branches: list[int]) -> Self:
        """The gates of some branches only, in the given order: those left after a layer drop."""
        chosen = type(self)(len(branches), self.hidden_size, **self.sizes())
        state = dict(self.named_parameters())
        with torch.no_grad():
            for name, parameter in chosen.named_parameters():
                rows = state[name][branches] if name in self.per_branch else state[name]
                parameter.copy_(rows)
        chosen.shortcuts = None if self.shortcuts is None else self.shortcuts.rows(branches)
        nats = self.prompt_sensitivity
        chosen.prompt_sensitivity = None if nats is None else nats[branches]
        chosen.scales, chosen.place, chosen.folded = self.scales, self.place, self.folded
        return chosen
