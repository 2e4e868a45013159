"""From logits to tokens: a sampler's distributions, drawing from them, accepting drafts.

A next-token distribution is probabilities [V], or one token id (greedy decoding, and drafts from
look-up). All decoders use the one function that accepts or resamples; it computes only those of the
target's distributions that it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gateskip.kernels import abi, ops
from gateskip.runtime.backend import Sampling

Distribution = int | Tensor
"""Next-token distribution: probabilities [V], or one token id (greedy)."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How a token is chosen; the defaults are greedy. Fields mean what they mean in
    transformers."""

    temperature: float = 0.0
    """0 takes the argmax."""
    top_k: int = 0
    """Only the k most likely tokens; 0 is all."""
    top_p: float = 1.0
    """Only the most likely tokens that together have this probability."""
    min_p: float = 0.0
    """Only tokens at least this likely, relative to the most likely."""
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
    def draws(self) -> Sampling | None:
        """The settings with which a backend can draw tokens itself; None where it needs more than
        these."""
        if self.temperature == 0 or self.processors or self.repetition_penalty != 1.0:
            return None
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p)

    @cached_property
    def native(self) -> bool:
        """Whether a backend can choose tokens as this sampler does."""
        return self == GREEDY or self.draws is not None

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

    def distribution(self, logits: Tensor, context: Sequence[int]) -> Distribution:
        """The distribution of the token after `context`. logits [V]."""
        if self.draws is not None and logits.device.type == "cpu" and ops.has_decoder():
            return ops.distribution(logits.float().contiguous(), abi.Sampling(*self.draws))
        scores = logits.float().unsqueeze(0)
        if self._chain:
            ids = torch.tensor([list(context)], device=logits.device)
            scores = self._chain(ids, scores)
        if self.temperature == 0:
            return int(scores.argmax(-1))
        return torch.softmax(scores[0], -1)

    def distributions(
        self, logits: Tensor, context: Sequence[int], draft: Sequence[int]
    ) -> Iterator[Distribution]:
        """The distributions after `context` and each longer part of `draft`, computed lazily.

        logits [K + 1, V]: row i predicts the token after i drafted tokens.
        """
        if self.temperature == 0 and not self._chain:
            yield from logits.argmax(-1).tolist()
            return
        for i, row in enumerate(logits):
            yield self.distribution(row, [*context, *draft[:i]])


GREEDY = Sampler()


def draw(distribution: Distribution, generator: torch.Generator) -> int:
    """A token from a distribution."""
    if isinstance(distribution, int):
        return distribution
    return int(torch.multinomial(distribution, 1, generator=generator))


def accept_or_resample(
    draft: Sequence[int],
    drawn_from: Sequence[Distribution],
    targets: Iterable[Distribution],
    generator: torch.Generator,
) -> tuple[int, int]:
    """How many drafted tokens are accepted, and the token that follows them.

    `drawn_from[i]` is the distribution of `draft[i]`; `targets` gives the target model's, one more
    than there are drafts. The tokens together have the same distribution as tokens drawn from the
    target alone (speculative sampling, arXiv 2211.17192, algorithm 1). Where the distributions are
    single tokens, the result is that of greedy decoding.
    """
    remaining = iter(targets)
    for accepted, (token, source) in enumerate(zip(draft, drawn_from, strict=True)):
        target = next(remaining)
        ratio = _probability(target, token) / _probability(source, token)
        if ratio < 1 and float(torch.rand((), generator=generator)) >= ratio:
            return accepted, draw(_residual(target, source), generator)
    return len(draft), draw(next(remaining), generator)


def _probability(distribution: Distribution, token: int) -> float:
    if isinstance(distribution, int):
        return float(distribution == token)
    return float(distribution[token])


def _residual(target: Distribution, source: Distribution) -> Distribution:
    """The distribution of a token that replaces a rejected one: max(0, p - q), normalised."""
    if isinstance(target, int):
        return target
    if isinstance(source, int):
        left = target.clone()
        left[source] = 0
    else:
        left = (target - source).clamp_min(0)
    return left / left.sum()
