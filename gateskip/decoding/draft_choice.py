"""Finds the draft that decodes a model fastest on this machine: measured once, stored with other
choices.

Verification makes every draft give the model's own text, so a stopwatch may choose among them.
Plain decoding is measured with them, and wins where no draft is faster.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch

from gateskip.decoding.config import DraftConfig
from gateskip.decoding.draft_models import LearnedDraft, Weights, candidates
from gateskip.decoding.own_text import fingerprint
from gateskip.decoding.self_generate import asked_ids
from gateskip.decoding.stats import Generation
from gateskip.kernels import autotune
from gateskip.quantization.formats import weight_format
from gateskip.runtime.backend import Thresholds
from gateskip.runtime.skipping import SkippingModel

PROMPTS = (
    "Explain to a child why the sky is blue.",
    "Write a short letter to a neighbour whose dog barks at night.",
    "Which five things should be checked before a long drive, and why?",
    "Write a Python function that counts how often each word occurs in a text, and explain it.",
    "Translate into French, then into German: The shop on the corner opens at nine.",
    "How many minutes are three hours and a quarter? Show each step.",
)
"""Prompts that are answered while drafts are timed. Text that the model asks itself would not do: a
draft network was trained on such text, and predicts it better than answers to other prompts
(docs/experiments.md)."""
TURNS = 2  # of each prompt, the faster of which counts: another process may have run in one
SECONDS = 0.7  # that a turn of plain decoding lasts, within
MIN_TOKENS, MAX_TOKENS = 16, 128  # of a turn
CLEARLY = 1.03  # times as fast as plain decoding a draft must be: noise must not choose
PLAIN = "plain"
Speeds = dict[str, float]
"""Name of the draft -> speed relative to plain decoding; 1 for `plain`."""


class Decodes(Protocol):
    """The part of a Decoder that is timed."""

    skipping: SkippingModel
    network: LearnedDraft | None
    draft_model: SkippingModel | None
    tokenizer: Any

    def thresholds(self, budget: float) -> Thresholds:
        """Thresholds of a budget."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], *args: Any, **settings: Any) -> Generation:
        """Continue prompts."""
        ...


def fastest(decoder: Decodes, budget: float) -> tuple[Weights | None, bool]:
    """The fastest draft at a budget, None without any, and whether it is clearly faster than plain
    decoding.

    Within `autotune.by_capability` nothing is timed: the first candidate is taken.
    """
    given: list[Weights] = ["learned"] if decoder.network is not None else []
    given += ["model"] if decoder.draft_model is not None else []
    names = candidates(decoder.skipping, budget, given)
    if not names:
        return None, False
    model, threads = decoder.skipping.model, torch.get_num_threads()
    identity = f"{weight_format(model)} {fingerprint(model, decoder.thresholds(budget))}"
    if decoder.network is not None:
        identity += f" {fingerprint(decoder.network.network, None)}"
    if decoder.draft_model is not None:
        identity += f" {fingerprint(decoder.draft_model.model, None)}"
    drafts = f"drafted by {', '.join(names)}, {threads} threads"
    question = f"times as fast as plain decoding of {identity} {drafts}"
    measured: Speeds | None = autotune.choice(question, partial(speeds, decoder, names, budget))
    if measured is None:
        return names[0], True
    # A stored answer has another order, which must not decide between two that are equal.
    return best({name: measured[name] for name in (PLAIN, *names)})


def best(measured: Speeds) -> tuple[Weights | None, bool]:
    """The fastest draft, and whether it is clearly faster than plain decoding."""
    drafts: dict[Any, float] = {name: rate for name, rate in measured.items() if name != PLAIN}
    name: Weights = max(drafts, key=lambda draft: drafts[draft])
    return name, drafts[name] > CLEARLY * measured[PLAIN]


def speeds(decoder: Decodes, names: Sequence[Weights], budget: float) -> Speeds:
    """Speeds relative to plain decoding of the same prompt: medians over prompts.

    Turns alternate. The first prompt is not counted, because it makes copies and learns draft
    lengths.
    """
    ratios: dict[str, list[float]] = {name: [] for name in (PLAIN, *names)}
    count = MIN_TOKENS
    for prompt in PROMPTS:
        ids = asked_ids(decoder.tokenizer, prompt)
        run = partial(_turn, decoder, ids, count, list(ratios), budget)
        turns = [run() for _ in range(TURNS)]
        rates = {name: max(turn[name] for turn in turns) for name in ratios}
        for name, rate in rates.items():
            ratios[name].append(rate / rates[PLAIN])
        count = min(MAX_TOKENS, max(MIN_TOKENS, round(SECONDS * rates[PLAIN])))
    return {name: round(statistics.median(of_draft[1:]), 3) for name, of_draft in ratios.items()}


def _turn(
    decoder: Decodes, ids: list[int], count: int, names: Sequence[Any], budget: float
) -> dict[str, float]:
    """Tokens a second of each way to answer one prompt."""
    rates = {}
    for name in names:
        if name == PLAIN:
            rates[name] = _rate(decoder.generate([ids], count))
        else:
            draft = DraftConfig(budget=budget, weights=name, lookup=False)
            rates[name] = _rate(decoder.generate([ids], count, "speculate", draft=draft))
    return rates


def _rate(generation: Generation) -> float:
    """Tokens a second after the first token, which comes from prefill."""
    stats = generation.stats
    return (stats.new_tokens - len(generation.tokens)) / max(stats.decode_s, 1e-9)
