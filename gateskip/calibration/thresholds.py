"""Thresholds: turns a budget, the share of multiply-adds to keep, into one number for each branch.

A threshold is calibrated once on text and stored. So a token's skips depend only on itself and its
past: not on other rows of the batch, on later tokens, or on how a prefill was cut. The published
method takes a quantile of the running batch instead (arXiv 2510.13876, section 3.3).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gateskip.calibration.allocation import Allocate, allocator
from gateskip.calibration.budgets import (
    OFF,
    CalibratedBudgets,
    half_way,
    interpolate,
    with_gaps_filled,
)
from gateskip.calibration.settings import DEFAULT_BUDGETS, Allocation
from gateskip.gates.base import Gates
from gateskip.kernels.autotune import fast_products
from gateskip.model.compute import branch_costs
from gateskip.model.families import Branch, device_of
from gateskip.model.gating import ANCHORS, NEVER_SKIP
from gateskip.model.progress import Progress
from gateskip.model.reference import masked_forward

CLOSE = 0.004  # a kept share this near to its budget is good enough
DAMPING = 0.8  # of corrections: skipping more lowers later logits, so that full ones overshoot


@dataclass(frozen=True)
class Sample:
    """Rows of text, and which of their tokens thresholds are calibrated on."""

    ids: Tensor  # [N, S], padded on the right
    counted: Tensor  # bool [N, S]; the first tokens of rows never count, since they never skip

    @classmethod
    def whole(cls, blocks: Tensor) -> Sample:
        """All tokens of blocks [N, S]."""
        return cls(blocks, torch.ones_like(blocks, dtype=torch.bool))


Samples = Sequence[Sample]
TextOf = Callable[[float], Samples]
"""A budget -> the text on which its thresholds are calibrated; equal text is the same object."""


def text_of(blocks: Tensor) -> TextOf:
    """The same blocks [N, S] for every budget."""
    samples = [Sample.whole(blocks)]
    return lambda _: samples


@dataclass(frozen=True)
class Calibration:
    """The thresholds of one budget, and their effect on the calibration text."""

    budget: float
    thresholds: tuple[float, ...]
    kept: float  # share of the branches' multiply-adds that was kept
    shares: tuple[float, ...]  # share of tokens kept, branch by branch


@torch.no_grad()
def calibrate(
    model: Any,
    gates: Gates,
    blocks: Tensor | TextOf,
    budgets: Sequence[float] = DEFAULT_BUDGETS,
    allocation: Allocation = "global",
    kv_rule: str = "project",
    sensitivity: Sequence[float] | None = None,
    min_share: float = 0.0,
    max_share: float = 1.0,
    closed: frozenset[int] = frozenset(),
    gone: frozenset[int] = frozenset(),
    shifts: Tensor | None = None,
    sure: float = 0.0,
    rounds: int = 6,
    batch: int = 4,
    progress: Progress | None = None,
) -> list[Calibration]:
    """Thresholds for each budget on blocks [N, S] of token ids, or on another text for each budget.

    Every branch keeps at least a share `min_share` of its tokens and at most `max_share`; tokens
    never skip `closed` branches. They always skip `gone` branches: where these alone save more than
    a budget asks for, less than the budget is kept. `shifts` [branches] are added to the logits of
    each branch before they are compared with those of others. Where less than a share `sure` of the
    tokens would enter a branch, or would skip it, all do.

    Skipping changes the inputs of later gates, so calibration is a closed loop of at most `rounds`.
    Thresholds are read off the logits measured at the neighbouring budget, the share that they
    really keep is measured, and the requested share is corrected. The closest round is returned.
    Budgets go from high to low.

    Raises ValueError for an unknown allocation.
    """
    device = device_of(model)
    text = text_of(blocks) if isinstance(blocks, Tensor) else blocks
    requested = sorted(set(budgets), reverse=True)
    samples = text(requested[0])
    costs = _costs(model, samples)
    free = torch.ones(len(costs), dtype=torch.bool, device=device)
    free[sorted(closed | gone)] = False
    free[0] &= kv_rule != "copy"  # the first attention has nothing below it to copy from
    allocate = allocator(allocation, costs, free, sensitivity, min_share, max_share)
    if shifts is not None:
        allocate = _shifted(allocate, shifts)
    if sure:
        allocate = _decided(allocate, sure)
    thresholds = torch.full((gates.branches,), NEVER_SKIP, device=device)
    thresholds[sorted(gone)] = torch.inf
    spared = float(costs[sorted(gone)].sum() / costs.sum())
    logits = _collect(model, gates, samples, thresholds, kv_rule, batch)
    calibrations = []
    for done, budget in enumerate(requested):
        if text(budget) is not samples:  # the neighbour's thresholds, on this budget's text
            samples = text(budget)
            logits = _collect(model, gates, samples, thresholds, kv_rule, batch)
        tried: list[tuple[Calibration, Tensor]] = []
        skip = max(0.0, 1 - budget - spared)  # the requested share
        for _ in range(rounds):
            thresholds = allocate(logits, 1 - skip)
            thresholds[sorted(gone)] = torch.inf
            left = _collect(model, gates, samples, thresholds, kv_rule, batch)
            tried.append((_record(budget, thresholds, left, costs), left))
            kept_share = tried[-1][0].kept
            if abs(kept_share - budget) < CLOSE:
                break
            skip = min(1.0, skip * ((1 - budget) / max(1e-6, 1 - kept_share)) ** DAMPING)
        best, logits = min(tried, key=lambda attempt: abs(attempt[0].kept - budget))
        thresholds = torch.tensor(best.thresholds, device=device)
        calibrations.append(best)
        if progress is not None:
            progress(done + 1, len(requested), "calibrating budgets")
    return calibrations


def _shifted(allocate: Allocate, shifts: Tensor) -> Allocate:
    """The same allocation of logits after a shift by `shifts` [branches]."""
    return lambda logits, budget: allocate(logits + shifts.unsqueeze(1), budget) - shifts


def _decided(allocate: Allocate, sure: float) -> Allocate:
    """The same, but where less than a share `sure` of a branch's tokens skip, or enter, none do."""

    def decide(logits: Tensor, budget: float) -> Tensor:
        thresholds = allocate(logits, budget)
        shares = (logits >= thresholds.unsqueeze(1)).float().mean(1)
        thresholds = thresholds.masked_fill(shares > 1 - sure, NEVER_SKIP)
        return thresholds.masked_fill(shares < sure, torch.inf)

    return decide


