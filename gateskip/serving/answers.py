"""An answer in the making: its row, its events, and the counts of its receipt."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gateskip.decoding.config import DraftConfig, SkipConfig
from gateskip.decoding.decoder import Decoder
from gateskip.decoding.rows import Row, StopConditions, Tokens
from gateskip.decoding.sampling import GREEDY
from gateskip.model.compute import Usage, Work, kept_share
from gateskip.runtime.backend import Verified
from gateskip.runtime.skipping import is_full
from gateskip.serving.requests import (
    Event,
    Finished,
    FinishReason,
    NewToken,
    OnEvent,
    Receipt,
    Request,
)
from gateskip.serving.slot import Slot

log = logging.getLogger(__name__)


class ServedRow(Row):
    """A row that may fail, and that takes back numbers of its random stream.

    Its `number` is its place in the cache. Its random stream is that of row 0 of `generate`.
    """

    def __init__(self, request: Request, tokenizer: Any, tell: Callable[[int], None]) -> None:
        ends = (frozenset(request.eos), request.stop, tokenizer, request.max_new_tokens)
        stops = StopConditions(*ends)
        super().__init__(0, list(request.prompt), stops, request.seed, lambda _, token: tell(token))
        self.error: Exception | None = None
        self._unused: list[float] = []

    def fail(self, error: Exception) -> None:
        """End the row, if it has not ended."""
        if not self.ended:
            self.error, self.ended = error, True

    def commit(self, tokens: Tokens) -> None:
        """As `Row.commit`; an exception ends the row."""
        try:
            super().commit(tokens)
        except Exception as error:
            self.error, self.ended = error, True

    def uniform(self) -> float:
        """A number from 0 to 1 from the row's random stream."""
        return self._unused.pop(0) if self._unused else super().uniform()

    def give_back(self, uniform: Sequence[float]) -> None:
        """Take back the last numbers, which drew no token."""
        self._unused = [*uniform, *self._unused]

    def stopped(self) -> bool:
        """Whether a stop condition ended it, and not the number of its tokens."""
        unlimited = replace(self.stops, limit=len(self.tokens) + 1)
        return bool(self.tokens) and unlimited.reached(self.tokens, self.text)


