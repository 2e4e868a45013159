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
    """The compute of prompts and answers."""

    budget: float = 0.8
    """Share of the branches' multiply-adds that tokens compute in mode `skip`."""
    prompt: Compute = "budget"
    """Compute of the prompt in modes that skip: the `budget`, or `full`."""
    answer: Compute = "budget"
    """Compute of the answer: the `budget`, or `full`."""
    prompt_budget: float | None = None
    """Share of multiply-adds that a prompt's tokens compute, except the last one, by thresholds
    with the least effect on answers: see calibration/reading.py. When None, prompts are computed at
    `budget`."""
    hold: bool = False
    """Whether each row keeps to its budget by thresholds that move with its own past: see
    runtime/budget_control.py."""


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """How mode `speculate` drafts and verifies."""

    budget: float = 1.0
    """Share of the branches' multiply-adds that drafting computes. 1 skips nothing; the model's own
    weights then draft nothing."""
    length: int | Literal["auto"] = "auto"
    """Tokens drafted before each verification, 1 to 16. `auto` sets it from measured cost and
    acceptance, to 0 where drafting does not pay."""
    weights: Weights | None = None
    """The draft model: the model's own weights (`own`); these with a 4-bit LM head (`int4-head`); a
    copy of all weights in fewer bits (`int4`, `int3`, `int2` with a 3-bit head, or `nf4`); the
    small network that the stage `draft-network` trained (`learned`); another model, the
    `draft_model` of `gateskip.load` (`model`); or `auto`, the fastest of these, measured once per
    machine. None is `model` where one was loaded, and `auto` elsewhere."""
    lookup: bool = True
    """Whether to look up the last tokens earlier in the text and propose the tokens that followed
    there, before a draft model is asked."""
    verify_budget: float = 1.0
    """Share of multiply-adds that verification computes. At 1 the tokens are those of mode `plain`
    (when sampling: their distribution); below 1 those of `skip` at that budget."""

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
