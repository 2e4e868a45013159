"""Queue, memory, deadlines, cancelling, failures, the end: nothing is lost, and the loop lives."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from served import LIMITS, SETTINGS, WARM, Listener, expected, ids, request_of

from gateskip.decoding.config import DraftConfig, SkipConfig
from gateskip.decoding.decoder import Decoder
from gateskip.decoding.sampling import Sampler
from gateskip.kernels import ops
from gateskip.serving import scheduler as scheduling
from gateskip.serving.requests import Draining, Finished, NewToken, QueueFull, Request, ServeLimits
from gateskip.serving.scheduler import Scheduler

pytestmark = pytest.mark.skipif(not ops.has_decoder(), reason="no native engine here")
Serve = Callable[..., Scheduler]


@pytest.fixture
def decoder(make_decoder: Callable[[str], Decoder]) -> Decoder:
    return make_decoder("llama-int8")


def test_nothing_is_lost(decoder: Decoder, serve: Serve) -> None:
    """200 requests of all kinds, a third of them cancelled anywhere from the queue on."""
    chance = random.Random(1)
    names = list(SETTINGS)
    whole = {name: expected(decoder, request_of(name, 1, 24)) for name in names}
    scheduler, heard = serve(decoder), list[tuple[str, int, Listener]]()
    for _ in range(200):
        name, new = chance.choice(names), chance.randint(1, 24)
        tickets = list[Any]()
        at = {chance.randint(1, 30): lambda tickets=tickets: tickets[0].cancel()}
        listener = Listener(at if chance.random() < 0.3 else None)
        tickets.append(scheduler.submit(request_of(name, 1, new), listener))
        heard.append((name, new, listener))
        if chance.random() < 0.1:
            tickets[0].cancel()
    assert scheduler.drain(120)
    for name, new, listener in heard:
        assert listener.tokens == whole[name][: len(listener.tokens)]
        assert listener.end.reason == "cancelled" or len(listener.tokens) == new
        assert listener.end.receipt.new_tokens == len(listener.tokens)
    seen = scheduler.snapshot()
    assert seen.requests == Counter(listener.end.reason for _, _, listener in heard)
    assert seen.requests["cancelled"] > 20 < seen.requests["length"]
    assert seen.new_tokens == sum(len(listener.tokens) for _, _, listener in heard)


def test_the_queue_has_a_bound_and_an_order(decoder: Decoder) -> None:
    scheduler = Scheduler(decoder, replace(LIMITS, rows=1, queue=3))
    order, heard = list[int](), [Listener({1: lambda i=i: order.append(i)}) for i in range(3)]
    for listener in heard:
        scheduler.submit(request_of("plain", 1, 4), listener)
    with pytest.raises(QueueFull, match="3 requests wait"):
        scheduler.submit(request_of("plain", 1), Listener())
    assert scheduler.snapshot().queued == 3
    scheduler.start()
    assert scheduler.drain(60) and order == [0, 1, 2]
    with pytest.raises(Draining):
        scheduler.submit(request_of("plain", 1), Listener())
    scheduler.close()


def test_a_queued_request_is_cancelled_or_late(decoder: Decoder, serve: Serve) -> None:
    scheduler, late, gone = serve(decoder, replace(LIMITS, rows=1)), Listener(), Listener()

    def others() -> None:
        scheduler.submit(replace(request_of("plain", 2), deadline=1e-6), late)
        scheduler.submit(request_of("plain", 3), gone).cancel()

    first = Listener({3: others})
    scheduler.submit(request_of("plain", 1, 30), first)
    assert (late.end.reason, gone.end.reason) == ("deadline", "cancelled")
    assert not late.tokens and not gone.tokens
    assert first.end.reason == "length" and first.tokens == expected(
        decoder, request_of("plain", 1, 30)
    )


def test_a_deadline_ends_with_the_tokens_so_far(
    decoder: Decoder, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("gateskip.serving.answers.time.monotonic", lambda: now[0])

    def later() -> None:
        now[0] = 2.0

    request, heard = replace(request_of("plain", 1, 60), deadline=1.0), Listener({5: later})
    serve(decoder).submit(request, heard)
    assert heard.end.reason == "deadline" and len(heard.tokens) == 5
    assert heard.end.receipt.total_s == 2.0 and heard.end.receipt.first_token_s == 0.0


def test_close_cancels_what_is_left(decoder: Decoder, serve: Serve) -> None:
    scheduler = serve(decoder, replace(LIMITS, rows=1))
    waiting = Listener()
    first = Listener({2: lambda: scheduler.submit(request_of("plain", 2), waiting)})
    scheduler.submit(request_of("plain", 1, 150), first)
    assert not scheduler.drain(0)
    scheduler.close()
    reasons = {first.end.reason, waiting.end.reason} if waiting.events else {first.end.reason}
    assert reasons <= {"cancelled", "length"} and not scheduler.snapshot().rows


def test_memory_has_a_bound(decoder: Decoder) -> None:
    one = Scheduler(decoder, replace(LIMITS, rows=1)).snapshot().cache_bytes
    limits = replace(LIMITS, rows=32, cache_bytes=5 * one + one // 2)
    bounded = Scheduler(decoder, limits)
    assert bounded.limits.rows == 5
    assert bounded.snapshot().cache_bytes == 5 * one <= 5 * one + one // 2
    with pytest.raises(ValueError, match=rf"one row of 200 tokens needs {one} bytes"):
        Scheduler(decoder, replace(LIMITS, cache_bytes=one - 1))
    assert Scheduler(decoder, ServeLimits(rows=1)).limits.context == 512 - 16, "the model's own"


def test_long_prompts_do_not_stall_rows(
    decoder: Decoder, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of 160 tokens is read in ten pieces, with a step of the other row between them."""
    monkeypatch.setattr(scheduling, "BESIDE", 16)
    prompt, seen = ids(160, 5), list[int]()
    late = Listener({1: lambda: seen.append(len(first.tokens))})
    joined = Request(prompt=prompt, max_new_tokens=8)
    first = Listener({5: lambda: scheduler.submit(joined, late)})
    scheduler = serve(decoder)
    scheduler.submit(request_of("plain", 1, 60), first)
    assert late.end.reason == first.end.reason == "length"
    if decoder.skipping.any_pieces:
        assert seen == [5 + 9]
    assert late.tokens == expected(decoder, joined)
    assert first.tokens == expected(decoder, request_of("plain", 1, 60))


