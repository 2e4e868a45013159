"""All kinds of gates by name, in one table. A new kind is a class and a row below."""

from __future__ import annotations

from typing import Any

from gateskip.gates.base import Gates
from gateskip.gates.baselines import ExitGates, RandomGates, RouterGates, StaticGates
from gateskip.gates.learned import (
    LowRankGates,
    MlpGates,
    ScalarGates,
    SharedGates,
    VectorGates,
)
from gateskip.model.gating import Place

GATE_KINDS: dict[str, type[Gates]] = {
    "scalar": ScalarGates,
    "vector": VectorGates,
    "low-rank": LowRankGates,
    "shared": SharedGates,
    "mlp": MlpGates,
    # baselines
    "random": RandomGates,
    "static": StaticGates,
    "router": RouterGates,
    "exit": ExitGates,
}
"""Kinds of gates, by name in a pipeline file."""


def make_gates(
    kind: str,
    branches: int,
    hidden_size: int,
    sizes: dict[str, int] | None = None,
    scales: bool = False,
    place: Place = "after",
) -> Gates:
    """New, open gates of a kind. Raises ValueError for a kind or place that does not exist."""
    if kind not in GATE_KINDS:
        raise ValueError(f"gate kind {kind!r}: one of {', '.join(GATE_KINDS)}")
    if place == "before" and not scales:
        raise ValueError("place 'before' scales a branch's input: it needs scales")
    make: Any = GATE_KINDS[kind]
    gates: Gates = make(branches, hidden_size, **(sizes or {}))
    gates.scales, gates.place = scales, place
    return gates
