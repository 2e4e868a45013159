"""Self-speculation: rounds in which tokens are drafted and verified.

Drafts are cheap. They come from a low skip budget, from copies of the weights in fewer bits, from a
small network, from another model, or from look-up in the text. Verification is a pass at full
compute. Both write the cache. Drafts attend to the committed, fully computed entries; a verify pass
overwrites the drafts' entries; and entries of rejected tokens are beyond the row's length and are
overwritten in turn. Another model has its own cache: see draft_cache.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from gateskip.decoding.draft_cache import DraftCache
from gateskip.decoding.draft_length import MAX_ROUNDS, DraftLengthController
from gateskip.decoding.draft_models import LearnedDraft
from gateskip.decoding.rows import Row, Tokens
from gateskip.decoding.sampling import GREEDY, Distribution, Sampler, accept_or_resample, draw
from gateskip.decoding.stats import Stats
from gateskip.model.families import to_device, to_host
from gateskip.runtime.backend import (
    Cache,
    DraftLimit,
    Round,
    SampledTokens,
    SampleRequest,
    SpeculationRequest,
    Verified,
)
from gateskip.runtime.skipping import Limits, SkippingModel

Passed = tuple[list[list[int]], Cache, list[int], list[int], Limits]
"""Arguments of `SkippingModel.decode`: tokens of each row, their places, and their limits."""


class Draft:
    """Drafted tokens of one row, and the distributions from which they were drawn."""

    def __init__(self, limit: int, looked_up: Sequence[int] = ()) -> None:
        self.limit = limit  # tokens it may grow to
        self.tokens: Tokens = list(looked_up)
        self.drawn_from: list[Distribution] = list(looked_up)
        self.looked_up = bool(looked_up)
        self.probabilities: list[float] = []  # of each token, by the drafting model
        self.acceptance = 1.0  # how likely all of it is accepted

    def take(self, sampled: SampledTokens) -> None:
        """Become the draft of a backend."""
        self.tokens, self.probabilities = sampled.tokens, sampled.probabilities
        self.drawn_from = list(sampled.drawn_from)

    def extend(
        self, logits: Tensor, row: Row, sampler: Sampler, controller: DraftLengthController | None
    ) -> None:
        """Draw one more token from the draft's logits [V]; an unlikely draft ends here."""
        distribution = sampler.distribution(logits, [*row.text, *self.tokens])
        self.tokens.append(draw(distribution, row.generator))
        self.drawn_from.append(distribution)
        if controller is not None:
            token, shares = self.tokens[-1], torch.softmax(logits.float(), -1)
            self.probabilities += to_host(shares[token : token + 1])
            self.acceptance *= controller.expected(self.probabilities[-1])
            if self.acceptance <= controller.min_acceptance():
                self.limit = len(self.tokens)


