"""The settings of `Decoder.generate`, in groups and as single keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypedDict, TypeVar

from gateskip.decoding.draft_models import Weights
from gateskip.decoding.phases import Compute

MAX_DRAFT = 16


@dataclass(frozen=True, kw_only=True)
class SkipConfig:
    """How prompts and answers skip branches."""

    budget: float = 0.8
    """Share of the branches' multiply-adds that is computed in mode `skip`."""
    prompt: Compute = "budget"
    """Whether prompt tokens skip at the budget (`budget`) or skip nothing (`full`)."""
    answer: Compute = "budget"
    """Whether answer tokens skip at the budget (`budget`) or skip nothing (`full`)."""
    prompt_budget: float | None = None
    """Share of the branches' multiply-adds that is computed for prompt tokens, except the last
    token. Its thresholds are calibrated for the smallest effect on answers
    (calibration/reading.py). With None, `budget` also applies to prompts."""
    hold: bool = False
    """Whether each row of a batch is kept at the budget. Its thresholds then change with the share
    that its earlier tokens computed (runtime/budget_control.py)."""


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """How drafts are made and verified in mode `speculate`."""

    budget: float = 1.0
    """Share of the branches' multiply-adds that drafting computes. With 1, drafting skips nothing,
    and the model's own weights (`own`) draft nothing."""
    length: int | Literal["auto"] = "auto"
    """Number of tokens in each draft, 1 to 16. `auto` sets it from measured cost and acceptance;
    while drafts do not make decoding faster, it is 0."""
    weights: Weights | None = None
    """The draft model: the model's own weights (`own`); these with a 4-bit LM head (`int4-head`); a
    copy of all weights in fewer bits (`int4`, `int3`, `int2` with a 3-bit head, or `nf4`); the
    small network that the stage `draft-network` trained (`learned`); another model, the
    `draft_model` of `gateskip.load` (`model`); or `auto`, the fastest of these, measured once per
    machine. None is `model` where one was loaded, and `auto` elsewhere."""
    lookup: bool = True
    """Whether to search the text for an earlier occurrence of the last tokens and to propose the
    tokens that followed it (look-up). The draft model proposes tokens only if look-up finds
    nothing."""
    verify_budget: float = 1.0
    """Share of the branches' multiply-adds that verification computes. With 1, the tokens (or, with
    sampling, their distribution) equal those of mode `plain`. Below 1, they equal those of mode
    `skip` at this budget."""

    def __post_init__(self) -> None:
        if self.length != "auto" and not 1 <= self.length <= MAX_DRAFT:
            raise ValueError(f"draft_length must be 'auto' or 1 to {MAX_DRAFT}")


class PhaseSettings(TypedDict, total=False):
    """The fields of SkipConfig except its budget, as keyword arguments."""

    prompt: Compute
    answer: Compute
    prompt_budget: float | None
    hold: bool


class Settings(PhaseSettings, total=False):
    """The fields of both groups except `budget`, as keyword arguments of `Decoder.generate`."""

    draft_budget: float
    draft_length: int | Literal["auto"]
    draft_weights: Weights | None
    lookup: bool
    verify_budget: float


SKIP_KEYWORDS = {field.name: field.name for field in fields(SkipConfig)}
DRAFT_KEYWORDS = {
    "draft_budget": "budget",
    "draft_length": "length",
    "draft_weights": "weights",
    "lookup": "lookup",
    "verify_budget": "verify_budget",
}
"""Keyword argument of `Decoder.generate` -> field of DraftConfig."""
Config = TypeVar("Config", SkipConfig, DraftConfig)


def grouped(
    skip: SkipConfig | None,
    draft: DraftConfig | None,
    budget: float | None,
    settings: Mapping[str, Any],
) -> tuple[SkipConfig, DraftConfig]:
    """Both groups; their fields may be given as keyword arguments instead.

    Raises TypeError for an unknown keyword, ValueError where a group and a keyword argument differ.
    """
    settings = {**settings, **({} if budget is None else {"budget": budget})}
    for name in settings:
        if name not in SKIP_KEYWORDS and name not in DRAFT_KEYWORDS:
            raise TypeError(f"generate() got an unexpected keyword argument {name!r}")
    return (
        _with_keywords("skip", skip, SkipConfig(), settings, SKIP_KEYWORDS),
        _with_keywords("draft", draft, DraftConfig(), settings, DRAFT_KEYWORDS),
    )


def _with_keywords(
    group: str,
    config: Config | None,
    default: Config,
    settings: Mapping[str, Any],
    keywords: Mapping[str, str],
) -> Config:
    given = {field: settings[name] for name, field in keywords.items() if name in settings}
    if config is None:
        return replace(default, **given)
    for name, field in keywords.items():
        if name in settings and settings[name] != getattr(config, field):
            raise ValueError(
                f"{name}={settings[name]!r} contradicts {group}={config!r}: give one of them"
            )
    return config
