"""Speculation of a cell, in two records that never mix: the timed rounds and the lossless check.

The check forces a draft length, so its acceptance says nothing of the speed that was timed; the
timed rounds may have drafted hardly at all.
"""

from __future__ import annotations

from typing import ClassVar

from compose.results.record import Record


class Divergence(Record):
    """The first place where speculative and plain greedy decoding differ."""

    prompt: int | None = None
    """Which prompt, from 0."""

    position: int | None = None
    """Which new token, from 0."""

    plain_token: int | None = None
    """The token that plain decoding took."""

    speculative_token: int | None = None
    """The token that speculative decoding took."""

    margin: float | None = None
    """Distance of the two highest logits there, plain decoding; near 0 is a near-tie."""

    margin_share: float | None = None
    """The same as a share of the distance between the highest and the lowest logit."""


class LosslessCheck(Record):
    """Speculative against plain greedy decoding, token for token, with forced and own lengths."""

    always: ClassVar[frozenset[str]] = frozenset({"first_divergence"})

    lossless: bool | None = None
    """Whether every new token equals plain greedy decoding's."""

    prompts: int | None = None
    """Prompts that were compared."""

    tokens: int | None = None
    """New tokens that were compared, over all prompts."""

    first_divergence: Divergence | None = None
    """Where they first differ; null when they do not."""

    divergences: tuple[Divergence, ...] | None = None
    """The same for each prompt whose texts differ."""

    forced_draft_length: int | None = None
    """Draft length that the check forces, so that drafts are verified at all."""

    forced_draft_length_histogram: dict[int, int] | None = None
    """Draft length -> passes of the check under the forced length; 0 is a plain step."""

    own_draft_length_histogram: dict[int, int] | None = None
    """The same for the prompts that were decoded with the cell's own draft lengths."""

    acceptance_rate: float | None = None
    """Accepted over drafted tokens under the forced length; not that of the timed rounds."""

    acceptance_rate_ci95: tuple[float, float] | None = None
    """95 % interval of `acceptance_rate` over prompts."""

    drafts_by_prompt: tuple[tuple[int, int], ...] | None = None
    """Tokens of each prompt that were drafted, and accepted, under the forced length."""

    acceptance_by_position: tuple[float, ...] | None = None
    """Share accepted at each position of a draft under the forced length, where all drafts before
    it had been accepted."""


class Speculation(Record):
    """What self-speculative decoding did in the timed rounds, all of them together."""

    draft_weights: str | None = None
    """What drafted, the measured choice where the cell says `auto`; `none` where no draft was
    measured to be faster than plain decoding."""

    draft_length_histogram: dict[int, int] | None = None
    """Draft length -> timed passes in which so many tokens were drafted; 0 is a plain step."""

    acceptance_rate: float | None = None
    """Accepted over drafted tokens; absent where nothing was drafted."""

    acceptance_rate_ci95: tuple[float, float] | None = None
    """95 % interval of `acceptance_rate` over rounds."""

    mean_accepted_tokens: float | None = None
    """Tokens gained by one pass of the whole model; plain decoding has 1."""

    mean_accepted_tokens_ci95: tuple[float, float] | None = None
    """95 % interval of `mean_accepted_tokens` over rounds."""

    drafts_by_round: tuple[tuple[int, int, int], ...] | None = None
    """Tokens of each timed round that were drafted, and accepted, and passes of the whole model."""

    acceptance_by_position: tuple[float, ...] | None = None
    """Share accepted of the drafts at each position, where all before them had been accepted."""

    plain_steps: float | None = None
    """Share of the timed steps that were plain: nothing was drafted."""

    fell_back: bool | None = None
    """Whether more than half of the timed steps were plain."""

    looked_up_share: float | None = None
    """Share of the drafted tokens that the text itself proposed."""

    speedup: float | None = None
    """Decode speed over that of the cell named by `plain`, paired round by round."""

    speedup_ci95: tuple[float, float] | None = None
    """95 % interval of `speedup`."""

    draft_s: float | None = None
    """Seconds of the timed rounds that went into drafting."""

    verify_s: float | None = None
    """Seconds of them that went into passes at full compute."""
