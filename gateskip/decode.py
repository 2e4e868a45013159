"""Decoding: plain, skipping and self-speculative, behind one `generate`.

Speculation drafts with an aggressive skip budget and verifies at full compute. Both write the same
cache: drafts attend to the committed, fully computed entries, a verify pass overwrites what the
drafts left, and what it rejects lies beyond the row's length and is overwritten in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from gateskip.budget import thresholds_at
from gateskip.compute import Saving, saving
from gateskip.sampling import accept_greedy
from gateskip.skip import NEVER_SKIP, KVCache, SkippingModel, Usage

Mode = Literal["plain", "skip", "speculate"]
Tokens = list[int]
Thresholds = Sequence[float] | None
MAX_DRAFT = 16


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

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / drafted tokens; None when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def mean_accepted_tokens(self) -> float | None:
        """Tokens a full pass yields; plain decoding has 1. None without a pass."""
        return (self.accepted + self.passes) / self.passes if self.passes else None

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
    """

    def __init__(
        self,
        skipping: SkippingModel,
        tokenizer: Any,
        grid: Mapping[float, Sequence[float]],
        defaults: Mapping[str, Any] | None = None,
        kernels: Mapping[str, int] | None = None,
    ) -> None:
        self.skipping, self.tokenizer = skipping, tokenizer
        self.grid, self.defaults = dict(grid), dict(defaults or {})
        self.kernels = dict(kernels or {})
        self.paces: dict[float, Pace] = {}  # by draft budget: what drafting costs and brings here

    def thresholds(self, budget: float) -> Thresholds:
        """Thresholds of a budget in (0, 1]. Raises ValueError when it cannot be had."""
        if budget < 1.0 and self.skipping.gates is None:
            raise ValueError("this model has no gates, so it cannot skip")
        return thresholds_at(self.grid, budget)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 64,
        mode: Mode = "plain",
        budget: float = 0.8,
        draft_budget: float = 0.5,
        draft_length: int | Literal["auto"] = "auto",
        eos: Sequence[int] = (),
        on_token: Callable[[int, int], None] | None = None,
    ) -> Generation:
        """Greedy continuation of prompts (token ids, one list a row).

        Args:
            mode: `plain` (full compute), `skip` (at `budget`), or `speculate` (drafts at
                `draft_budget`, verified at full compute: the tokens of `plain`).
            draft_length: drafted tokens a verify pass, 1 to 16, or `auto`: set by measured costs
                and acceptance, 0 while speculation does not pay.
            eos: token ids that end a row; the ending token is part of the result.
            on_token: called with (row, token) as tokens are committed.
        """
        if not prompts or not all(prompts):
            raise ValueError("every prompt needs at least one token")
        if max_new_tokens < 1:
            raise ValueError("max_new_tokens must be at least 1")
        if draft_length != "auto" and not 1 <= draft_length <= MAX_DRAFT:
            raise ValueError(f"draft_length must be 'auto' or 1 to {MAX_DRAFT}")
        ends, stats = frozenset(eos), Stats()
        emit = on_token or (lambda row, token: None)
        with torch.inference_mode():
            if mode == "speculate":
                draft = self.thresholds(draft_budget)
                pace = self.paces.setdefault(draft_budget, Pace())
                length = pace if draft_length == "auto" else draft_length
                rows = [
                    self._speculate(p, i, max_new_tokens, draft, length, ends, stats, emit)
                    for i, p in enumerate(prompts)
                ]
            elif mode in ("plain", "skip"):
                levels = self.thresholds(budget) if mode == "skip" else None
                rows = self._decode(prompts, max_new_tokens, levels, ends, stats, emit)
            else:
                raise ValueError(f"mode {mode!r}: one of plain, skip, speculate")
        stats.new_tokens = sum(map(len, rows))
        return Generation(rows, stats)

    # -- plain and skipping --------------------------------------------------------------------

    def _decode(
        self,
        prompts: Sequence[Sequence[int]],
        limit: int,
        levels: Thresholds,
        ends: frozenset[int],
        stats: Stats,
        emit: Callable[[int, int], None],
    ) -> list[Tokens]:
        lengths = [len(p) for p in prompts]
        started = time.perf_counter()
        cache, logits = self._prefill(prompts, limit, levels)
        last = logits.argmax(-1)  # [B]
        stats.prefill_s = stats.ttft_s = time.perf_counter() - started
        stats.prompt_tokens = sum(lengths)
        rows: list[Tokens] = [[] for _ in prompts]
        self._commit(rows, last.tolist(), ends, emit)
        started = time.perf_counter()
        for step in range(limit - 1):
            if all(row[-1] in ends for row in rows):
                break
            starts = [n + step for n in lengths]
            hidden = self.skipping.forward(last.unsqueeze(1), cache, starts, levels)
            last = self.skipping.head(hidden[:, -1]).argmax(-1)
            self._commit(rows, last.tolist(), ends, emit)
            stats.passes += 1
        stats.decode_s = time.perf_counter() - started
        return rows

    def _prefill(
        self, prompts: Sequence[Sequence[int]], limit: int, levels: Thresholds
    ) -> tuple[KVCache, Tensor]:
        """A filled cache and the logits [B, V] after each prompt's last token."""
        lengths = [len(p) for p in prompts]
        ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(list(prompt))
        ids = ids.to(self.skipping.device)
        cache = self.skipping.new_cache(len(prompts), max(lengths) + limit + MAX_DRAFT)
        hidden = self.skipping.forward(ids, cache, [0] * len(prompts), levels, lengths)
        final = hidden[torch.arange(len(prompts)), torch.tensor(lengths) - 1]
        return cache, self.skipping.head(final)

    @staticmethod
    def _commit(
        rows: list[Tokens],
        tokens: Tokens,
        ends: frozenset[int],
        emit: Callable[[int, int], None],
    ) -> None:
        """Append one token to every row that has not ended."""
        for number, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if not row or row[-1] not in ends:
                row.append(token)
                emit(number, token)

    # -- self-speculation ----------------------------------------------------------------------

    def _speculate(
        self,
        prompt: Sequence[int],
        number: int,
        limit: int,
        draft_levels: Thresholds,
        draft_length: int | Pace,
        ends: frozenset[int],
        stats: Stats,
        emit: Callable[[int, int], None],
    ) -> Tokens:
        """One row: draft, verify, commit, until `limit` tokens or an ending one."""
        started = time.perf_counter()
        cache, logits = self._prefill([prompt], limit, None)
        row = [int(logits.argmax(-1))]
        emit(number, row[0])
        spent = time.perf_counter() - started
        stats.prefill_s += spent
        stats.ttft_s = stats.ttft_s or spent
        stats.prompt_tokens += len(prompt)
        pace = draft_length if isinstance(draft_length, Pace) else None
        started = time.perf_counter()
        while len(row) < limit and row[-1] not in ends:
            wanted = draft_length.draft_length() if isinstance(draft_length, Pace) else draft_length
            count = min(wanted, limit - len(row) - 1)
            slot = len(prompt) + len(row) - 1  # of the last committed token
            begun = time.perf_counter()
            draft = self._draft(row[-1], slot, count, cache, draft_levels)
            drafted = time.perf_counter()
            accepted, following = self._verify(row[-1], draft, slot, cache)
            verified = time.perf_counter()
            if pace is not None:
                pace.observe(count, accepted, drafted - begun, verified - drafted)
            _account(stats, count, accepted, drafted - begun, verified - drafted)
            for token in (*draft[:accepted], following):
                row.append(token)
                emit(number, token)
                if token in ends:
                    break
        stats.decode_s += time.perf_counter() - started
        return row

    def _draft(
        self, last: int, slot: int, count: int, cache: KVCache, levels: Thresholds
    ) -> Tokens:
        """`count` tokens decoded greedily with skipping, after `last` at `slot`."""
        draft: Tokens = []
        for step in range(count):
            ids = torch.tensor([[last]], device=self.skipping.device)
            hidden = self.skipping.forward(ids, cache, [slot + step], levels)
            last = int(self.skipping.head(hidden[0, -1:]).argmax(-1))
            draft.append(last)
        return draft

    def _verify(self, last: int, draft: Tokens, slot: int, cache: KVCache) -> tuple[int, int]:
        """One full pass over the last committed token and the draft."""
        ids = torch.tensor([[last, *draft]], device=self.skipping.device)
        hidden = self.skipping.forward(ids, cache, [slot], None)
        return accept_greedy(draft, self.skipping.head(hidden[0]))

    # -- accounting ----------------------------------------------------------------------------

    def saved(self, usage: Usage, budget: float) -> Saving:
        """Multiply-adds saved over the tokens that `usage` counted at a budget."""
        levels = self.thresholds(budget)
        gated = [levels is not None and level != NEVER_SKIP for level in levels or ()]
        gated = gated or [False] * len(usage.kept)
        skipping = self.skipping
        return saving(skipping.model, usage, skipping.gates, skipping.kv_rule, gated)


