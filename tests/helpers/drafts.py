"""Settings of drafts that several tests ask for."""

from __future__ import annotations

from typing import Any

SKIPPING: dict[str, Any] = {"draft_weights": "own", "draft_budget": 0.5, "lookup": False}
"""A draft that skips half and is nothing else."""