def test_stops(decoder: Decoder, serve: Serve) -> None:
    request = request_of("plain", 4, 30)
    tokens = expected(decoder, request)
    words = decoder.tokenizer.decode(tokens[4:7])
    scheduler = serve(decoder)
    for ends in ({"eos": (tokens[9],)}, {"stop": (words,)}, {"eos": (tokens[9],), "stop": ("~",)}):
        heard, stopping = Listener(), replace(request, **ends)
        scheduler.submit(stopping, heard)
        assert heard.end.reason == "stop" and heard.tokens == expected(decoder, stopping)


def test_log_probabilities(decoder: Decoder, serve: Serve) -> None:
    request, heard = request_of("logprobs", 4, 6), Listener()
    serve(decoder).submit(request, heard)
    assert heard.end.reason == "length"
    model = decoder.skipping
    text = [*request.prompt, *heard.tokens]
    cache = model.new_cache(1, 200)
    model.forward(torch.tensor([request.prompt]), cache, [0])
    first = len(request.prompt)
    states = model.decode([text[first:]], cache, [0], [first])
    following = torch.log_softmax(model.head(states), -1)
    events = [event for event in heard.events[1:] if isinstance(event, NewToken)]
    for event, logprobs in zip(events, following, strict=False):
        top = logprobs.topk(3)
        assert event.top == tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        assert event.logprob == float(logprobs[event.token]) == event.top[0][1]
    assert heard.end.receipt.drafted == 0


