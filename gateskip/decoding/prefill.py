"""Prefill: puts prompts into a cache, in pieces that bound the further memory, and commits first
tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from gateskip.decoding.config import MAX_DRAFT
from gateskip.decoding.phases import Phases
from gateskip.decoding.rows import Row
from gateskip.decoding.sampling import GREEDY, Sampler, draw, draw_on_device
from gateskip.decoding.stats import Stats
from gateskip.model.compute import Usage
from gateskip.model.families import to_device, to_host
from gateskip.runtime.backend import Cache
from gateskip.runtime.skipping import SkippingModel

PREFILL = 4096  # tokens of all prompts together in one pass: bounds what lies beside the cache
PIECE = 1024  # and of one of them: what branches hold then is a tenth of a small model at most


def cache_capacity(prompt: int, new_tokens: int) -> int:
    """Positions of a row's cache for a prompt and the new tokens, with room for rejected drafts."""
    return prompt + new_tokens + MAX_DRAFT


def prefill(
    model: SkippingModel, rows: Sequence[Row], phases: Phases, sampler: Sampler, stats: Stats
) -> tuple[Cache, Usage]:
    """A cache with the prompts of rows, and the usage of filling it; the first token of every row
    is committed."""
    started = time.perf_counter()
    longest = max(len(row.prompt) for row in rows)
    cache = model.new_cache(len(rows), cache_capacity(longest, rows[0].stops.limit))
    states = fill(model, rows, cache, phases)
    used = model.usage.copy()
    if phases.apart:
        last = [row.prompt[-1:] for row in rows]
        starts = [len(row.prompt) - 1 for row in rows]
        numbers = list(range(len(rows)))
        states = model.decode(last, cache, numbers, starts, phases.answer).unbind()
    for row, state in zip(rows, states, strict=True):
        row.state = state.clone()
    commit_next(model, rows, model.head(torch.stack(list(states))), sampler)
    stats.prefill_s = stats.ttft_s = time.perf_counter() - started
    return cache, used


def fill(
    model: SkippingModel, rows: Sequence[Row], cache: Cache, phases: Phases
) -> Sequence[Tensor]:
    """Fill the cache with the part of the prompts that passes together; returns the final state [H]
    of each row's last token in it."""
    lengths = [phases.read(len(row.prompt)) for row in rows]
    full_from = phases.full_from(lengths)
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        ids[number, :length] = torch.tensor(row.prompt[:length], dtype=torch.long)
    ids = ids.to(model.device)
    final: list[Tensor] = [torch.empty(0)] * len(rows)
    columns = max(1, min(PIECE, PREFILL // len(rows)))
    for first in range(0, max(lengths), columns):
        part = ids[:, first : first + columns]
        counts = [min(max(n - first, 0), part.shape[1]) for n in lengths]
        full = None if full_from is None else [place - first for place in full_from]
        starts = [first] * len(rows)
        hidden = model.forward(part, cache, starts, phases.prompt, counts, full)
        for number, length in enumerate(lengths):
            if first < length <= first + columns:
                final[number] = hidden[number, length - first - 1].clone()
    return final


def commit_next(
    model: SkippingModel, rows: Sequence[Row], logits: Tensor, sampler: Sampler
) -> None:
    """Commit one token to every row that has not ended. logits [B, V]."""
    decoder, sampling = model.row_decoder, sampler.draws
    if logits.device.type != "cpu" and sampler.native:
        _commit_from_device(rows, logits, sampler)
        return
    for row, of_row in zip(rows, logits, strict=True):
        if row.ended:
            continue
        if decoder is not None and sampling is not None:  # as it draws for a row alone
            row.commit([decoder.draw(of_row, sampling, row.uniform())])
        else:
            row.commit([draw(sampler.distribution(of_row, row.text), row.generator)])


def _commit_from_device(rows: Sequence[Row], logits: Tensor, sampler: Sampler) -> None:
    """The same where tokens are chosen on the device, and read together."""
    if sampler == GREEDY:
        chosen = logits.argmax(-1)
    else:
        uniform = [0.0 if row.ended else row.uniform() for row in rows]
        places = to_device(torch.tensor(uniform, dtype=torch.float64), logits.device)
        chosen = draw_on_device(sampler.probs(logits), places)
    for row, token in zip(rows, to_host(chosen), strict=True):
        if not row.ended:
            row.commit([token])
