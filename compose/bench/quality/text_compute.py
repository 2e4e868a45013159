"""The compute of a cell that skips on the text that was scored: on prompts, and on answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

from gateskip.decoding.decoder import Decoder
from gateskip.decoding.phases import Phase
from gateskip.model.compute import Saving, Usage

Saves = Callable[[Usage], Saving]
"""Counts the compute that was saved over tokens."""


def text_compute(
    used: Mapping[Phase, Usage], decoder: Decoder, saving: Saves
) -> dict[str, Any] | None:
    """`TextCompute` of tokens by phase; None where none was counted."""
    seen = {phase: usage for phase, usage in used.items() if usage.seen}
    if not seen:
        return None
    whole: dict[str, Any] = _numbers(reduce(Usage.plus, seen.values()), decoder, saving)
    for phase, usage in seen.items():
        whole[phase] = _numbers(usage, decoder, saving)
    return whole


def _numbers(usage: Usage, decoder: Decoder, saving: Saves) -> dict[str, Any]:
    return {
        "tokens": usage.seen,
        "kept": round(decoder.kept_of(usage), 4),
        "saved_net": round(saving(usage).net, 4),
    }
