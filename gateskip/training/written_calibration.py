"""Calibrates thresholds where they are used: on text that the skipping model itself decodes.

Gate logits on answers differ from those on prose, and those on a skipping model's text from those
on the dense model's. So the model answers prompts at every budget, thresholds are calibrated on the
answers' tokens, and the model answers again with these: a fixed point after a few rounds.
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
MIN_ANSWER_TOKENS = 2  # tokens that count in all answers at a budget; fewer calibrate nothing

Prompts = Sequence[Sequence[int]]
Source = Literal["written", "both"]


@dataclass(frozen=True)
class Written:
    """Prompts, and the answers to them at one budget."""

    ids: Tensor  # [N, S], padded on the right
    phases: Mapping[Phase, Tensor]  # bool [N, S] each

    def sample(self, phase: Phase) -> Sample:
        """A sample in which the tokens of one phase count."""
        return Sample(self.ids, self.phases[phase])

    @classmethod
    def of(cls, prompts: Prompts, answers: Prompts) -> Written:
        """Rows of prompts and answers, without each answer's last token, which the model never
        reads."""
        rows = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        places = torch.arange(longest)
        first = torch.tensor([[len(prompt)] for prompt in prompts])  # of the answer [N, 1]
        end = torch.tensor([[len(row)] for row in rows])
        return cls(ids, {"prompt": places < first, "answer": (places >= first) & (places < end)})


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
    """Thresholds for every budget, calibrated on answers of up to `new_tokens` decoded at it.

    `first` are thresholds to begin with, from any text. Blocks `text` [N, S], where given, count
    beside the answers. `settings` are those of `calibrate`. Rounds end early once every budget
    keeps its share of the answers that are written at it.

    Raises ValueError where answers are too short to calibrate on.
    """
    calibrated = first
    for number in range(rounds):
        written = write_at(
            model, gates, calibrated, prompts, new_tokens, stops, kv_rule, seed + number, progress
        )
        shares = _shares(model, gates, calibrated, written, kv_rule, "answer") if number else {}
        if number and all(abs(share - budget) < CLOSE for budget, share in shares.items()):
            break
        calibrated = calibrate_everywhere(
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
    written = write_at(model, gates, calibrated, prompts, new_tokens, stops, kv_rule, seed + rounds)
    by_phase = {name: _shares(model, gates, calibrated, written, kv_rule, name) for name in phases}
    apart = {b: {str(name): round(by_phase[name][b], 4) for name in phases} for b in written}
    return replace(calibrated, phases=apart, prompts=first.prompts)


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
    """The model's answers to the prompts at each calibrated budget.

    Raises ValueError where all answers at a budget have fewer than MIN_ANSWER_TOKENS together.
    """
    decoder = Decoder(runnable(model, gates, kv_rule), None, budgets)
    written: dict[float, Written] = {}
    for budget in sorted(budgets.thresholds, reverse=True):
        answers: list[list[int]] = []
        for start in range(0, len(prompts), TOGETHER):
            part, part_seed = prompts[start : start + TOGETHER], seed * 1_000_003 + start
            answers += decoder.generate(
                part, new_tokens, "skip", budget, sampler=SAMPLER, seed=part_seed, eos=stops
            ).tokens
        written[budget] = Written.of(prompts, answers)
        if int(written[budget].phases["answer"].sum()) < MIN_ANSWER_TOKENS:
            raise ValueError(f"answers at budget {budget:g} end at once: nothing to calibrate on")
        if progress is not None:
            progress(len(written), len(budgets.thresholds), "writing at budgets")
    return written


def _text_of(written: Mapping[float, Written], text: Tensor | None) -> Callable[[float], Samples]:
    """A budget -> the answers written at the nearest budget, with `text` beside all of them."""
    beside = [] if text is None else [Sample.whole(text)]
    samples = {budget: [*beside, rows.sample("answer")] for budget, rows in written.items()}
    return lambda budget: samples[min(samples, key=lambda other: abs(other - budget))]


def _shares(
    model: Any,
    gates: Gates,
    budgets: CalibratedBudgets,
    written: Mapping[float, Written],
    kv_rule: str,
    phase: Phase,
) -> dict[float, float]:
    """The share that each budget's thresholds keep of one phase of the text written at it."""
    return {
        budget: kept_by(model, gates, [rows.sample(phase)], budgets.thresholds[budget], kv_rule)
        for budget, rows in written.items()
    }
