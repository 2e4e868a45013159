"""Requests to a scheduler, and a listener to their events."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from gateskip.decoding.config import DraftConfig, SkipConfig
from gateskip.decoding.decoder import Decoder
from gateskip.decoding.sampling import Sampler
from gateskip.serving.requests import Event, Finished, NewToken, Request, ServeLimits

LIMITS = ServeLimits(rows=4, context=200, queue=300, prefixes=3)

WARM = Sampler(temperature=0.9, top_p=0.95)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sampled": {"sampler": WARM, "seed": 5},
    "cold": {"sampler": Sampler(top_p=0.9, top_k=5)},
    "penalty": {"sampler": Sampler(temperature=0.8, repetition_penalty=1.2), "seed": 6},
    "logprobs": {"logprobs": 3},
    "sampled, logprobs": {"sampler": WARM, "seed": 7, "logprobs": 2},
    "skip": {"mode": "skip", "skip": SkipConfig(budget=0.7)},
    "skip more": {"mode": "skip", "skip": SkipConfig(budget=0.5, prompt="full")},
    "skip, sampled": {"mode": "skip", "skip": SkipConfig(budget=0.7), "sampler": WARM},
    "skip prompts": {"mode": "skip", "skip": SkipConfig(budget=0.7, answer="full")},
    "read": {"mode": "skip", "skip": SkipConfig(budget=0.7, prompt_budget=0.5)},
    "held": {"mode": "skip", "skip": SkipConfig(budget=0.7, hold=True)},
    "held, read": {"mode": "skip", "skip": SkipConfig(budget=0.7, prompt_budget=0.6, hold=True)},
    "drafts": {"mode": "speculate", "draft": DraftConfig(weights="int4", length=3)},
    "look-up": {"mode": "speculate", "draft": DraftConfig(weights="own")},
    "drafts, sampled": {
        "mode": "speculate",
        "draft": DraftConfig(weights="int4", length=3),
        "sampler": WARM,
    },
    "verified at a budget": {
        "mode": "speculate",
        "draft": DraftConfig(weights="own", budget=0.5, length=2, verify_budget=0.7),
    },
}


def ids(count: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 512, (count,), generator=generator).tolist())


class Listener:
    """Collects a request's events; `at` maps a number of tokens to a call at that moment."""

    def __init__(self, at: dict[int, Callable[[], Any]] | None = None) -> None:
        self.events: list[Event] = []
        self.at = at or {}
        self.done = threading.Event()

    def __call__(self, event: Event) -> None:
        assert not self.done.is_set(), "nothing follows the end"
        self.events.append(event)
        if isinstance(event, Finished):
            self.done.set()
        elif call := self.at.get(len(self.tokens)):
            call()

    @property
    def tokens(self) -> list[int]:
        return [event.token for event in self.events if isinstance(event, NewToken)]

    @property
    def end(self) -> Finished:
        assert self.done.wait(60)
        assert isinstance(self.events[-1], Finished)
        return self.events[-1]


def expected(decoder: Decoder, request: Request) -> list[int]:
    """The tokens of `generate`. Sampled ones of mode `speculate` are those of mode `plain`."""
    r = request
    draft = r.draft or DraftConfig()
    mode = "plain" if r.mode == "speculate" and r.sampler.temperature else r.mode
    return decoder.generate(
        [r.prompt],
        r.max_new_tokens,
        mode,
        skip=r.skip,
        draft=draft,
        sampler=r.sampler,
        seed=r.seed,
        eos=r.eos,
        stop=r.stop,
    ).tokens[0]


def request_of(name: str, seed: int, new: int = 20, size: int | None = None) -> Request:
    count = size or 3 + 11 * seed % 60
    return Request(prompt=ids(count, seed), max_new_tokens=new, **SETTINGS[name])
