"""The backends that run a model: one protocol, three implementations, chosen by name when a model
is loaded.

    reference  torch, whole sequences, differentiable: tests compare the others with it
    gathered   torch on any device, each branch computed for the tokens that enter it
    native     compiled kernels on a CPU

All have the same verbs. `prefill` takes many tokens at once, of prompts and of scored text: matrix
products of many rows. `decode` takes the next token of each row, or a few drafted ones to verify:
weights are read once for all. `sample` chooses the next tokens of one row. The caller chooses the
verb, so the arithmetic does not depend on the number of rows. A backend with `speculate` also
drafts and verifies in one call; the others do so step by step (decoding/speculation.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Literal, NamedTuple, Protocol, Self, TypeVar, get_args, runtime_checkable

import torch
from torch import Tensor

from gateskip.model.compute import Usage
from gateskip.model.families import to_host
from gateskip.runtime.budget_control import RowThresholds
from gateskip.runtime.kv_cache import KVFormat

BackendName = Literal["reference", "gathered", "native"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
KV_RULES = ("project", "copy")
Thresholds = Sequence[float] | None
"""One number for each branch: a token enters where its gate's logit reaches it. None is full
compute."""
PassThresholds = Thresholds | RowThresholds
"""Thresholds of one pass: the same for all tokens, or separate ones for each row."""


@dataclass(frozen=True)
class Arithmetic:
    """The arithmetic that made a number; part of every result."""

    backend: BackendName
    weights: str
    """Storage of the weights: `bfloat16`, `4 bits in groups of 64`, or several, the largest
    first."""
    activations: str
    """Type of the activations in products: `float32`, `bfloat16`, `8 bits in blocks of 32, ...`."""
    accumulation: str
    """The type in which products are summed up."""

    def to_dict(self) -> dict[str, str]:
        """The four fields as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.backend}: {self.weights} x {self.activations}, sums in {self.accumulation}"


class Cache(Protocol):
    """A backend's state of the tokens so far, indexed by row and token position.

    A position that is run again is overwritten, so truncating a row only lowers its length.
    """

    drift: Tensor | None
    """Per-row budget control's number for each position: see `budget_control.Tracked`."""

    @property
    def capacity(self) -> int:
        """Positions of a row."""
        ...

    @property
    def batch(self) -> int:
        """Rows."""
        ...

    def rows(self, numbers: Sequence[int]) -> Self:
        """Copies of rows, in the given order; a row may come more than once."""
        ...

    def nbytes(self) -> int:
        """Memory held, in bytes."""
        ...


class Sampling(NamedTuple):
    """How tokens are drawn, as in `Sampler`."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float


class DraftLimit(NamedTuple):
    """Condition that ends a draft before it has all its tokens."""

    min_acceptance: float
    """It ends once the probability that all of it is accepted is this or less."""
    acceptance_by_bin: Sequence[float]
    """Acceptance rate of a token by its probability, in equal bins from 0 to 1."""


@dataclass(frozen=True)
class SampleRequest:
    """A request for the next tokens of one row."""

    token: int
    """The last committed token."""
    count: int
    """Most new tokens."""
    sampling: Sampling | None = None
    """How they are drawn; None takes the argmax."""
    uniform: Sequence[float] = ()
    """A number from 0 to 1 for each token that is drawn."""
    limit: DraftLimit | None = None
    """If given, the tokens are a draft: ranked by the draft head, with their probabilities."""
    on_token: Callable[[int], bool] | None = None
    """Called with each token; the tokens end where it returns true, or raises."""


@dataclass(frozen=True)
class SampledTokens:
    """The tokens that followed."""

    tokens: list[int]
    state: Tensor | None = None
    """The final state [H] before the last one; None for a draft by a network."""
    probabilities: list[float] = field(default_factory=list)
    """The draft model's probability of each token of a draft."""
    drawn_from: Sequence[int | Tensor] = ()
    """For each token of a draft, the probabilities [V] from which it was drawn; greedily, the token
    itself."""


@dataclass(frozen=True)
class Verified:
    """A draft of one row, and what verification accepted of it."""

    drafted: int
    accepted: int
    looked_up: bool = False
    """Whether look-up in the text proposed the draft."""
    probabilities: Sequence[float] = ()
    """The draft model's probability of each drafted token; empty where it gives none."""


@dataclass(frozen=True)
class Round:
    """A round of speculation: each row's draft and the pass that verified all drafts; or a number
    of plain `steps`."""

    rows: Sequence[Verified]
    draft_s: float
    verify_s: float
    steps: int = 1


@dataclass(frozen=True)
class SpeculationRequest:
    """A request for rounds of speculation of one row."""

    token: int
    """The last committed token."""
    state: Tensor
    """The final state [H] before it."""
    left: int
    """Most new tokens."""
    max_rounds: int
    max_drafts: int
    """Most rounds with a draft."""
    draft_length: int
    """Most tokens of a draft; 0 drafts none."""
    limit: DraftLimit
    lookup_length: int
    """Most tokens that look-up in the text proposes; 0 turns look-up off."""
    propose: Callable[[int], Sequence[int]]
    """Gives up to that many tokens by look-up in the text."""
    on_token: Callable[[int], bool]
    """Called with each token; the rounds end where it returns true, or raises."""
    sampling: Sampling | None
    """How tokens are drawn; None takes the argmax."""
    uniform: Callable[[int], Tensor]
    """Gives that many numbers from 0 to 1, float64."""