class Answer:
    """The answer to one request, from `submit` to its last event.

    Attributes:
        phases: the limits of its prompt and of its new tokens.
        read: prompt tokens whose keys and values are in the cache.
        reused: those of them that came from an earlier request.
        logits: of the token that is committed next [V], where log probabilities are asked for.
        compute: the share of compute of the pass that chose it, where that is known.
    """

    def __init__(self, number: int, request: Request, decoder: Decoder, on_event: OnEvent) -> None:
        """Raises ValueError for settings that the decoder cannot have."""
        sampler = request.sampler
        if sampler.temperature == 0 and replace(sampler, top_k=0, top_p=1.0, min_p=0.0) == GREEDY:
            request = replace(request, sampler=GREEDY)  # the argmax whatever the rest says
        self.number, self.request = number, request
        self.skip, self.draft = request.skip or SkipConfig(), request.draft or DraftConfig()
        self.phases = decoder.phases_of(request.mode, self.skip, self.draft)
        self.row = ServedRow(request, decoder.tokenizer, self._tell)
        self.cancelled = False
        self.slot: Slot | None = None
        self.read = self.reused = 0
        self.logits: Tensor | None = None
        self.compute: float | None = None
        self.drafted = self.accepted = self.looked_up = 0
        self.computed = self.whole = 0.0  # multiply-adds of branches: done, and without skipping
        self._on_event = on_event
        self._submitted = time.monotonic()
        self._begun: float | None = None
        self.first_token_s: float | None = None

    # -- what it asks for ------------------------------------------------------------------------

    @property
    def budget(self) -> float | None:
        """Share of the branches' multiply-adds that is to be computed; None for all."""
        mode, verify_budget = self.request.mode, self.draft.verify_budget
        if mode == "speculate":
            return verify_budget if verify_budget < 1 else None
        return self.skip.budget if mode == "skip" else None

    @property
    def greedy(self) -> bool:
        """Whether only the argmax of its logits is needed."""
        return self.request.sampler == GREEDY and self.request.logprobs is None

    @property
    def drafts(self) -> bool:
        """Whether it may be drafted for."""
        return self.request.mode == "speculate" and not self.token_by_token

    @property
    def native(self) -> bool:
        """Whether native calls can choose its tokens."""
        return self.request.sampler.native and not self.token_by_token

    @property
    def token_by_token(self) -> bool:
        """Whether each token is committed by itself, with facts about it."""
        return self.request.logprobs is not None or self.request.token_shares

    @property
    def skips(self) -> bool:
        """Whether its answer's tokens skip branches."""
        return not is_full(self.phases.answer)

    @property
    def overdue(self) -> bool:
        """Whether its deadline is over."""
        limit = self.request.deadline
        return limit is not None and time.monotonic() > self._submitted + limit

    # -- events ----------------------------------------------------------------------------------

    def begin(self, slot: Slot) -> None:
        """Note that it leaves the queue for a row of the cache."""
        self._begun, self.slot, self.row.number = time.monotonic(), slot, slot.number
        self.read = self.reused = slot.read

    def _tell(self, token: int) -> None:
        if self.first_token_s is None:
            self.first_token_s = time.monotonic() - self._submitted
        self._on_event(self._event(token))

    def _event(self, token: int) -> NewToken:
        compute = self.compute if self.request.token_shares else None
        if self.logits is None:
            return NewToken(token, compute=compute)
        logprobs = torch.log_softmax(self.logits.float(), -1)
        top = logprobs.topk(self.request.logprobs or 0)
        alternatives = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return NewToken(token, float(logprobs[token]), tuple(alternatives), compute)

    def finish(self, reason: FinishReason) -> None:
        """Send the last event."""
        error = None if self.row.error is None else str(self.row.error) or repr(self.row.error)
        self._send(Finished(reason, self.receipt(), error))

    def _send(self, event: Event) -> None:
        try:
            self._on_event(event)
        except Exception:
            log.exception("request %d: its listener failed", self.number)

    def reason(self) -> FinishReason | None:
        """The reason to end now; None while it goes on."""
        if self.row.error is not None:
            return "failed"
        if self.row.ended:
            return "stop" if self.row.stopped() else "length"
        return "cancelled" if self.cancelled else "deadline" if self.overdue else None

    # -- counts ----------------------------------------------------------------------------------

    def count_draft(self, verified: Verified) -> None:
        """Count a draft and its outcome."""
        self.drafted += verified.drafted
        self.accepted += verified.accepted
        self.looked_up += verified.drafted if verified.looked_up else 0

    def count_usage(self, model: Any, usage: Usage) -> None:
        """Count what tokens of this row alone computed, if the request skips anything."""
        if usage.seen and (self.phases.prompt is not None or self.phases.answer is not None):
            whole = Work.of(model).of_branches(usage)
            self.count_work(kept_share(model, usage) * whole, whole)

    def count_work(self, computed: float, whole: float) -> None:
        """Count multiply-adds of branches: those computed, and all without skipping."""
        self.computed += computed
        self.whole += whole

    def receipt(self) -> Receipt:
        """The work so far."""
        now, request = time.monotonic(), self.request
        return Receipt(
            prompt_tokens=len(request.prompt),
            reused_tokens=self.reused,
            new_tokens=len(self.row.tokens),
            drafted=self.drafted,
            accepted=self.accepted,
            looked_up=self.looked_up,
            skipped=1 - self.computed / self.whole if self.whole else None,
            budget=self.budget,
            queued_s=(now if self._begun is None else self._begun) - self._submitted,
            first_token_s=self.first_token_s or 0.0,
            total_s=now - self._submitted,
        )


@dataclass
class Sums:
    """Counts over answers."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    looked_up: int = 0
    computed: float = 0.0
    whole: float = 0.0

    def add(self, answer: Answer) -> None:
        """Count an answer's work so far."""
        self.prompt_tokens += 0 if answer.slot is None else len(answer.request.prompt)
        self.reused_tokens += answer.reused
        self.new_tokens += len(answer.row.tokens)
        self.drafted += answer.drafted
        self.accepted += answer.accepted
        self.looked_up += answer.looked_up
        self.computed += answer.computed
        self.whole += answer.whole
