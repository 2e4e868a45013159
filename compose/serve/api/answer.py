"""One answer while it is decoded: its text, facts about its tokens, and how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from compose.serve.api.calls import CallDelta, CallReader
from compose.serve.api.text import AnswerText
from compose.serve.api.token_bytes import TokenBytes
from gateskip.serving.requests import Event, Finished, NewToken


@dataclass(frozen=True)
class TokenLogprob:
    """A token's text, its bytes, its log probability, and those of the most probable tokens."""

    text: str
    raw: bytes
    logprob: float
    offset: int
    """Characters of the answer before the token."""
    top: tuple[tuple[str, bytes, float], ...]


@dataclass(frozen=True)
class TokenShare:
    """Text of one token, and the share of compute that chose the token."""

    text: str
    compute: float | None
    """None where it is not known: see `gateskip.serving.requests.NewToken`."""


@dataclass
class Piece:
    """What is new in an answer."""

    text: str = ""
    shares: list[TokenShare] = field(default_factory=list)
    """Of the tokens of the text, in parts that make it up."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    calls: list[CallDelta] = field(default_factory=list)
    finished: Finished | None = None


class Inbox:
    """The events of a request's answers, from the scheduler's thread to the event loop.

    Each waking of the loop takes time from the threads that decode. So `take` gathers events.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: deque[tuple[int, Event]] = deque()
        self._ready = asyncio.Event()
        self._wakes = True
        self._taken_at = -math.inf

    def put(self, answer: int, event: Event) -> None:
        """Add an event; any thread may call it."""
        self._events.append((answer, event))
        if (self._wakes or isinstance(event, Finished)) and not self._loop.is_closed():
            self._wakes = False
            self._loop.call_soon_threadsafe(self._ready.set)

    async def take(self, gather_s: float) -> list[tuple[int, Event]]:
        """All events since the last call, at least one, and no sooner than `gather_s` seconds after
        that call; but at once for the first event and for the end of an answer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._taken_at + gather_s):
                await self._ready.wait()
        while not self._events:
            self._ready.clear()
            self._wakes = True
            if not self._events:  # else `put` came before it could see that it has to wake
                await self._ready.wait()
        self._ready.clear()
        self._taken_at = self._loop.time()
        return [self._events.popleft() for _ in range(len(self._events))]


class Answer:
    """The `index`-th answer of a request; `add` takes its events in their order."""

    def __init__(
        self,
        index: int,
        text: AnswerText,
        token_bytes: TokenBytes,
        eos: Sequence[int],
        calls: CallReader | None = None,
        *,
        with_shares: bool = False,
    ) -> None:
        self.index = index
        self.finished: Finished | None = None
        self._calls = calls
        self._text, self._bytes, self._eos = text, token_bytes, frozenset(eos)
        self._waiting: deque[TokenLogprob] = deque()
        self._begun: deque[tuple[int, float | None]] = deque()
        """Where tokens begin in the text, and the compute of each, if that is asked for."""
        self._with_shares = with_shares
        self._piece = Piece()

    @property
    def called(self) -> bool:
        """Whether the answer has a call of a function."""
        return self._calls is not None and self._calls.called

    def add(self, event: Event) -> None:
        """Take an event."""
        if isinstance(event, NewToken):
            if self._is_in_a_call(event.token):
                return
            if (
                event.logprob is not None
                and not self._text.stopped
                and event.token not in self._eos
            ):
                self._waiting.append(self._logprob(event))
            if self._with_shares:
                self._begun.append((len(self._text.raw), event.compute))
            self._piece.text += self._text.add(event.token)
        else:
            self._piece.text += self._text.finish()
            self._piece.calls += [] if self._calls is None else self._calls.finish()
            self._piece.finished = self.finished = event

    def _is_in_a_call(self, token: int) -> bool:
        """Whether a token is a part of a call, which then has it."""
        if self._calls is None or token in self._eos:
            return False
        deltas = self._calls.add(token)
        self._piece.calls += deltas or []
        return deltas is not None

    def take(self) -> Piece:
        """What is new since the last call."""
        piece, self._piece = self._piece, Piece()
        if self._with_shares:
            piece.shares = self._shares(self._text.given - len(piece.text), self._text.given)
        while self._waiting and self._is_shown(self._waiting[0]):
            piece.logprobs.append(self._waiting.popleft())
        return piece

    def _shares(self, start: int, end: int) -> list[TokenShare]:
        """The text from `start` to `end`, cut where tokens begin."""
        shares, tokens = list[TokenShare](), self._begun
        while start < end:
            while len(tokens) > 1 and tokens[1][0] <= start:
                tokens.popleft()
            stop = min(end, tokens[1][0]) if len(tokens) > 1 else end
            shares.append(TokenShare(self._text.raw[start:stop], tokens[0][1]))
            start = stop
        return shares

    def _is_shown(self, token: TokenLogprob) -> bool:
        """Whether the text has the token: tokens of a stop string are no part of an answer."""
        return token.offset < self._text.given

    def _logprob(self, event: NewToken) -> TokenLogprob:
        assert event.logprob is not None
        shown, raw = self._bytes.shown, self._bytes
        top = tuple((shown(token), raw(token), logprob) for token, logprob in event.top)
        offset = len(self._text.raw)
        return TokenLogprob(shown(event.token), raw(event.token), event.logprob, offset, top)
