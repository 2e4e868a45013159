"""Continuous batching: many requests decode at once in one model, and join and leave between steps.

One thread owns the decoder. It takes requests from a queue in their order, reads prompts in pieces
beside rows that decode, and decodes all rows together. The tokens of a request are those that
`Decoder.generate` gives for its prompt alone with the same settings, whatever runs beside it. In
mode `speculate` they are those of mode `plain`, also with a sampler: a drafted token is accepted
where it is the one that plain decoding draws by the seed. (`generate` accepts more of them, and
keeps only the distribution.)

Prompts are read in pieces of any size where their bits do not depend on it: where all products are
compiled kernels with 8-bit activations. Elsewhere a prompt is read in the pieces of `generate`, so
that a step may wait for 1,024 tokens, and whole pieces are reused.

A draft is made or chosen when the first request asks for it, which takes seconds:
`Decoder.prepare_drafts` does it before.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Hashable
from dataclasses import replace
from typing import get_args

import torch

from gateskip.decoding.config import MAX_DRAFT, DraftConfig
from gateskip.decoding.decoder import NO_MODEL, NO_NETWORK, Decoder, Mode
from gateskip.decoding.draft_models import Weights
from gateskip.decoding.prefill import PIECE
from gateskip.runtime.skipping import is_full
from gateskip.serving.answers import Answer, Sums
from gateskip.serving.requests import (
    Draining,
    FinishReason,
    OnEvent,
    QueueFull,
    Request,
    ServeLimits,
    Snapshot,
)
from gateskip.serving.slots import Slots
from gateskip.serving.steps import Steps

log = logging.getLogger(__name__)
BESIDE = 256  # prompt tokens that are read between two steps of rows that decode
UNREAD = 1 << 14  # times to first tokens that wait for `snapshot`; then the oldest are dropped


class Ticket:
    """A request that was submitted."""

    def __init__(self, scheduler: Scheduler, answer: Answer) -> None:
        self._scheduler, self._answer = scheduler, answer
        self.number = answer.number

    def cancel(self) -> None:
        """End the request soon, with the tokens that it has. Any thread may call this; a request
        that has ended stays as it is."""
        self._answer.cancelled = True
        self._scheduler.wake()


class Scheduler:
    """Answers many requests at once.

    Attributes:
        limits: the limits that are kept: as many rows as the memory holds, and no longer context
            than the model has.
    """

    def __init__(self, decoder: Decoder, limits: ServeLimits = ServeLimits()) -> None:  # noqa: B008
        """Allocates the KV cache.

        Raises ValueError where it does not fit, and for backends other than `native`: only there
        a row has the same bits alone and beside others. OSError where `prefix_dir` cannot be made.
        """
        if decoder.skipping.engine is None:
            raise ValueError(f"backend {decoder.backend!r}: many requests need the backend native")
        models = [one for one in (decoder.skipping, decoder.draft_model) if one is not None]
        positions = min(one.model.config.max_position_embeddings for one in models)
        limits = replace(limits, context=min(limits.context, positions - MAX_DRAFT))
        self._slots = Slots(decoder.skipping, limits, decoder.draft_model)
        if limits.prefix_dir is not None:
            self._slots.use_disk(decoder, limits.prefix_dir)
        self.limits = replace(limits, rows=self._slots.cache.batch)
        self._decoder, self._steps = decoder, Steps(decoder, self._slots)
        self._changed = threading.Condition()
        self._queue = deque[Answer]()
        self._active = list[Answer]()  # the last one may still read its prompt
        self._draining = self._closing = False
        self._thread: int | None = None  # that runs the loop
        self._number = 0
        self._ended = Counter[FinishReason]()
        self._sums = Sums()
        self._first_token_s = deque[float](maxlen=UNREAD)

    # -- from any thread -------------------------------------------------------------------------

    def submit(self, request: Request, on_event: OnEvent) -> Ticket:
        """Queue a request; `on_event` gets its tokens, and then its end.

        Raises:
            ValueError: a setting that the decoder cannot have, or too many tokens.
            QueueFull: as many requests wait as may.
            Draining: the scheduler is being stopped.
        """
        self._check(request)
        answer = Answer(0, request, self._decoder, on_event)
        with self._changed:
            if self._draining or self._closing:
                raise Draining("no more requests are taken")
            if len(self._queue) >= self.limits.queue:
                raise QueueFull(f"{len(self._queue)} requests wait already")
            self._number += 1
            answer.number = self._number
            self._queue.append(answer)
            self._changed.notify_all()
        return Ticket(self, answer)

    def wake(self) -> None:
        """Let the loop look at its requests again."""
        with self._changed:
            self._changed.notify_all()

    def start(self) -> None:
        """Call `run` in a thread of its own."""
        threading.Thread(target=self.run, name="gateskip-scheduler", daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: self._thread is not None or self._closing)

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests, and wait until all have ended; whether they have in time."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not (self._queue or self._active), timeout_s)

    def close(self) -> None:
        """End the loop soon, and cancel what has not ended. Waits for that, except in the loop's
        thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            if self._thread == threading.get_ident():
                return
            self._changed.wait_for(lambda: self._thread is None)
        self._end_all()
        self._slots.close()

    def snapshot(self) -> Snapshot:
        """Counts and state."""
        with self._changed:
            sums = Sums(**vars(self._sums))
            for answer in self._active:
                sums.add(answer)
            times = tuple(self._first_token_s)
            self._first_token_s.clear()
            return Snapshot(
                queued=len(self._queue),
                rows=len(self._active),
                requests=dict(self._ended),
                prompt_tokens=sums.prompt_tokens,
                reused_tokens=sums.reused_tokens,
                new_tokens=sums.new_tokens,
                drafted=sums.drafted,
                accepted=sums.accepted,
                looked_up=sums.looked_up,
                skipped=1 - sums.computed / sums.whole if sums.whole else None,
                cache_bytes=self._slots.nbytes(),
                cached_tokens=self._slots.cached_tokens(),
                first_token_s=times,
            )

    def _check(self, request: Request) -> None:
        """Raise ValueError for a request that cannot run. Settings of skipping: see Answer."""
        vocabulary = self._decoder.skipping.model.config.vocab_size
        if not request.prompt:
            raise ValueError("a prompt needs at least one token")
        if not all(0 <= token < vocabulary for token in request.prompt):
            raise ValueError(f"a prompt's token is not one of the {vocabulary} of the model")
        if request.max_new_tokens < 1:
            raise ValueError("max_new_tokens must be at least 1")
        if len(request.prompt) + request.max_new_tokens > self.limits.context:
            raise ValueError(
                f"{len(request.prompt)} tokens of the prompt and {request.max_new_tokens} new ones"
                f" are more than the {self.limits.context} of a request"
            )
        if request.mode not in get_args(Mode):
            raise ValueError(f"mode {request.mode!r}: one of {', '.join(get_args(Mode))}")
        if request.logprobs is not None and not 0 <= request.logprobs <= vocabulary:
            raise ValueError(f"logprobs {request.logprobs}: 0 to {vocabulary}")
        if request.mode == "speculate":
            self._check_draft(request.draft or DraftConfig())

    def _check_draft(self, draft: DraftConfig) -> None:
        decoder, weights = self._decoder, draft.weights
        if weights is not None and weights not in get_args(Weights):
            names = ", ".join(get_args(Weights))
            raise ValueError(f"draft_weights {weights!r}: one of {names}")
        if weights == "learned" and decoder.network is None:
            raise ValueError(NO_NETWORK)
        if weights == "model" and decoder.draft_model is None:
            raise ValueError(NO_MODEL)
        decoder.thresholds(draft.budget)

    # -- the loop --------------------------------------------------------------------------------

    def run(self) -> None:
        """Answer requests until `close`; one thread runs this."""
        with self._changed:
            self._thread = threading.get_ident()
            self._changed.notify_all()
        self._decoder.skipping.gated = True
        with torch.inference_mode():
            while self._wait():
                try:
                    self._turn()
                except Exception as error:
                    log.exception("a step failed")
                    for answer in self._active:  # whatever is wrong, the loop goes on without it
                        answer.row.error, answer.row.ended = error, True
        self._end_all()
        with self._changed:
            self._thread = None
            self._changed.notify_all()

    def _wait(self) -> bool:
        """Wait for work; whether the loop goes on."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._queue or self._active)
            return not self._closing

    def _turn(self) -> None:
        """Ends, then some tokens of prompts, then the next tokens of all rows."""
        self._end_some()
        self._read()
        self._end_some()
        decoding = [answer for answer in self._active if answer.row.tokens]
        if decoding and len(self._active) == 1:
            self._steps.alone(decoding[0], self._waits)
        else:
            self._steps.together(decoding)
        self._end_some()

    def _read(self) -> None:
        """Read prompts, one after the other, up to a number of tokens that rows can wait for."""
        left = BESIDE if any(answer.row.tokens for answer in self._active) else PIECE
        while left > 0 and (answer := self._reading()) is not None:
            try:
                left -= max(1, self._steps.read(answer, left))
            except Exception as error:
                answer.row.fail(error)
            if answer.first_token_s is not None:
                with self._changed:
                    self._first_token_s.append(answer.first_token_s)
                left = min(left, BESIDE)  # for now a row waits

    def _reading(self) -> Answer | None:
        """The request whose prompt is read: the one begun, or the first that waits, if a row is
        free."""
        for answer in self._active:
            if not answer.row.tokens and not answer.row.ended:
                return answer
        with self._changed:
            if not self._queue or not self._slots.free:
                return None
            answer = self._queue.popleft()
            answer.begin(self._slots.take(answer.request.prompt, self._settings(answer)))
            self._active.append(answer)
            return answer

    def _settings(self, answer: Answer) -> Hashable:
        """The settings by which a prompt skips, if it does; and gates that scale always matter."""
        gates = self._decoder.skipping.gates
        if is_full(answer.phases.prompt) and not (gates is not None and gates.scales):
            return None
        return answer.request.mode, answer.skip, answer.draft.verify_budget

    def _waits(self) -> bool:
        """Whether something waits for the end of a row's step."""
        waiting = bool(self._queue) and self._slots.free
        return waiting or self._closing or any(a.cancelled or a.overdue for a in self._active)

    def _end_some(self) -> None:
        """End requests that are done, cancelled or late."""
        with self._changed:
            answers = [*self._active, *self._queue]
        for answer in answers:
            reason = answer.reason()
            if reason is not None:
                self._end(answer, reason)

    def _end_all(self) -> None:
        """Cancel what has not ended."""
        with self._changed:
            answers = [*self._active, *self._queue]
        for answer in answers:
            self._end(answer, answer.reason() or "cancelled")

    def _end(self, answer: Answer, reason: FinishReason) -> None:
        answer.finish(reason)
        with self._changed:
            if answer.slot is not None:
                self._active.remove(answer)
                self._slots.release(answer.slot, forget=answer.row.error is not None)
            elif answer in self._queue:
                self._queue.remove(answer)
            self._sums.add(answer)
            self._ended[reason] += 1
            self._changed.notify_all()