def test_drafts_that_cannot_be_made_fail_their_request_alone(
    decoder: Decoder, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drafting(config: DraftConfig, rows: int) -> None:
        raise ValueError("no copy")

    monkeypatch.setattr(decoder, "drafting", drafting)
    scheduler, heard = serve(decoder), [Listener(), Listener(), Listener()]
    heard[0].at = {4: lambda: scheduler.submit(request_of("drafts", 2), heard[1])}
    for name, listener in (("plain", heard[0]), ("look-up", heard[2])):
        scheduler.submit(request_of(name, 1), listener)
    assert [listener.end.reason for listener in heard] == ["length", "failed", "failed"]
    assert heard[1].end.error == heard[2].end.error == "no copy"
    assert heard[0].tokens == expected(decoder, request_of("plain", 1))


class Failing:
    """Text, or scores, that cannot be had."""

    def decode(self, tokens: list[int]) -> str:
        raise RuntimeError("no text")

    def __call__(self, ids: Any, scores: Any) -> Any:
        raise RuntimeError("no scores")


def test_a_failing_request_ends_alone(
    decoder: Decoder, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop that fails, a sampler that does, and a listener that does."""
    other, bad_stop, bad_sampler, scheduler = Listener(), Listener(), Listener(), serve(decoder)
    monkeypatch.setattr(decoder, "tokenizer", Failing())
    broken = Sampler(temperature=1.0, processors=(Failing(),))

    def fails() -> None:
        raise RuntimeError("not heard")

    bad_listener = Listener({4: fails})

    def submit() -> None:
        scheduler.submit(replace(request_of("plain", 2), stop=("x",)), bad_stop)
        scheduler.submit(replace(request_of("plain", 3), sampler=broken), bad_sampler)
        scheduler.submit(request_of("plain", 3), bad_listener)

    first = Listener({5: submit, 30: lambda: scheduler.submit(request_of("skip", 6), other)})
    scheduler.submit(request_of("plain", 1, 40), first)
    assert (bad_stop.end.reason, bad_stop.end.error) == ("failed", "no text")
    assert (bad_sampler.end.reason, bad_sampler.end.error) == ("failed", "no scores")
    assert (bad_listener.end.reason, bad_listener.end.error) == ("failed", "not heard")
    assert first.end.reason == other.end.reason == "length"
    assert first.tokens == expected(decoder, request_of("plain", 1, 40))
    assert other.tokens == expected(decoder, request_of("skip", 6))


def test_a_failing_model_ends_the_rows_of_its_step(
    decoder: Decoder, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, scheduler, heard = decoder.skipping, serve(decoder), [Listener() for _ in range(3)]
    argmax, calls = model.argmax, list[int]()

    def failing(*args: Any) -> Any:
        calls.append(len(args[0]))
        if len(calls) == 3:
            raise RuntimeError("no memory")
        return argmax(*args)

    monkeypatch.setattr(model, "argmax", failing)

    def others() -> None:
        scheduler.submit(request_of("plain", 2), heard[1])
        scheduler.submit(request_of("skip", 2), heard[2])

    heard[0].at = {3: others}
    scheduler.submit(request_of("plain", 1), heard[0])
    assert [listener.end.reason for listener in heard] == ["failed", "failed", "length"]
    assert heard[0].end.error == "no memory" and calls[:3] == [2, 2, 2]
    again = Listener()
    scheduler.submit(request_of("plain", 2), again)
    assert again.end.reason == "length" and again.end.receipt.reused_tokens == 0
    assert again.tokens == expected(decoder, request_of("plain", 2))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ()}, "at least one token"),
    ({"prompt": (512,)}, "one of the 512"),
    ({"prompt": (-1,)}, "one of the 512"),
    ({"max_new_tokens": 0}, "at least 1"),
    ({"max_new_tokens": 200}, "more than the 200 of a request"),
    ({"mode": "fast"}, "one of plain, skip, speculate"),
    ({"logprobs": -1}, "logprobs -1"),
    ({"mode": "skip", "skip": SkipConfig(budget=0.1)}, "0.1"),
    ({"mode": "skip", "skip": SkipConfig(prompt="full", answer="full")}, "skip nothing"),
    ({"mode": "speculate", "draft": DraftConfig(weights="learned")}, "no draft network"),
    ({"mode": "speculate", "draft": DraftConfig(weights="model")}, "no draft model"),
    ({"mode": "speculate", "draft": DraftConfig(budget=0.1)}, "0.1"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_requests_that_are_refused(
    decoder: Decoder, settings: dict[str, Any], message: str
) -> None:
    scheduler = Scheduler(decoder, LIMITS)
    with pytest.raises(ValueError, match=message):
        scheduler.submit(replace(request_of("plain", 1), **settings), Listener())
    assert not scheduler.snapshot().queued


def test_other_backends_are_refused(tiny_llama: Any) -> None:
    import gateskip

    with pytest.raises(ValueError, match="backend 'gathered'"):
        Scheduler(gateskip.load(tiny_llama, backend="gathered"), LIMITS)


def test_a_call_that_ends_early_keeps_the_random_stream(decoder: Decoder, serve: Serve) -> None:
    """Numbers that were drawn ahead for a row alone are drawn again after another row joins."""
    first, second = request_of("sampled", 3, 60), request_of("sampled", 5, 8)
    heard = Listener()
    joins = {n: lambda: scheduler.submit(second, Listener()) for n in (3, 20, 37)}
    one = Listener({**joins, 50: lambda: scheduler.submit(second, heard)})
    scheduler = serve(decoder)
    scheduler.submit(first, one)
    assert one.end.reason == heard.end.reason == "length"
    assert one.tokens == expected(decoder, first) and heard.tokens == expected(decoder, second)
    assert isinstance(heard.events[-1], Finished) and WARM.draws is not None
