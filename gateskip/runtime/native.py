"""The backend `native`: compiled kernels on a CPU.

Decoding is one native call for all tokens of a pass. A step in torch spends most of its time
between operators; here a skipped branch costs only its gate. Several steps of one row, and rounds
of speculation, are one call, too. Prompts: see native_prefill.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from gateskip.gates.base import Gates
from gateskip.model.families import embed
from gateskip.quantization.formats import weight_format
from gateskip.quantization.packed_linear import rounding
from gateskip.runtime.backend import (
    Arithmetic,
    BackendName,
    PassThresholds,
    Round,
    RowDecoder,
    SampledTokens,
    SampleRequest,
    Sampling,
    SpeculationRequest,
    Thresholds,
    dtype_name,
)
from gateskip.runtime.budget_control import RowThresholds
from gateskip.runtime.engine import Engine
from gateskip.runtime.gathering import GatheredPass
from gateskip.runtime.kv_cache import KVCache
from gateskip.runtime.native_prefill import NativeOperations

IN_BYTES = "8 bits in blocks of 32, 16 where a value stands out"
"""Activations in products with packed weights: see linear/int8.h."""


class NativeBackend(GatheredPass, RowDecoder[KVCache]):
    """See `RowDecoder`. With `rounded`, packed weights may be multiplied with 8-bit activations."""

    name: BackendName = "native"
    operations: NativeOperations

    def __init__(
        self,
        model: Any,
        gates: Gates | None = None,
        kv_rule: str = "project",
        rounded: bool = True,
    ) -> None:
        """Raises UnsupportedModel when the kernels cannot run this model here."""
        self.engine = Engine(model, gates, kv_rule, rounded)
        operations = NativeOperations(model, self.engine.parts, kv_rule)
        super().__init__(model, gates, kv_rule, operations)

    def arithmetic(self, scoring: bool = False) -> Arithmetic:
        """Decoding keeps float32 between products; packed weights may meet 8-bit activations."""
        if scoring and not self.operations.int8_activations:
            fp32 = self.operations.fp32_activations
            activations = "float32" if fp32 else dtype_name(self.dtype)
        else:
            activations = IN_BYTES if self.engine.rounded else "float32"
        return Arithmetic(self.name, weight_format(self.model), activations, "float32")

    def prefill(
        self,
        input_ids: Tensor,
        cache: KVCache,
        starts: Sequence[int],
        thresholds: PassThresholds = None,
        lengths: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
        full_from: Sequence[int] | None = None,
    ) -> Tensor:
        """See `Backend.prefill`."""
        with rounding(self.operations.native_products and self.engine.rounded):
            return super().prefill(input_ids, cache, starts, thresholds, lengths, rows, full_from)

    def decode(
        self,
        tokens: Sequence[Sequence[int]],
        cache: KVCache,
        rows: Sequence[int],
        starts: Sequence[int],
        thresholds: PassThresholds = None,
    ) -> Tensor:
        """See `Backend.decode`; a row has the same bits alone and beside any others."""
        flat, cache_rows, slots = _begin(tokens, cache, rows, starts)
        hidden = embed(self.model, torch.tensor(flat))
        if isinstance(thresholds, RowThresholds):
            width = thresholds.entered.shape[1]
            values = thresholds.values.repeat_interleave(width, 0)  # [rows, branches]
            entered = torch.zeros(values.shape, dtype=torch.uint8)
            states = self.engine.step(hidden, cache, cache_rows, slots, values, entered)
            weights = thresholds.weights.repeat_interleave(width, 0)
            thresholds.entered += (entered * weights).sum(1).view(-1, width)
        else:
            states = self.engine.step(hidden, cache, cache_rows, slots, thresholds)
        self._count(*((slot, 1) for slot in slots))
        return states

    def argmax(
        self,
        tokens: Sequence[Sequence[int]],
        cache: KVCache,
        rows: Sequence[int],
        starts: Sequence[int],
        thresholds: PassThresholds = None,
    ) -> tuple[list[list[int]], Tensor]:
        """See `Backend.argmax`; one native call where all rows have the same thresholds."""
        if isinstance(thresholds, RowThresholds):
            return super().argmax(tokens, cache, rows, starts, thresholds)
        flat, cache_rows, slots = _begin(tokens, cache, rows, starts)
        chosen, states = self.engine.argmax(flat, cache, cache_rows, slots, thresholds)
        self._count(*((slot, 1) for slot in slots))
        following = iter(chosen)
        return [list(islice(following, len(ids))) for ids in tokens], states

    def sample(
        self, request: SampleRequest, place: tuple[KVCache, int, int], thresholds: PassThresholds
    ) -> SampledTokens:
        """See `Backend.sample`: all steps in one native call."""
        cache, row, slot = place
        cache.begin([row], [slot], [request.count])
        if isinstance(thresholds, RowThresholds):
            values = thresholds.values
            entered = torch.zeros(request.count, values.shape[1], dtype=torch.uint8)
            sampled = self.engine.sample(request, place, values, entered)
            thresholds.entered += (entered * thresholds.weights).sum(1)
        else:
            sampled = self.engine.sample(request, place, thresholds)
        self._count((slot, len(sampled.tokens)))
        return sampled

    def speculate(
        self,
        request: SpeculationRequest,
        drafter: NativeBackend | None,
        place: tuple[KVCache, int, int],
        thresholds: Thresholds = None,
        draft_thresholds: Thresholds = None,
        draft_cache: KVCache | None = None,
    ) -> tuple[list[Round], Tensor]:
        """See `RowDecoder.speculate`."""
        cache, row, slot = place
        cache.begin([row], [slot], [1])
        engine = None if drafter is None else drafter.engine
        rounds, state = self.engine.speculate(
            request, engine, place, thresholds, draft_thresholds, draft_cache
        )
        verified, drafted = list[tuple[int, int]](), list[tuple[int, int]]()
        first, end = slot, slot + 1
        for (draft,) in (one.rows for one in rounds):
            verified.append((slot, draft.drafted + 1))
            if draft.drafted and not draft.looked_up:
                drafted.append((slot, draft.drafted))
            end = max(end, slot + draft.drafted + 1)
            slot += draft.accepted + 1
        cache.begin([row], [first], [end - first])
        if draft_cache is not None and drafted:
            read = max(start + count for start, count in drafted)
            draft_cache.begin([row], [first], [read - first])
        if drafter is self:
            verified, drafted = verified + drafted, []
        self._count(*verified)
        if drafter is not None and drafted:
            drafter._count(*drafted)
        return plain_steps_as_one(rounds), state

    def draw(self, logits: Tensor, sampling: Sampling, uniform: float) -> int:
        """See `RowDecoder.draw`."""
        return self.engine.draw(logits, sampling, uniform)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Backend.logits`."""
        return self.engine.logits(hidden)

    def _count(self, *spans: tuple[int, int]) -> None:
        """Count tokens by position and number, and the branches that they entered in the last
        call."""
        for start, count in spans:
            self.usage.saw(start, count)
        entered = self.engine.entered.tolist()
        self.usage.kept = [a + b for a, b in zip(self.usage.kept, entered, strict=True)]


def _begin(
    tokens: Sequence[Sequence[int]], cache: KVCache, rows: Sequence[int], starts: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """Token ids, cache rows and slots, one of each a token, after telling the cache that they
    come."""
    counts = [len(ids) for ids in tokens]
    cache.begin(rows, starts, counts)
    flat = [token for ids in tokens for token in ids]
    cache_rows = [row for row, n in zip(rows, counts, strict=True) for _ in range(n)]
    slots = [start + i for start, n in zip(starts, counts, strict=True) for i in range(n)]
    return flat, cache_rows, slots


def plain_steps_as_one(rounds: Sequence[Round]) -> list[Round]:
    """Rounds of one row, with consecutive plain steps merged into one."""
    merged = list[Round]()
    for one in rounds:
        before = merged[-1] if merged else None
        if one.rows[0].drafted or before is None or before.rows[0].drafted:
            merged.append(one)
        else:
            times = before.draft_s + one.draft_s, before.verify_s + one.verify_s
            merged[-1] = Round(one.rows, *times, before.steps + 1)
    return merged
