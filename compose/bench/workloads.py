"""Prompts that systems are timed on: running text of exact lengths, or a file's by category."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.assets import load_texts, token_blocks
from compose.bench.generate import prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = list[list[int]]
"""Token ids of a batch of prompts, or of their continuations."""

Workloads = dict[str, list[Rows]]
"""Name of a workload -> its batches of prompts."""

UNNAMED = "prompts"
"""The category of prompts that have none."""


def rows_of(
    tokenizer: PreTrainedTokenizerBase,
    batch: int,
    context: int,
    category: str,
    wanted: Mapping[str, Any],
    cache: Path | None,
) -> list[Rows]:
    """The batches of one shape: `batch` rows of running text, `context` tokens each; or with a
    `category` its prompts, one at a time. `wanted` is the benchmark's speed section.

    Raises AssetError where the texts cannot be had.
    """
    if category:
        limit = wanted["prompts_per_category"]
        return prompts_by_category(tokenizer, wanted["prompts"], limit, cache)[category]
    return [running_text(tokenizer, batch, context, cache)]


def running_text(
    tokenizer: PreTrainedTokenizerBase, batch: int, context: int, cache: Path | None
) -> Rows:
    """`batch` rows of `context` tokens of heldout-text. Their exact length keeps the time from
    depending on how prompts end."""
    text = load_texts("heldout-text", None, cache)
    rows: Rows = token_blocks(text, tokenizer, context, batch).tolist()
    return rows


def categories(source: str, cache: Path | None) -> list[str]:
    """The categories of a file's prompts, in their order; no tokenizer is needed.

    Raises AssetError where `source` cannot be had.
    """
    data = load_texts(source, None, cache)
    return list(dict.fromkeys(data.categories or [UNNAMED]))


def prompts_by_category(
    tokenizer: PreTrainedTokenizerBase, source: str, limit: int | None, cache: Path | None
) -> Workloads:
    """Category -> its prompts, each a batch of one; `limit` of each category.

    Raises AssetError where `source` cannot be had.
    """
    data = load_texts(source, None, cache)
    texts = data.prompts or data.rows
    names = data.categories or [UNNAMED] * len(texts)
    workloads: Workloads = {}
    for name, text in zip(names, texts, strict=True):
        group = workloads.setdefault(name, [])
        if limit is None or len(group) < limit:
            group.append([prompt_ids(tokenizer, text)])
    return workloads
