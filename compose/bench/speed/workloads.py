"""Prompts on which systems are timed, and the turns of a cell added up to a repeat.

Prompts are running text of exact lengths, or a file's by category. Speeds of a repeat are sums of
tokens over sums of seconds. So many short turns equal one long turn, but they are spread over the
time in which the other cells have theirs.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from compose.assets import load_texts, token_blocks
from compose.bench.generate import prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


T = TypeVar("T")

Rows = list[list[int]]
"""Token ids of a batch of prompts, or of their continuations."""

Workloads = dict[str, list[Rows]]
"""Name of a workload -> its batches of prompts."""

UNNAMED = "prompts"
"""The category of prompts that have none."""


class TurnText(NamedTuple):
    """The prompts of a turn."""

    batch: int
    context: int
    """Tokens of a prompt; 0 with a category."""
    category: str
    """Category of the prompts in a file; empty for running text."""
    round: int
    """Number of the round. Each round takes other text, so that an interval over rounds is one over
    texts."""


def rows_of(
    tokenizer: PreTrainedTokenizerBase,
    which: TurnText,
    speed: Mapping[str, Any],
    cache: Path | None,
) -> list[Rows]:
    """The batches of a turn: rows of running text, or the prompts of a category, one at a time.
    `speed` is the benchmark's speed section.

    Raises AssetError where the texts are not available.
    """
    if which.category:
        texts = _texts_by_category(speed["prompts"], cache)[which.category]
        count = min(speed["prompts_per_category"] or len(texts), len(texts))
        return [[prompt_ids(tokenizer, text)] for text in _next(texts, which.round, count)]
    return [running_text(tokenizer, which.batch, which.context, cache, which.round)]


class TurnTexts(dict[TurnText, list[Rows]]):
    """The batches of turns, each made on first use: see `rows_of`."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, speed: Mapping[str, Any], cache: Path | None
    ) -> None:
        super().__init__()
        self._arguments = tokenizer, speed, cache

    def __missing__(self, which: TurnText) -> list[Rows]:
        tokenizer, speed, cache = self._arguments
        self[which] = rows_of(tokenizer, which, speed, cache)
        return self[which]


def running_text(
    tokenizer: PreTrainedTokenizerBase,
    batch: int,
    context: int,
    cache: Path | None,
    number: int = 0,
) -> Rows:
    """`batch` rows of `context` tokens of heldout-text; each number takes the next ones, and starts
    again at the end. With exact lengths the time does not depend on how prompts end."""
    text = load_texts("heldout-text", None, cache)
    rows: Rows = token_blocks(text, tokenizer, context, (number + 1) * batch).tolist()
    return _next(rows, number, batch)


def _next(all_of_them: list[T], number: int, count: int) -> list[T]:
    """The `number`-th group of `count` items; the list starts again at its end."""
    first = number * count
    return [all_of_them[i % len(all_of_them)] for i in range(first, first + count)]


def categories(source: str, cache: Path | None) -> list[str]:
    """The categories of a file's prompts, in their order, without a tokenizer.

    Raises AssetError where `source` is not available.
    """
    return list(_texts_by_category(source, cache))


def prompts_by_category(
    tokenizer: PreTrainedTokenizerBase, source: str, limit: int | None, cache: Path | None
) -> Workloads:
    """Category -> its prompts, each a batch of one; `limit` of each category.

    Raises AssetError where `source` is not available.
    """
    return {
        name: [[prompt_ids(tokenizer, text)] for text in texts[:limit]]
        for name, texts in _texts_by_category(source, cache).items()
    }


def _texts_by_category(source: str, cache: Path | None) -> dict[str, list[str]]:
    """Category -> its prompts, both in their order."""
    data = load_texts(source, None, cache)
    texts = data.prompts or data.rows
    names = data.categories or [UNNAMED] * len(texts)
    by_category: dict[str, list[str]] = {}
    for name, text in zip(names, texts, strict=True):
        by_category.setdefault(name, []).append(text)
    return by_category


Turn = Mapping[str, Any]
"""The record of one turn from a cell's process; see
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
    """Sums of the counts of speculation, over the turns of a repeat or the repeats of a cell, with
    the draft's name in the last one."""
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
