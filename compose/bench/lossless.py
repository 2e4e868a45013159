"""The lossless check: speculative decoding against plain decoding, token for token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from compose.units import Progress
from gateskip.decoding.decoder import Decoder
from gateskip.decoding.stats import Stats

FORCED_DRAFT = 3
"""Draft length of the check where the cell says `auto`: without drafts nothing is checked."""


def check_lossless(
    decoder: Decoder,
    settings: Mapping[str, Any],
    prompts: Sequence[list[int]],
    new_tokens: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare both decodings of each prompt; the fields of the result's `speculation`.

    `settings` are a speculating cell's arguments of `Decoder.generate`. A draft length of `auto`
    is replaced: a decoder that falls back to plain steps would pass without having shown anything.
    """
    length = settings["draft_length"]
    settings = {**settings, "draft_length": FORCED_DRAFT if length == "auto" else length}
    target = settings["target"]
    compared, total = 0, Stats()
    divergences: list[dict[str, Any]] = []
    batched = decoder.generate(list(prompts), new_tokens, target=target).tokens
    for number, prompt in enumerate(prompts):
        plain = batched[number]
        own = decoder.generate([prompt], new_tokens, "speculate", **settings)
        total.add(own.stats)
        compared += len(plain)
        if own.tokens[0] != plain:  # a batch rounds in another order: decode the row by itself
            plain = decoder.generate([prompt], new_tokens, target=target).tokens[0]
        divergence = _divergence(decoder, number, prompt, plain, own.tokens[0])
        divergences += [divergence] if divergence else []
        if progress is not None:
            progress(number + 1, len(prompts), "lossless check")
    return {
        "lossless": not divergences,
        "first_divergence": divergences[0] if divergences else None,
        "divergences": divergences,
        "prompts": len(prompts),
        "tokens": compared,
        "acceptance_rate": total.acceptance_rate,
        "mean_accepted_tokens": total.mean_accepted_tokens,
        "acceptance_by_position": [stood / tried for tried, stood in total.positions],
        "looked_up_share": total.looked_up / total.drafted if total.drafted else None,
        "draft_length_histogram": total.draft_lengths,
        "checked_draft_length": settings["draft_length"],
    }


def _divergence(
    decoder: Decoder, number: int, prompt: list[int], plain: list[int], own: list[int]
) -> dict[str, Any] | None:
    """Where two continuations first differ, and plain decoding's top-2 logit margin there."""
    if plain == own:
        return None
    pairs = zip(plain, own, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(plain), len(own)))
    ids = torch.tensor([prompt + plain[:same]])
    skipping = decoder.skipping
    hidden = skipping.forward(ids, skipping.new_cache(1, ids.shape[1]), [0])
    with torch.inference_mode():
        logits = skipping.head(hidden[0, -1:])[0].float()
    best, second = logits.topk(2).values.tolist()
    return {
        "prompt": number,
        "position": same,
        "plain_token": plain[same] if same < len(plain) else None,
        "speculative_token": own[same] if same < len(own) else None,
        "margin": best - second,
        "margin_share": (best - second) / (best - float(logits.min())),
    }
