"""The share of compute of each token of an answer, against the branches that each pass counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from served import Listener, expected, request_of

from gateskip.decoding.config import DraftConfig, SkipConfig
from gateskip.decoding.decoder import Decoder
from gateskip.decoding.prefill import fill
from gateskip.decoding.rows import Row, StopConditions
from gateskip.kernels import ops
from gateskip.model.compute import branch_costs, kept_share
from gateskip.runtime.budget_control import BudgetControl, block_of, shares
from gateskip.serving.requests import NewToken, Request
from gateskip.serving.scheduler import Scheduler

pytestmark = pytest.mark.skipif(not ops.has_decoder(), reason="no native engine here")


def shares_of(heard: Listener) -> list[float | None]:
    return [event.compute for event in heard.events if isinstance(event, NewToken)]


def counted_shares(decoder: Decoder, request: Request, tokens: list[int]) -> list[float]:
    """The shares of all tokens but the first, by passes of one token each."""
    model, skip = decoder.skipping, request.skip or SkipConfig()
    phases = decoder.phases_of(request.mode, skip, request.draft or DraftConfig())
    row = Row(0, list(request.prompt), StopConditions(frozenset(), (), None, len(tokens)), 0, None)
    counted, costs = list[float](), tuple(branch_costs(model.model))
    with torch.inference_mode():
        cache = model.new_cache(1, len(request.prompt) + len(tokens) + 16)
        fill(model, [row], cache, phases)
        if phases.apart:
            model.decode([row.prompt[-1:]], cache, [0], [len(row.prompt) - 1], phases.answer)
        for place, token in enumerate(tokens[:-1], len(row.prompt)):
            before = model.usage.copy()
            model.decode([[token]], cache, [0], [place], phases.answer)
            usage = model.usage.since(before)
            if isinstance(phases.answer, BudgetControl):  # weighs branches by its blocks
                weights = shares(costs, block_of(place))
                entered = sum(w * kept for w, kept in zip(weights, usage.kept, strict=True))
                counted.append(entered / sum(weights))
            else:
                counted.append(kept_share(model.model, usage))
    return counted


@pytest.mark.parametrize("beside", [0, 2])
@pytest.mark.parametrize("name", ["skip", "skip more", "skip, sampled", "skip prompts", "held"])
def test_shares_are_those_of_the_passes(
    make_decoder: Callable[[str], Decoder], serve: Callable[..., Scheduler], name: str, beside: int
) -> None:
    """Also beside other rows; and the tokens are the same."""
    decoder = make_decoder("llama-int8")
    request = replace(request_of(name, 4), token_shares=True)
    wanted, scheduler = expected(decoder, request), serve(decoder)
    others = [Listener() for _ in range(beside)]
    for seed, listener in enumerate(others):
        scheduler.submit(request_of(("plain", "skip")[seed], seed + 1, 30), listener)
    heard = Listener()
    scheduler.submit(request, heard)
    assert heard.end.reason == "length" and heard.tokens == wanted
    assert scheduler.drain(60)  # the model is for one thread at a time
    first, *rest = shares_of(heard)
    assert rest == pytest.approx(counted_shares(decoder, request, wanted), abs=1e-6)
    if name == "skip prompts":
        assert set(rest) == {1.0} == {first}
    else:
        assert len(set(rest)) > 2 and (first is None) == (name != "skip more")
    assert all(set(shares_of(other)) == {None} for other in others)


@pytest.mark.parametrize("name", ["plain", "logprobs", "drafts", "sampled"])
def test_full_compute_has_the_share_one(
    make_decoder: Callable[[str], Decoder], serve: Callable[..., Scheduler], name: str
) -> None:
    decoder, heard = make_decoder("llama-int8"), Listener()
    request = replace(request_of(name, 4), token_shares=True)
    serve(decoder).submit(request, heard)
    assert heard.end.reason == "length" and heard.tokens == expected(decoder, request)
    assert set(shares_of(heard)) == {1.0} and heard.end.receipt.drafted == 0
