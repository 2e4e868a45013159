"""The tokens of a request are those of `generate`, whatever runs beside it; and none is lost."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gateskip
from compose.artifacts.folder import copy_companions
from gateskip.calibration.reading import calibrate_prompts, prompt_sensitivity
from gateskip.calibration.thresholds import calibrate
from gateskip.calibration.warm_start import warm_start
from gateskip.checkpoint import GateFile, grid_of, save_gates
from gateskip.decoding import prefill
from gateskip.decoding.config import DraftConfig, SkipConfig
from gateskip.decoding.decoder import Decoder
from gateskip.decoding.sampling import Sampler
from gateskip.kernels import autotune, ops
from gateskip.quantization.folders import load_model
from gateskip.serving import slots
from gateskip.serving.requests import (
    Draining,
    Event,
    Finished,
    NewToken,
    QueueFull,
    Request,
    ServeLimits,
)
from gateskip.serving.scheduler import Scheduler

pytestmark = pytest.mark.skipif(not ops.has_decoder(), reason="no native engine here")

BUDGETS = (0.9, 0.7, 0.5)
LIMITS = ServeLimits(rows=4, context=200, queue=300, prefixes=3)
WARM = Sampler(temperature=0.9, top_p=0.95)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sampled": {"sampler": WARM, "seed": 5},
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


@pytest.fixture(autouse=True)
def our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopwatch beside other work would now and then choose the libraries' layers."""
    monkeypatch.setattr(autotune, "own_are_faster", lambda times: False)


@pytest.fixture(scope="module")
def make_decoder(
    make_tiny: Callable[..., Path],
    grid_folder: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Decoder]:
    """A tiny model with gates, by family and weights: `llama-int8`."""
    made: dict[str, Decoder] = {}

    def make(kind: str) -> Decoder:
        if kind not in made:
            source, form = make_tiny(kind.split("-")[0]), kind.split("-")[1]
            blocks = torch.tensor([ids(48, 10 + row) for row in range(6)])
            model = load_model(source, "float32")
            gates, _ = warm_start(model, blocks)
            grid, kept = grid_of(calibrate(model, gates.requires_grad_(False), blocks, BUDGETS))
            gates.prompt_sensitivity = prompt_sensitivity(model, gates, blocks[:2])
            prompts = calibrate_prompts(model, gates, blocks, BUDGETS)
            folder = tmp_path_factory.mktemp(kind) / "model"
            stored = grid_folder(source, "int8", group_size=32) if form == "int8" else source
            shutil.copytree(stored, folder)
            copy_companions(source, folder)
            save_gates(folder, GateFile(gates, "project", grid, kept, prompts=prompts))
            dtype = "float32" if form == "float32" else "bfloat16"
            made[kind] = gateskip.load(folder, dtype, "native")
        return made[kind]

    return make


@pytest.fixture(params=["llama-float32", "llama-int8", "gemma2-int8"])
def decoder(make_decoder: Callable[[str], Decoder], request: pytest.FixtureRequest) -> Decoder:
    return make_decoder(request.param)


@pytest.fixture
def serve() -> Iterator[Callable[..., Scheduler]]:
    """A scheduler that runs; it is closed at the end."""
    running: list[Scheduler] = []

    def make(decoder: Decoder, limits: ServeLimits = LIMITS) -> Scheduler:
        scheduler = Scheduler(decoder, limits)
        scheduler.start()
        running.append(scheduler)
        return scheduler

    yield make
    for scheduler in running:
        scheduler.close()


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


@pytest.mark.parametrize("name", SETTINGS)
def test_alone(decoder: Decoder, serve: Callable[..., Scheduler], name: str) -> None:
    request, heard = request_of(name, 4), Listener()
    wanted = expected(decoder, request)
    scheduler = serve(decoder)
    scheduler.submit(request, heard)
    receipt = heard.end.receipt
    assert heard.tokens == wanted and heard.end.reason == "length"
    assert (receipt.prompt_tokens, receipt.new_tokens) == (len(request.prompt), 20)
    budget = {"skip": request.skip and request.skip.budget, "speculate": None, "plain": None}
    assert receipt.budget == budget[request.mode] or name == "verified at a budget"
    assert (receipt.skipped is not None) == (request.mode == "skip" or "verified" in name)


