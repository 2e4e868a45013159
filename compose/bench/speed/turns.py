"""A timed repeat of a cell: the turns it had in one round, added up.

Speeds are sums of tokens over sums of seconds, so a repeat that is made of many short turns is what
one long turn would have been, but spread over the time in which the other cells had theirs.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Turn = Mapping[str, Any]
"""The record of one turn from a cell's process: see
`compose.bench.speed.measure.SpeedTurns.measure`."""

SUMS = ("prompt_tokens", "prefill_s", "tokens", "decode_s")
LARGEST = ("resident_bytes", "peak_bytes", "cache_bytes", "beside_bytes", "threads", "affinity")
COUNTS = ("drafted", "accepted", "passes", "looked_up", "draft_s", "verify_s")


def add_turns(turns: Sequence[Turn]) -> dict[str, Any]:
    """One repeat from its turns, at least one: tokens a second, sums, and the largest memory.

    `decode_tokens_per_s` is None where nothing was decoded; `digest` is None where the turns of a
    cell gave different texts.
    """
    sums = {name: sum(turn[name] for turn in turns) for name in SUMS}
    digests = {turn.get("digest") for turn in turns}
    numbers: dict[str, Any] = {
        "prefill_tokens_per_s": _rate(sums["prompt_tokens"], sums["prefill_s"]),
        "decode_tokens_per_s": _rate(sums["tokens"], sums["decode_s"]),
        "ttft_s": statistics.median(turn["ttft_s"] for turn in turns),
        **sums,
        "turns": sum(turn.get("turns", 1) for turn in turns),
        "digest": digests.pop() if len(digests) == 1 else None,
    }
    for name in LARGEST:
        values = [turn[name] for turn in turns if turn.get(name) is not None]
        if values:
            numbers[name] = max(values)
    if "spent" in turns[0]:
        numbers["spent"] = add_counts(turn["spent"] for turn in turns)
    if "compute" in turns[0]:
        numbers["compute"] = mean_compute([turn["compute"] for turn in turns])
    if "speculation" in turns[0]:
        numbers["speculation"] = add_speculation([turn["speculation"] for turn in turns])
    return numbers


def mean_compute(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each share of compute over the records that have it."""
    return {
        name: statistics.mean(record[name] for record in records if name in record)
        for name in dict.fromkeys(name for record in records for name in record)
    }


def add_speculation(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts of speculation, added up over the turns of a repeat, or the repeats of a cell, with
    the draft's name of the last one."""
    longest = max(len(record["positions"]) for record in records)
    positions = [[0, 0] for _ in range(longest)]
    for record in records:
        for total, (reached, accepted) in zip(positions, record["positions"], strict=False):
            total[0] += reached
            total[1] += accepted
    return {
        "draft_length_histogram": add_counts(
            record["draft_length_histogram"] for record in records
        ),
        **{name: sum(record[name] for record in records) for name in COUNTS},
        "positions": positions,
        "draft_weights": records[-1].get("draft_weights"),
    }


def add_counts(counts: Iterable[Mapping[Any, float]]) -> dict[str, float]:
    """Counts by name, added up. Names become text, as in JSON."""
    total: dict[str, float] = {}
    for record in counts:
        for name, count in record.items():
            total[str(name)] = total.get(str(name), 0) + count
    return total


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if tokens and seconds > 0 else None