@dataclass
class Drafting:
    """How one call drafts: by `model` under `thresholds`, `length` tokens each.

    With `lookup`, tokens that the text itself proposes come first. Controllers, if any, set the
    lengths. `weights` names the model; `none` never drafts, so that look-up alone does. A `network`
    drafts instead of the model, from the final state before a row's last token. A model with other
    keys and values than the verifying one has its `own_cache`.
    """

    model: SkippingModel
    thresholds: Sequence[float] | None
    length: int | Literal["auto"]
    lookup: bool
    controller: DraftLengthController | None = None
    lookup_controller: DraftLengthController | None = None
    weights: str = "own"
    network: LearnedDraft | None = None
    own_cache: DraftCache | None = None

    def native(self) -> bool:
        """Whether rounds of one row can be one call of the kernels."""
        by_network = self.network is None or self.network.prepare()
        return by_network and self.model.row_decoder is not None

    def make(self, rows: list[Row], sampler: Sampler, cache: Cache) -> list[Draft]:
        """A draft for every row: looked up where the text repeats itself, otherwise decoded."""
        drafts = self.begin(rows)
        if self.network is not None:
            for draft, row in zip(drafts, rows, strict=True):
                self._by_network(self.network, draft, row, sampler)
            return drafts
        if len(rows) == 1 and sampler.native and self.model.row_decoder is not None:
            self._in_one_call(drafts[0], rows[0], sampler, cache)
            return drafts
        growing = [(d, r) for d, r in zip(drafts, rows, strict=True) if len(d.tokens) < d.limit]
        while growing:
            unread = [draft.tokens[-1:] or self.unread(row) for draft, row in growing]
            states = self.model.decode(
                unread,
                cache if self.own_cache is None else self.own_cache.cache,
                [row.number for _, row in growing],
                [
                    row.slot + len(draft.tokens) + 1 - len(tokens)
                    for (draft, row), tokens in zip(growing, unread, strict=True)
                ],
                self.thresholds,
            )
            last = to_device([end - 1 for end in accumulate(map(len, unread))], states.device)
            logits_of_rows = self.model.head(states.index_select(0, last))
            for (draft, row), logits in zip(growing, logits_of_rows, strict=True):
                draft.extend(logits, row, sampler, self.controller)
            growing = [(draft, row) for draft, row in growing if len(draft.tokens) < draft.limit]
        return drafts

    def unread(self, row: Row) -> Tokens:
        """The tokens that the draft model reads to draft a row's first one."""
        return [row.last] if self.own_cache is None else self.own_cache.missing(row)

    def _in_one_call(self, draft: Draft, row: Row, sampler: Sampler, cache: Cache) -> None:
        """A draft of one row, where the backend makes it in a single call."""
        if draft.looked_up or not draft.limit:
            return
        assert self.model.row_decoder is not None
        if self.own_cache is not None:
            self.own_cache.catch_up(row)
            cache = self.own_cache.cache
        request, place = self._request(draft, row, sampler), (cache, row.number, row.slot)
        draft.take(self.model.row_decoder.sample(request, place, self.thresholds))

    def _by_network(self, network: LearnedDraft, draft: Draft, row: Row, sampler: Sampler) -> None:
        """A draft that a network makes; greedily where it does not know the sampler."""
        if draft.looked_up or not draft.limit:
            return
        assert row.state is not None, "a row's state is kept for its network"
        draft.take(network.draft(self._request(draft, row, sampler), row.state))

    def _request(self, draft: Draft, row: Row, sampler: Sampler) -> SampleRequest:
        """The request for a backend to draft."""
        drawn = draft.limit if sampler.draws is not None else 0
        uniform = [row.uniform() for _ in range(drawn)]
        return SampleRequest(row.last, draft.limit, sampler.draws, uniform, self.limit())

    def limit(self) -> DraftLimit:
        """The condition that ends a draft."""
        if self.controller is None:
            return DraftLimit(0.0, [1.0])  # draft on, whatever it is
        return DraftLimit(self.controller.min_acceptance(), self.controller.acceptance_by_bin)

    def begin(self, rows: list[Row]) -> list[Draft]:
        """The drafts that look-up proposes, and empty ones with the number of tokens to draft."""
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
        """For rounds of one row: most tokens that are drafted and looked up, most rounds, and most
        rounds with a draft, until this is called again."""
        if self.controller is None or self.lookup_controller is None:
            length = 0 if self.weights == "none" else self._length(None)
            return length, self._length(None) if self.lookup else 0, MAX_ROUNDS, MAX_ROUNDS
        used = self._used_controllers()
        plain_is_timed = any(controller.times_plain() for controller in used)
        chosen = {id(controller): controller.draft_length() for controller in used}
        if plain_is_timed:
            return 0, 0, DraftLengthController.TIMED, MAX_ROUNDS
        rounds = min([MAX_ROUNDS, *(controller.rounds() for controller in used)])
        drafted, looked_up = (
            chosen.get(id(controller), 0)
            for controller in (self.controller, self.lookup_controller)
        )
        drafts = min([MAX_ROUNDS, *(controller.drafts() for controller in used)])
        return drafted, looked_up, rounds, drafts

    def _used_controllers(self) -> list[DraftLengthController]:
        """The controllers of the drafts that this call can have."""
        used = (self.weights != "none", self.controller), (self.lookup, self.lookup_controller)
        return [controller for drafts, controller in used if drafts and controller is not None]

    def verified(self, row: int, slot: int, verified: Verified) -> None:
        """Tell the draft's own cache the outcome of a draft after position `slot`."""
        if self.own_cache is not None and verified.drafted and not verified.looked_up:
            self.own_cache.drafted(row, slot, verified.drafted, verified.accepted)

    def observe(self, done: Round) -> None:
        """Tell the controllers a round's cost and accepted tokens, or its number of plain steps."""
        if self.controller is None or self.lookup_controller is None:
            return
        longest = max(row.drafted for row in done.rows)
        accepted = [row.accepted for row in done.rows]
        for row in done.rows:
            self.controller.learn(row.probabilities, row.accepted)
        kinds = {row.looked_up for row in done.rows if row.drafted}
        controllers = ((False, self.controller), (True, self.lookup_controller))
        for looked_up, controller in controllers:
            if longest == 0:
                controller.observe(0, [], 0.0, done.verify_s, done.steps)
            elif kinds == {looked_up}:  # the times of a mixed round belong to neither
                controller.observe(longest, accepted, done.draft_s, done.verify_s)
            else:
                controller.waited()


MakeRound = Callable[[SkippingModel, list[Row], Drafting, Sampler, Cache, Limits], Round]
"""The signature of `_round`."""


