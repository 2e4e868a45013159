"""Turns gate logits and a budget into thresholds, one for each branch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gateskip.calibration.settings import ALLOCATIONS
from gateskip.model.gating import NEVER_SKIP

Allocate = Callable[[Tensor, float], Tensor]
"""(gate logits [branches, tokens], budget) -> thresholds [branches]."""


def allocator(
    name: str,
    costs: Tensor,
    free: Tensor,
    sensitivity: Sequence[float] | None,
    min_share: float,
    max_share: float,
) -> Allocate:
    """The function from gate logits and a budget to thresholds, by the allocation's name.

    costs [branches] are multiply-adds of a token, `free` [branches] marks the branches that may be
    skipped, `min_share` and `max_share` bound the share of tokens that a branch keeps.

    Raises ValueError for an unknown name, and for "sensitivity" without sensitivities.
    """

    def by_shares(shares: Callable[[float], Tensor]) -> Allocate:
        def allocate(logits: Tensor, budget: float) -> Tensor:
            thresholds = quantiles(logits, shares(budget).clamp(min_share, max_share))
            return thresholds.masked_fill(~free, NEVER_SKIP)

        return allocate

    if name == "global":
        return lambda logits, budget: global_thresholds(
            logits, budget, costs, free, min_share, max_share
        )
    if name == "uniform":
        ratio = float(costs.sum() / costs[free].sum())
        return by_shares(lambda budget: (1 - (1 - budget) * ratio) * torch.ones_like(costs))
    if name == "sensitivity":
        if sensitivity is None:
            raise ValueError("allocation 'sensitivity' needs the branches' measured sensitivities")
        measured = torch.tensor(sensitivity, device=costs.device).masked_fill(~free, 1e9)
        return by_shares(lambda budget: allocate_shares(measured, costs, budget, min_share))
    raise ValueError(f"allocation {name!r}: one of {', '.join(ALLOCATIONS)}")


def global_thresholds(
    logits: Tensor,
    budget: float,
    costs: Tensor,
    free: Tensor,
    min_share: float = 0.0,
    max_share: float = 1.0,
) -> Tensor:
    """One threshold for all free branches: the cost-weighted quantile of all gate logits.

    Where a bound on a branch's kept share changes its threshold, the common one is searched again
    until all branches together keep the budget. logits [branches, tokens] -> [branches]; tokens
    never skip branches that are not `free` [branches].
    """
    z = logits[free].flatten()
    weight = costs[free].unsqueeze(1).expand_as(logits[free]).flatten()
    order = torch.argsort(z)
    spent = torch.cumsum(weight[order].double(), 0)
    skip = (1 - budget) * float(costs.sum()) * logits.shape[1]
    cut = int(torch.searchsorted(spent, torch.tensor(skip, dtype=torch.double, device=z.device)))
    thresholds = torch.full((len(costs),), NEVER_SKIP, dtype=logits.dtype, device=logits.device)
    thresholds[free] = z[order[min(cut, len(order) - 1)]]
    if min_share <= 0.0 and max_share >= 1.0:
        return thresholds
    highest = quantiles(logits, torch.full_like(costs, min_share))
    lowest = quantiles(logits, torch.full_like(costs, max_share))
    low, high = 0, len(order) - 1
    while low < high:  # the kept cost falls as the common threshold rises
        middle = (low + high) // 2
        bounded = z[order[middle]].clamp(lowest, highest)  # [branches]
        shares = (logits >= bounded.unsqueeze(1)).double().mean(1)
        dropped = float(((1 - shares) * costs)[free].sum())
        low, high = (middle + 1, high) if dropped < (1 - budget) * costs.sum() else (low, middle)
    bounded = z[order[low]].clamp(lowest, highest)
    thresholds[free] = bounded[free]
    return thresholds


def quantiles(logits: Tensor, shares: Tensor) -> Tensor:
    """Thresholds [branches] at which `shares` [branches] of logits [branches, tokens] are kept."""
    ordered = logits.sort(dim=1).values
    cut = ((1 - shares) * logits.shape[1]).round().long()
    inside = cut.clamp(max=logits.shape[1] - 1)
    thresholds = ordered.gather(1, inside.unsqueeze(1)).squeeze(1)
    thresholds[cut == 0] = NEVER_SKIP
    thresholds[cut >= logits.shape[1]] = torch.inf
    return thresholds


def allocate_shares(
    sensitivity: Tensor, costs: Tensor, budget: float, min_share: float = 0.0
) -> Tensor:
    """Kept share of each branch [branches] that minimizes the loss at a budget.

    The loss of dropping a share d of a branch's tokens is modelled as sensitivity * d^2 / 2. The
    optimum under sum(costs * d) = (1 - budget) * sum(costs) is d = multiplier * cost / sensitivity,
    cut to [0, 1 - min_share]; bisection finds the multiplier.
    """
    ratio = costs / sensitivity.clamp_min(1e-6)
    target = (1 - budget) * float(costs.sum())
    low, high = 0.0, float((1.0 / ratio).max())
    for _ in range(80):
        middle = (low + high) / 2
        dropped = (middle * ratio).clamp(0, 1 - min_share)
        low, high = (middle, high) if float((dropped * costs).sum()) < target else (low, middle)
    return 1 - (high * ratio).clamp(0, 1 - min_share)
