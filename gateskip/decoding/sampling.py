"""From logits to tokens: a sampler's distributions, drawing from them, accepting drafts.

A law is what the next token is drawn from: probabilities [V], or one token id that is certain, as
in greedy decoding and in drafts that were looked up. All decoders use the one function that accepts
or resamples, and it never looks at more of the target's laws than it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

Law = int | Tensor
"""Where all the probability is, or probabilities [V]."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How a token is chosen; the defaults are greedy. Fields mean what they do in transformers."""

    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 is all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Only tokens at least this likely, relative to the likeliest."""
    repetition_penalty: float = 1.0
    """Divides the scores of tokens that the text already has."""
    processors: tuple[Any, ...] = ()
    """Further LogitsProcessors of transformers, applied first: (ids [1, S], scores [1, V])."""

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or self.repetition_penalty <= 0:
            raise ValueError(
                "temperature and top_k must not be negative, nor the penalty 0 or less"
            )
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError("top_p must lie in (0, 1] and min_p in [0, 1]")

    @cached_property
    def _chain(self) -> Any:
        from transformers.generation import logits_process as g

        chain = g.LogitsProcessorList(self.processors)
        if self.repetition_penalty != 1.0:
            chain.append(g.RepetitionPenaltyLogitsProcessor(penalty=self.repetition_penalty))
        if self.temperature > 0:
            if self.temperature != 1.0:
                chain.append(g.TemperatureLogitsWarper(float(self.temperature)))
            if self.top_k:
                chain.append(g.TopKLogitsWarper(self.top_k))
            if self.top_p < 1.0:
                chain.append(g.TopPLogitsWarper(self.top_p))
            if self.min_p:
                chain.append(g.MinPLogitsWarper(self.min_p))
        return chain

    def law(self, logits: Tensor, context: Sequence[int]) -> Law:
        """Where the token after `context` is drawn from. logits [V]."""
        scores = logits.float().unsqueeze(0)
        if self._chain:
            ids = torch.tensor([list(context)], device=logits.device)
            scores = self._chain(ids, scores)
        if self.temperature == 0:
            return int(scores.argmax(-1))
        return torch.softmax(scores[0], -1)

    def laws(self, logits: Tensor, context: Sequence[int], draft: Sequence[int]) -> Iterator[Law]:
        """The laws after `context` and each longer part of `draft`, made as they are asked for.

        logits [K + 1, V]: row i predicts what follows i drafted tokens.
        """
        if self.temperature == 0 and not self._chain:
            yield from logits.argmax(-1).tolist()
            return
        for i, row in enumerate(logits):
            yield self.law(row, [*context, *draft[:i]])


GREEDY = Sampler()


def draw(law: Law, generator: torch.Generator) -> int:
    """A token from a law."""
    if isinstance(law, int):
        return law
    return int(torch.multinomial(law, 1, generator=generator))


def accept_or_resample(
    draft: Sequence[int], drawn: Sequence[Law], wanted: Iterable[Law], generator: torch.Generator
) -> tuple[int, int]:
    """How many drafted tokens stand, and the token that follows them.

    `drawn[i]` is the law that `draft[i]` was drawn from, `wanted` gives the target's laws, one more
    than there are drafts. The tokens together are distributed as if drawn from the target alone
    (speculative sampling, arXiv 2211.17192, algorithm 1); where the laws are certain they are what
    greedy decoding gives.
    """
    laws = iter(wanted)
    for accepted, (token, source) in enumerate(zip(draft, drawn, strict=True)):
        law = next(laws)
        chance = _probability(law, token) / _probability(source, token)
        if chance < 1 and float(torch.rand((), generator=generator)) >= chance:
            return accepted, draw(_residual(law, source), generator)
    return len(draft), draw(next(laws), generator)


def _probability(law: Law, token: int) -> float:
    return float(law == token) if isinstance(law, int) else float(law[token])


def _residual(law: Law, source: Law) -> Law:
    """What the target wants more often than the draft gives: max(0, p - q), normed."""
    if isinstance(law, int):
        return law
    if isinstance(source, int):
        left = law.clone()
        left[source] = 0
    else:
        left = (law - source).clamp_min(0)
    return left / left.sum()
