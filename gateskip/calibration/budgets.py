"""Thresholds for any budget, interpolated between calibrated ones, and the share that they keep.

Interpolated thresholds can keep another share than the budget. So calibration measures the share
half-way between each two calibrated budgets, and a budget that would keep another share is refused.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

OFF = 0.02  # accepted difference between a budget and the share that it keeps
STEP = 0.1  # between two calibrated budgets at most
HIGHEST = 0.97  # the highest budget, always calibrated: above it comes full compute
TINY = 1e-9


@dataclass(frozen=True)
class CalibratedBudgets:
    """Everything that was calibrated for a model's gates."""

    thresholds: Mapping[float, Sequence[float]]
    """Thresholds, one per branch, for each calibrated budget."""
    kept: Mapping[float, float] = field(default_factory=dict)
    """Share of the branches' multiply-adds that each budget kept on the calibration text."""
    between: Mapping[float, float] = field(default_factory=dict)
    """The same for interpolated thresholds, half-way between two calibrated budgets."""
    phases: Mapping[float, Mapping[str, float]] = field(default_factory=dict)
    """The share that each budget kept of prompts (`prompt`) and of the answers written at it
    (`answer`), where thresholds were calibrated on written text."""
    prompts: CalibratedBudgets | None = None
    """The same for tokens of prompts, calibrated by their effect on answers: see
    calibration/reading.py."""

    def for_prompts(self) -> CalibratedBudgets:
        """The budgets that were calibrated for tokens of prompts.

        Raises:
            ValueError: there are none.
        """
        if self.prompts is None:
            raise ValueError(
                "no prompt budgets were calibrated: make the gates again with prompt_budgets"
            )
        return self.prompts

    def at(self, budget: float) -> list[float] | None:
        """Thresholds for a budget; None means full compute.

        Raises:
            ValueError: the budget is below the lowest calibrated one, or the share that it keeps
                was never measured or differs from it by more than OFF.
        """
        if budget >= 1.0:
            return None
        kept_share = self.kept_at(budget)
        exact = _nearest(self.thresholds, budget)
        if exact is None and abs(kept_share - budget) > OFF + TINY:
            calibrated = ", ".join(f"{other:g}" for other in sorted(self.thresholds))
            raise ValueError(
                f"budget {budget:g} would keep {kept_share:.2f} of the multiply-adds: use a"
                f" calibrated budget ({calibrated}), or add {budget:g} to the gate stage's budgets"
            )
        if exact is not None:
            return list(self.thresholds[exact])
        low, high = self._around(budget)
        if high is None:  # above the highest: that, or full compute, whichever is nearer
            return list(self.thresholds[low]) if kept_share < 1.0 else None
        return interpolate(self.thresholds, low, high, budget)

    def kept_at(self, budget: float) -> float:
        """Share of multiply-adds that a budget keeps on text like the calibration's.

        Measured at calibrated budgets and half-way between two of them; linear in between.

        Raises:
            ValueError: the budget is below the lowest calibrated one, or lies in a gap wider than
                STEP in which nothing was measured.
        """
        if budget >= 1.0:
            return 1.0
        exact = _nearest(self.thresholds, budget)
        if exact is not None:
            return self._measured(exact)
        low, high = self._around(budget)
        if high is None:
            ends = (self._measured(low), 1.0)
            return min(ends, key=lambda end: abs(end - budget))
        middle = _nearest(self.between, half_way(low, high))
        points = [(low, self._measured(low)), (high, self._measured(high))]
        if middle is not None:
            points.insert(1, (middle, self.between[middle]))
        elif high - low > STEP + TINY:
            raise ValueError(
                f"the share that budget {budget:g} keeps was never measured: use {low:g} or"
                f" {high:g}, or make the gates again with {budget:g} among their budgets"
            )
        for (below, share), (above, next_share) in itertools.pairwise(points):
            if budget <= above:
                return share + (next_share - share) * (budget - below) / (above - below)
        raise AssertionError("a budget lies between its neighbours")

    def curve(self, count: int) -> tuple[float, float, list[list[float]]]:
        """The first and the last of `count` budgets in equal steps, and their thresholds.

        They go on below the lowest calibrated budget, as far as that is below 1, by extrapolating
        the thresholds of the two lowest: text that skips less than calibration's needs them to
        come to its budget.

        Raises:
            ValueError: fewer than two budgets are calibrated.
        """
        budgets = sorted(self.thresholds)
        if len(budgets) < 2:
            raise ValueError(
                "per-row budget control needs at least two calibrated budgets, and the gates have"
                f" {len(budgets)}: make them again with more budgets"
            )
        low, high, rows = max(0.0, 2 * budgets[0] - 1), budgets[-1], list[list[float]]()
        for number in range(count):
            budget = low + (high - low) * number / (count - 1)
            above = min(max(1, bisect_left(budgets, budget)), len(budgets) - 1)
            rows.append(interpolate(self.thresholds, budgets[above - 1], budgets[above], budget))
        return low, high, rows

    def _measured(self, budget: float) -> float:
        """The share that a calibrated budget kept; the budget itself where it was not stored."""
        exact = _nearest(self.kept, budget)
        return budget if exact is None else self.kept[exact]

    def _around(self, budget: float) -> tuple[float, float | None]:
        """The nearest calibrated budgets below and above; None above the highest."""
        budgets = sorted(self.thresholds)
        if not budgets or budget < budgets[0]:
            lowest = f"{budgets[0]:g}" if budgets else "none"
            raise ValueError(f"budget {budget:g} was not calibrated; the lowest is {lowest}")
        above = bisect_left(budgets, budget)
        return budgets[above - 1], budgets[above] if above < len(budgets) else None


def _nearest(values: Mapping[float, object], budget: float) -> float | None:
    """The key that equals this budget up to rounding."""
    return next((key for key in values if abs(key - budget) < TINY), None)


def half_way(low: float, high: float) -> float:
    """The budget in the middle of two, rounded to few digits."""
    return round((low + high) / 2, 4)


def interpolate(
    thresholds: Mapping[float, Sequence[float]], low: float, high: float, budget: float
) -> list[float]:
    """Thresholds of a budget between two calibrated ones, or below both."""
    part = (budget - low) / (high - low)
    pairs = zip(thresholds[low], thresholds[high], strict=True)
    return [_between(a, b, part) for a, b in pairs]


def _between(low: float, high: float, part: float) -> float:
    if math.isfinite(low) and math.isfinite(high):
        return low + (high - low) * part
    return high  # one end never skips (or always does): keep the safer end


def with_gaps_filled(budgets: Sequence[float]) -> list[float]:
    """The budgets with further ones between and above them, so that no gap is wider than STEP."""
    ordered = sorted({budget for budget in budgets if budget < 1})
    if ordered and ordered[-1] < HIGHEST - OFF / 2:
        ordered.append(HIGHEST)
    filled = ordered[:1]
    for low, high in itertools.pairwise(ordered):
        parts = math.ceil((high - low) / STEP - TINY)
        filled += [round(low + (high - low) * n / parts, 3) for n in range(1, parts)]
        filled.append(high)
    return filled