def test_all_at_once(decoder: Decoder, serve: Callable[..., Scheduler]) -> None:
    """Every setting beside all others, twice, in few rows, and their sum in the snapshot."""
    requests = [request_of(name, seed) for seed in (1, 2) for name in SETTINGS]
    wanted = [expected(decoder, request) for request in requests]
    scheduler, heard = serve(decoder), [Listener() for _ in requests]
    for request, listener in zip(requests, heard, strict=True):
        scheduler.submit(request, listener)
    assert scheduler.drain(60)
    for request, listener, tokens in zip(requests, heard, wanted, strict=True):
        assert (request, listener.tokens) == (request, tokens)
        if request.mode == "skip":
            assert 0.05 < (listener.end.receipt.skipped or 0) < 0.8
    seen, receipts = scheduler.snapshot(), [listener.end.receipt for listener in heard]
    assert seen.requests == {"length": len(requests)} and not seen.queued and not seen.rows
    assert seen.new_tokens == 20 * len(requests)
    assert seen.prompt_tokens == sum(len(request.prompt) for request in requests)
    assert seen.reused_tokens == sum(receipt.reused_tokens for receipt in receipts)
    assert seen.drafted == sum(receipt.drafted for receipt in receipts) >= seen.accepted > 0
    assert seen.looked_up == sum(receipt.looked_up for receipt in receipts)
    assert len(seen.first_token_s) == len(requests) and not scheduler.snapshot().first_token_s


@pytest.mark.parametrize("name", SETTINGS)
def test_joined_late_and_after_a_cancelled_neighbour(
    decoder: Decoder, serve: Callable[..., Scheduler], name: str
) -> None:
    first, late, last = request_of(name, 3, 40), request_of(name, 8), request_of("plain", 9)
    wanted = [expected(decoder, request) for request in (first, late, last)]
    scheduler = serve(decoder, replace(LIMITS, rows=2))
    heard, heard_last, tickets = Listener(), Listener(), dict[str, Any]()
    cancelled = Listener({6: lambda: tickets["neighbour"].cancel()})

    def neighbour() -> None:
        tickets["neighbour"] = scheduler.submit(request_of(name, 7, 100), cancelled)
        scheduler.submit(late, heard)

    one = Listener({5: neighbour, 25: lambda: scheduler.submit(last, heard_last)})
    scheduler.submit(first, one)
    assert one.end.reason == heard.end.reason == heard_last.end.reason == "length"
    assert [one.tokens, heard.tokens, heard_last.tokens] == wanted
    assert cancelled.end.reason == "cancelled" and 6 <= len(cancelled.tokens) < 20
    assert cancelled.tokens == expected(decoder, request_of(name, 7, 100))[: len(cancelled.tokens)]


PREFIXES = [name for name in SETTINGS if "sampled" not in name]


@pytest.mark.parametrize("name", PREFIXES)
@pytest.mark.parametrize("kind", ["llama-int8", "llama-float32"])
def test_a_prefix_is_reused(
    make_decoder: Callable[[str], Decoder],
    serve: Callable[..., Scheduler],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    name: str,
) -> None:
    """Whole pieces of it where products may depend on pieces, all of it elsewhere; a row that has
    it whole goes on, another one is copied."""
    decoder = make_decoder(kind)
    monkeypatch.setattr(prefill, "PIECE", 64)
    monkeypatch.setattr(slots, "PIECE", 64)
    system = ids(70, 1)
    texts = [system, system + ids(9, 2), system + ids(30, 3), system + ids(30, 3) + ids(20, 4)]
    texts += [texts[-1], ids(20, 5), system[:66] + ids(4, 6)]
    scheduler = serve(decoder)
    reused = []
    for text in texts:
        request, heard = Request(prompt=text, max_new_tokens=8, **SETTINGS[name]), Listener()
        scheduler.submit(request, heard)
        reused.append(heard.end.receipt.reused_tokens)
        assert (len(reused), heard.tokens) == (len(reused), expected(decoder, request))
    if decoder.skipping.any_pieces:
        last = 1 if name in ("skip more", "skip prompts", "read", "held, read") else 0
        assert reused == [0, 70 - last, 70 - last, 100 - last, 119, 0, 66]
    else:
        assert reused == [0, 64, 64, 64, 64, 0, 64]


def test_other_settings_share_no_prefix(
    make_decoder: Callable[[str], Decoder], serve: Callable[..., Scheduler]
) -> None:
    decoder, prompt = make_decoder("llama-int8"), ids(90, 1)
    scheduler = serve(decoder)
    for name in ("plain", "skip", "read", "drafts", "skip more"):
        heard = Listener()
        scheduler.submit(Request(prompt=prompt, max_new_tokens=4, **SETTINGS[name]), heard)
        shares = decoder.skipping.any_pieces and name in ("drafts", "skip more")
        assert heard.end.receipt.reused_tokens == 89 * shares
