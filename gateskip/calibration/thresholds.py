"""Thresholds: from a budget, the share of multiply-adds to keep, to one number a branch.

A threshold is calibrated once on text and stored, so that what a token skips depends on nothing but
itself and its past: not on batch-mates, not on later tokens, not on how a prefill was cut. The
published method takes a quantile of the running batch instead (arXiv 2510.13876, section 3.3).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gateskip.calibration.allocation import allocator
from gateskip.calibration.budgets import (
    OFF,
    CalibratedBudgets,
    half_way,
    interpolate,
    with_gaps_filled,
)
from gateskip.calibration.settings import DEFAULT_BUDGETS, Allocation
from gateskip.gates.base import Gates
from gateskip.model.compute import branch_costs
from gateskip.model.families import Branch, device_of
from gateskip.model.gating import ANCHORS, NEVER_SKIP
from gateskip.model.progress import Progress
from gateskip.model.reference import masked_forward

CLOSE = 0.004  # a kept share this near to its budget is good enough
DAMPING = 0.8  # skipping more lowers later logits, so that full corrections overshoot


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
    allocation: Allocation = "global",
    kv_rule: str = "project",
    sensitivity: Sequence[float] | None = None,
    least: float = 0.0,
    most: float = 1.0,
    closed: frozenset[int] = frozenset(),
    gone: frozenset[int] = frozenset(),
    rounds: int = 6,
    batch: int = 4,
    progress: Progress | None = None,
) -> list[Calibration]:
    """Thresholds for each budget on blocks [N, S] of token ids.

    Every branch keeps at least a share `least` of its tokens and at most `most`; `closed` branches
    never skip. `gone` branches always do: where they alone save more than a budget asks for, less
    than the budget is kept.

    Skipping changes what later gates read, so calibration is a closed loop of at most `rounds`:
    thresholds are read off the logits measured at the neighbouring budget, the share that they
    really keep is measured, and the requested share is corrected. The closest round is returned.
    Budgets go from high to low.
    """
    device = device_of(model)
    costs = torch.tensor([c.over(blocks.shape[1]) for c in branch_costs(model)], device=device)
    free = torch.ones(len(costs), dtype=torch.bool, device=device)
    free[sorted(closed | gone)] = False
    free[0] &= kv_rule != "copy"  # the first attention has nothing below it to copy from
    allocate = allocator(allocation, costs, free, sensitivity, least, most)
    thresholds = torch.full((gates.branches,), NEVER_SKIP, device=device)
    thresholds[sorted(gone)] = torch.inf
    spared = float(costs[sorted(gone)].sum() / costs.sum())
    logits = _collect(model, gates, blocks, thresholds, kv_rule, batch)
    calibrations = []
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
        calibrations.append(best)
        if progress is not None:
            progress(done + 1, len(wanted), "calibrating budgets")
    return calibrations


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


@torch.no_grad()
def calibrate_everywhere(
    model: Any,
    gates: Gates,
    blocks: Tensor,
    budgets: Sequence[float],
    kv_rule: str = "project",
    gone: frozenset[int] = frozenset(),
    batch: int = 4,
    **settings: Any,
) -> CalibratedBudgets:
    """As `calibrate`, so that every budget from the lowest on can be had.

    Gaps between budgets are filled, and what the thresholds half-way between two keep is measured;
    where that is more than half of OFF away, the half-way budget is calibrated too.
    """
    thresholds: dict[float, Sequence[float]] = {}
    kept: dict[float, float] = {}
    wanted = with_gaps_filled(budgets)
    for _ in range(2):
        done = calibrate(
            model, gates, blocks, wanted, kv_rule=kv_rule, gone=gone, batch=batch, **settings
        )
        thresholds |= {each.budget: each.thresholds for each in done}
        kept |= {each.budget: each.kept for each in done}
        between = {
            middle: kept_by(model, gates, blocks, row, kv_rule, batch)
            for middle, row in _half_way(thresholds).items()
        }
        wanted = [middle for middle, share in between.items() if abs(share - middle) > OFF / 2]
        if not wanted:
            break
    return CalibratedBudgets(thresholds, kept, between)


def _half_way(thresholds: Mapping[float, Sequence[float]]) -> dict[float, list[float]]:
    """Interpolated thresholds half-way between each two calibrated budgets."""
    middles = {}
    for low, high in itertools.pairwise(sorted(thresholds)):
        middle = half_way(low, high)
        middles[middle] = interpolate(thresholds, low, high, middle)
    return middles


def kept_by(
    model: Any,
    gates: Gates,
    blocks: Tensor,
    thresholds: Sequence[float],
    kv_rule: str = "project",
    batch: int = 4,
) -> float:
    """Share of the branches' multiply-adds that thresholds keep on blocks [N, S]."""
    device = device_of(model)
    costs = torch.tensor([c.over(blocks.shape[1]) for c in branch_costs(model)], device=device)
    row = torch.tensor(list(thresholds), device=device)
    return _record(0.0, row, _collect(model, gates, blocks, row, kv_rule, batch), costs).kept
