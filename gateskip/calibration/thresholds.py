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

from gateskip.calibration.allocation import allocator
from gateskip.gates.base import Gates
from gateskip.model.compute import branch_costs
from gateskip.model.families import Branch
from gateskip.model.gating import ANCHORS, NEVER_SKIP
from gateskip.model.reference import masked_forward

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
    allocate = allocator(allocation, costs, free, sensitivity, least, most)
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
