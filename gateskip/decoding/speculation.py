"""Drafts for self-speculation: rows in the making, and where their drafted tokens come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gateskip.decoding.draft_length import MOST_ROUNDS, DraftLengthController
from gateskip.decoding.lookup import Lookup
from gateskip.decoding.sampling import Distribution, Sampler, draw
from gateskip.runtime.backend import Cache, Drafted, Drawn, Round
from gateskip.runtime.learned_draft import LearnedDraft
from gateskip.runtime.skipping import SkippingModel

Tokens = list[int]


@dataclass(frozen=True)
class StopConditions:
    """What ends a row."""

    tokens: frozenset[int]
    strings: tuple[str, ...]
    tokenizer: Any
    limit: int
    criteria: tuple[Any, ...] = ()
    """StoppingCriteria of transformers: (ids [1, S], None) -> bool [1]."""

    def reached(self, tokens: Tokens, text: Tokens) -> bool:
        """Whether a row of new tokens, the end of its text, ends here."""
        if len(tokens) >= self.limit or tokens[-1] in self.tokens:
            return True
        if self.criteria:
            ids = torch.tensor([text])
            if any(bool(each(ids, None).all()) for each in self.criteria):
                return True
        if not self.strings:
            return False
        longest = max(map(len, self.strings))
        tail = self.tokenizer.decode(tokens[-longest - 4 :])  # most tokens have a character or more
        return any(string in tail for string in self.strings)


class Row:
    """One text in the making."""

    def __init__(
        self,
        number: int,
        prompt: Tokens,
        stops: StopConditions,
        seed: int,
        on_token: Callable[[int, int], None] | None,
    ) -> None:
        self.number, self.prompt, self.stops, self.on_token = number, prompt, stops, on_token
        self.tokens: Tokens = []
        self.text = list(prompt)
        self.ended = False
        self.lookup = Lookup()
        self.state: Tensor | None = None  # final state [H] before the last token
        self.generator = torch.Generator().manual_seed(seed * 1_000_003 + number)

    def uniform(self) -> float:
        """A number from 0 to 1 of the row's own random stream."""
        return float(self.uniforms(1))

    def uniforms(self, count: int) -> Tensor:
        """So many of them [count]."""
        return torch.rand(count, generator=self.generator, dtype=torch.float64)

    @property
    def last(self) -> int:
        """The last committed token."""
        return self.text[-1]

    @property
    def slot(self) -> int:
        """Its position: it is in the text, but not yet in the cache."""
        return len(self.text) - 1

    def commit(self, tokens: Tokens) -> None:
        """Append tokens up to the first that ends the row."""
        for token in tokens:
            if self.ended:
                return
            self.tokens.append(token)
            self.text.append(token)
            self.ended = self.stops.reached(self.tokens, self.text)
            if self.on_token is not None:
                self.on_token(self.number, token)

    def commit_one(self, token: int) -> bool:
        """Append a token; whether the row ends with it."""
        self.commit([token])
        return self.ended


class Draft:
    """Drafted tokens of one row, and the distributions they were drawn from."""

    def __init__(self, limit: int, looked_up: Sequence[int] = ()) -> None:
        self.limit = limit  # tokens it may grow to
        self.tokens: Tokens = list(looked_up)
        self.drawn_from: list[Distribution] = list(looked_up)
        self.looked_up = bool(looked_up)
        self.probabilities: list[float] = []  # of each token, by the drafting model
        self.acceptance = 1.0  # how likely all of it is accepted

    def take(self, drafted: Drafted) -> None:
        """Become what a backend drafted."""
        self.tokens, self.probabilities = drafted.tokens, drafted.probabilities
        self.drawn_from = list(drafted.drawn_from)

    def extend(
        self, logits: Tensor, row: Row, sampler: Sampler, controller: DraftLengthController | None
    ) -> None:
        """Draw one more token from the draft's logits [V]; an unlikely draft ends here."""
        distribution = sampler.distribution(logits, [*row.text, *self.tokens])
        self.tokens.append(draw(distribution, row.generator))
        self.drawn_from.append(distribution)
        if controller is not None:
            self.probabilities.append(float(torch.softmax(logits.float(), -1)[self.tokens[-1]]))
            self.acceptance *= controller.expected(self.probabilities[-1])
            if self.acceptance <= controller.least():
                self.limit = len(self.tokens)


