"""The lossless check: compares speculative with plain decoding, token by token.

It shows whether speculation changes the text, not how fast it is. Its draft length is fixed, while
the timed rounds choose theirs (`compose.bench.speed.measure`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from compose.bench.quality.scored import Scored
from compose.results.quality import common_prefix
from compose.units import Progress
from gateskip.decoding.decoder import Decoder
from gateskip.decoding.stats import Stats

FORCED_DRAFT = 3
"""Draft length of the first pass where the cell's is `auto`: without drafts there is nothing to
check."""


def check_lossless(
    decoder: Decoder,
    settings: Mapping[str, Any],
    prompts: Sequence[list[int]],
    new_tokens: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare both decodings of each prompt; the fields of the result's `lossless_check`.

    `settings` are a speculating cell's arguments of `Decoder.generate`. Drafts that are verified at
    a budget, or after prompts that skip, are compared with decoding that skips as much. With a
    draft length of `auto` the prompts are decoded twice. The first pass uses a fixed draft length,
    since a decoder that falls back to plain steps would pass without drafting; the second uses the
    lengths that the cell chooses. The verdict covers both. Of drafts that are chosen by their speed
    the first is checked, because other work may run beside the check.
    """
    if decoder.draft_model is None and settings.get("draft_weights") in (None, "auto"):
        first = decoder.first_draft(settings.get("draft_budget", 1.0))
        settings = {**settings, "draft_weights": first or "own"}
    own_length = settings["draft_length"]
    forced_length = FORCED_DRAFT if own_length == "auto" else own_length
    skips = {
        "budget": settings.get("verify_budget", 1.0),
        "prompt_budget": settings.get("prompt_budget"),
    }
    undrafted = {"target": settings["target"], "mode": "skip", **skips}
    scored = Scored(decoder, **skips)
    plain = decoder.generate(list(prompts), new_tokens, **undrafted).tokens
    divergences: list[dict[str, Any]] = []
    totals: dict[str, Stats] = {}
    drafts: dict[str, list[tuple[int, int]]] = {}
    passes = {"forced": forced_length} | ({"own": own_length} if own_length == "auto" else {})
    for name, length in passes.items():
        totals[name], drafts[name] = Stats(), []
        for number, prompt in enumerate(prompts):
            arguments = {**settings, "draft_length": length}
            speculated = decoder.generate([prompt], new_tokens, "speculate", **arguments)
            totals[name].add(speculated.stats)
            drafts[name].append((speculated.stats.drafted, speculated.stats.accepted))
            if speculated.tokens[0] != plain[number]:
                # A batch rounds in another order: decode the row by itself.
                plain[number] = decoder.generate([prompt], new_tokens, **undrafted).tokens[0]
            divergence = _divergence(scored, number, prompt, plain[number], speculated.tokens[0])
            divergences += [{"pass": name, **divergence}] if divergence else []
            if progress is not None:
                progress(number + 1, len(prompts), f"lossless check, {name} lengths")
    forced = totals["forced"]
    return {
        "lossless": not divergences,
        "first_divergence": divergences[0] if divergences else None,
        "divergences": divergences,
        "prompts": len(prompts),
        "tokens": len(passes) * sum(map(len, plain)),
        "forced_draft_length": forced_length,
        "forced_draft_length_histogram": forced.draft_lengths,
        "own_draft_length_histogram": totals.get("own", forced).draft_lengths,
        "acceptance_rate": forced.acceptance_rate,
        "drafts_by_prompt": drafts["forced"],
        "acceptance_by_position": [accepted / tried for tried, accepted in forced.positions],
    }


def _divergence(
    scored: Scored, number: int, prompt: list[int], plain: list[int], speculated: list[int]
) -> dict[str, Any] | None:
    """Where two continuations first differ, and the difference between the top two logits there,
    decoded without drafts as in `scored`."""
    if plain == speculated:
        return None
    same = common_prefix(plain, speculated)
    with torch.inference_mode():
        following = [*plain[:same], prompt[-1]]  # the last token is a placeholder
        logits = scored.answer_logits([prompt], [following])[0][-1].float()
    best, second = logits.topk(2).values.tolist()
    return {
        "prompt": number,
        "position": same,
        "plain_token": plain[same] if same < len(plain) else None,
        "speculative_token": speculated[same] if same < len(speculated) else None,
        "margin": best - second,
        "margin_share": (best - second) / (best - float(logits.min())),
    }
