"""Per-row budget control: thresholds move with the share that the row's earlier tokens kept.

Thresholds are calibrated on some text, and keep another share on other text (prompts full of digits
kept 0.743 of the multiply-adds at budget 0.8). `BudgetControl` is a controller for each row. At the
start of a block of positions it moves along the calibrated thresholds, by the row's earlier tokens:

    budget of the block = budget + sum over earlier tokens (budget - kept share) / max(32, width)
                                 + mean over the last 64 of them (requested share - kept share)

The sum makes up for the difference of earlier tokens within a block, or for half of it where the
block is narrower. The mean is the error of the thresholds on this text: without it, the sum would
have to stay away from 0 to correct the error of each next block, and a short text would never come
to its budget. Where they ask for 1 or more, everything is computed. Blocks begin at 0, 16, 32, 64,
128, 192 and so on. They are narrow at first, so that a short text also meets its budget, and wide
later, because prompts pass block by block and read all weights in each. The controller uses only
the row's own earlier tokens, at positions that do not depend on how the text comes in: a row has
the same thresholds alone and in a batch, in chunks and token by token. The kept shares are stored
by position, as the KV cache is, so truncating a row truncates them, too. Sums are of integers, and
therefore the same in every order and in every backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from gateskip.model.compute import BranchCost, branch_costs
from gateskip.model.families import to_device
from gateskip.model.gating import ANCHORS, NEVER_SKIP

NARROWEST, WIDEST = 16, 64  # positions between two updates
MADE_UP = 32  # positions, at least, over which an offset is made up for
RECENT = 64  # positions whose thresholds' error is expected of the next block
STEPS = 256  # budgets whose thresholds are computed once
UNIT = 1 << 20  # a token's multiply-adds at all branches together, as an integer
DRIFT_BYTES = 16  # of a position of a row: see `Tracked.drift`


class Tracked(Protocol):
    """The parts of a cache that budget control uses."""

    drift: Tensor | None
    """int64 [B, capacity, 2]: budget - kept share, and requested - kept share, of the token at each
    position, in UNITs; 0 where the token was not controlled."""

    @property
    def capacity(self) -> int:
        """Positions of a row."""
        ...

    @property
    def batch(self) -> int:
        """Rows."""
        ...


class Budgets(Protocol):
    """Calibrated budgets: see calibration/budgets.py."""

    def at(self, budget: float) -> list[float] | None:
        """Thresholds of a budget, one per branch; None for full compute."""
        ...

    def curve(self, steps: int) -> tuple[float, float, list[list[float]]]:
        """The first and the last of that many budgets in equal steps, and their thresholds."""
        ...


@dataclass
class RowThresholds:
    """Thresholds of each row of one pass, and the branches that its tokens entered."""

    values: Tensor  # float32 [rows, branches]
    weights: Tensor  # int64 [rows, branches]: a branch's share of a token's multiply-adds, in UNITs
    entered: Tensor  # int64 [rows, S]: filled by the backend, what each token entered, in UNITs
    requested: Tensor | None = None  # float64 [rows]: the budget of the thresholds, if controlled

    def count(self, branch: int, keep: Tensor | None) -> None:
        """Tokens that enter a branch: bool [rows, S], or None for all."""
        weight = self.weights[:, branch : branch + 1]
        self.entered += weight if keep is None else weight * keep


@dataclass(frozen=True)
class BudgetControl:
    """Keeps every row at `budget`, by thresholds `curve` [STEPS, branches] of budgets in equal
    steps from `low` to `high`."""

    budget: float
    low: float
    high: float
    curve: Tensor
    costs: tuple[BranchCost, ...] = field(repr=False)

    @classmethod
    def of(cls, budgets: Budgets, budget: float, model: Any, device: torch.device) -> BudgetControl:
        """Control at a calibrated budget. Raises ValueError where too few were calibrated."""
        low, high, rows = budgets.curve(STEPS)
        curve = torch.tensor(rows, device=device)
        return cls(budget, low, high, curve, tuple(branch_costs(model)))

    def thresholds(
        self, cache: Tracked, rows: Sequence[int], starts: Sequence[int], width: int
    ) -> RowThresholds:
        """Thresholds of `width` tokens of cache rows, from positions `starts` on, which are in one
        block."""
        device = self.curve.device
        if cache.drift is None:
            cache.drift = empty_drift(cache.batch, cache.capacity, device)
        blocks = [block_of(start) for start in starts]
        firsts, widths = to_device(blocks, device).unbind(1)  # [rows]
        before = torch.arange(cache.capacity, device=device) - firsts.unsqueeze(1)  # < 0: earlier
        kept, missed = cache.drift[to_device(rows, device)].unbind(-1)  # [rows, capacity]
        tokens = kept.masked_fill(before >= 0, 0).sum(1).double() / UNIT
        recent = missed.masked_fill((before >= 0) | (before < -RECENT), 0).sum(1).double() / UNIT
        error = recent / firsts.clamp(1, RECENT)
        requested = self.budget + tokens / widths.clamp(min=MADE_UP) + error
        step = ((requested - self.low) / (self.high - self.low) * (STEPS - 1)).round()
        values = self.curve[step.clamp(0, STEPS - 1).long()]
        full = requested >= 1
        values = values.masked_fill(full.unsqueeze(1), NEVER_SKIP)
        requested = requested.clamp(self.low, self.high).masked_fill(full, 1.0)
        weights = to_device([shares(self.costs, block) for block in blocks], device)
        entered = torch.zeros(len(blocks), width, dtype=torch.long, device=device)
        return RowThresholds(values, weights, entered, requested)

    def record(
        self, cache: Tracked, rows: Sequence[int], starts: Sequence[int], done: RowThresholds
    ) -> None:
        """Store the shares that the tokens of a pass kept."""
        assert cache.drift is not None and done.requested is not None, "`thresholds` came first"
        budgets = torch.stack((torch.full_like(done.requested, self.budget), done.requested), -1)
        targets = (budgets * done.weights.sum(1, keepdim=True)).round().long()  # [rows, 2]
        drift, width = targets.unsqueeze(1) - done.entered.unsqueeze(-1), done.entered.shape[1]
        for row, start, of_row in zip(rows, starts, drift, strict=True):
            of_row[: max(0, ANCHORS - start)] = 0  # anchors enter whatever the thresholds are
            cache.drift[row, start : start + width] = of_row


def empty_drift(rows: int, capacity: int, device: torch.device) -> Tensor:
    """See `Tracked.drift`: of tokens that are not controlled."""
    return torch.zeros(rows, capacity, 2, dtype=torch.long, device=device)


@lru_cache(maxsize=4096)
def shares(costs: tuple[BranchCost, ...], block: tuple[int, int]) -> list[int]:
    """Each branch's share of a token's multiply-adds in the middle of a block, in UNITs."""
    middle = block[0] + block[1] // 2
    macs = [cost.at(min(middle, cost.window or middle)) for cost in costs]
    return [round(branch / sum(macs) * UNIT) for branch in macs]


def block_of(position: int) -> tuple[int, int]:
    """First position and width of the block that a position is in."""
    width = min(WIDEST, 1 << (max(position, NARROWEST).bit_length() - 1))
    return position // width * width, width


def is_narrow(position: int) -> bool:
    """Whether a position is in a block that is not as wide as later ones."""
    return block_of(position)[1] < WIDEST


def next_width(starts: Sequence[int], left: Sequence[int]) -> int:
    """Most tokens that all rows at `starts`, with that many left, can take before one changes
    block."""
    return min(
        min(sum(block_of(start)) - start, count) for start, count in zip(starts, left, strict=True)
    )
