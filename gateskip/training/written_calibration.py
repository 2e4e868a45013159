"""Thresholds calibrated where they are used: on text that the skipping model itself decodes.

Gates see other logits on an answer than on prose, and on what a skipping model writes than on what
the dense one would have written. So the model answers prompts at every budget, thresholds are
calibrated on the answers' tokens, and with these it answers again: a fixed point of a few rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from gateskip.calibration.budgets import CalibratedBudgets
from gateskip.calibration.thresholds import (
    CLOSE,
    Sample,
    Samples,
    calibrate_everywhere,
    kept_by,
)
from gateskip.decoding.decoder import Decoder
from gateskip.decoding.phases import Phase
from gateskip.decoding.self_generate import SAMPLER, TOGETHER
from gateskip.gates.base import Gates
from gateskip.model.progress import Progress
from gateskip.training.rollouts import runnable

ROUNDS = 2
LEAST_ANSWERS = 2  # tokens that count in all answers to a budget; fewer calibrate nothing

Prompts = Sequence[Sequence[int]]
Source = Literal["written", "both"]


@dataclass(frozen=True)
class Written:
    """Prompts, and the answers to them at one budget."""

    ids: Tensor  # [N, S], padded on the right
    phases: Mapping[Phase, Tensor]  # bool [N, S] each

    def sample(self, phase: Phase) -> Sample:
        """The tokens of one phase count."""
        return Sample(self.ids, self.phases[phase])

    @classmethod
    def of(cls, prompts: Prompts, answers: Prompts) -> Written:
        """Rows of prompts and answers, without each answer's last token, which enters nothing."""
        rows = [[*prompt, *own[:-1]] for prompt, own in zip(prompts, answers, strict=True)]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        places = torch.arange(longest)
        given = torch.tensor([[len(prompt)] for prompt in prompts])
        whole = torch.tensor([[len(row)] for row in rows])
        return cls(ids, {"prompt": places < given, "answer": (places >= given) & (places < whole)})


def calibrate_written(
    model: Any,
    gates: Gates,
    first: CalibratedBudgets,
    prompts: Prompts,
    budgets: Sequence[float],
    *,
    new_tokens: int,
    stops: Sequence[int] = (),
    text: Tensor | None = None,
    kv_rule: str = "project",
    gone: frozenset[int] = frozenset(),
    seed: int = 0,
    rounds: int = ROUNDS,
    progress: Progress | None = None,
    **settings: Any,
) -> CalibratedBudgets:
    """Thresholds for every budget on answers of up to `new_tokens` that are decoded at it.

    `first` are thresholds to begin with, of any text. Blocks `text` [N, S], where given, count
    beside the answers. `settings` are those of `calibrate`. Rounds end early once every budget
    keeps its share on what is written at it.

    Raises ValueError where answers end too soon to calibrate on.
    """
    found = first
    for number in range(rounds):
        written = write_at(
            model, gates, found, prompts, new_tokens, stops, kv_rule, seed + number, progress
        )
        if number and all(
            abs(share - budget) < CLOSE
            for budget, share in _shares(model, gates, found, written, kv_rule, "answer").items()
        ):
            break
        found = calibrate_everywhere(
            model,
            gates,
            _text_of(written, text),
            budgets,
            kv_rule,
            gone,
            progress=progress,
            **settings,
        )
    phases: tuple[Phase, ...] = ("prompt", "answer")
    written = write_at(model, gates, found, prompts, new_tokens, stops, kv_rule, seed + rounds)
    shares = {name: _shares(model, gates, found, written, kv_rule, name) for name in phases}
    apart = {b: {str(name): round(shares[name][b], 4) for name in phases} for b in written}
    return replace(found, phases=apart, prompts=first.prompts)


def write_at(
    model: Any,
    gates: Gates,
    budgets: CalibratedBudgets,
    prompts: Prompts,
    new_tokens: int,
    stops: Sequence[int],
    kv_rule: str,
    seed: int,
    progress: Progress | None = None,
) -> dict[float, Written]:
    """What the model answers at each calibrated budget.

    Raises ValueError where the answers of a budget hold next to nothing.
    """
    decoder = Decoder(runnable(model, gates, kv_rule), None, budgets)
    found: dict[float, Written] = {}
    for budget in sorted(budgets.thresholds, reverse=True):
        answers: list[list[int]] = []
        for start in range(0, len(prompts), TOGETHER):
            some, drawn = prompts[start : start + TOGETHER], seed * 1_000_003 + start
            answers += decoder.generate(
                some, new_tokens, "skip", budget, sampler=SAMPLER, seed=drawn, eos=stops
            ).tokens
        found[budget] = Written.of(prompts, answers)
        if int(found[budget].phases["answer"].sum()) < LEAST_ANSWERS:
            raise ValueError(f"answers at budget {budget:g} end at once: nothing to calibrate on")
        if progress is not None:
            progress(len(found), len(budgets.thresholds), "writing at budgets")
    return found


def _text_of(written: Mapping[float, Written], text: Tensor | None) -> Callable[[float], Samples]:
    """The answers written at the nearest budget, and the same text beside all of them."""
    beside = [] if text is None else [Sample.whole(text)]
    samples = {budget: [*beside, own.sample("answer")] for budget, own in written.items()}
    return lambda budget: samples[min(samples, key=lambda each: abs(each - budget))]


def _shares(
    model: Any,
    gates: Gates,
    budgets: CalibratedBudgets,
    written: Mapping[float, Written],
    kv_rule: str,
    phase: Phase,
) -> dict[float, float]:
    """What each budget's thresholds keep of one phase of what was written at it."""
    return {
        budget: kept_by(model, gates, [own.sample(phase)], budgets.thresholds[budget], kv_rule)
        for budget, own in written.items()
    }
