"""A cell's decoder as a scored model: hidden states that are computed while skipping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compose.bench.continuations import BranchingModel
from gateskip.decoding.decoder import Decoder, Mode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = list[list[int]]
"""Token ids, row by row."""


class Scored(BranchingModel):
    """The decoder of a cell, plain or skipping at a budget."""

    def __init__(self, decoder: Decoder, budget: float | None) -> None:
        self.decoder, self.budget = decoder, budget
        self.thresholds = None if budget is None else decoder.thresholds(budget)

    @property
    def device(self) -> torch.device:
        """Where inputs must lie."""
        return self.decoder.skipping.device

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's tokenizer."""
        tokenizer: PreTrainedTokenizerBase = self.decoder.tokenizer
        return tokenizer

    def hidden(self, input_ids: Tensor, lengths: Tensor | None) -> Tensor:
        """Token ids [B, S] -> final hidden states [B, S, H]."""
        skipping = self.decoder.skipping
        cache = skipping.new_cache(*input_ids.shape)
        counts = None if lengths is None else lengths.tolist()
        return skipping.forward(input_ids, cache, [0] * len(input_ids), self.thresholds, counts)

    def generate(
        self, prompts: Sequence[list[int]], new_tokens: int, stop_tokens: Sequence[int]
    ) -> list[list[int]]:
        """Greedy continuations, decoded as the cell decodes."""
        mode: Mode = "plain" if self.thresholds is None else "skip"
        budget = 1.0 if self.budget is None else self.budget
        return self.decoder.generate(prompts, new_tokens, mode, budget, eos=stop_tokens).tokens

    def branch(
        self, contexts: Sequence[list[int]], endings: Sequence[list[int]], owner: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Hidden states after each context [G, H], and of each ending's tokens [R, E, H]."""
        skipping, lengths = self.decoder.skipping, [len(context) for context in contexts]
        slots = max(lengths) + max(map(len, endings))
        cache = skipping.new_cache(len(contexts), slots)
        zeros = [0] * len(contexts)
        read = skipping.forward(
            padded(contexts).to(self.device), cache, zeros, self.thresholds, lengths
        )
        after = read[torch.arange(len(contexts)), torch.tensor(lengths) - 1]
        copies = cache.rows(owner)
        starts = [lengths[number] for number in owner]
        ids = padded(endings).to(self.device)
        if ids.shape[1] == 0:
            return after, read.new_zeros(len(owner), 0, read.shape[-1])
        counts = [len(ending) for ending in endings]
        return after, skipping.forward(ids, copies, starts, self.thresholds, counts)

    def answer_states(self, prompts: Rows, answers: Rows) -> list[Tensor]:
        """Of each answer, the final states [T, H] that predict its T tokens, as the cell decodes.

        The first token is predicted by the prompt's last state, each further one by a decoding
        step: a pass over an answer has the bits of its tokens one by one.
        """
        skipping, thresholds = self.decoder.skipping, self.thresholds
        lengths = [len(prompt) for prompt in prompts]
        cache = skipping.new_cache(len(prompts), max(lengths) + max(map(len, answers)))
        ids = padded(prompts).to(self.device)
        read = skipping.forward(ids, cache, [0] * len(prompts), thresholds, lengths)  # [B, S, H]
        states = [read[row, length - 1 : length] for row, length in enumerate(lengths)]
        rows = [row for row, answer in enumerate(answers) if len(answer) > 1]
        if not rows:
            return states
        steps = [answers[row][:-1] for row in rows]
        starts = [lengths[row] for row in rows]
        found = skipping.decode(steps, cache, rows, starts, thresholds)
        for row, own in zip(rows, found.split([len(ids) for ids in steps]), strict=True):
            states[row] = torch.cat((states[row], own.to(read.dtype)))
        return states

    def answer_logits(self, prompts: Rows, answers: Rows) -> list[Tensor]:
        """Of each answer, the logits [T, V] that predict its T tokens, as the cell decodes."""
        states = self.answer_states(prompts, answers)
        return [self.decoder.skipping.head(own) for own in states]

    def head(self, hidden: Tensor) -> Tensor:
        """Final hidden states [..., H] -> logits [..., V]."""
        return self.decoder.skipping.scores(hidden)


def padded(rows: Sequence[list[int]]) -> Tensor:
    """Token ids [N, S], padded on the right by zeros."""
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.long)
