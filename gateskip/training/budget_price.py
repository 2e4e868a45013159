"""The price of compute in a gate fine-tune: the Lagrange multiplier of the budget, by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gateskip.training.masks import TrainMask


class BudgetPrice:
    """Removes the common-mode gate gradient: the Lagrange multiplier of the budget.

    Under a budget the threshold follows the logits, so raising all of them changes nothing. Almost
    every token gains by entering almost every branch, so that common rise is most of a gate's
    gradient, and it hides the part that ranks branches and tokens. Every entered branch therefore
    pays its multiply-adds. The price is the one at which the loss, compute included, does not
    change with a common shift of the logits: minus the loss's gradient under the shift, over that
    of the compute. It is measured in each step.

    For each step, call `add_cost` before, and `add_loss` after, the backward pass of each part;
    then `apply`.
    """

    def __init__(self, parameters: Sequence[Tensor], parts: int = 1) -> None:
        """The gates' `parameters`; `parts` backward passes make one step's gradients."""
        self.parameters, self.parts = parameters, parts
        self.cost_gradients: list[Tensor] = []  # of the paid cost, one a parameter
        device = parameters[0].device if parameters else None
        self.cost_shift = torch.zeros((), device=device)  # gradients under a common shift
        self.loss_shift = torch.zeros((), device=device)

    def add_cost(self, rule: TrainMask) -> None:
        """Add the gradients of a pass's paid cost, in the parameters and in the shift."""
        if rule.form == "hard" or not rule.paid.requires_grad:
            return
        inputs = [rule.shift, *self.parameters]
        shift, *gradients = torch.autograd.grad(
            rule.paid, inputs, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        self.cost_shift = self.cost_shift.to(shift) + shift / self.parts
        before = self.cost_gradients or [torch.zeros_like(gradient) for gradient in gradients]
        self.cost_gradients = [a + b / self.parts for a, b in zip(before, gradients, strict=True)]

    def add_loss(self, rule: TrainMask) -> None:
        """Add the loss's gradient under the shift, which the backward pass left in the rule."""
        if rule.shift.grad is not None:
            self.loss_shift = self.loss_shift.to(rule.shift.grad) + rule.shift.grad

    def apply(self, accelerator: Any) -> None:
        """Add price times cost to the parameters' gradients, which are those of all processes."""
        if not self.cost_gradients:
            return
        shifts = torch.stack([self.loss_shift, self.cost_shift])
        loss, cost = accelerator.reduce(shifts, "mean")
        price = float(-loss / cost.clamp_min(1e-12))
        for parameter, gradient in zip(self.parameters, self.cost_gradients, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(accelerator.reduce(gradient, "mean"), alpha=price)
