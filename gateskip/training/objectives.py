"""What a gate fine-tune optimizes: losses, sparsity terms, masks and budget schedules.

All are plain functions of tensors or numbers; train.py puts them together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gateskip.model.families import Branch
from gateskip.model.gating import ANCHORS

ChunkLoss = Callable[[Tensor, slice], Tensor]
CHUNK = 128  # tokens whose logits exist at once
SLICE = 8  # of them, whose distributions do

# -- losses -----------------------------------------------------------------------------------


class _InChunks(torch.autograd.Function):
    """Sum of a loss over chunks of rows; each chunk's gradient is made while it is at hand."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss_of: ChunkLoss) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        slopes = []
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, min(start + CHUNK, len(hidden)))
            part = hidden[rows].detach().requires_grad_()
            with torch.enable_grad():
                loss = loss_of(part, rows)
            slopes.append(torch.autograd.grad(loss, part)[0])
            total += loss.detach().float()
        ctx.save_for_backward(torch.cat(slopes))
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        (slope,) = slopes
        return ctx.saved_tensors[0] * slope, None


def in_chunks(hidden: Tensor, loss_of: ChunkLoss) -> Tensor:
    """`loss_of` summed over hidden states [N, H], a few rows at a time.

    `loss_of(part [C, H], rows)` gives the loss of those rows. A vocabulary's logits are by far the
    largest tensor of a small model's training step; a chunk of them stays in the processor's cache.
    Gradients reach `hidden` only: what makes logits of it does not learn.
    """
    loss: Tensor = _InChunks.apply(hidden, loss_of)  # type: ignore[no-untyped-call]
    return loss


class _Divergence(torch.autograd.Function):
    """Sum of KL(teacher || student) over rows, whose slope is known: q - p. A few rows at a time,
    so that what lies between stays in the processor's cache."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        total = torch.zeros((), device=student.device)
        slopes = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for start in range(0, len(student), SLICE):
            rows = slice(start, start + SLICE)
            log_q, log_p = (
                F.log_softmax(_softened(part[rows], temperature), dim=-1)
                for part in (student, teacher)
            )
            p = log_p.exp()
            total += log_p.sub_(log_q).mul_(p).sum()
            if slopes is not None:
                slopes[rows] = log_q.exp_().sub_(p)
        if slopes is not None:
            ctx.save_for_backward(slopes)
        ctx.temperature = temperature
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * (slopes[0] / ctx.temperature), None, None


def _softened(logits: Tensor, temperature: float) -> Tensor:
    return logits.float() if temperature == 1 else logits.float() / temperature


def distill_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean KL(teacher || student) over tokens. Logits [B, S, V] -> scalar; the teacher's learn not.

    Both are softened by `temperature`, whose square keeps the gradient's size (arXiv 1503.02531).
    """
    own, told = (part.flatten(0, -2) for part in (student, teacher))
    total: Tensor = _Divergence.apply(own, told, temperature)  # type: ignore[no-untyped-call]
    return total * (temperature**2 / len(own))


def next_token_loss(logits: Tensor, following: Tensor) -> Tensor:
    """Mean cross-entropy of logits [N, V] at the tokens that follow [N]; -100 is no token."""
    return F.cross_entropy(logits.float(), following)


def hidden_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared distance of final hidden states [B, S, H], relative to the teacher's size."""
    distance = (student.float() - teacher.float()).square().mean()
    return distance / teacher.float().square().mean()


# -- sparsity ---------------------------------------------------------------------------------


def l1(gates: Tensor, budget: float) -> Tensor:
    """Mean gate."""
    return gates.mean()


def l2(gates: Tensor, budget: float) -> Tensor:
    """Mean squared gate: the published term (arXiv 2510.13876, equation 3)."""
    return gates.square().mean()


def bernoulli_kl(gates: Tensor, budget: float) -> Tensor:
    """KL of a coin that falls open with the budget from one that does with the mean gate."""
    share = torch.tensor(budget).clamp(1e-4, 1 - 1e-4).to(gates.device)
    mean = gates.mean().clamp(1e-6, 1 - 1e-6)
    return share * (share / mean).log() + (1 - share) * ((1 - share) / (1 - mean)).log()


SPARSITY: dict[str, Callable[[Tensor, float], Tensor]] = {"l1": l1, "l2": l2, "kl": bernoulli_kl}
"""(gates of all branches and tokens [...], this step's budget) -> scalar."""


