"""Prompts that systems are timed on: running text of exact lengths, or a file's by category."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compose.assets import load_texts, token_blocks
from compose.bench.generate import prompt_ids
from compose.bench.measurement import Workloads
from gateskip.decoding.decoder import Decoder


def running_text(
    decoder: Decoder, batches: Sequence[int], contexts: Sequence[int], cache: Path | None
) -> Workloads:
    """`BATCH x CONTEXT` -> its one batch of prompts, cut from heldout-text."""
    text = load_texts("heldout-text", None, cache)
    return {
        f"{batch} x {context}": [token_blocks(text, decoder.tokenizer, context, batch).tolist()]
        for batch in batches
        for context in contexts
    }


def prompts_by_category(
    decoder: Decoder, source: str, limit: int | None, cache: Path | None
) -> Workloads:
    """Category -> its prompts, each a batch of one; `limit` of each category.

    Raises AssetError where `source` cannot be had.
    """
    data = load_texts(source, None, cache)
    texts = data.prompts or data.rows
    names = data.categories or ["prompts"] * len(texts)
    workloads: Workloads = {}
    for name, text in zip(names, texts, strict=True):
        group = workloads.setdefault(name, [])
        if limit is None or len(group) < limit:
            group.append([prompt_ids(decoder.tokenizer, text)])
    return workloads
