"""What runs a model: one protocol, three implementations, chosen by name when a model is loaded.

    reference  torch, whole sequences, differentiable: what the others are held to
    gathered   torch on any device, each branch computed for the tokens that enter it
    native     compiled kernels on a CPU

All have the same verbs. `prefill` takes many tokens at once, of prompts and of what is scored:
matrix products of many rows. `decode` takes the next token of each row, or a few of them to be
verified: weights are streamed once for all. `sample` chooses the tokens that follow in one row. The
verb is the caller's, so no arithmetic depends on how many rows there happen to be. A backend with
`speculate` also drafts and verifies in one call; the others do so step by step
(decoding/speculation.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, NamedTuple, Protocol, Self, TypeVar, get_args, runtime_checkable

import torch
from torch import Tensor

from gateskip.model.compute import Usage
from gateskip.runtime.budget_control import RowThresholds
from gateskip.runtime.kv_cache import KVFormat

BackendName = Literal["reference", "gathered", "native"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
KV_RULES = ("project", "copy")
Thresholds = Sequence[float] | None
"""One number a branch: a token enters where its gate's logit reaches it. None is full compute."""
PassThresholds = Thresholds | RowThresholds
"""Of one pass: the same for all tokens, or each row's own."""


@dataclass(frozen=True)
class Arithmetic:
    """Which arithmetic makes a number; part of every result."""

    backend: BackendName
    weights: str
    """How weights are stored: `bfloat16`, `4 bits in groups of 64`, or several, the largest first.
    """
    activations: str
    """What weights are multiplied with: `float32`, `bfloat16`, `8 bits in blocks of 32, ...`."""
    accumulation: str
    """The type in which products are summed up."""

    def to_dict(self) -> dict[str, str]:
        """The four fields as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.backend}: {self.weights} x {self.activations}, sums in {self.accumulation}"


class Cache(Protocol):
    """What a backend knows of the tokens so far, indexed by row and token position.

    A position that is run again is overwritten, so truncating a row only lowers its length.
    """

    drift: Tensor | None
    """What per-row budget control knows of each position: see `budget_control.Tracked`."""

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
    """Where a draft ends before it has all its tokens."""

    min_acceptance: float
    """It ends once it is this likely or less that all of it is accepted."""
    acceptance_by_bin: Sequence[float]
    """How likely a token is accepted by its probability, in equal steps from 0 to 1."""


@dataclass(frozen=True)
class SampleRequest:
    """Tokens that follow each other in one row."""

    token: int
    """The last committed one."""
    count: int
    """Tokens that may follow."""
    sampling: Sampling | None = None
    """How they are drawn; None takes the argmax."""
    uniform: Sequence[float] = ()
    """A number from 0 to 1 for each token that is drawn."""
    limit: DraftLimit | None = None
    """Given, the tokens are a draft: ranked by the draft head, with their probabilities."""
    on_token: Callable[[int], bool] | None = None
    """Told of each token; they end where it returns true, or raises."""


@dataclass(frozen=True)
class SampledTokens:
    """The tokens that followed."""

    tokens: list[int]
    state: Tensor | None = None
    """The final state [H] before the last one; None of a draft by a network."""
    probabilities: list[float] = field(default_factory=list)
    """Of each token of a draft, as the draft sees it."""
    drawn_from: Sequence[int | Tensor] = ()
    """Of each token of a draft, the probabilities [V] that it was drawn from; greedily, the token
    itself."""


@dataclass(frozen=True)
class Verified:
    """A draft of one row, and what verification accepted of it."""

    drafted: int
    accepted: int
    looked_up: bool = False
    """Whether the draft came out of the text."""
    probabilities: Sequence[float] = ()
    """Of each drafted token, as the draft sees it; empty where it does not say."""


@dataclass(frozen=True)
class Round:
    """A round of speculation, each row's draft and the pass that verified all; or plain `steps`."""

    rows: Sequence[Verified]
    draft_s: float
    verify_s: float
    steps: int = 1


@dataclass(frozen=True)
class SpeculationRequest:
    """Rounds of speculation of one row."""

    token: int
    """The last committed one."""
    state: Tensor
    """The final state [H] before it."""
    left: int
    """Tokens that may follow."""
    max_rounds: int
    max_drafts: int
    """Rounds with a draft, at most."""
    draft_length: int
    """Tokens of a draft at most; 0 drafts none."""
    limit: DraftLimit
    lookup_length: int
    """Tokens that the text proposes at most; 0 looks nothing up."""
    propose: Callable[[int], Sequence[int]]
    """Up to so many tokens that the text proposes."""
    on_token: Callable[[int], bool]
    """Told of each token; the rounds end where it returns true, or raises."""
    sampling: Sampling | None
    """How tokens are drawn; None takes the argmax."""
    uniform: Callable[[int], Tensor]
    """So many numbers from 0 to 1, float64."""


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
    """How caches made from now on keep keys and values."""

    def arithmetic(self, scoring: bool = False) -> Arithmetic:
        """The arithmetic of decoding, or of prompts and scoring."""
        ...

    def new_cache(self, batch: int, capacity: int) -> CacheT:
        """An empty cache for `batch` rows of at most `capacity` tokens.

        Raises ValueError where the model has fewer positions.
        """
        ...

    def cache_bytes(self, batch: int, capacity: int) -> int:
        """What `new_cache` takes, in bytes."""
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
        right-padded rows; states at padding are undefined. Rows with thresholds of their own are
        not padded. `full_from` gives the column of each row from which on tokens enter every
        branch, whatever the thresholds."""
        ...

    def decode(
        self,
        tokens: Sequence[Sequence[int]],
        cache: CacheT,
        rows: Sequence[int],
        starts: Sequence[int],
        thresholds: PassThresholds = None,
    ) -> Tensor:
        """Continue `rows` of a cache, each by tokens of its own from position `starts[i]` on.

        -> final normed states [N, H] of all tokens, those of the first row first. Rows with
        thresholds of their own are continued by equally many tokens."""
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
        chosen = self.logits(states).argmax(-1)
        return [part.tolist() for part in chosen.split([len(ids) for ids in tokens])], states

    def sample(
        self, request: SampleRequest, place: tuple[CacheT, int, int], thresholds: PassThresholds
    ) -> SampledTokens:
        """One token or more that follow each other in a row: as many as the backend runs in one
        call, up to those requested. A backend that is no RowDecoder takes the argmax alone, drafts
        nothing, and gives one token.

        `place` is the last committed token's: a cache, the row in it, and the position.
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
    ) -> tuple[list[Round], Tensor]:
        """Rounds of speculation of one row, drafted by a model, or without one by the network that
        this backend's engine has taken; and the final state [H] before the last token. `place` is
        as in `sample`. Plain steps that follow each other are one round."""
        ...

    def draw(self, logits: Tensor, sampling: Sampling, uniform: float) -> int:
        """A token of logits [V], as `sample` draws it by a number from 0 to 1."""
        ...


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