CacheT = TypeVar("CacheT", bound=Cache)


class Backend(Protocol[CacheT]):
    """A model that runs tokens at positions against a cache, under thresholds.

    `argmax` and `sample` have a body here, for backends whose kernels choose no tokens.
    """

    name: BackendName
    usage: Usage
    """How many tokens entered each branch, counted over all calls."""
    gated: bool
    """Whether gates that scale do so at full compute, too."""
    kv_cache: KVFormat
    """Format of keys and values in caches made from now on."""

    def arithmetic(self, scoring: bool = False) -> Arithmetic:
        """The arithmetic of decoding, or of prompts and scoring."""
        ...

    def new_cache(self, batch: int, capacity: int) -> CacheT:
        """An empty cache for `batch` rows of at most `capacity` tokens.

        Raises ValueError where the model has fewer positions.
        """
        ...

    def cache_bytes(self, batch: int, capacity: int) -> int:
        """The size of `new_cache`'s result, in bytes."""
        ...

    def prefill(
        self,
        input_ids: Tensor,
        cache: CacheT,
        starts: Sequence[int],
        thresholds: PassThresholds = None,
        lengths: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
        full_from: Sequence[int] | None = None,
    ) -> Tensor:
        """Run input_ids [B, S], one row of the cache each (or `rows` of it), from positions
        `starts` on -> final normed states [B, S, H]. `lengths` gives the real tokens of
        right-padded rows; states at padding are undefined. Rows with separate thresholds are not
        padded. `full_from` gives the column of each row from which on tokens enter every branch,
        whatever the thresholds."""
        ...

    def decode(
        self,
        tokens: Sequence[Sequence[int]],
        cache: CacheT,
        rows: Sequence[int],
        starts: Sequence[int],
        thresholds: PassThresholds = None,
    ) -> Tensor:
        """Continue `rows` of a cache, each by its own tokens from position `starts[i]` on.

        -> final normed states [N, H] of all tokens, those of the first row first. Rows with
        separate thresholds are continued by equally many tokens.
        """
        ...

    def argmax(
        self,
        tokens: Sequence[Sequence[int]],
        cache: CacheT,
        rows: Sequence[int],
        starts: Sequence[int],
        thresholds: PassThresholds = None,
    ) -> tuple[list[list[int]], Tensor]:
        """As `decode`: the argmax token after each of `tokens`, and the states [N, H]."""
        states = self.decode(tokens, cache, rows, starts, thresholds)
        chosen = iter(to_host(self.logits(states).argmax(-1)))
        return [list(islice(chosen, len(ids))) for ids in tokens], states

    def sample(
        self, request: SampleRequest, place: tuple[CacheT, int, int], thresholds: PassThresholds
    ) -> SampledTokens:
        """One or more next tokens of a row: as many as the backend runs in one call, up to those
        requested. A backend that is not a RowDecoder takes the argmax, drafts nothing, and gives
        one token.

        `place` is that of the last committed token: a cache, the row in it, and the position.
        """
        assert request.sampling is None and request.limit is None, (
            "only a RowDecoder draws and drafts"
        )
        cache, row, slot = place
        chosen, states = self.argmax([[request.token]], cache, [row], [slot], thresholds)
        if request.on_token is not None:
            request.on_token(chosen[0][0])
        return SampledTokens(chosen[0], states[0])

    def logits(self, hidden: Tensor) -> Tensor:
        """Final states [N, H] -> logits [N, V], in the arithmetic of decoding."""
        ...

    def scores(self, hidden: Tensor) -> Tensor:
        """Final states [..., H] -> logits [..., V], in the arithmetic of prompts and scoring."""
        ...


@runtime_checkable
class RowDecoder(Backend[CacheT], Protocol[CacheT]):
    """A backend that draws tokens itself, drafts, and runs many steps of a row in one call."""

    def speculate(
        self,
        request: SpeculationRequest,
        drafter: Self | None,
        place: tuple[CacheT, int, int],
        thresholds: Thresholds = None,
        draft_thresholds: Thresholds = None,
        draft_cache: CacheT | None = None,
    ) -> tuple[list[Round], Tensor]:
        """Rounds of speculation of one row, drafted by a model, or without one by the draft network
        of this backend's engine; and the final state [H] before the last token. `place` is as in
        `sample`. A `draft_cache` is the drafter's own, and has the row's tokens before the last
        one; without it both models share a cache. Plain steps that follow each other are one
        round."""
        ...

    def draw(self, logits: Tensor, sampling: Sampling, uniform: float) -> int:
        """A token of logits [V], as `sample` draws it by a number from 0 to 1."""
        ...


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