def speculate(
    model: SkippingModel,
    rows: list[Row],
    drafting: Drafting,
    sampler: Sampler,
    cache: Cache,
    limits: Limits,
    stats: Stats,
    round_of: MakeRound | None = None,
) -> None:
    """Draft, verify, commit, each row by its own number of tokens, until all have ended.

    `round_of` makes a round of some rows where it is not one native call; by default step by step.
    """
    round_of = round_of or _round
    in_one_call = sampler.native and model.speculates(limits) and drafting.native()
    while live := [row for row in rows if not row.ended]:
        if in_one_call and len(live) == 1:
            rounds = rounds_of_row(model, live[0], drafting, sampler, cache, limits)
        else:
            rounds = [round_of(model, live, drafting, sampler, cache, limits)]
        for done in rounds:
            drafting.observe(done)
            stats.add_round(done)


def rounds_of_row(
    model: SkippingModel,
    row: Row,
    drafting: Drafting,
    sampler: Sampler,
    cache: Cache,
    limits: Limits,
    max_rounds: int = MAX_ROUNDS,
) -> list[Round]:
    """Some rounds of one row in one native call."""
    assert row.state is not None, "prefill keeps each row's state"
    drafted, looked_up, rounds, drafts = drafting.lengths()
    own_cache = drafting.own_cache if drafted else None
    if own_cache is not None:
        own_cache.catch_up(row)
    request = SpeculationRequest(
        token=row.last,
        state=row.state,
        left=row.stops.limit - len(row.tokens),
        max_rounds=min(rounds, max_rounds),
        max_drafts=drafts,
        draft_length=drafted,
        limit=drafting.limit(),
        lookup_length=looked_up,
        propose=lambda count: row.lookup.propose(row.text, count),
        on_token=row.commit_one,
        sampling=sampler.draws,
        uniform=row.uniforms,
    )
    drafter = None if drafting.network is not None else drafting.model
    slot = row.slot
    done, row.state = model.speculate(
        *(request, drafter, (cache, row.number, slot), limits, drafting.thresholds),
        None if own_cache is None else own_cache.cache,
    )
    for one in done:
        (verified,) = one.rows
        drafting.verified(row.number, slot, verified)
        slot += (verified.accepted + 1) * one.steps
    return done


def _round(
    model: SkippingModel,
    rows: list[Row],
    drafting: Drafting,
    sampler: Sampler,
    cache: Cache,
    limits: Limits,
) -> Round:
    """One round of some rows."""
    begun = time.perf_counter()
    slots = [row.slot for row in rows]
    drafts = drafting.make(rows, sampler, cache)
    drafted = time.perf_counter()
    accepted = _verify(model, rows, drafts, sampler, cache, limits)
    verified = [
        Verified(len(draft.tokens), count, draft.looked_up, draft.probabilities)
        for draft, count in zip(drafts, accepted, strict=True)
    ]
    for row, slot, one in zip(rows, slots, verified, strict=True):
        drafting.verified(row.number, slot, one)
    return Round(verified, drafted - begun, time.perf_counter() - drafted)


def _verify(
    model: SkippingModel,
    rows: list[Row],
    drafts: list[Draft],
    sampler: Sampler,
    cache: Cache,
    limits: Limits,
) -> list[int]:
    """One pass over each row's last token and draft; commits, counts accepted tokens."""
    tokens = [[row.last, *draft.tokens] for row, draft in zip(rows, drafts, strict=True)]
    numbers, slots = [row.number for row in rows], [row.slot for row in rows]
    targets, states = _targets(
        model, rows, drafts, sampler, (tokens, cache, numbers, slots, limits)
    )
    counts = []
    for row, draft, target, of_row in zip(rows, drafts, targets, states, strict=True):
        accepted, following = accept_or_resample(
            draft.tokens, draft.drawn_from, target, row.generator
        )
        row.commit([*draft.tokens[:accepted], following])
        row.state = of_row[accepted]
        counts.append(accepted)
    return counts


def _targets(
    model: SkippingModel, rows: list[Row], drafts: list[Draft], sampler: Sampler, passed: Passed
) -> tuple[Sequence[Iterable[Distribution]], Sequence[Tensor]]:
    """For each row, the distributions after its last token and after each token of its draft, and
    the final states [K + 1, H] there."""
    counts = [len(ids) for ids in passed[0]]
    if sampler == GREEDY:
        chosen, states = model.argmax(*passed)
        return chosen, states.split(counts)
    states = model.decode(*passed)
    logits = model.head(states).split(counts)
    targets = [
        sampler.distributions(part, row.text, draft.tokens)
        for row, draft, part in zip(rows, drafts, logits, strict=True)
    ]
    return targets, states.split(counts)
