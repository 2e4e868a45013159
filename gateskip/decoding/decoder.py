"""Decoding: plain, skipping and self-speculative, behind one `generate`.

Speculation drafts cheaply (with an aggressive skip budget, with 4-bit copies of the same weights,
by looking up what the text said before) and verifies at full compute. Both write the same cache:
drafts attend to the committed, fully computed entries, a verify pass overwrites what the drafts
left, and what it rejects lies beyond the row's length and is overwritten in turn.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from gateskip.calibration.thresholds import thresholds_at
from gateskip.decoding.draft_length import Pace
from gateskip.decoding.drafting import Draft, Drafting, Ends, Row
from gateskip.decoding.sampling import GREEDY, Sampler, accept_or_resample, draw
from gateskip.decoding.self_generate import write
from gateskip.model.compute import Saving, Usage, Work, saving
from gateskip.model.gating import NEVER_SKIP
from gateskip.quantization.draft_copy import int4_copy, int4_draft_head, nf4_copy
from gateskip.runtime.kv_cache import KVCache
from gateskip.runtime.native import Engine, Unsuited
from gateskip.runtime.skipping import SkippingModel, Thresholds

Mode = Literal["plain", "skip", "speculate"]
Weights = Literal["own", "int4-head", "nf4", "int4"]
Tokens = list[int]
Target = Literal["gated", "original"]
MAX_DRAFT = 16
PREFILL = 4096  # tokens of all prompts together in one pass: bounds what lies beside the cache
PIECE = 1024  # and of one of them: what branches hold then is a tenth of a small model at most
SELF_WRITTEN = (8, 96)  # rows and tokens of the text to which an int4 draft is fitted


def slots(prompt: int, new_tokens: int) -> int:
    """Slots that a row's cache has for a prompt and what follows, rejected drafts among it."""
    return prompt + new_tokens + MAX_DRAFT


ADDED = (
    *("prompt_tokens", "new_tokens", "prefill_s", "decode_s", "drafted", "accepted"),
    *("passes", "draft_s", "verify_s", "looked_up"),
)
"""Fields of Stats that are sums."""


@dataclass
class Stats:
    """What one `generate` call did and how long it took, in seconds and tokens."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    ttft_s: float = 0.0
    """Time to the first token of the first row: prefill and one LM head."""
    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    """Forward passes at full compute after prefill: verify passes and plain steps."""
    draft_s: float = 0.0
    verify_s: float = 0.0
    draft_lengths: dict[int, int] = field(default_factory=dict)
    """How often each draft length was tried; 0 is a plain step."""
    looked_up: int = 0
    """Drafted tokens that came from the text itself."""
    positions: list[list[int]] = field(default_factory=list)
    """By position in a draft: how often it was reached with all before it accepted, and accepted.
    """

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / drafted tokens; None when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def mean_accepted_tokens(self) -> float | None:
        """Tokens a full pass yields; plain decoding has 1. None without a pass."""
        return (self.accepted + self.passes) / self.passes if self.passes else None

    def add(self, other: Stats) -> None:
        """Count another call's work with this one's; `ttft_s` stays the first call's."""
        for name in ADDED:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for length, times in other.draft_lengths.items():
            self.draft_lengths[length] = self.draft_lengths.get(length, 0) + times
        for position, (tried, stood) in enumerate(other.positions):
            self.count(position, tried, stood)

    def count(self, position: int, tried: int, stood: int) -> None:
        """Drafts at a position that were reached with all before them accepted, and accepted."""
        while len(self.positions) <= position:
            self.positions.append([0, 0])
        self.positions[position][0] += tried
        self.positions[position][1] += stood

    def to_dict(self) -> dict[str, Any]:
        """Counts, times and the two rates, as plain data."""
        return asdict(self) | {
            "acceptance_rate": self.acceptance_rate,
            "mean_accepted_tokens": self.mean_accepted_tokens,
        }