def _account(stats: Stats, count: int, accepted: int, draft_s: float, verify_s: float) -> None:
    stats.drafted += count
    stats.accepted += accepted
    stats.passes += 1
    stats.draft_s += draft_s
    stats.verify_s += verify_s
    stats.draft_lengths[count] = stats.draft_lengths.get(count, 0) + 1


class Pace:
    """Sets the draft length that measured costs and acceptance promise most tokens a second from.

    With acceptance a, k drafted tokens yield (1 - a^(k + 1)) / (1 - a) tokens a pass (arXiv
    2211.17192, equation 1) for the time of k draft steps and one verify pass. Length 0 is plain
    decoding; while it is best, drafting is tried again after ever longer pauses. A decoder keeps
    its pace from one call to the next: what speculation costs does not change with the prompt.
    """

    LONGEST = 8
    TRIAL = 3
    MARGIN = 1.02  # speculation must promise this much more than plain decoding

    def __init__(self) -> None:
        self.acceptance = 0.6
        self.draft_step: float | None = None  # seconds
        self.plain: float | None = None
        self.per_row: float | None = None  # what one more row adds to a verify pass, seconds
        self.pause, self.wait = 32, 0

    def draft_length(self) -> int:
        """Tokens to draft next."""
        if self.plain is None:
            return 0
        if self.draft_step is None or self.per_row is None:
            return self.TRIAL
        best = max(range(self.LONGEST + 1), key=self._tokens_per_s)
        if best and self._tokens_per_s(best) > self.MARGIN * self._tokens_per_s(0):
            self.pause = 32
            return best
        self.wait += 1
        if self.wait < self.pause:
            return 0
        self.wait, self.pause = 0, min(2 * self.pause, 512)
        return self.TRIAL

    def _tokens_per_s(self, k: int) -> float:
        assert self.plain is not None
        if k == 0:
            return 1 / self.plain
        assert self.draft_step is not None and self.per_row is not None
        a = min(self.acceptance, 0.99)
        tokens = (1 - a ** (k + 1)) / (1 - a)
        return tokens / (k * self.draft_step + self.plain + k * self.per_row)

    def observe(self, count: int, accepted: int, draft_s: float, verify_s: float) -> None:
        """Take in what one round took: `count` drafted, `accepted` of them."""
        if count == 0:
            self.plain = _blend(self.plain, verify_s, 0.3)
            return
        self.draft_step = _blend(self.draft_step, draft_s / count, 0.3)
        self.per_row = _blend(
            self.per_row, max(0.0, verify_s - (self.plain or verify_s)) / count, 0.3
        )
        tried = min(accepted + 1, count)  # drafts after the first refusal tell nothing
        for outcome in (1.0,) * accepted + (0.0,) * (tried - accepted):
            self.acceptance += 0.1 * (outcome - self.acceptance)


def _blend(old: float | None, new: float, share: float) -> float:
    return new if old is None else old + share * (new - old)