# -- masks ------------------------------------------------------------------------------------


class TrainMask:
    """Mask rule of one training step, by one threshold a branch.

    `straight-through`: 0 or 1 as at inference, with the slope of a sigmoid in the backward pass.
    `soft`: that sigmoid itself, so the model sees fractions. `hard`: 0 or 1 and no slope, as
    published; gates then learn through what they scale.

    `costs` [branches] count towards the kept `share`; `prices` [branches] are what skipping really
    saves, of which `paid` is the differentiable sum over entered branches. Every gate logit moves
    with `shift`, a zero that shows by its gradient what the loss gains when all of them rise.
    """

    def __init__(
        self,
        costs: Tensor,
        thresholds: Tensor,
        form: str = "straight-through",
        temperature: float = 1.0,
        free: Sequence[bool] | None = None,
        prices: Tensor | None = None,
    ) -> None:
        self.costs, self.thresholds = costs, thresholds
        self.prices = costs if prices is None else prices
        self.form, self.temperature = form, temperature
        self.free = free or [True] * len(costs)
        self.logits: list[Tensor] = []
        self.share = torch.zeros((), device=costs.device)
        self.shift = torch.zeros((), device=costs.device, requires_grad=True)
        self.paid = torch.zeros((), device=costs.device)

    def __call__(self, branch: Branch, z: Tensor) -> Tensor:
        """Gate logits [B, S] -> mask [B, S]; branches that are not `free` never skip."""
        self.logits.append(z.detach()[:, ANCHORS:].flatten())
        free = self.free[branch.index]
        if free and self.form != "hard":
            z = z + self.shift
        mask = self._mask(z, self.thresholds[branch.index]) if free else torch.ones_like(z)
        if free:
            self.paid = self.paid + self.prices[branch.index] * mask.mean()
        self.share = self.share + self.costs[branch.index] * mask.detach().mean()
        return mask

    def _mask(self, z: Tensor, threshold: Tensor) -> Tensor:
        hard = (z >= threshold).to(z.dtype)
        if self.form == "hard":
            return hard
        soft = torch.sigmoid((z - threshold) / self.temperature)
        return soft if self.form == "soft" else hard + soft - soft.detach()


# -- budgets ----------------------------------------------------------------------------------


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


# -- the price of compute ---------------------------------------------------------------------


class Level:
    """Takes out of the gates' gradients what would only move them all.

    Under a budget one threshold follows the logits, so raising all of them changes nothing; and
    since almost every token gains by entering almost every branch, that common rise is most of what
    the loss asks of a gate, and all that Adam sees of it. What is left to learn is which branch and
    token gains more than compute costs elsewhere. So every entered branch pays its multiply-adds,
    at the one price that makes the whole indifferent to a common shift of the logits: the Lagrange
    multiplier of the budget, measured in each step.
    """

    def __init__(self, parameters: Sequence[Tensor], parts: int = 1) -> None:
        """`parts` backward passes make one step's gradients."""
        self.parameters, self.parts = parameters, parts
        self.costs: list[Tensor] = []  # slopes of what is paid, a parameter each
        self.cost_slope, self.loss_slope = torch.zeros(()), torch.zeros(())  # under a common shift

    def price(self, rule: TrainMask) -> None:
        """Slopes of what a pass pays; before its backward pass."""
        if rule.form == "hard" or not rule.paid.requires_grad:
            return
        asked = [rule.shift, *self.parameters]
        shift, *slopes = torch.autograd.grad(
            rule.paid, asked, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        self.cost_slope = self.cost_slope.to(shift) + shift / self.parts
        before = self.costs or [torch.zeros_like(slope) for slope in slopes]
        self.costs = [a + b / self.parts for a, b in zip(before, slopes, strict=True)]

    def benefit(self, rule: TrainMask) -> None:
        """Slope of the loss under a common shift; after the backward pass."""
        if rule.shift.grad is not None:
            self.loss_slope = self.loss_slope.to(rule.shift.grad) + rule.shift.grad

    def apply(self, accelerator: Any) -> None:
        """Charge the price; the gradients of all processes are in place."""
        if not self.costs:
            return
        slopes = torch.stack([self.loss_slope, self.cost_slope])
        loss, cost = accelerator.reduce(slopes, "mean")
        price = float(-loss / cost.clamp_min(1e-12))
        for parameter, slope in zip(self.parameters, self.costs, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(accelerator.reduce(slope, "mean"), alpha=price)
