"""One request for text: its answers are submitted, followed, and cancelled when nobody waits."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from typing import Protocol

from compose.serve.api.answer import Answer, Inbox, Piece, TokenLogprob, TokenShare
from compose.serve.api.calls import CallDelta, whole_calls
from compose.serve.api.errors import ApiError, invalid
from compose.serve.api.shapes import JSON, Envelope, Shape, ended, receipt_of, token_shares, usage
from gateskip.serving.requests import (
    Draining,
    Event,
    Finished,
    OnEvent,
    QueueFull,
    Receipt,
    Request,
    Snapshot,
)

LOG = logging.getLogger("gateskip.serve")
RETRY_AFTER_S = 1
GATHER_S = 0.05  # between two chunks of a stream: each slows decoding, and no reader sees it
WHOLE_S = 1.0  # where nobody reads before the end


class Ticket(Protocol):
    """A submitted request."""

    def cancel(self) -> None:
        """End it; its last event says so."""


class Scheduler(Protocol):
    """What answers requests; see `gateskip.serving.scheduler`."""

    def submit(self, request: Request, on_event: OnEvent) -> Ticket:
        """Queue a request. Raises QueueFull, Draining, ValueError."""

    def snapshot(self) -> Snapshot:
        """Counts, and the state now."""

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests, and wait for those that run; whether all have ended."""

    def close(self) -> None:
        """End everything."""


class Generation:
    """The answers to a request, `n` for each of its prompts."""

    def __init__(
        self,
        scheduler: Scheduler,
        requests: Sequence[Request],
        answers: Sequence[Answer],
        envelope: Envelope,
        *,
        n: int,
    ) -> None:
        self._requests, self._answers, self._envelope, self._n = requests, answers, envelope, n
        self._inbox = Inbox()
        self._tickets: list[Ticket] = []
        try:
            for number, request in enumerate(requests):
                on_event = partial(self._inbox.put, number)
                self._tickets.append(scheduler.submit(request, on_event))
        except BaseException as error:
            self.cancel()
            raise _refusal(error) from None

    def cancel(self) -> None:
        """End the answers that have not ended."""
        for ticket, answer in zip(self._tickets, self._answers, strict=False):
            if answer.finished is None:
                ticket.cancel()

    @property
    def receipts(self) -> list[Receipt]:
        """Of the answers that have ended."""
        return [answer.finished.receipt for answer in self._answers if answer.finished is not None]

    async def whole(self) -> JSON:
        """The whole answer."""
        texts = [""] * len(self._answers)
        tokens: list[list[TokenLogprob]] = [[] for _ in self._answers]
        shares: list[list[TokenShare]] = [[] for _ in self._answers]
        calls: list[list[CallDelta]] = [[] for _ in self._answers]
        async for answer, piece in self._pieces(WHOLE_S):
            texts[answer.index] += piece.text
            tokens[answer.index] += piece.logprobs
            shares[answer.index] += piece.shares
            calls[answer.index] += piece.calls
        choices = [
            {
                "index": i,
                **self._shape.choice(texts[i], self._of(tokens[i]), whole_calls(calls[i])),
                **ended(answer.finished, called=answer.called),
                **self._shares(shares[i]),
            }
            for i, answer in enumerate(self._answers)
        ]
        return self._envelope.whole(choices, usage=self._usage(), gateskip=self._receipt())

    async def chunks(self, *, with_usage: bool) -> AsyncIterator[JSON]:
        """The answer in chunks; the last choice to end carries the receipt."""
        begun: set[int] = set()
        more = {"usage": None} if with_usage else {}
        async for answer, piece in self._pieces(GATHER_S):
            first = answer.index not in begun
            if not (piece.text or piece.logprobs or piece.calls or piece.finished or first):
                continue
            begun.add(answer.index)
            logprobs = self._of(piece.logprobs)
            delta = self._shape.delta(piece.text, logprobs, piece.calls, first=first)
            end = ended(piece.finished, called=answer.called)
            choice = {"index": answer.index, **delta, **end, **self._shares(piece.shares)}
            last = {"gateskip": self._receipt()} if self._all_ended() else {}
            yield self._envelope.chunk([choice], **more, **last)
        if with_usage:
            yield self._envelope.chunk([], usage=self._usage())

    async def _pieces(self, gather_s: float) -> AsyncIterator[tuple[Answer, Piece]]:
        """What is new in each answer, until all have ended."""
        while not self._all_ended():
            for number in self._taken(await self._inbox.take(gather_s)):
                answer = self._answers[number]
                piece = answer.take()
                if piece.finished is not None:
                    _check(piece.finished)
                yield answer, piece

    def _taken(self, events: Sequence[tuple[int, Event]]) -> Iterator[int]:
        """Give the answers their events; the numbers of these answers."""
        for number, event in events:
            self._answers[number].add(event)
        yield from dict.fromkeys(number for number, _ in events)

    @property
    def _shape(self) -> Shape:
        return self._envelope.shape

    def _of(self, logprobs: list[TokenLogprob]) -> list[TokenLogprob] | None:
        return None if self._requests[0].logprobs is None else logprobs

    def _shares(self, shares: list[TokenShare]) -> JSON:
        return token_shares(shares) if self._requests[0].token_shares else {}

    def _all_ended(self) -> bool:
        return all(answer.finished is not None for answer in self._answers)

    def _usage(self) -> JSON:
        return usage(self.receipts, self._n)

    def _receipt(self) -> JSON:
        return receipt_of(self.receipts, self._requests[0])


def _check(finished: Finished) -> None:
    """Raises ApiError for an answer that did not end by itself."""
    if finished.reason == "failed":
        LOG.error("an answer failed: %s", finished.error)
        raise ApiError(500, "the model failed on this request", code="generation_failed")
    if finished.reason == "cancelled":
        raise stopping()


def stopping() -> ApiError:
    """The server takes no requests."""
    return ApiError(503, "the server is stopping", code="draining", headers={"Retry-After": "5"})


def _refusal(error: BaseException) -> BaseException:
    """A scheduler's refusal as the client gets it."""
    if isinstance(error, QueueFull):
        headers = {"Retry-After": str(RETRY_AFTER_S)}
        return ApiError(429, "the queue is full: try again", code="queue_full", headers=headers)
    if isinstance(error, Draining):
        return stopping()
    if isinstance(error, ValueError):
        return invalid(str(error))
    return error
