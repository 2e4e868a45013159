"""One round of speculation on a device other than the CPU: the host reads its outcome once.

Drafted tokens, verification and acceptance stay on the device. At the end of a round the host reads
one tensor: each row's drafted tokens, how many of them were accepted, the token that follows, and
the draft's probabilities. So a draft has the length that was chosen before the round, and does not
end early where it becomes unlikely.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from gateskip.decoding.draft_models import LearnedDraft
from gateskip.decoding.rows import Row
from gateskip.decoding.sampling import (
    GREEDY,
    Sampler,
    accept_on_device,
    draw_on_device,
    match_on_device,
)
from gateskip.decoding.speculation import Draft, Drafting
from gateskip.model.families import to_device, to_host
from gateskip.runtime.backend import Cache, Round, Verified
from gateskip.runtime.budget_control import BudgetControl
from gateskip.runtime.skipping import Limits, SkippingModel


def rounds_on_device(
    model: SkippingModel, drafting: Drafting, sampler: Sampler, limits: Limits
) -> bool:
    """Whether `device_round` can make the rounds of these settings."""
    models = [model] if drafting.network is not None else [model, drafting.model]
    return (
        all(each.steps_on_device for each in models)
        and sampler.native
        and not isinstance(limits, BudgetControl)
    )


def device_round(
    model: SkippingModel,
    rows: list[Row],
    drafting: Drafting,
    sampler: Sampler,
    cache: Cache,
    limits: Limits,
) -> Round:
    """One round of some rows; all of it but the reading of its outcome is queued on the device."""
    assert not isinstance(limits, BudgetControl), "ask `rounds_on_device`"
    clock = _Clock(model.device)
    drafts, slots = drafting.begin(rows), [row.slot for row in rows]
    lengths = [draft.limit for draft in drafts]
    made = _DeviceDrafts(rows, drafts, drafting, sampler, cache, model.device)
    clock.mark()
    last = to_device([[row.last] for row in rows], model.device)
    states = model.step(
        torch.cat((last, made.tokens), 1),
        cache,
        [row.number for row in rows],
        slots,
        limits,
        [length + 1 for length in lengths],
    )
    logits, of_rows = model.head(states), to_device(lengths, model.device)
    if sampler == GREEDY:
        accepted, following = match_on_device(made.tokens, of_rows, logits.argmax(-1))
    else:
        uniform = _uniform(rows, made.tokens.shape[1] + 1, model.device)
        targets = sampler.probs(logits)
        accepted, following = accept_on_device(
            made.tokens, of_rows, targets, made.drawn_from, uniform
        )
    clock.mark()
    outcome = (accepted.unsqueeze(1), following.unsqueeze(1), made.tokens, made.probabilities)
    verified = []
    for row, draft, numbers, of_row in zip(
        rows,
        drafts,
        to_host(torch.cat([part.double() for part in outcome], 1)),
        states,
        strict=True,
    ):
        count, length = int(numbers[0]), draft.limit
        tokens = [int(token) for token in numbers[2 : 2 + length]]
        row.commit([*tokens[:count], int(numbers[1])])
        row.state = of_row[count]
        sure = numbers[2 + made.tokens.shape[1] :][:length]
        verified.append(Verified(length, count, draft.looked_up, () if draft.looked_up else sure))
    for row, slot, one in zip(rows, slots, verified, strict=True):
        drafting.verified(row.number, slot, one)
    return Round(verified, *clock.seconds())


class _DeviceDrafts:
    """Drafts of all rows on a device: `tokens` [B, K], the draft model's `probabilities` of them
    [B, K] (K is 0 where nothing learns from them), and what they were `drawn_from` [B, K, V], or
    None where every draft is certain of its tokens."""

    def __init__(
        self,
        rows: Sequence[Row],
        drafts: Sequence[Draft],
        drafting: Drafting,
        sampler: Sampler,
        cache: Cache,
        device: torch.device,
    ) -> None:
        self._drafting, self._sampler, self._device = drafting, sampler, device
        columns = max(draft.limit for draft in drafts)
        padded = [[*draft.tokens, *[0] * (columns - len(draft.tokens))] for draft in drafts]
        self.tokens = to_device(padded, device).long()
        learns = drafting.controller is not None
        self.probabilities = torch.zeros(len(drafts), columns if learns else 0, device=device)
        self.drawn_from: Tensor | None = None
        growing = [i for i, draft in enumerate(drafts) if draft.limit and not draft.looked_up]
        if not growing:
            return
        if drafting.network is not None:
            for i in growing:
                self._by_network(drafting.network, i, rows[i], drafts[i].limit)
        else:
            by = cache if drafting.own_cache is None else drafting.own_cache.cache
            count = max(drafts[i].limit for i in growing)
            self._decode([rows[i] for i in growing], to_device(growing, device), count, by)

    def _decode(self, rows: Sequence[Row], index: Tensor, count: int, cache: Cache) -> None:
        """`count` tokens of each of some rows, whose numbers are `index`, by the draft model."""
        drafting, sampler = self._drafting, self._sampler
        model, numbers = drafting.model, [row.number for row in rows]
        unread = [drafting.unread(row) for row in rows]
        starts = [row.slot + 1 - len(ids) for row, ids in zip(rows, unread, strict=True)]
        states = model.decode(unread, cache, numbers, starts, drafting.thresholds)
        ends = [end - 1 for end in accumulate(map(len, unread))]
        states = states.index_select(0, to_device(ends, self._device))
        uniform = None if sampler == GREEDY else _uniform(rows, count, self._device)
        for k in range(count):
            logits = model.head(states)
            if uniform is None:
                chosen = logits.argmax(-1)
            else:
                probs = sampler.probs(logits)
                chosen = draw_on_device(probs, uniform[:, k])
                self._note(index, k, probs)
            self.tokens[index, k] = chosen
            if self.probabilities.shape[1]:
                sure = logits.float().softmax(-1).gather(-1, chosen.unsqueeze(-1))
                self.probabilities[index, k] = sure.squeeze(-1)
            if k + 1 < count:
                starts = [row.slot + k + 1 for row in rows]
                passed = (chosen.unsqueeze(1), cache, numbers, starts, drafting.thresholds)
                states = model.step(*passed).squeeze(1)

    def _note(self, index: Tensor, k: int, probs: Tensor) -> None:
        """Store the distributions [N, V] from which the tokens of some rows at column k come."""
        if self.drawn_from is None:  # of rows that were looked up: certain
            sizes = (*self.tokens.shape, probs.shape[-1])
            self.drawn_from = torch.zeros(sizes, device=self._device)
            self.drawn_from.scatter_(-1, self.tokens.unsqueeze(-1), 1.0)
        self.drawn_from[index, k] = probs

    def _by_network(self, network: LearnedDraft, i: int, row: Row, count: int) -> None:
        """A row's draft by a network, which is certain of its tokens."""
        assert row.state is not None, "a row's state is kept for its network"
        last = to_device([row.last], self._device)[0]
        tokens, sure = network.draft_on_device(last, row.state, count)
        self.tokens[i, :count] = tokens
        if self.probabilities.shape[1]:
            self.probabilities[i, :count] = sure


def _uniform(rows: Sequence[Row], count: int, device: torch.device) -> Tensor:
    """`count` numbers from 0 to 1 of each row's random stream, float64 [B, count]."""
    return to_device(torch.stack([row.uniforms(count) for row in rows]), device)


class _Clock:
    """Seconds between marks: on CUDA by events, since the host runs ahead of the device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda, self._marks = device.type == "cuda", list[float | torch.cuda.Event]()
        self.mark()

    def mark(self) -> None:
        """Note the time at which the work queued so far is done."""
        if not self._cuda:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> tuple[float, float]:
        """Seconds of the draft and of verification, once the host has read the outcome."""
        begun, drafted, done = self._marks
        return _between(begun, drafted), _between(drafted, done)


def _between(first: float | torch.cuda.Event, last: float | torch.cuda.Event) -> float:
    if isinstance(first, float) or isinstance(last, float):
        return last - first  # type: ignore[operator]
    return float(first.elapsed_time(last)) / 1000
