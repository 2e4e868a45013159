"""Baselines of learned gates, as gates: noise, constants, early exit, Mixture-of-Depths.

None decides by a learned read-out of the token. Thresholds, budgets, KV rules, physical skipping
and the count of multiply-adds are the same for all of them.

    random   noise that is a function of the token; the backbone may train under its skipping
    static   whole branches by the cost of dropping them, the same for every token
    exit     a token exits when the LM head is already confident (CALM, arXiv 2207.07061)
    router   one router a layer for both its branches, every other layer (Mixture-of-Depths, arXiv
             2404.02258); it scales entered branches, and decides by a threshold in training as well
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gateskip.gates.base import OPEN, SPREAD, Gates
from gateskip.model.families import UnsupportedModel, final_norm, find_branches, head

CHECKS = 5  # layers at which a token may exit
ALWAYS = 1e4  # logit of a branch that is never skipped


class RandomGates(Gates):
    """Uniform noise that depends only on the token's state, so it is the same in every batch."""

    kind = "random"
    per_branch = ("direction",)
    FREQUENCY = 997.0

    def __init__(self, branches: int, hidden_size: int) -> None:
        super().__init__(branches, hidden_size)
        direction = torch.randn(branches, hidden_size) / hidden_size**0.5
        self.direction = nn.Parameter(direction, requires_grad=False)

    def logit(self, branch: int, x: Tensor) -> Tensor:
        """The fractional part of a large multiple of a random projection, as a logit."""
        turns = (x.float() @ self.direction[branch]) * self.FREQUENCY
        return torch.logit(turns - turns.floor(), eps=1e-6)

    def macs(self) -> int:
        """0: the cost of noise is not counted."""
        return 0

    def start(self, weight: Tensor, bias: Tensor, mean: Tensor) -> None:
        """Noise ignores read-outs."""


class StaticGates(Gates):
    """A constant for each branch: a budget drops the branches with the least cost, for every
    token."""

    kind = "static"
    per_branch = ("bias",)

    def __init__(self, branches: int, hidden_size: int) -> None:
        super().__init__(branches, hidden_size)
        self.bias = nn.Parameter(torch.full((branches,), OPEN), requires_grad=False)

    def logit(self, branch: int, x: Tensor) -> Tensor:
        """b, independent of x."""
        return self.part("bias", branch).expand(x.shape[:-1])

    def macs(self) -> int:
        """0."""
        return 0

    def start(self, weight: Tensor, bias: Tensor, mean: Tensor) -> None:
        """The read-outs at the mean input: the branch's mean importance."""
        with torch.no_grad():
            self.bias.copy_(bias + (weight * mean).sum(1))


class RouterGates(Gates):
    """One scalar gate for both branches of every second layer; tokens never skip the other
    layers."""

    kind = "router"
    per_branch = ("weight", "bias")

    def __init__(self, branches: int, hidden_size: int) -> None:
        super().__init__(branches, hidden_size)
        self.weight = nn.Parameter(torch.randn(branches, hidden_size) * SPREAD)
        self.bias = nn.Parameter(torch.full((branches,), OPEN))
        self._attention: Tensor | None = None  # the layer's decision, made at its attention

    def logit(self, branch: int, x: Tensor) -> Tensor:
        """w . x + b at the attention of an odd layer; its MLP repeats it."""
        if branch % 4 < 2:  # even layers
            return torch.full(x.shape[:-1], ALWAYS, device=x.device)
        if branch % 2 == 1:
            assert self._attention is not None, "branches are evaluated in the order they run"
            return self._attention
        self._attention = x.float() @ self.part("weight", branch) + self.part("bias", branch)
        return self._attention

    def macs(self) -> int:
        """H, at one branch in four."""
        return self.hidden_size // 4

    def start(self, weight: Tensor, bias: Tensor, mean: Tensor) -> None:
        """The read-outs of the attention branches."""
        with torch.no_grad():
            self.weight.copy_(weight)
            self.bias.copy_(bias)


class ExitGates(Gates):
    """A token enters while the LM head, evaluated at a few layers, is not yet confident.

    `attach` sets the model whose head it is. Between two checks the last decision holds. The state
    of a token that exited no longer changes, so every later check decides the same.
    """

    kind = "exit"
    per_branch = ()

    def __init__(self, branches: int, hidden_size: int) -> None:
        super().__init__(branches, hidden_size)
        self.unused = nn.Parameter(torch.zeros(1), requires_grad=False)  # a file needs a tensor
        self.checks: frozenset[int] = frozenset()
        self._vocabulary = 0
        self._model: list[Any] = []  # in a list, so that it is no submodule
        self._last: Tensor | None = None

    def attach(self, model: Any) -> None:
        """Take the model whose LM head decides; `UnsupportedModel` without RMS norms."""
        branches = find_branches(model)
        if branches[0].norm_in is None or branches[0].family.norm.offset:
            raise UnsupportedModel("early exit needs an RMS norm before every branch")
        layers = len(branches) // 2
        places = [round((i + 1) * layers / (CHECKS + 1)) for i in range(CHECKS)]
        self.checks = frozenset(2 * place for place in places)
        self._model, self._vocabulary = [model], model.config.vocab_size

    def logit(self, branch: int, x: Tensor) -> Tensor:
        """Minus the logit of the head's top probability; before the first check all enter."""
        if branch in self.checks:
            self._last = self._doubt(branch, x)
        elif branch < min(self.checks):
            self._last = torch.full(x.shape[:-1], ALWAYS, device=x.device)
        assert self._last is not None, "branches are evaluated in the order they run"
        return self._last

    def _doubt(self, branch: int, x: Tensor) -> Tensor:
        """Minus the logit of the head's top probability at a branch's input [..., H], in which the
        final norm's weights replace the branch's own."""
        (model,) = self._model
        norm_in: Any = find_branches(model)[branch].norm_in
        hidden = x / norm_in.weight * final_norm(model).weight
        sure = head(model, hidden).float().softmax(-1).amax(-1)
        return -torch.logit(sure, eps=1e-6)

    def macs(self) -> int:
        """H * V at each check, spread over all branches."""
        return len(self.checks) * self.hidden_size * self._vocabulary // self.branches

    def start(self, weight: Tensor, bias: Tensor, mean: Tensor) -> None:
        """The LM head ignores read-outs."""
