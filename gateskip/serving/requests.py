"""Requests to a scheduler, the events that answer them, and the limits that it keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gateskip.decoding.config import DraftConfig, SkipConfig
from gateskip.decoding.decoder import Mode
from gateskip.decoding.sampling import GREEDY, Sampler

FinishReason = Literal["stop", "length", "cancelled", "deadline", "failed"]


class QueueFull(RuntimeError):
    """The queue has as many requests as it may hold."""


class Draining(RuntimeError):
    """The scheduler takes no more requests, because it is being stopped."""


@dataclass(frozen=True, kw_only=True)
class ServeLimits:
    """The memory and the work that a scheduler accepts."""

    rows: int = 32
    """Most requests that decode at the same time."""
    context: int = 4096
    """Most tokens of a request: its prompt and its answer."""
    queue: int = 256
    """Most requests that wait for a row."""
    cache_bytes: int | None = None
    """Most memory of the KV cache, in bytes; fewer rows then decode at the same time."""
    prefixes: int = 8
    """Most finished rows whose keys and values are kept for requests that begin alike."""
    prefix_dir: Path | None = None
    """Folder in which keys and values of prompts are kept for later processes and other ones; None
    keeps none."""

    def __post_init__(self) -> None:
        if min(self.rows, self.context, self.queue) < 1 or self.prefixes < 0:
            raise ValueError("rows, context and queue must be at least 1, and prefixes at least 0")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt, and how it is answered. Fields mean what they mean in `Decoder.generate`."""

    prompt: tuple[int, ...]
    max_new_tokens: int = 64
    mode: Mode = "plain"
    skip: SkipConfig | None = None
    draft: DraftConfig | None = None
    sampler: Sampler = GREEDY
    seed: int = 0
    eos: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    """If given, each token comes with its log probability and those of that many most probable
    tokens. A request with log probabilities is decoded plainly: drafts do not give them."""
    token_shares: bool = False
    """Whether each token comes with the share of compute that chose it. Such a request is decoded
    token by token, without drafts."""
    deadline: float | None = None
    """Seconds from `submit` after which the request ends with the tokens that it has."""


@dataclass(frozen=True)
class NewToken:
    """A token of an answer."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """The most probable tokens and their log probabilities, in falling order."""
    compute: float | None = None
    """If asked for, the share of the branches' multiply-adds that was computed in the pass that
    chose the token. None for a first token that was chosen in the pass of its whole prompt."""


@dataclass(frozen=True)
class Receipt:
    """The work that answered a request."""

    prompt_tokens: int
    reused_tokens: int
    """Prompt tokens whose keys and values came from an earlier request."""
    new_tokens: int
    drafted: int = 0
    accepted: int = 0
    looked_up: int = 0
    """Drafted tokens that look-up in the text proposed."""
    skipped: float | None = None
    """Share of the branches' multiply-adds that was skipped; None for a request that skips
    nothing."""
    budget: float | None = None
    queued_s: float = 0.0
    first_token_s: float = 0.0
    """Seconds from `submit` to the first token."""
    total_s: float = 0.0


@dataclass(frozen=True)
class Finished:
    """The end of an answer; the last event of a request."""

    reason: FinishReason
    receipt: Receipt
    error: str | None = None


Event = NewToken | Finished
OnEvent = Callable[[Event], None]
"""Called in the scheduler's thread; it must return at once."""


@dataclass(frozen=True)
class Snapshot:
    """Counts since the scheduler was made, and its state now."""

    queued: int
    """Requests that wait."""
    rows: int
    """Requests that decode or read their prompt now."""
    requests: dict[FinishReason, int]
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    drafted: int
    accepted: int
    looked_up: int
    skipped: float | None
    """Share of the branches' multiply-adds that was skipped by requests that skip."""
    cache_bytes: int
    """Memory of the KV cache."""
    cached_tokens: int
    """Tokens whose keys and values are kept: of rows, and of prefixes."""
    first_token_s: tuple[float, ...]
    """Times to the first token since the last snapshot."""
