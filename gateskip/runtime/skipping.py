"""A model whose branches can be skipped, behind one of the backends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from gateskip.gates.base import Gates
from gateskip.model.compute import Usage
from gateskip.model.families import UnsupportedModel, final_norm, find_branches, to_host
from gateskip.model.gating import NEVER_SKIP
from gateskip.quantization.packed_linear import PackedLinear
from gateskip.runtime.backend import (
    BACKENDS,
    KV_RULES,
    Arithmetic,
    Backend,
    BackendName,
    Cache,
    Round,
    RowDecoder,
    SampledTokens,
    SampleRequest,
    Sampling,
    SpeculationRequest,
    Thresholds,
)
from gateskip.runtime.budget_control import BudgetControl, Budgets, is_narrow, next_width
from gateskip.runtime.engine import Engine
from gateskip.runtime.gathered import GatheredBackend
from gateskip.runtime.kv_cache import KV_FORMATS, KVCache, KVFormat
from gateskip.runtime.native import NativeBackend
from gateskip.runtime.reference import ReferenceBackend

Limits = Thresholds | BudgetControl
"""Limits that decide which tokens enter a branch: thresholds, one per branch; per-row budget
control, with separate thresholds for each row; or None, full compute."""


def is_full(limits: Limits) -> bool:
    """Whether every token enters every branch."""
    return limits is None or (not isinstance(limits, BudgetControl) and max(limits) == NEVER_SKIP)


def make_backend(
    name: str, model: Any, gates: Gates | None, kv_rule: str, rounded: bool = True
) -> Backend[Any]:
    """The backend of this name for a model and its gates.

    `rounded` lets `native` multiply packed weights with activations rounded to 8 bits.

    Raises ValueError for an unknown name, UnsupportedModel where the backend cannot run the model.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r}: one of {', '.join(BACKENDS)}")
    if name == "native":
        return NativeBackend(model, gates, kv_rule, rounded)
    if name == "gathered":
        return GatheredBackend(model, gates, kv_rule)
    return ReferenceBackend(model, gates, kv_rule)


def require_one_device(model: Any, gates: Gates | None) -> torch.device:
    """The device that all weights are on.

    Raises UnsupportedModel where they are on several, or where a format does not run on it.
    """
    parts = [*model.parameters(), *model.buffers()]
    parts += [] if gates is None else [*gates.parameters(), *gates.buffers()]
    devices: set[torch.device] = {part.device for part in parts}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise UnsupportedModel(f"weights and gates are on several devices ({names}): use one")
    (device,) = devices
    if device.type != "cpu" and any(isinstance(m, PackedLinear) for m in model.modules()):
        raise UnsupportedModel(f"packed weights run on a CPU, not on {device}")
    return device


