"""How a budget is shared out over the branches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gateskip.model.gating import NEVER_SKIP

ALLOCATIONS = ("global", "uniform", "sensitivity")
Allocate = Callable[[Tensor, float], Tensor]
"""(gate logits [branches, tokens], budget) -> thresholds [branches]."""


def allocator(
    name: str,
    costs: Tensor,
    free: Tensor,
    sensitivity: Sequence[float] | None,
    least: float,
    most: float,
) -> Allocate:
    """How a budget becomes thresholds, by the allocation's name.

    costs [branches] are multiply-adds of a token, `free` [branches] marks those that may skip,
    `least` and `most` bound a branch's kept share. Raises ValueError for an unknown name.
    """

    def by_shares(shares: Callable[[float], Tensor]) -> Allocate:
        def allocate(logits: Tensor, budget: float) -> Tensor:
            found = quantiles(logits, shares(budget).clamp(least, most))
            return found.where(free, torch.tensor(NEVER_SKIP))

        return allocate

    if name == "global":
        return lambda logits, budget: global_thresholds(logits, budget, costs, free, least, most)
    if name == "uniform":
        ratio = float(costs.sum() / costs[free].sum())
        return by_shares(lambda budget: (1 - (1 - budget) * ratio) * torch.ones(len(costs)))
    if name == "sensitivity":
        if sensitivity is None:
            raise ValueError("allocation 'sensitivity' needs the branches' measured sensitivities")
        rises = torch.tensor(sensitivity).where(free, torch.tensor(1e9))
        return by_shares(lambda budget: allocate_shares(rises, costs, budget, least))
    raise ValueError(f"allocation {name!r}: one of {', '.join(ALLOCATIONS)}")


def global_thresholds(
    logits: Tensor,
    budget: float,
    costs: Tensor,
    free: Tensor,
    least: float = 0.0,
    most: float = 1.0,
) -> Tensor:
    """One threshold for all free branches: the cost-weighted quantile of all gate logits.

    With bounds on a branch's kept share its threshold is moved where they ask for it, and the
    common one is searched again until the whole keeps the budget. logits [branches, tokens] ->
    [branches]; branches that are not `free` [branches] never skip.
    """
    z = logits[free].flatten()
    weight = costs[free].unsqueeze(1).expand_as(logits[free]).flatten()
    order = torch.argsort(z)
    spent = torch.cumsum(weight[order].double(), 0)
    skip = (1 - budget) * float(costs.sum()) * logits.shape[1]
    cut = int(torch.searchsorted(spent, torch.tensor(skip, dtype=torch.double)))
    thresholds = torch.full((len(costs),), NEVER_SKIP, dtype=logits.dtype)
    thresholds[free] = z[order[min(cut, len(order) - 1)]]
    if least <= 0.0 and most >= 1.0:
        return thresholds
    highest = quantiles(logits, torch.full((len(costs),), least))
    lowest = quantiles(logits, torch.full((len(costs),), most))
    low, high = 0, len(order) - 1
    while low < high:  # the kept cost falls as the common threshold rises
        middle = (low + high) // 2
        level = z[order[middle]].clamp(lowest, highest)
        kept = (logits >= level.unsqueeze(1)).double().mean(1)
        dropped = float(((1 - kept) * costs)[free].sum())
        low, high = (middle + 1, high) if dropped < (1 - budget) * costs.sum() else (low, middle)
    level = z[order[low]].clamp(lowest, highest)
    thresholds[free] = level[free]
    return thresholds


def quantiles(logits: Tensor, shares: Tensor) -> Tensor:
    """Per branch, the threshold that keeps `shares[branch]` of the tokens."""
    ordered = logits.sort(dim=1).values
    cut = ((1 - shares) * logits.shape[1]).round().long()
    inside = cut.clamp(max=logits.shape[1] - 1)
    thresholds = ordered.gather(1, inside.unsqueeze(1)).squeeze(1)
    thresholds[cut == 0] = NEVER_SKIP
    thresholds[cut >= logits.shape[1]] = torch.inf
    return thresholds


def allocate_shares(
    sensitivity: Tensor, costs: Tensor, budget: float, least: float = 0.0
) -> Tensor:
    """Kept share of each branch that costs the least loss at a budget.

    Dropping a share d of a branch's tokens is taken to cost sensitivity * d^2 / 2; the optimum
    under sum(costs * d) = (1 - budget) * sum(costs) is d = multiplier * cost / sensitivity, cut to
    [0, 1 - least]; the multiplier is found by bisection.
    """
    slope = costs / sensitivity.clamp_min(1e-6)
    target = (1 - budget) * float(costs.sum())
    low, high = 0.0, float((1.0 / slope).max())
    for _ in range(80):
        middle = (low + high) / 2
        dropped = (middle * slope).clamp(0, 1 - least)
        low, high = (middle, high) if float((dropped * costs).sum()) < target else (low, middle)
    return 1 - (high * slope).clamp(0, 1 - least)
