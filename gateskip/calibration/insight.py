"""Inspection of gates: the compute that each branch, kind of token and position gets.

The paper reports that the first token has the highest gates in early layers, that punctuation stays
high, and that deep layers turn to content words (arXiv 2510.13876, section 5). This module measures
the same on any text, under the gates' decisions at a budget.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gateskip.gates.base import Gates
from gateskip.model.compute import branch_costs
from gateskip.model.families import Branch, device_of
from gateskip.model.gating import ANCHORS
from gateskip.model.reference import masked_forward

KINDS = ("first", "template", "punctuation", "digits", "function", "content", "space")
"""Kinds of tokens: the first of a text, special tokens (chat template), and kinds by spelling."""

FUNCTION_WORDS = frozenset(
    """a about above after again against all am an and any are as at be because been before being
    below between both but by can could did do does doing down during each few for from further had
    has have having he her here hers him his how i if in into is it its itself just may me might
    more most must my no nor not of off on once only or other our out over own same shall she should
    so some such than that the their them then there these they this those through to too under
    until up upon us very was we were what when where which while who whom why will with would you
    your""".split()  # noqa: SIM905 -- a list of words reads better as text
)


@dataclass(frozen=True)
class Inspection:
    """One text under the gates at one budget."""

    kinds: tuple[str, ...]  # [S]
    importance: Tensor  # [branches, S]: the gates' means, 0 to 1
    entered: Tensor  # bool [branches, S]: which branches each token entered
    compute: Tensor  # [S]: share of the branches' multiply-adds that each token got


@torch.no_grad()
def inspect_text(
    model: Any,
    gates: Gates,
    tokenizer: Any,
    ids: Sequence[int],
    thresholds: Sequence[float],
    kv_rule: str = "project",
) -> Inspection:
    """Run a text's token ids [S] under thresholds, one per branch, and note which tokens enter."""
    importance: list[Tensor] = []
    masks: list[Tensor] = []  # bool [S], a branch each

    def rule(branch: Branch, z: Tensor) -> Tensor:
        enters = z[0] >= thresholds[branch.index]
        enters[:ANCHORS] = True
        importance.append(torch.sigmoid(z[0]))
        masks.append(enters)
        return enters.to(z.dtype).unsqueeze(0)

    device = device_of(model)
    masked_forward(model, torch.tensor([list(ids)], device=device), gates, rule, kv_rule)
    costs = torch.tensor([cost.over(len(ids)) for cost in branch_costs(model)], device=device)
    entered = torch.stack(masks)
    compute = (entered * costs.unsqueeze(1)).sum(0) / costs.sum()
    return Inspection(token_kinds(tokenizer, ids), torch.stack(importance), entered, compute)


def token_kinds(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """The kind of each token, a member of KINDS."""
    special = set(tokenizer.all_special_ids)
    kinds = []
    for place, token in enumerate(ids):
        if place < ANCHORS:
            kinds.append("first")
        elif token in special:
            kinds.append("template")
        else:
            kinds.append(_kind(tokenizer.decode([token])))
    return tuple(kinds)


def _kind(text: str) -> str:
    word = text.strip()
    if not word:
        return "space"
    if all(letter in string.punctuation or not letter.isalnum() for letter in word):
        return "punctuation"
    if word.isdigit():
        return "digits"
    return "function" if word.lower() in FUNCTION_WORDS else "content"


def summarize(inspections: Sequence[Inspection], positions: int = 8) -> dict[str, Any]:
    """Means over texts, as plain data.

    `branches`: mean gate and kept share of each; `kinds` and `positions`: tokens seen, mean share
    of compute, and kept share of each branch for each kind and each eighth of the texts. The first
    token of a text is left out of branches and positions: it never skips.
    """
    importance = torch.cat([text.importance[:, ANCHORS:] for text in inspections], 1)
    entered = torch.cat([text.entered[:, ANCHORS:] for text in inspections], 1)
    by_kind = {}
    for kind in KINDS:
        chosen = [torch.tensor([name == kind for name in text.kinds]) for text in inspections]
        if any(bool(mask.any()) for mask in chosen):
            by_kind[kind] = _group(inspections, chosen)
    by_position = []
    for part in range(positions):
        chosen = [_part(len(text.kinds), part, positions) for text in inspections]
        if any(bool(mask.any()) for mask in chosen):
            by_position.append(_group(inspections, chosen))
    return {
        "branches": [
            {"gate": round(float(gate), 4), "kept": round(float(share), 4)}
            for gate, share in zip(importance.mean(1), entered.float().mean(1), strict=True)
        ],
        "kinds": by_kind,
        "positions": by_position,
    }


def _part(length: int, part: int, parts: int) -> Tensor:
    """Which tokens of a text are in each of `parts` equal stretches; the anchors are in none."""
    places = torch.arange(length)
    return (places * parts // length == part) & (places >= ANCHORS)


def _group(inspections: Sequence[Inspection], chosen: Sequence[Tensor]) -> dict[str, Any]:
    """Means over the chosen tokens, a bool [S] for each text."""
    pairs = list(zip(inspections, chosen, strict=True))
    compute = torch.cat([text.compute[mask] for text, mask in pairs])
    entered = torch.cat([text.entered[:, mask] for text, mask in pairs], 1)
    return {
        "tokens": len(compute),
        "compute": round(float(compute.mean()), 4),
        "kept": [round(float(share), 4) for share in entered.float().mean(1)],
    }
