"""A cell's decoder as a scored model: its hidden states are computed while skipping.

`text_compute` gives the compute that a cell that skips used on the scored text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compose.bench.quality.continuations import BranchingModel
from gateskip.decoding.decoder import Decoder, Mode
from gateskip.decoding.phases import FULL, Phase
from gateskip.model.compute import Saving, Usage
from gateskip.runtime.backend import Cache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Rows = list[list[int]]
"""Token ids, row by row."""

Saves = Callable[[Usage], Saving]
"""Counts saved compute over tokens."""


class Scored(BranchingModel):
    """The decoder of a cell, plain or skipping at a budget."""

    def __init__(self, decoder: Decoder, budget: float | None, **skipping: Any) -> None:
        """`skipping` are `prompt`, `answer`, `hold` and `prompt_budget` of `Decoder.generate`."""
        self.decoder, self.budget, self.skipping = decoder, budget, skipping
        self.thresholds = None if budget is None else decoder.thresholds(budget)
        """The calibrated thresholds of the budget."""
        self.phases = FULL if budget is None else decoder.phases(budget, **skipping)
        self.parts = self.phases.differ
        self.reads = skipping.get("prompt_budget") is not None
        """Whether prompts have separate thresholds, for tokens from which nothing is predicted."""
        self.used: dict[Phase, Usage] = {}
        """Usage of the tokens of prompts and of answers since `clear_used`."""

    def clear_used(self) -> None:
        """Reset the counts of written text."""
        self.used = {}

    def _count(self, used: Mapping[Phase, Usage]) -> None:
        self.used = added(self.used, used)

    @property
    def device(self) -> torch.device:
        """The device of the inputs."""
        return self.decoder.skipping.device

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's tokenizer."""
        tokenizer: PreTrainedTokenizerBase = self.decoder.tokenizer
        return tokenizer

    def hidden(self, input_ids: Tensor, lengths: Tensor | None) -> Tensor:
        """Token ids [B, S] -> final hidden states [B, S, H]. The first `read_of(S)` tokens of text
        without padding are a prompt."""
        skipping, phases = self.decoder.skipping, self.phases
        cache = skipping.new_cache(*input_ids.shape)
        counts = None if lengths is None else lengths.tolist()
        read = self.read_of(input_ids.shape[1]) if counts is None else 0
        starts = [0] * len(input_ids)
        if not read:
            return skipping.forward(input_ids, cache, starts, phases.text, counts)
        prompt = skipping.forward(input_ids[:, :read], cache, starts, phases.prompt)
        rest = [read] * len(input_ids)
        return torch.cat(
            (prompt, skipping.forward(input_ids[:, read:], cache, rest, phases.answer)), 1
        )

    def read_of(self, length: int) -> int:
        """How many tokens of a block of running text are context only: half of them where the
        cell's prompts have separate thresholds. Predictions at these are not scored."""
        return length // 2 if self.reads else 0

    def generate(
        self, prompts: Sequence[list[int]], new_tokens: int, stop_tokens: Sequence[int]
    ) -> list[list[int]]:
        """Greedy continuations by the cell's decode settings."""
        mode: Mode = "plain" if self.thresholds is None else "skip"
        budget = 1.0 if self.budget is None else self.budget
        written = self.decoder.generate(
            prompts, new_tokens, mode, budget, eos=stop_tokens, **self.skipping
        )
        self._count(written.usage)
        return written.tokens

    def branch(
        self, contexts: Sequence[list[int]], endings: Sequence[list[int]], owner: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Hidden states after each context [G, H], and of each ending's tokens [R, E, H]."""
        skipping, lengths = self.decoder.skipping, [len(context) for context in contexts]
        slots = max(lengths) + max(map(len, endings))
        cache = skipping.new_cache(len(contexts), slots)
        after = self._after(contexts, cache)
        copies = cache.rows(owner)
        starts = [lengths[number] for number in owner]
        ids = padded(endings).to(self.device)
        if ids.shape[1] == 0:
            return after, after.new_zeros(len(owner), 0, after.shape[-1])
        counts = [len(ending) for ending in endings]
        return after, skipping.forward(ids, copies, starts, self.phases.answer, counts)

    def _after(self, contexts: Sequence[list[int]], cache: Cache) -> Tensor:
        """Final states [G, H] of the contexts' last tokens, in an empty cache that they fill."""
        lengths = [len(context) for context in contexts]
        read = self._read(contexts, cache)
        places = torch.arange(len(contexts))
        if not self.phases.apart:
            return read[places, torch.tensor(lengths) - 1]
        last = torch.tensor([context[-1:] for context in contexts]).to(self.device)
        starts = [length - 1 for length in lengths]
        return self.decoder.skipping.forward(last, cache, starts, self.phases.answer)[:, 0]

    def _read(self, contexts: Sequence[list[int]], cache: Cache) -> Tensor:
        """Final states [G, S, H] of the part of the contexts that is prefilled together."""
        lengths = [self.phases.read(len(context)) for context in contexts]
        ids, zeros = padded(contexts)[:, : max(lengths)].to(self.device), [0] * len(contexts)
        if not max(lengths):
            return torch.empty(0)
        full_from = self.phases.full_from(lengths)
        return self.decoder.skipping.forward(
            ids, cache, zeros, self.phases.prompt, lengths, full_from
        )

    def answer_states(self, prompts: Rows, answers: Rows) -> list[Tensor]:
        """For each answer, the final states [T, H] that predict its T tokens, computed as in
        decoding.

        The prompt's last state predicts the first token; it comes from the prefill unless that
        token is computed apart. A decoding step predicts each further token. One pass over an
        answer gives the same bits as its tokens one by one.
        """
        skipping, phases = self.decoder.skipping, self.phases
        before = skipping.usage.copy()
        cache = skipping.new_cache(len(prompts), max(map(len, prompts)) + max(map(len, answers)))
        read = self._read(prompts, cache)  # [B, S, H]
        after = skipping.usage.copy()
        self._count({"prompt": after.since(before)})
        starts = [phases.read(len(prompt)) for prompt in prompts]
        steps = [
            [*prompt[start:], *answer[:-1]]
            for prompt, start, answer in zip(prompts, starts, answers, strict=True)
        ]
        states = [
            read[row, start - 1 : start] if not phases.apart else read.new_zeros(0)
            for row, start in enumerate(starts)
        ]
        rows = [row for row, ids in enumerate(steps) if ids]
        if not rows:
            return states
        decoded = skipping.decode(
            [steps[row] for row in rows], cache, rows, [starts[row] for row in rows], phases.answer
        )
        self._count({"answer": skipping.usage.since(after)})
        for row, rest in zip(rows, decoded.split([len(steps[row]) for row in rows]), strict=True):
            first = states[row]
            states[row] = torch.cat((first, rest.to(first.dtype))) if len(first) else rest
        return states

    def answer_logits(self, prompts: Rows, answers: Rows) -> list[Tensor]:
        """For each answer, the logits [T, V] that predict its T tokens, computed as in decoding."""
        states = self.answer_states(prompts, answers)
        return [self.decoder.skipping.head(hidden) for hidden in states]

    def head(self, hidden: Tensor) -> Tensor:
        """Final hidden states [..., H] -> logits [..., V]."""
        return self.decoder.skipping.scores(hidden)


def added(first: Mapping[Phase, Usage], second: Mapping[Phase, Usage]) -> dict[Phase, Usage]:
    """The sum of two counts, phase by phase."""
    both = first.keys() & second.keys()
    return {**first, **second, **{phase: first[phase].plus(second[phase]) for phase in both}}


def text_compute(
    used: Mapping[Phase, Usage], decoder: Decoder, saving: Saves
) -> dict[str, Any] | None:
    """`TextCompute` of tokens by phase; None where none was counted."""
    seen = {phase: usage for phase, usage in used.items() if usage.seen}
    if not seen:
        return None
    whole: dict[str, Any] = _numbers(reduce(Usage.plus, seen.values()), decoder, saving)
    for phase, usage in seen.items():
        whole[phase] = _numbers(usage, decoder, saving)
    return whole


def _numbers(usage: Usage, decoder: Decoder, saving: Saves) -> dict[str, Any]:
    return {
        "tokens": usage.seen,
        "kept": round(decoder.kept_of(usage), 4),
        "saved_net": round(saving(usage).net, 4),
    }


def padded(rows: Sequence[list[int]]) -> Tensor:
    """Token ids [N, S], padded on the right by zeros."""
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.long)
