"""What a cell is: its family (what its chain does), its quantizer, and how it decodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from compose.results.parts import StepInfo
from compose.results.schema import CellResult, Results

Decode = Literal["plain", "skip", "speculate", "peer"]

NOT_QUANTIZED = "not quantized"
INTEGERS = frozenset({"int8", "int6", "int4", "int3", "int2"})
OLDER_ROLES = dict.fromkeys(
    ("drop-layers", "prune-width", "prune-heads", "prune-hidden", "prune-branches"), "prune"
) | {"gate": "gate"}
"""Roles of stages in results from before each step stated its own."""


def weights_of(cell: CellResult) -> str:
    """How the weights are stored, in words, as far as the chain's stages or the peer tell."""
    if cell.peer is not None:
        return cell.peer.option or NOT_QUANTIZED
    for step in cell.steps or ():
        stored = _older_format(step) if step.role is None else step.stored_as
        if stored is not None:
            return stored
    return NOT_QUANTIZED


def _older_format(step: StepInfo) -> str | None:
    """What `stored_as` would say of a step in results that do not state it."""
    extra = step.model_extra or {}
    if step.use in INTEGERS:
        return step.use
    if step.use == "bnb":
        return str(extra.get("format", "bnb"))
    if step.use in ("gptq", "autoround"):
        return f"{step.use} {extra['bits']}-bit" if "bits" in extra else step.use
    return None


def decode_of(cell: CellResult) -> Decode:
    """How the cell decodes: by its stages, or else by what was measured of it."""
    if cell.peer is not None:
        return "peer"
    uses = _uses(cell.steps)
    if "speculate" in uses or cell.speculates:
        return "speculate"
    if cell.steps is not None:
        return "skip" if "skip" in uses else "plain"
    return "skip" if cell.plain not in (None, cell.name) else "plain"


def family_of(cell: CellResult) -> str:
    """The family that the report filters by: the last thing that the chain does to speed."""
    if cell.peer is not None:
        return cell.peer.engine
    decode = decode_of(cell)
    roles = {step.role or OLDER_ROLES.get(step.use) for step in cell.steps or ()}
    if decode == "speculate":
        return "speculation"
    if decode == "skip":
        return "skipping"
    if "prune" in roles:
        return "pruned"
    if "gate" in roles:
        return "gated, all computed"
    return "dense" if weights_of(cell) == NOT_QUANTIZED else "quantized"


def lossless_to(results: Results, cell: CellResult) -> str:
    """The weights whose tokens a cell with drafts has to give: `its int4 weights`.

    Where it verifies drafts at a budget: the cell that skips at that budget, by its name.
    """
    plain = results.find(cell.plain)
    if plain is not None and decode_of(plain) == "skip":
        return plain.name
    stored = weights_of(cell)
    stored = (results.dtype or "own") if stored == NOT_QUANTIZED else stored
    return f"its {stored} weights"


def _uses(steps: Sequence[StepInfo] | None) -> set[str]:
    return {step.use for step in steps or ()}
