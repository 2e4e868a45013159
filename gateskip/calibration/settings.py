"""Settings of calibration. Imports no torch: the gate stage reads it while planning."""

from __future__ import annotations

from typing import Literal, get_args

Allocation = Literal["global", "uniform", "sensitivity"]
"""How a budget is shared out over branches: one threshold for all, the same kept share for each, or
shares by measured sensitivity."""

ALLOCATIONS: tuple[Allocation, ...] = get_args(Allocation)

PromptOrder = Literal["harm", "depth"]
"""Which branches a prompt's tokens skip first: those with the least effect on answers for their
cost (`harm`), or the last layers (`depth`)."""

DEFAULT_BUDGETS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4)
"""Budgets for which thresholds are calibrated by default."""
