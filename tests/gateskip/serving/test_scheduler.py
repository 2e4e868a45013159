"""The tokens of a request are those of `generate`, whatever runs beside it; and none is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from served import LIMITS, SETTINGS, WARM, Listener, expected, ids, request_of
from tiny_models import first_layers

import gateskip
from gateskip.decoding import prefill
from gateskip.decoding.config import DraftConfig
from gateskip.decoding.decoder import Decoder
from gateskip.kernels import ops
from gateskip.serving import drafts, slots
from gateskip.serving.requests import Request
from gateskip.serving.scheduler import Scheduler

pytestmark = pytest.mark.skipif(not ops.has_decoder(), reason="no native engine here")


@pytest.fixture(params=["llama-float32", "llama-int8", "gemma2-int8"])
def decoder(make_decoder: Callable[[str], Decoder], request: pytest.FixtureRequest) -> Decoder:
    return make_decoder(request.param)


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
    if name.startswith("drafts"):
        assert receipt.accepted < receipt.drafted > receipt.looked_up
        assert receipt.accepted > 0 or "sampled" in name, "where chance does not decide"
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
        assert reused == [0, 70 - last, 70, 100 - last, 119, 0, 66]
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


def test_another_model_drafts(
    tiny_llama: Path,
    serve: Callable[..., Scheduler],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Its cache has the texts of all rows, also of rows that took over another one's prefix, or
    were not drafted for before."""
    monkeypatch.setattr(drafts, "CAUGHT_UP", 24)
    folder = first_layers(tiny_llama, tmp_path / "model", 2)
    decoder = gateskip.load(tiny_llama, "float32", "native", draft_model=folder)
    monkeypatch.setattr(prefill, "PIECE", 64)
    monkeypatch.setattr(slots, "PIECE", 64)
    system = ids(70, 1)
    texts = [system, ids(9, 2), system + ids(30, 3), system + ids(60, 3), ids(40, 5)]
    config = DraftConfig(length=4)
    how: list[dict[str, Any]] = [{"mode": "speculate", "draft": config}, {}]
    how += [how[0] | {"sampler": WARM, "seed": 2}, how[0]]
    for rows in (1, 3):
        scheduler = serve(decoder, replace(LIMITS, rows=rows))
        requests = [Request(prompt=text, max_new_tokens=24, **way) for text in texts for way in how]
        heard = [Listener() for _ in requests]
        for request, listener in zip(requests, heard, strict=True):
            scheduler.submit(request, listener)
        assert scheduler.drain(60)
        assert [listener.tokens for listener in heard] == [expected(decoder, r) for r in requests]
        seen = scheduler.snapshot()
        assert seen.accepted > 10 and seen.reused_tokens > 0


def test_a_model_that_drafts_for_itself_is_always_right(
    tiny_llama: Path, serve: Callable[..., Scheduler]
) -> None:
    """A token missing or left over in its cache would change a draft."""
    decoder = gateskip.load(tiny_llama, "float32", "native", draft_model=tiny_llama)
    config = DraftConfig(length=4, lookup=False)
    scheduler, heard = serve(decoder), [Listener() for _ in range(6)]
    for seed, listener in enumerate(heard):
        request = Request(
            prompt=ids(30, seed % 4), max_new_tokens=20 + seed, mode="speculate", draft=config
        )
        scheduler.submit(request, listener)
    assert scheduler.drain(60)
    receipts = [listener.end.receipt for listener in heard]
    assert all(receipt.accepted == receipt.drafted > 10 for receipt in receipts)


def test_keys_and_values_in_8_bits(
    make_decoder: Callable[[str], Decoder], serve: Callable[..., Scheduler]
) -> None:
    decoder = make_decoder("llama-int8")
    with decoder.skipping.keeping("int8"):
        scheduler = serve(decoder)
        system = ids(70, 1)
        for text in (system, system + ids(9, 2), system + ids(30, 3), ids(90, 4)):
            request, heard = Request(prompt=text, max_new_tokens=12), Listener()
            scheduler.submit(request, heard)
            assert heard.end.reason == "length" and heard.tokens == expected(decoder, request)
    if decoder.skipping.any_pieces:
        assert scheduler.snapshot().reused_tokens == 140
