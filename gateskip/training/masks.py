"""Masks of a gate fine-tune: how thresholds mask in training, and the budget of each step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gateskip.model.families import Branch
from gateskip.model.gating import ANCHORS


class TrainMask:
    """Mask rule of one training step, by one threshold per branch, or one for each row of it.

    `straight-through`: 0 or 1 as at inference, with the gradient of a sigmoid in the backward pass.
    `soft`: that sigmoid itself, so the model sees fractions. `hard`: 0 or 1 and no gradient, as
    published; gates then learn only by scaling.

    `thresholds` are [branches] or [branches, B]. `costs` [branches] count towards the kept `share`;
    `prices` [branches] are the net saving of a skipped token, and `paid` is their differentiable
    sum over entered branches. Tokens from position `cut` on enter all branches and do not count.
    `shift` is a zero that is added to every gate logit: its gradient is that of the loss under a
    common rise of all.
    """

    def __init__(
        self,
        costs: Tensor,
        thresholds: Tensor,
        form: str = "straight-through",
        temperature: float = 1.0,
        free: Sequence[bool] | None = None,
        prices: Tensor | None = None,
        cut: int | None = None,
    ) -> None:
        self.costs, self.thresholds = costs, thresholds
        self.prices = costs if prices is None else prices
        self.form, self.temperature, self.cut = form, temperature, cut
        self.free = free or [True] * len(costs)
        self.logits: list[Tensor] = []
        self.share = torch.zeros((), device=costs.device)
        self.shift = torch.zeros((), device=costs.device, requires_grad=True)
        self.paid = torch.zeros((), device=costs.device)

    def __call__(self, branch: Branch, z: Tensor) -> Tensor:
        """Gate logits [B, S] -> mask [B, S]; tokens never skip branches that are not `free`."""
        self.logits.append(z.detach()[:, ANCHORS : self.cut].flatten())
        free = self.free[branch.index]
        if free and self.form != "hard":
            z = z + self.shift
        threshold = self.thresholds[branch.index]  # of all rows, or [B]
        mask = self._mask(z, threshold.unsqueeze(-1)) if free else torch.ones_like(z)
        if free:
            self.paid = self.paid + self.prices[branch.index] * mask[:, : self.cut].mean()
        share = mask.detach()[:, : self.cut].mean()
        self.share = self.share + self.costs[branch.index] * share
        if self.cut is None:
            return mask
        return torch.cat((mask[:, : self.cut], torch.ones_like(mask[:, self.cut :])), 1)

    def _mask(self, z: Tensor, threshold: Tensor) -> Tensor:
        hard = (z >= threshold).to(z.dtype)
        if self.form == "hard":
            return hard
        soft = torch.sigmoid((z - threshold) / self.temperature)
        return soft if self.form == "soft" else hard + soft - soft.detach()


def scheduled_budget(schedule: str, lowest: float, step: int, steps: int, draw: float) -> float:
    """The budget of one step of `steps`; `draw` is uniform in [0, 1).

    `linear` and `cosine` fall from 1 to `lowest` over the run. `sampled` draws between 1 and a
    bound that reaches `lowest` halfway, so that one set of gates serves every budget.
    """
    part = step / max(1, steps - 1)
    if schedule == "linear":
        return 1.0 - (1.0 - lowest) * part
    if schedule == "cosine":
        return 1.0 - (1.0 - lowest) * (1 - math.cos(math.pi * part)) / 2
    if schedule == "sampled":
        bound = 1.0 - (1.0 - lowest) * min(1.0, 0.3 + 1.4 * step / steps)
        return float(bound + (1.0 - bound) * draw**1.5)
    raise ValueError(f"budget schedule {schedule!r}: one of linear, cosine, sampled")