@dataclass(frozen=True)
class Generation:
    """New tokens of every row, without the prompt, and how they came about."""

    tokens: list[Tokens]
    stats: Stats


class Decoder:
    """A model with its gates, ready to decode: what `gateskip.load` returns.

    Attributes:
        skipping: the model and its gates.
        tokenizer: the folder's tokenizer.
        grid: thresholds, one a branch, for each calibrated budget.
        defaults: mode and settings that the folder asks for.
        kernels: how many linear layers run on which compiled kernel.
        kernel_times: microseconds that chose them, by shape: `ours`, and the library's `own`.
        unsuited: why torch decodes this model, where the native engine was asked for.
    """

    def __init__(
        self,
        skipping: SkippingModel,
        tokenizer: Any,
        grid: Mapping[float, Sequence[float]],
        defaults: Mapping[str, Any] | None = None,
        kernels: Mapping[str, int] | None = None,
        unsuited: str | None = None,
        kernel_times: Mapping[str, dict[str, float]] | None = None,
    ) -> None:
        self.skipping, self.tokenizer = skipping, tokenizer
        self.grid, self.defaults = dict(grid), dict(defaults or {})
        self.kernels, self.unsuited = dict(kernels or {}), unsuited
        self.kernel_times = dict(kernel_times or {})
        self.paces: dict[Any, Pace] = {}  # by kind of draft: what drafting costs and brings here
        self._drafters: dict[str, SkippingModel] = {"own": skipping}

    def thresholds(self, budget: float) -> Thresholds:
        """Thresholds of a budget in (0, 1]. Raises ValueError when it cannot be had."""
        if budget < 1.0 and self.skipping.gates is None:
            raise ValueError("this model has no gates, so it cannot skip")
        return thresholds_at(self.grid, budget)

    def models(self) -> list[SkippingModel]:
        """The model, and its twin if there is one by now."""
        return list(self._drafters.values())

    def drafter(self, weights: Weights) -> SkippingModel:
        """What drafts: the model itself, or its 4-bit twin, which is made on first use.

        Raises ValueError where there can be no twin.
        """
        if weights not in self._drafters:
            if weights not in get_args(Weights):
                known = ", ".join(get_args(Weights))
                raise ValueError(f"draft_weights {weights!r}: one of {known}")
            self._drafters[weights] = self._twin(weights)
        return self._drafters[weights]

    def _twin(self, weights: Weights) -> SkippingModel:
        own = self.skipping
        blocks = None if weights == "nf4" else write(self, *SELF_WRITTEN)
        with torch.inference_mode():
            copied = own.model
            if weights != "int4-head":
                copied = nf4_copy(own.model) if blocks is None else int4_copy(own.model, blocks)
        twin = SkippingModel(copied, own.gates, own.kv_rule)
        if own.engine is None:
            return twin
        with contextlib.suppress(Unsuited):
            twin.engine = Engine(copied, own.gates, own.kv_rule, rounded=True)
            if blocks is not None:
                twin.engine.use_sketch(int4_draft_head(own.model, blocks), own.engine.head)
        return twin

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 64,
        mode: Mode = "plain",
        budget: float = 0.8,
        draft_budget: float = 0.5,
        draft_length: int | Literal["auto"] = "auto",
        draft_weights: Weights = "own",
        lookup: bool = False,
        target: Target = "gated",
        sampler: Sampler = GREEDY,
        seed: int = 0,
        eos: Sequence[int] = (),
        stop: Sequence[str] = (),
        criteria: Sequence[Any] = (),
        on_token: Callable[[int, int], None] | None = None,
    ) -> Generation:
        """Continue prompts (token ids, one list a row), greedily unless `sampler` says otherwise.

        Args:
            mode: `plain` (full compute), `skip` (at `budget`), or `speculate` (drafted, verified at
                full compute: the tokens of `plain`, or when sampling its distribution).
            draft_budget: how much of the branches a draft computes; 1 skips nothing.
            draft_length: drafted tokens a verify pass, 1 to 16, or `auto`: set by measured costs
                and acceptance, 0 while speculation does not pay.
            draft_weights: `own`; `int4-head`, where a 4-bit copy of the LM head ranks tokens; or a
                4-bit copy of all weights, `int4` (that head, too) or `nf4` (twin.py).
            lookup: before drafting, propose what followed the last tokens where they stood before.
            target: what full compute means where gates scale what branches add: the `gated` model,
                or the `original`, without them. Other gates leave the model what it was.
            sampler, seed: how tokens are drawn; each row has a random stream of its own.
            eos: token ids that end a row; the ending token is part of the result.
            stop: strings that end a row as soon as its text holds one.
            criteria: further StoppingCriteria of transformers.
            on_token: called with (row, token) as tokens are committed.
        """
        if not prompts or not all(prompts):
            raise ValueError("every prompt needs at least one token")
        if max_new_tokens < 1:
            raise ValueError("max_new_tokens must be at least 1")
        if draft_length != "auto" and not 1 <= draft_length <= MAX_DRAFT:
            raise ValueError(f"draft_length must be 'auto' or 1 to {MAX_DRAFT}")
        if mode not in ("plain", "skip", "speculate"):
            raise ValueError(f"mode {mode!r}: one of plain, skip, speculate")
        if target not in ("gated", "original"):
            raise ValueError(f"target {target!r}: gated or original")
        self.skipping.gated = target == "gated"
        ends = Ends(frozenset(eos), tuple(stop), self.tokenizer, max_new_tokens, tuple(criteria))
        rows = [Row(i, list(p), ends, seed, on_token) for i, p in enumerate(prompts)]
        stats = Stats(prompt_tokens=sum(map(len, prompts)))
        if mode == "speculate":
            levels = self.thresholds(draft_budget)
            drafting = Drafting(self.drafter(draft_weights), levels, draft_length, lookup)
            if draft_length == "auto":
                kind = (draft_weights, draft_budget, len(prompts))
                drafting.pace = self.paces.setdefault(kind, Pace())
                drafting.lookup_pace = self.paces.setdefault(("lookup", len(prompts)), Pace())
            with torch.inference_mode():
                self._speculate(rows, drafting, sampler, stats)
        else:
            levels = self.thresholds(budget) if mode == "skip" else None
            with torch.inference_mode():
                self._decode(rows, levels, sampler, stats)
        stats.new_tokens = sum(len(row.tokens) for row in rows)
        return Generation([row.tokens for row in rows], stats)

    # -- plain and skipping --------------------------------------------------------------------

    def _decode(self, rows: list[Row], levels: Thresholds, sampler: Sampler, stats: Stats) -> None:
        cache = self._prefill(rows, levels, sampler, stats)
        started = time.perf_counter()
        while not all(row.ended for row in rows):
            last = torch.tensor([[row.last] for row in rows], device=self.skipping.device)
            hidden = self.skipping.forward(last, cache, [row.slot for row in rows], levels)
            self._choose(rows, self.skipping.head(hidden[:, -1]), sampler)
            stats.passes += 1
        stats.decode_s = time.perf_counter() - started

    def _prefill(
        self, rows: list[Row], levels: Thresholds, sampler: Sampler, stats: Stats
    ) -> KVCache:
        """A cache that holds the prompts; the first token of every row is committed."""
        started = time.perf_counter()
        lengths = [len(row.prompt) for row in rows]
        ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, : len(row.prompt)] = torch.tensor(row.prompt)
        ids = ids.to(self.skipping.device)
        cache = self.skipping.new_cache(len(rows), slots(max(lengths), rows[0].ends.limit))
        final: list[Tensor] = [torch.empty(0)] * len(rows)  # of each row's last token, [H]
        columns = max(1, min(PIECE, PREFILL // len(rows)))
        for first in range(0, max(lengths), columns):
            part = ids[:, first : first + columns]
            own = [min(max(n - first, 0), part.shape[1]) for n in lengths]
            hidden = self.skipping.forward(part, cache, [first] * len(rows), levels, own)
            for number, length in enumerate(lengths):
                if first < length <= first + columns:
                    final[number] = hidden[number, length - first - 1].clone()
        self._choose(rows, self.skipping.head(torch.stack(final)), sampler)
        stats.prefill_s = stats.ttft_s = time.perf_counter() - started
        return cache

    @staticmethod
    def _choose(rows: list[Row], logits: Tensor, sampler: Sampler) -> None:
        """Commit one token to every row that has not ended. logits [B, V]."""
        for row, own in zip(rows, logits, strict=True):
            if not row.ended:
                row.commit([draw(sampler.law(own, row.text), row.generator)])

    # -- self-speculation ----------------------------------------------------------------------

    def _speculate(
        self, rows: list[Row], drafting: Drafting, sampler: Sampler, stats: Stats
    ) -> None:
        """Draft, verify, commit, each row by its own number of tokens, until all have ended."""
        cache = self._prefill(rows, None, sampler, stats)
        started = time.perf_counter()
        while live := [row for row in rows if not row.ended]:
            begun = time.perf_counter()
            drafts = drafting.make(live, sampler, cache)
            drafted = time.perf_counter()
            accepted = self._verify(live, drafts, sampler, cache)
            verified = time.perf_counter()
            drafting.observe(drafts, accepted, drafted - begun, verified - drafted)
            _account(stats, drafts, accepted, drafted - begun, verified - drafted)
        stats.decode_s = time.perf_counter() - started

    def _verify(
        self, rows: list[Row], drafts: list[Draft], sampler: Sampler, cache: KVCache
    ) -> list[int]:
        """One full pass over each row's last token and draft; commits, and counts what stood."""
        found = self.skipping.ragged(
            [[row.last, *draft.tokens] for row, draft in zip(rows, drafts, strict=True)],
            cache,
            [row.number for row in rows],
            [row.slot for row in rows],
        )
        logits = self.skipping.head(torch.cat(found)).split([len(part) for part in found])
        counts = []
        for row, draft, own in zip(rows, drafts, logits, strict=True):
            wanted = sampler.laws(own, row.text, draft.tokens)
            accepted, following = accept_or_resample(
                draft.tokens, draft.laws, wanted, row.generator
            )
            row.commit([*draft.tokens[:accepted], following])
            counts.append(accepted)
        return counts

    # -- accounting ----------------------------------------------------------------------------

    def saved(self, usage: Usage, budget: float, dense: Work | None = None) -> Saving:
        """Multiply-adds saved over the tokens that `usage` counted at a budget: of this model's
        own, or of those of the `dense` one that it was cut from."""
        skipping, gates = self.skipping, self.skipping.gates
        scaled = gates is not None and gates.scales and skipping.gated  # every gate is asked
        levels = self.thresholds(budget) or [NEVER_SKIP] * len(usage.kept)
        gated = [scaled or level != NEVER_SKIP for level in levels]
        return saving(skipping.model, usage, gates, skipping.kv_rule, gated, dense)


def _account(
    stats: Stats, drafts: list[Draft], accepted: list[int], draft_s: float, verify_s: float
) -> None:
    stats.draft_s += draft_s
    stats.verify_s += verify_s
    for draft, stood in zip(drafts, accepted, strict=True):
        count = len(draft.tokens)
        stats.drafted += count
        stats.accepted += stood
        stats.passes += 1
        stats.looked_up += count if draft.looked_up else 0
        stats.draft_lengths[count] = stats.draft_lengths.get(count, 0) + 1
        for position in range(min(stood + 1, count)):
            stats.count(position, 1, position < stood)
