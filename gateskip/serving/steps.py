"""Steps of a scheduler: a piece of a prompt, or the next tokens of all rows.

Rows at full compute share one pass: greedy ones, drafts to verify, sampled ones. Rows that skip
share another, each with its own thresholds. A row alone decodes many tokens in one native call. In
`native` a row has the same bits in all of these.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gateskip.decoding.decoder import IN_ONE_CALL, Decoder
from gateskip.decoding.draft_length import MAX_ROUNDS
from gateskip.decoding.prefill import commit_next
from gateskip.decoding.sampling import GREEDY, accept_or_resample
from gateskip.decoding.speculation import Draft, Drafting, rounds_of_row
from gateskip.model.compute import branch_costs, kept_share
from gateskip.runtime.backend import Round, SampleRequest, Verified
from gateskip.runtime.budget_control import BudgetControl, RowThresholds
from gateskip.runtime.skipping import is_full
from gateskip.serving.answers import Answer
from gateskip.serving.drafts import Drafts, ready, steps_before
from gateskip.serving.slots import Slots

AT_ONCE_S = 0.05  # that rounds of one row in one call may take, so that others join soon


class Steps:
    """Runs the steps of a decoder's model on the rows of a cache."""

    def __init__(self, decoder: Decoder, slots: Slots) -> None:
        self._decoder, self._model, self._slots = decoder, decoder.skipping, slots
        self._cache = slots.cache
        self._costs = branch_costs(self._model.model)
        self._drafts = Drafts(decoder, slots)
        self._round_s = AT_ONCE_S  # seconds of a round of one row

    # -- prompts ---------------------------------------------------------------------------------

    def read(self, answer: Answer, most: int) -> int:
        """Read about `most` tokens more of a prompt, from disk where they are there; returns how
        many. After the last one the answer's first token is committed."""
        row, phases, first, slot = answer.row, answer.phases, answer.read, answer.slot
        assert slot is not None, "it has a row"
        whole = phases.read(len(row.prompt))
        if loaded := self._slots.load(slot, most, min(whole, len(row.prompt) - 1)):
            answer.read, answer.reused = first + loaded, answer.reused + loaded
            return loaded
        count = min(self._slots.piece(first, most), whole - first)
        state = torch.empty(0)
        if count:
            full_from = phases.full_from([whole])
            full = None if full_from is None else [full_from[0] - first]
            ids = torch.tensor([row.prompt[first : first + count]], device=self._model.device)
            before = self._model.usage.copy()
            with self._cache.alone(row.number) as alone:
                states = self._model.forward(ids, alone, [first], phases.prompt, [count], full)
            answer.count_usage(self._model.model, self._model.usage.since(before))
            answer.read, state = first + count, states[0, -1]
            # The last token may be computed as the answer is: no other prompt reuses it then
            slot.read = min(answer.read, len(row.prompt) - phases.differ)
        if answer.read == whole:
            self._slots.keep(slot, answer.request.max_new_tokens)
            self._begin(answer, state)
        return count

    def _begin(self, answer: Answer, state: Tensor) -> None:
        """Commit the first token, after the final state [H] of the prompt's tokens."""
        row, phases, model = answer.row, answer.phases, self._model
        if phases.apart:
            before, last = model.usage.copy(), len(row.prompt) - 1
            passed = ([row.prompt[-1:]], self._cache, [row.number], [last])
            (state,) = model.decode(*passed, phases.answer)
            usage = model.usage.since(before)
            answer.count_usage(model.model, usage)
            answer.compute = kept_share(model.model, usage)
        else:  # the last token of a prompt that skips like the answer passed with others
            answer.compute = 1.0 if phases.differ or is_full(phases.prompt) else None
        row.state = state.clone()
        self._commit(answer, model.head(row.state.unsqueeze(0)))

    # -- the next tokens -------------------------------------------------------------------------

    def together(self, answers: Sequence[Answer]) -> None:
        """The next token of each row, or what is accepted of its draft. Where the model fails, the
        rows of the pass end."""
        self._guarded(self._full, [answer for answer in answers if not answer.skips])
        self._guarded(self._skip, [answer for answer in answers if answer.skips])

    def alone(self, answer: Answer, interrupted: Callable[[], bool]) -> None:
        """The next tokens of the only row, until `interrupted` says that something else waits: in
        one native call, if its tokens can be chosen there."""
        self._guarded(lambda some: self._alone(some[0], interrupted), [answer])

    def _guarded(self, step: Callable[[Sequence[Answer]], None], answers: Sequence[Answer]) -> None:
        if not answers:
            return
        try:
            step(answers)
        except Exception as error:
            for answer in answers:
                answer.row.fail(error)

    def _alone(self, answer: Answer, interrupted: Callable[[], bool]) -> None:
        model, limits = self._model, answer.phases.answer
        drafting = self._drafts.of(answer.draft, 1) if answer.drafts else None
        if drafting is not None and not model.speculates(limits):
            drafting = None
        while drafting is not None and not ready(drafting, answer.row):
            if interrupted():
                return
        before = model.usage.copy()
        if drafting is not None and answer.greedy and drafting.native():
            self._speculate(answer, drafting)
        elif answer.native and (drafting is None or answer.skips):
            self._sample(answer, interrupted, IN_ONE_CALL)
        elif answer.native and drafting is not None and (steps := steps_before(drafting)):
            begun = time.perf_counter()
            steps = self._sample(answer, interrupted, steps)
            drafting.observe(Round([Verified(0, 0)], 0.0, time.perf_counter() - begun, steps))
        else:
            return self.together([answer])
        answer.count_usage(model.model, model.usage.since(before))

    def _sample(self, answer: Answer, interrupted: Callable[[], bool], most: int) -> int:
        """Up to `most` tokens of a row in one call; returns how many."""
        row, sampling = answer.row, answer.request.sampler.draws
        begun = len(row.tokens)
        count = min(most, IN_ONE_CALL, row.stops.limit - begun)
        uniform = [row.uniform() for _ in range(count if sampling is not None else 0)]

        def on_token(token: int) -> bool:
            return row.commit_one(token) or interrupted()

        request = SampleRequest(row.last, count, sampling, uniform, on_token=on_token)
        place = (self._cache, row.number, row.slot)
        row.state = self._model.sample(request, place, answer.phases.answer).state
        done = len(row.tokens) - begun
        row.give_back(uniform[done:])
        return done

    def _speculate(self, answer: Answer, drafting: Drafting) -> None:
        """Some rounds of a greedy row in one call."""
        limits, begun = answer.phases.answer, time.perf_counter()
        most = max(1, min(MAX_ROUNDS, int(AT_ONCE_S / self._round_s)))
        args = (self._model, answer.row, drafting, GREEDY, self._cache, limits)
        rounds = rounds_of_row(*args, most)
        for done in rounds:
            drafting.observe(done)
            answer.count_draft(done.rows[0])
        self._round_s = (time.perf_counter() - begun) / max(1, sum(r.steps for r in rounds))

    def _full(self, answers: Sequence[Answer]) -> None:
        """One pass of rows at full compute, over the last token and the draft of each."""
        rows, begun = [answer.row for answer in answers], time.perf_counter()
        drafts, draftings = self._drafts.make(answers)
        drafted = time.perf_counter()
        tokens = [[row.last, *draft.tokens] for row, draft in zip(rows, drafts, strict=True)]
        passed = (tokens, self._cache, [row.number for row in rows], [row.slot for row in rows])
        counts, logits = [len(ids) for ids in tokens], list[Tensor]()
        if all(answer.greedy for answer in answers):
            targets, states = self._model.argmax(*passed)
        else:
            states = self._model.decode(*passed)
            logits = list(self._model.head(states).split(counts))
            targets = [of_row.argmax(-1).tolist() for of_row in logits]
        verify_s, outcomes = time.perf_counter() - drafted, list[Verified]()
        for i, of_row in enumerate(states.split(counts)):
            answer, row = answers[i], rows[i]
            answer.count_work(*self._work_of_full(answer))
            answer.compute = 1.0
            if answer.greedy:
                outcomes.append(_verify(answer, drafts[i], targets[i]))
            else:
                outcomes.append(self._draw(answer, drafts[i], logits[i]))
            row.state = of_row[outcomes[i].accepted]
        for drafting, places in draftings:
            for i in places:
                drafting.verified(rows[i].number, passed[3][i], outcomes[i])
            drafting.observe(Round([outcomes[i] for i in places], drafted - begun, verify_s))

    def _draw(self, answer: Answer, draft: Draft, logits: Tensor) -> Verified:
        """Commit tokens of a row that is not greedy, of logits [K + 1, V] after its last token and
        each of its draft. Each token is drawn as without a draft, by its own number of the random
        stream; the draft is right up to the first that it does not have."""
        accepted = 0
        for proposed, of_token in zip([*draft.tokens, None], logits, strict=True):
            self._commit(answer, of_token.unsqueeze(0))
            if answer.row.ended or answer.row.last != proposed:
                break
            accepted += 1
        return _outcome(answer, draft, accepted)

    def _skip(self, answers: Sequence[Answer]) -> None:
        """One pass of rows that skip, each by its own thresholds."""
        rows, cache = [answer.row for answer in answers], self._cache
        numbers, slots = [row.number for row in rows], [row.slot for row in rows]
        limits = [self._thresholds(answer) for answer in answers]
        together = RowThresholds(
            torch.cat([one.values for one in limits]),
            torch.cat([one.weights for one in limits]),
            torch.cat([one.entered for one in limits]),
        )
        tokens = [[row.last] for row in rows]
        states = self._model.backend.decode(tokens, cache, numbers, slots, together)
        logits = self._model.head(states)
        for i, answer in enumerate(answers):
            one = replace(limits[i], entered=together.entered[i : i + 1])
            control = answer.phases.answer
            if isinstance(control, BudgetControl):
                control.record(cache, [numbers[i]], [slots[i]], one)
            whole = sum(self._macs(slots[i]))
            answer.compute = int(one.entered) / int(one.weights.sum())
            answer.count_work(answer.compute * whole, whole)
            self._commit(answer, logits[i : i + 1])
            rows[i].state = states[i]

    def _thresholds(self, answer: Answer) -> RowThresholds:
        """The thresholds [1, branches] of a row's next token."""
        limits, row = answer.phases.answer, answer.row
        if isinstance(limits, BudgetControl):
            return limits.thresholds(self._cache, [row.number], [row.slot], 1)
        assert limits is not None, "it skips"
        return RowThresholds(
            torch.tensor([list(limits)]),
            torch.tensor([self._macs(row.slot)]),
            torch.zeros(1, 1, dtype=torch.long),
        )

    def _macs(self, position: int) -> list[int]:
        """Multiply-adds of a token at each branch that it enters."""
        seen = position + 1
        return [int(cost.at(min(seen, cost.window or seen))) for cost in self._costs]

    def _work_of_full(self, answer: Answer) -> tuple[float, float]:
        """Multiply-adds of the next token, which skips nothing, if its prompt skipped."""
        if answer.phases.answer is None:
            return 0.0, 0.0
        whole = float(sum(self._macs(answer.row.slot)))
        return whole, whole

    def _commit(self, answer: Answer, logits: Tensor) -> None:
        """Commit the next token, of logits [1, V]."""
        row, sampler = answer.row, answer.request.sampler
        answer.logits = None if answer.request.logprobs is None else logits[0]
        try:
            commit_next(self._model, [row], logits, sampler)
        except Exception as error:  # of its own sampler
            row.fail(error)


def _verify(answer: Answer, draft: Draft, target: Sequence[int]) -> Verified:
    """Commit the accepted tokens of a greedy row's draft, and the one that follows them."""
    row = answer.row
    accepted, following = accept_or_resample(draft.tokens, draft.drawn_from, target, row.generator)
    row.commit([*draft.tokens[:accepted], following])
    return _outcome(answer, draft, accepted)


def _outcome(answer: Answer, draft: Draft, accepted: int) -> Verified:
    outcome = Verified(len(draft.tokens), accepted, draft.looked_up, draft.probabilities)
    answer.count_draft(outcome)
    return outcome
