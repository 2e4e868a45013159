"""Prompts that systems are timed on: running text of exact lengths, or a file's by category."""

from __future__ import annotations

from collections.abc import Mapping
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
    """Of the prompts of a file; empty for running text."""
    round: int
    """Each round reads other text, so that an interval over rounds is one over texts."""


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
    """`batch` rows of `context` tokens of heldout-text, for each number the next ones, until the
    text begins again. Their exact length keeps the time from depending on how prompts end."""
    text = load_texts("heldout-text", None, cache)
    rows: Rows = token_blocks(text, tokenizer, context, (number + 1) * batch).tolist()
    return _next(rows, number, batch)


def _next(all_of_them: list[T], number: int, count: int) -> list[T]:
    """The `number`-th `count` of a list that begins again where it ends."""
    first = number * count
    return [all_of_them[i % len(all_of_them)] for i in range(first, first + count)]


def categories(source: str, cache: Path | None) -> list[str]:
    """The categories of a file's prompts, in their order; no tokenizer is needed.

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
