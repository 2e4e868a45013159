"""Thresholds: from a budget, the share of multiply-adds to keep, to one number a branch.

A threshold is calibrated once on text and stored, so that what a token skips depends on nothing but
itself and its past: not on batch-mates, not on later tokens, not on how a prefill was cut. The
published method takes a quantile of the running batch instead (arXiv 2510.13876, section 3.3).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gateskip.gates.learned import ANCHORS, Gates
from gateskip.model.compute import branch_costs
from gateskip.model.families import Branch
from gateskip.model.reference import masked_forward
from gateskip.runtime.skipping import NEVER_SKIP

ALLOCATIONS = ("global", "uniform", "sensitivity")
CLOSE = 0.004  # a kept share this near to its budget is good enough
DAMPING = 0.8  # skipping more lowers later logits, so that full corrections overshoot
DEFAULT_BUDGETS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4)


@dataclass(frozen=True)
class Calibration:
    """What one budget became on the calibration text."""

    budget: float
    thresholds: tuple[float, ...]
    kept: float  # share of the branches' multiply-adds that was kept
    shares: tuple[float, ...]  # share of tokens kept, branch by branch


# gate logits [branches, tokens] -> thresholds [branches]
Allocate = Callable[[Tensor, float], Tensor]


@torch.no_grad()
def calibrate(
    model: Any,
    gates: Gates,
    blocks: Tensor,
    budgets: Sequence[float] = DEFAULT_BUDGETS,
    allocation: str = "global",
    kv_rule: str = "project",
    sensitivity: Sequence[float] | None = None,
    least: float = 0.0,
    most: float = 1.0,
    closed: frozenset[int] = frozenset(),
    gone: frozenset[int] = frozenset(),
    rounds: int = 6,
    batch: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> list[Calibration]:
    """Thresholds for each budget on blocks [N, S] of token ids.

    Every branch keeps at least a share `least` of its tokens and at most `most`; `closed` branches
    never skip. `gone` branches always do: where they alone save more than a budget asks for, less
    than the budget is kept.

    Skipping changes what later gates see, so the thresholds are found in a closed loop: up to
    `rounds` times, thresholds are read off the logits that the neighbouring budget left, the share
    that they really keep is measured, and more or less is asked for; the closest round counts.
    Budgets go from high to low.
    """
    costs = torch.tensor([c.at(blocks.shape[1] / 2) for c in branch_costs(model)])
    free = torch.ones(len(costs), dtype=torch.bool)
    free[sorted(closed | gone)] = False
    free[0] &= kv_rule != "copy"  # the first attention has nothing below it to copy from
    allocate = _allocator(allocation, costs, free, sensitivity, least, most)
    thresholds = torch.full((gates.branches,), NEVER_SKIP)
    thresholds[sorted(gone)] = torch.inf
    spared = float(costs[sorted(gone)].sum() / costs.sum())
    logits = _collect(model, gates, blocks, thresholds, kv_rule, batch)
    found = []
    wanted = sorted(set(budgets), reverse=True)
    for done, budget in enumerate(wanted):
        tried: list[tuple[Calibration, Tensor]] = []
        skip = max(0.0, 1 - budget - spared)  # what is asked for
        for _ in range(rounds):
            thresholds = allocate(logits, 1 - skip)
            thresholds[sorted(gone)] = torch.inf
            left = _collect(model, gates, blocks, thresholds, kv_rule, batch)
            tried.append((_record(budget, thresholds, left, costs), left))
            kept = tried[-1][0].kept
            if abs(kept - budget) < CLOSE:
                break
            skip = min(1.0, skip * ((1 - budget) / max(1e-6, 1 - kept)) ** DAMPING)
        best, logits = min(tried, key=lambda each: abs(each[0].kept - budget))
        found.append(best)
        if progress is not None:
            progress(done + 1, len(wanted))
    return found


def _record(budget: float, thresholds: Tensor, logits: Tensor, costs: Tensor) -> Calibration:
    shares = (logits >= thresholds.unsqueeze(1)).float().mean(1)
    kept = float((shares * costs).sum() / costs.sum())
    return Calibration(budget, tuple(thresholds.tolist()), kept, tuple(shares.tolist()))


def _collect(
    model: Any, gates: Gates, blocks: Tensor, thresholds: Tensor, kv_rule: str, batch: int
) -> Tensor:
    """Gate logits [branches, tokens] while skipping by `thresholds`."""
    logits: list[list[Tensor]] = [[] for _ in range(gates.branches)]

    def rule(branch: Branch, z: Tensor) -> Tensor:
        logits[branch.index].append(z[:, ANCHORS:].flatten())
        return (z >= thresholds[branch.index]).to(z.dtype)

    for part in blocks.split(batch):
        masked_forward(model, part, gates, rule, kv_rule)
    return torch.stack([torch.cat(parts) for parts in logits])


def _allocator(
    name: str,
    costs: Tensor,
    free: Tensor,
    sensitivity: Sequence[float] | None,
    least: float,
    most: float,
) -> Allocate:
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


def thresholds_at(grid: Mapping[float, Sequence[float]], budget: float) -> list[float] | None:
    """Thresholds for any budget, interpolated between the calibrated ones. None means full compute.

    Above the grid's highest budget the thresholds of that budget are used until 1.0, which is full
    compute. Raises ValueError below the lowest calibrated budget.
    """
    if budget >= 1.0:
        return None
    known = sorted(grid)
    if not known or budget < known[0] - 1e-9:
        lowest = known[0] if known else "none"
        raise ValueError(f"budget {budget} was not calibrated; the lowest is {lowest}")
    above = min(bisect_left(known, budget - 1e-9), len(known) - 1)
    if abs(known[above] - budget) < 1e-9 or above == 0 or budget > known[above]:
        return list(grid[known[above]])
    low, high = known[above - 1], known[above]
    part = (budget - low) / (high - low)
    return [_between(a, b, part) for a, b in zip(grid[low], grid[high], strict=True)]


def _between(low: float, high: float, part: float) -> float:
    if torch.isfinite(torch.tensor([low, high])).all():
        return low + (high - low) * part
    return high  # one end never skips (or always does): keep the safer end