@dataclass
class Drafting:
    """How drafts are made in one call: by `model` under `thresholds`, `length` tokens each.

    With `lookup`, what the text itself proposes comes first. Controllers, if any, set the lengths.
    `weights` names the model; `none` never drafts, so that look-up alone does. A `network` drafts
    in the model's place, from the final state before a row's last token.
    """

    model: SkippingModel
    thresholds: Sequence[float] | None
    length: int | Literal["auto"]
    lookup: bool
    controller: DraftLengthController | None = None
    lookup_controller: DraftLengthController | None = None
    weights: str = "own"
    network: LearnedDraft | None = None

    def native(self) -> bool:
        """Whether rounds of one row can be one call of the kernels."""
        by_network = self.network is None or self.network.prepare()
        return by_network and self.model.row_decoder is not None

    def make(self, rows: list[Row], sampler: Sampler, cache: Cache) -> list[Draft]:
        """A draft for every row: looked up where the text repeats itself, else decoded."""
        drafts = self._begin(rows)
        if self.network is not None:
            for draft, row in zip(drafts, rows, strict=True):
                self._by_network(self.network, draft, row, sampler)
            return drafts
        if len(rows) == 1 and sampler.native and self.model.row_decoder is not None:
            self._in_one_call(drafts[0], rows[0], sampler, cache)
            return drafts
        growing = [(d, r) for d, r in zip(drafts, rows, strict=True) if len(d.tokens) < d.limit]
        while growing:
            states = self.model.decode(
                [[[row.last, *draft.tokens][-1]] for draft, row in growing],
                cache,
                [row.number for _, row in growing],
                [row.slot + len(draft.tokens) for draft, row in growing],
                self.thresholds,
            )
            for (draft, row), logits in zip(growing, self.model.head(states), strict=True):
                draft.extend(logits, row, sampler, self.controller)
            growing = [(draft, row) for draft, row in growing if len(draft.tokens) < draft.limit]
        return drafts

    def _in_one_call(self, draft: Draft, row: Row, sampler: Sampler, cache: Cache) -> None:
        """A draft of one row, where the backend makes it in a single call."""
        if draft.looked_up or not draft.limit:
            return
        assert self.model.row_decoder is not None
        place, drawn = (cache, row.number, row.slot), self._drawn(draft, row, sampler)
        decoder, limits = self.model.row_decoder, self.thresholds
        draft.take(decoder.draft(row.last, draft.limit, self.wanted(), place, limits, drawn))

    def _by_network(self, network: LearnedDraft, draft: Draft, row: Row, sampler: Sampler) -> None:
        """A draft that a network makes; greedily where it does not know the sampler."""
        if draft.looked_up or not draft.limit:
            return
        assert row.state is not None, "a row's state is kept for its network"
        drawn = self._drawn(draft, row, sampler)
        draft.take(network.draft(row.last, draft.limit, self.wanted(), row.state, drawn))

    def wanted(self) -> tuple[float, Sequence[float]]:
        """Where a draft ends: see `RowDecoder.draft`."""
        if self.controller is None:
            return 0.0, [1.0]  # draft on, whatever it is
        return self.controller.least(), self.controller.acceptance_by_bin

    def _drawn(self, draft: Draft, row: Row, sampler: Sampler) -> Drawn | None:
        """How a backend draws a draft's tokens; None greedily."""
        if sampler.draws is None:
            return None
        return sampler.draws, [row.uniform() for _ in range(draft.limit)]

    def _begin(self, rows: list[Row]) -> list[Draft]:
        left = [row.stops.limit - len(row.tokens) - 1 for row in rows]  # verifying adds one more
        drafts: list[Draft | None] = [None] * len(rows)
        if self.lookup:
            count = self._length(self.lookup_controller)
            for i, row in enumerate(rows):
                if proposed := row.lookup.propose(row.text, min(count, left[i])):
                    drafts[i] = Draft(len(proposed), proposed)
        if all(draft is not None for draft in drafts):
            return [draft for draft in drafts if draft is not None]
        count = 0 if self.weights == "none" else self._length(self.controller)
        return [draft or Draft(min(count, left[i])) for i, draft in enumerate(drafts)]

    def _length(self, controller: DraftLengthController | None) -> int:
        if controller is not None:
            return controller.draft_length()
        assert self.length != "auto", "controllers set the length"
        return self.length

    def lengths(self) -> tuple[int, int, int, int]:
        """For rounds of one row: tokens that are drafted and looked up at most, and how many rounds
        there are, and how many with a draft, until this is asked again."""
        if self.controller is None or self.lookup_controller is None:
            length = 0 if self.weights == "none" else self._length(None)
            return length, self._length(None) if self.lookup else 0, MOST_ROUNDS, MOST_ROUNDS
        asked = self._asked()
        timed = [each for each in asked if each.times_plain()]
        chosen = {id(each): each.draft_length() for each in asked}
        if timed:
            return 0, 0, DraftLengthController.TIMED, MOST_ROUNDS
        rounds = min([MOST_ROUNDS, *(each.rounds() for each in asked)])
        length, longest = (
            chosen.get(id(each), 0) for each in (self.controller, self.lookup_controller)
        )
        drafts = min([MOST_ROUNDS, *(each.drafts() for each in asked)])
        return length, longest, rounds, drafts

    def _asked(self) -> list[DraftLengthController]:
        """The controllers whose drafts this call can have."""
        wanted = (self.weights != "none", self.controller), (self.lookup, self.lookup_controller)
        return [each for has, each in wanted if has and each is not None]

    def observe(self, made: Round) -> None:
        """Tell the controllers what a round cost and how much was accepted, or how many plain
        steps it had."""
        if self.controller is None or self.lookup_controller is None:
            return
        longest = max(row.drafted for row in made.rows)
        accepted = [row.accepted for row in made.rows]
        for row in made.rows:
            self.controller.learn(row.probabilities, row.accepted)
        kinds = {row.looked_up for row in made.rows if row.drafted}
        for looked_up, own in ((False, self.controller), (True, self.lookup_controller)):
            if longest == 0:
                own.observe(0, [], 0.0, made.verify_s, made.steps)
            elif kinds == {looked_up}:  # the times of a mixed round belong to neither
                own.observe(longest, accepted, made.draft_s, made.verify_s)
            else:
                own.waited()
