"""Which draft decodes a model fastest on this machine: measured once, stored with other choices.

Verification makes every draft give the model's own text, so a stopwatch may choose among them.
Plain decoding is measured beside them, and stays where no draft is faster.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch

from gateskip.decoding.draft_models import Weights, candidates
from gateskip.decoding.self_generate import asked_ids
from gateskip.decoding.stats import Generation
from gateskip.kernels import autotune
from gateskip.quantization.formats import weight_format
from gateskip.runtime.backend import Thresholds
from gateskip.runtime.learned_draft import LearnedDraft
from gateskip.runtime.skipping import SkippingModel

PROMPTS = (
    "Explain to a child why the sky is blue.",
    "Write a short letter to a neighbour whose dog barks at night.",
    "Which five things should be checked before a long drive, and why?",
    "Write a Python function that counts how often each word occurs in a text, and explain it.",
    "Translate into French, then into German: The shop on the corner opens at nine.",
    "How many minutes are three hours and a quarter? Show each step.",
)
"""What is answered. Not what the model asks itself: a network that drafts learned on such text, and
guesses it better than answers to others (docs/experiments.md)."""
SECONDS = 1.0  # that a turn of plain decoding lasts, within
LEAST, MOST = 16, 128  # tokens
CLEARLY = 1.03  # times as fast as plain decoding a draft must be: noise must not choose
SAMPLED = 32  # numbers of each tensor by which a model is known again
PLAIN = "plain"
Speeds = dict[str, float]
"""Tokens a second of `plain` decoding, and of drafts by name."""


class Decodes(Protocol):
    """What is timed: a Decoder."""

    skipping: SkippingModel
    network: LearnedDraft | None
    tokenizer: Any

    def thresholds(self, budget: float) -> Thresholds:
        """Thresholds of a budget."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], *args: Any, **settings: Any) -> Generation:
        """Continue prompts."""
        ...


def fastest(decoder: Decodes, budget: float) -> tuple[Weights | None, bool]:
    """The fastest draft at a budget, None without any, and whether it is clearly faster than
    plain decoding.

    Within `autotune.by_capability` nothing is timed: the likeliest draft is taken.
    """
    names = candidates(decoder.skipping, budget, decoder.network is not None)
    if not names:
        return None, False
    model, threads = decoder.skipping.model, torch.get_num_threads()
    known = f"{weight_format(model)} {fingerprint(model, decoder.thresholds(budget))}"
    if decoder.network is not None:
        known += f" {fingerprint(decoder.network.network, None)}"
    question = f"tokens/s of answers of {known} drafted by {', '.join(names)}, {threads} threads"
    found: Speeds | None = autotune.choice(question, partial(speeds, decoder, names, budget))
    return (names[0], True) if found is None else best(found)


def best(found: Speeds) -> tuple[Weights | None, bool]:
    """The fastest draft, and whether it is clearly faster than plain decoding."""
    drafts: dict[Any, float] = {name: rate for name, rate in found.items() if name != PLAIN}
    name: Weights = max(drafts, key=lambda each: drafts[each])
    return name, drafts[name] > CLEARLY * found[PLAIN]


def speeds(decoder: Decodes, names: Sequence[Weights], budget: float) -> Speeds:
    """Tokens a second of plain decoding and of each draft: medians of turns that alternate.

    The first turns are not counted: copies are made in them, and draft lengths are learned.
    """
    found: dict[str, list[float]] = {name: [] for name in (PLAIN, *names)}
    count = LEAST
    for prompt in PROMPTS:
        ids = asked_ids(decoder.tokenizer, prompt)
        for name, rates in found.items():
            settings = {"draft_weights": name, "draft_budget": budget, "lookup": False}
            way = {} if name == PLAIN else {"mode": "speculate", **settings}
            rates.append(_rate(decoder.generate([ids], count, **way)))
        count = min(MOST, max(LEAST, round(SECONDS * found[PLAIN][-1])))
    return {name: round(statistics.median(rates[1:]), 1) for name, rates in found.items()}


def _rate(generation: Generation) -> float:
    """Tokens a second after the first, which comes out of prefill."""
    stats = generation.stats
    return (stats.new_tokens - len(generation.tokens)) / max(stats.decode_s, 1e-9)


def fingerprint(model: Any, thresholds: Thresholds) -> str:
    """What a model's weights and its drafts' thresholds are known again by."""
    digest = hashlib.sha256(repr(thresholds and list(thresholds)).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED].contiguous()
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