class SkippingModel:
    """A causal LM whose branches can be skipped, with a cache.

    `model` is a transformers causal LM of a supported architecture, `gates` its gates or None.
    Thresholds are one number per branch: a token enters where its gate's logit reaches it. Without
    thresholds every token enters every branch, unscaled, so the result is the model's own.
    `row_decoder` is the backend, if it draws and drafts tokens itself.
    """

    def __init__(
        self,
        model: Any,
        gates: Gates | None = None,
        kv_rule: str = "project",
        backend: BackendName = "gathered",
        rounded: bool = True,
    ) -> None:
        """Raises ValueError for an unknown name, UnsupportedModel for models that cannot run."""
        if kv_rule not in KV_RULES:
            raise ValueError(f"kv_rule {kv_rule!r}: one of {', '.join(KV_RULES)}")
        self.model, self.gates, self.kv_rule = model, gates, kv_rule
        self.device = require_one_device(model, gates)
        self.dtype: torch.dtype = final_norm(model).weight.dtype
        self.branches = find_branches(model)
        if gates is not None:
            gates.attach(model)
        runs: Backend[Any] = make_backend(backend, model, gates, kv_rule, rounded)
        self.backend = runs
        # Asked once: every round of drafting looks here
        self.row_decoder: RowDecoder[Any] | None = runs if isinstance(runs, RowDecoder) else None

    @property
    def usage(self) -> Usage:
        """How many tokens entered each branch, counted over all calls."""
        return self.backend.usage

    @property
    def gated(self) -> bool:
        """Whether gates that scale do so at full compute, too."""
        return self.backend.gated

    @gated.setter
    def gated(self, value: bool) -> None:
        self.backend.gated = value

    @property
    def kv_cache(self) -> KVFormat:
        """Format of keys and values in caches made from now on."""
        return self.backend.kv_cache

    @kv_cache.setter
    def kv_cache(self, value: KVFormat) -> None:
        if value not in KV_FORMATS:
            raise ValueError(f"kv_cache {value!r}: one of {', '.join(KV_FORMATS)}")
        self.backend.kv_cache = value

    @contextmanager
    def keeping(self, kind: KVFormat | None) -> Iterator[None]:
        """Within this context caches are made in a format; None changes nothing."""
        before = self.kv_cache
        self.kv_cache = before if kind is None else kind
        try:
            yield
        finally:
            self.kv_cache = before

    @property
    def engine(self) -> Engine | None:
        """The compiled kernels' view of the model, where the backend is `native`."""
        return self.backend.engine if isinstance(self.backend, NativeBackend) else None

    @property
    def any_pieces(self) -> bool:
        """Whether prompts have the same bits in pieces of any sizes."""
        backend = self.backend
        return isinstance(backend, NativeBackend) and backend.operations.any_pieces

    def limits(self, budgets: Budgets, budget: float, per_row: bool = False) -> Limits:
        """Limits that keep a calibrated budget, for each row with `per_row`; None for full compute.

        Raises ValueError where there are no gates, or the budget was not calibrated.
        """
        if budget < 1.0 and self.gates is None:
            raise ValueError("this model has no gates, so it cannot skip")
        thresholds = budgets.at(budget)
        if thresholds is None or not per_row:
            return thresholds
        return BudgetControl.of(budgets, budget, self.model, self.device)

    def arithmetic(self, scoring: bool = False) -> Arithmetic:
        """The arithmetic of decoding, or of prompts and scoring."""
        return self.backend.arithmetic(scoring)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `batch` rows of at most `capacity` tokens: see `Cache`.

        Raises ValueError where the model has fewer positions.
        """
        cache: Cache = self.backend.new_cache(batch, capacity)
        return cache

    def cache_bytes(self, batch: int, capacity: int) -> int:
        """The size of `new_cache`'s result, in bytes."""
        return self.backend.cache_bytes(batch, capacity)

    @torch.inference_mode()
    def forward(
        self,
        input_ids: Tensor,
        cache: Cache,
        starts: Sequence[int],
        thresholds: Limits = None,
        lengths: Sequence[int] | None = None,
        full_from: Sequence[int] | None = None,
    ) -> Tensor:
        """Prefill of prompts, and of scored text: input_ids [B, S] -> final states [B, S, H].

        See `Backend.prefill`. Budget control takes passes of at most one of its blocks, and has no
        tokens at full compute.
        """
        if isinstance(thresholds, BudgetControl):
            assert full_from is None, "a row's budget is kept by all tokens of a pass"
            return self._control_prefill(input_ids, cache, starts, thresholds, lengths)
        self._count_full(thresholds, input_ids.numel() if lengths is None else sum(lengths))
        return self.backend.prefill(
            input_ids, cache, starts, thresholds, lengths, full_from=full_from
        )

    @torch.inference_mode()
    def decode(
        self,
        tokens: Sequence[Sequence[int]],
        cache: Cache,
        rows: Sequence[int],
        starts: Sequence[int],
        thresholds: Limits = None,
    ) -> Tensor:
        """The next tokens of some rows -> final states [N, H], row after row.

        See `Backend.decode`.
        """
        if isinstance(thresholds, BudgetControl):
            return self._control_decode(tokens, cache, rows, starts, thresholds)
        self._count_full(thresholds, sum(map(len, tokens)))
        return self.backend.decode(tokens, cache, rows, starts, thresholds)

    @property
    def steps_on_device(self) -> bool:
        """Whether `step` is available: on a device other than the CPU."""
        return self.device.type != "cpu" and isinstance(self.backend, GatheredBackend)

    @torch.inference_mode()
    def step(
        self,
        ids: Tensor,
        cache: Cache,
        rows: Sequence[int],
        starts: Sequence[int],
        thresholds: Thresholds = None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """As `decode`, with token ids [B, S] on the model's device -> final states [B, S, H]; see
        `GatheredBackend.step`. The host asks the device nothing."""
        backend = self.backend
        assert isinstance(backend, GatheredBackend), "ask `steps_on_device`"
        assert isinstance(cache, KVCache), "the backend's own"
        self._count_full(thresholds, ids.numel() if lengths is None else sum(lengths))
        return backend.step(ids, cache, rows, starts, thresholds, lengths)

    @torch.inference_mode()
    def argmax(
        self,
        tokens: Sequence[Sequence[int]],
        cache: Cache,
        rows: Sequence[int],
        starts: Sequence[int],
        thresholds: Limits = None,
    ) -> tuple[list[list[int]], Tensor]:
        """As `decode`: the argmax token after each, and the states [N, H]."""
        if isinstance(thresholds, BudgetControl):
            states = self._control_decode(tokens, cache, rows, starts, thresholds)
            chosen = iter(to_host(self.head(states).argmax(-1)))
            return [list(islice(chosen, len(ids))) for ids in tokens], states
        self._count_full(thresholds, sum(map(len, tokens)))
        return self.backend.argmax(tokens, cache, rows, starts, thresholds)

    @torch.inference_mode()
    def sample(
        self, request: SampleRequest, place: tuple[Cache, int, int], thresholds: Limits
    ) -> SampledTokens:
        """One or more next tokens of a row: see `Backend.sample`. Budget control takes calls of at
        most one of its blocks."""
        if isinstance(thresholds, BudgetControl):
            return self._control_sample(request, place, thresholds)
        sampled = self.backend.sample(request, place, thresholds)
        self._count_full(thresholds, len(sampled.tokens))
        return sampled

    def draws(self, sampling: Sampling | None) -> bool:
        """Whether `sample` draws tokens with these settings; None stands for settings that it does
        not know."""
        return self.row_decoder is not None and sampling is not None

    def speculates(self, thresholds: Limits) -> bool:
        """Whether `speculate` is available."""
        return self.row_decoder is not None and not isinstance(thresholds, BudgetControl)

    @torch.inference_mode()
    def speculate(
        self,
        request: SpeculationRequest,
        drafter: SkippingModel | None,
        place: tuple[Cache, int, int],
        thresholds: Limits = None,
        draft_thresholds: Thresholds = None,
        draft_cache: Cache | None = None,
    ) -> tuple[list[Round], Tensor]:
        """Rounds of speculation of one row in one call: see `RowDecoder`."""
        assert self.row_decoder is not None, "ask `speculates`"
        assert not isinstance(thresholds, BudgetControl), "ask `speculates`"
        by = None if drafter is None else drafter.row_decoder
        rounds, state = self.row_decoder.speculate(
            request, by, place, thresholds, draft_thresholds, draft_cache
        )
        passed = sum((one.rows[0].drafted + 1) * one.steps for one in rounds)
        self._count_full(thresholds, passed)
        return rounds, state

    def _count_full(self, thresholds: Thresholds, tokens: int) -> None:
        """Count tokens that use no gate; gates that scale are evaluated even then."""
        scaled = self.gated or thresholds is not None  # as every backend asks gates that scale
        scales = self.gates is not None and self.gates.scales and scaled
        if not scales and is_full(thresholds):
            self.usage.ungated += tokens

    # -- per-row budget control ------------------------------------------------------------------

    def _control_prefill(
        self,
        input_ids: Tensor,
        cache: Cache,
        starts: Sequence[int],
        control: BudgetControl,
        lengths: Sequence[int] | None,
    ) -> Tensor:
        """As `forward`, in passes that end where any row comes to a new block.

        Narrow blocks pass as in decoding, where torch's products of few tokens take longer; not
        where all products of prompts are native. A block is narrow by its place only, so a row's
        path does not depend on others or on chunks.
        """
        batch, columns = input_ids.shape
        counts = [columns] * batch if lengths is None else list(lengths)
        done, out = [0] * batch, torch.empty(0)
        while live := [row for row in range(batch) if done[row] < counts[row]]:
            narrow = [row for row in live if is_narrow(starts[row] + done[row])]
            narrow = [] if self.any_pieces else narrow
            live = narrow or live
            places = [starts[row] + done[row] for row in live]
            width = next_width(places, [counts[row] - done[row] for row in live])
            row_index = torch.tensor(live, device=input_ids.device).unsqueeze(1)
            first = torch.tensor([done[row] for row in live], device=input_ids.device)
            index = first.unsqueeze(1) + torch.arange(width, device=input_ids.device)
            limits = control.thresholds(cache, live, places, width)
            part = input_ids[row_index, index]
            if narrow:
                states = self.backend.decode(part.tolist(), cache, live, places, limits)
                states = states.view(*part.shape, -1)
            else:
                some = None if len(live) == cache.batch else live
                states = self.backend.prefill(part, cache, places, limits, None, some)
            control.record(cache, live, places, limits)
            if not len(out):
                out = states.new_zeros(batch, columns, states.shape[-1])
            out[row_index, index] = states.to(out.dtype)
            for row in live:
                done[row] += width
        return out

    def _control_decode(
        self,
        tokens: Sequence[Sequence[int]],
        cache: Cache,
        rows: Sequence[int],
        starts: Sequence[int],
        control: BudgetControl,
    ) -> Tensor:
        """As `decode`, in passes that end where any row comes to a new block."""
        done = [0] * len(tokens)
        parts: list[list[Tensor]] = [[] for _ in tokens]
        while live := [i for i, ids in enumerate(tokens) if done[i] < len(ids)]:
            places, cache_rows = [starts[i] + done[i] for i in live], [rows[i] for i in live]
            width = next_width(places, [len(tokens[i]) - done[i] for i in live])
            limits = control.thresholds(cache, cache_rows, places, width)
            some = [list(tokens[i][done[i] : done[i] + width]) for i in live]
            states = self.backend.decode(some, cache, cache_rows, places, limits)
            control.record(cache, cache_rows, places, limits)
            for i, of_row in zip(live, states.split(width), strict=True):
                parts[i].append(of_row)
                done[i] += width
        return torch.cat([part for of_row in parts for part in of_row])

    def _control_sample(
        self, request: SampleRequest, place: tuple[Cache, int, int], control: BudgetControl
    ) -> SampledTokens:
        """As `sample`, in calls that end where the row comes to a new block."""
        (cache, row, slot), token, ended = place, request.token, False
        first, tokens, on_token = slot, list[int](), request.on_token

        def tell(following: int) -> bool:
            nonlocal token, ended
            token, ended = following, on_token is not None and on_token(following)
            return ended

        while not ended and (left := request.count - len(tokens)):
            slot = first + len(tokens)
            width = 1 if self.row_decoder is None else next_width([slot], [left])
            limits = control.thresholds(cache, [row], [slot], width)
            uniform = request.uniform[len(tokens) : len(tokens) + width]
            part = replace(request, token=token, count=width, uniform=uniform, on_token=tell)
            sampled = self.backend.sample(part, (cache, row, slot), limits)
            control.record(cache, [row], [slot], limits)
            tokens += sampled.tokens
        return SampledTokens(tokens, sampled.state)

    # -- LM heads --------------------------------------------------------------------------------

    @torch.inference_mode()
    def head(self, hidden: Tensor) -> Tensor:
        """Final states [..., H] -> logits [..., V], in the arithmetic of decoding."""
        flat = hidden.flatten(0, -2)
        return self.backend.logits(flat).view(*hidden.shape[:-1], -1)

    @torch.inference_mode()
    def scores(self, hidden: Tensor) -> Tensor:
        """Final states [..., H] -> logits [..., V], in the arithmetic of prompts and scoring."""
        return self.backend.scores(hidden)