def _record(budget: float, thresholds: Tensor, logits: Tensor, costs: Tensor) -> Calibration:
    shares = (logits >= thresholds.unsqueeze(1)).float().mean(1)
    kept_share = float((shares * costs).sum() / costs.sum())
    return Calibration(budget, tuple(thresholds.tolist()), kept_share, tuple(shares.tolist()))


def _costs(model: Any, samples: Samples) -> Tensor:
    """Multiply-adds [branches] of a token, at the mean context of the longest rows."""
    longest = max(sample.ids.shape[1] for sample in samples)
    return torch.tensor([c.over(longest) for c in branch_costs(model)], device=device_of(model))


def _collect(
    model: Any, gates: Gates, samples: Samples, thresholds: Tensor, kv_rule: str, batch: int
) -> Tensor:
    """Gate logits [branches, tokens] of the tokens that count, while skipping by `thresholds`."""
    logits: list[list[Tensor]] = [[] for _ in range(gates.branches)]
    counted = torch.empty(0)  # of the rows at hand, without the anchors

    def rule(branch: Branch, z: Tensor) -> Tensor:
        logits[branch.index].append(z[:, ANCHORS:].flatten()[counted])
        return (z >= thresholds[branch.index]).to(z.dtype)

    for sample in samples:
        for part, mask in zip(sample.ids.split(batch), sample.counted.split(batch), strict=True):
            counted = mask[:, ANCHORS:].flatten().to(thresholds.device)
            with fast_products(thresholds.device.type):
                masked_forward(model, part, gates, rule, kv_rule)
    return torch.stack([torch.cat(parts) for parts in logits])


@torch.no_grad()
def mean_logits(
    model: Any, gates: Gates, blocks: Tensor, kv_rule: str = "project", batch: int = 4
) -> Tensor:
    """Each branch's mean gate logit [branches] on blocks [N, S], while no token skips."""
    entered = torch.full((gates.branches,), NEVER_SKIP, device=device_of(model))
    return _collect(model, gates, [Sample.whole(blocks)], entered, kv_rule, batch).mean(1)


@torch.no_grad()
def calibrate_everywhere(
    model: Any,
    gates: Gates,
    blocks: Tensor | TextOf,
    budgets: Sequence[float],
    kv_rule: str = "project",
    gone: frozenset[int] = frozenset(),
    batch: int = 4,
    **settings: Any,
) -> CalibratedBudgets:
    """As `calibrate`, but so that every budget from the lowest on is available.

    Gaps between budgets are filled. The share that thresholds half-way between two budgets keep is
    measured; where it differs by more than half of OFF, the half-way budget is calibrated too.
    """
    text = text_of(blocks) if isinstance(blocks, Tensor) else blocks
    thresholds: dict[float, Sequence[float]] = {}
    kept_shares: dict[float, float] = {}
    requested = with_gaps_filled(budgets)
    for _ in range(2):
        calibrations = calibrate(
            model, gates, text, requested, kv_rule=kv_rule, gone=gone, batch=batch, **settings
        )
        thresholds |= {row.budget: row.thresholds for row in calibrations}
        kept_shares |= {row.budget: row.kept for row in calibrations}
        between = {
            middle: kept_by(model, gates, text(middle), row, kv_rule, batch)
            for middle, row in _half_way(thresholds).items()
        }
        requested = [middle for middle, share in between.items() if abs(share - middle) > OFF / 2]
        if not requested:
            break
    return CalibratedBudgets(thresholds, kept_shares, between)


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
    blocks: Tensor | Samples,
    thresholds: Sequence[float],
    kv_rule: str = "project",
    batch: int = 4,
) -> float:
    """Share of the branches' multiply-adds that thresholds keep on blocks [N, S], or on the tokens
    of samples that count."""
    samples = [Sample.whole(blocks)] if isinstance(blocks, Tensor) else blocks
    row = torch.tensor(list(thresholds), device=device_of(model))
    logits = _collect(model, gates, samples, row, kv_rule, batch)
    return _record(0.0, row, logits, _costs(model, samples)).kept
