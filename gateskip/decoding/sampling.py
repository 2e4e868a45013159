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
from gateskip.model.families import to_cpu, to_device, to_host
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
            ids = to_device([list(context)], logits.device)
            scores = self._chain(ids, scores)
        if self.temperature == 0:
            return int(to_host(scores.argmax(-1))[0])
        return torch.softmax(scores[0], -1)

    def probs(self, logits: Tensor) -> Tensor:
        """The distributions [..., V] after logits [..., V], where they do not depend on the text:
        `draws` is not None."""
        assert self.draws is not None, "greedy, or with processors that read the text"
        scores = logits.float().flatten(0, -2)
        scores = self._chain(torch.empty(0), scores) if self._chain else scores
        return torch.softmax(scores, -1).view(logits.shape)

    def distributions(
        self, logits: Tensor, context: Sequence[int], draft: Sequence[int]
    ) -> Iterator[Distribution]:
        """The distributions after `context` and each longer part of `draft`, computed lazily.

        logits [K + 1, V]: row i predicts the token after i drafted tokens.
        """
        if self.temperature == 0 and not self._chain:
            yield from to_host(logits.argmax(-1))
            return
        for i, row in enumerate(logits):
            yield self.distribution(row, [*context, *draft[:i]])


GREEDY = Sampler()


def draw(distribution: Distribution, generator: torch.Generator) -> int:
    """A token from a distribution."""
    if isinstance(distribution, int):
        return distribution
    # a seed draws the same tokens on every device
    return int(torch.multinomial(to_cpu(distribution), 1, generator=generator))


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
    return float(to_host(distribution[token : token + 1])[0])


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


# -- on a device other than the CPU: nothing is asked of it ------------------------------------


def draw_on_device(probs: Tensor, uniform: Tensor) -> Tensor:
    """A token [N] of each distribution [N, V], by numbers [N] from 0 to 1."""
    summed = probs.double().cumsum(-1)
    goal = (uniform * summed[:, -1]).unsqueeze(-1)
    place = torch.searchsorted(summed, goal, right=True).squeeze(-1)
    return place.clamp_max(probs.shape[-1] - 1)


def match_on_device(drafted: Tensor, lengths: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """How many drafted tokens [B] are accepted greedily, and the token [B] that follows them.

    drafted [B, K], of which each row has `lengths` [B]; targets [B, K + 1] are argmax tokens.
    """
    right = (drafted == targets[:, :-1]) & _within(drafted, lengths)
    accepted = right.long().cumprod(-1).sum(-1)
    return accepted, targets.gather(1, accepted.unsqueeze(1)).squeeze(1)


def accept_on_device(
    drafted: Tensor, lengths: Tensor, targets: Tensor, drawn_from: Tensor | None, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """The rule of `accept_or_resample` for all rows at once: accepted tokens [B], the next [B].

    drafted [B, K], of which each row has `lengths` [B], drawn from the distributions `drawn_from`
    [B, K, V], or certain (None); targets [B, K + 1, V]; uniform [B, K + 1], numbers from 0 to 1.
    """
    count, chosen = drafted.shape[1], drafted.unsqueeze(-1)
    if not count:
        return torch.zeros_like(lengths), draw_on_device(targets[:, 0], uniform[:, 0])
    if drawn_from is None:
        drawn_from = torch.zeros_like(targets[:, 1:]).scatter_(-1, chosen, 1.0)
    p, q = (part.gather(-1, chosen).squeeze(-1) for part in (targets[:, :-1], drawn_from))
    right = (uniform[:, :-1] * q < p) & _within(drafted, lengths)
    accepted = right.long().cumprod(-1).sum(-1)
    target = _row_at(targets, accepted)
    residual = (target - _row_at(drawn_from, accepted.clamp_max(count - 1))).clamp_min(0)
    probs = torch.where((accepted < lengths).unsqueeze(1), residual, target)
    return accepted, draw_on_device(probs, uniform[:, -1])


def _within(drafted: Tensor, lengths: Tensor) -> Tensor:
    """Which of drafted [B, K] are in the first `lengths` [B] of their row."""
    return torch.arange(drafted.shape[1], device=drafted.device) < lengths.unsqueeze(1)


def _row_at(x: Tensor, places: Tensor) -> Tensor:
    """x [B, N, V] at places [B] -> [B, V]."""
    return x.gather(1, places.view(-1, 1, 1).expand(-1, 1, x.shape[-1])).squeeze(1)
