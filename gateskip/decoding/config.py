"""The settings of `Decoder.generate` in groups, and the same one by one, as keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypedDict, TypeVar

from gateskip.decoding.draft_models import Weights
from gateskip.decoding.phases import Compute

MAX_DRAFT = 16


@dataclass(frozen=True, kw_only=True)
class SkipConfig:
    """What the tokens of prompts and answers compute."""

    budget: float = 0.8
    """Share of the branches' multiply-adds that tokens compute in mode `skip`."""
    prompt: Compute = "budget"
    """What prompts are computed at where tokens skip: the `budget`, or `full` compute."""
    answer: Compute = "budget"
    """What answers are computed at, likewise."""
    prompt_budget: float | None = None
    """Share that a prompt's tokens compute but the last, by thresholds that keep what answers need
    of them: see calibration/reading.py. Without it prompts are computed at `budget`."""
    hold: bool = False
    """Keep every row at its budget by thresholds that move with its own past: see
    runtime/budget_control.py."""


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """How mode `speculate` drafts and verifies."""

    budget: float = 1.0
    """Share of the branches' multiply-adds that a draft computes; 1 skips nothing, and then the
    model's own weights draft nothing."""
    length: int | Literal["auto"] = "auto"
    """Drafted tokens a verify pass, 1 to 16, or `auto`: set by measured costs and acceptance, 0
    while speculation does not pay."""
    weights: Weights = "auto"
    """`own`; `int4-head`, where a 4-bit LM head ranks tokens; a copy of all weights in fewer bits,
    `int4`, `int3`, `int2` (3-bit head) or `nf4`; the small network that the stage `draft-network`
    trained, `learned`; or `auto`, the one that is fastest here, which is measured once a machine.
    """
    lookup: bool = True
    """Before drafting, propose what followed the last tokens earlier in the text."""
    verify_budget: float = 1.0
    """Share that verification computes: at 1 the tokens are those of mode `plain`, or when sampling
    their distribution; below 1 those of `skip` at that budget."""

    def __post_init__(self) -> None:
        if self.length != "auto" and not 1 <= self.length <= MAX_DRAFT:
            raise ValueError(f"draft_length must be 'auto' or 1 to {MAX_DRAFT}")


class PhaseSettings(TypedDict, total=False):
    """The fields of SkipConfig but its budget, as keyword arguments."""

    prompt: Compute
    answer: Compute
    prompt_budget: float | None
    hold: bool


class Settings(PhaseSettings, total=False):
    """The fields of both groups but `budget`, as keyword arguments of `Decoder.generate`."""

    draft_budget: float
    draft_length: int | Literal["auto"]
    draft_weights: Weights
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
"""Keyword arguments of `Decoder.generate`, and the fields that they are."""
Config = TypeVar("Config", SkipConfig, DraftConfig)


def grouped(
    skip: SkipConfig | None,
    draft: DraftConfig | None,
    budget: float | None,
    settings: Mapping[str, Any],
) -> tuple[SkipConfig, DraftConfig]:
    """Both groups, of which fields may be given as keyword arguments instead.

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
