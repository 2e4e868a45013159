"""Layers with a sliding window keep what it reaches, and give what whole caches give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gateskip
from gateskip.kernels import ops
from gateskip.quantization.folders import load_model
from gateskip.runtime import kv_cache
from gateskip.runtime.backend import BackendName
from gateskip.runtime.kv_cache import SLACK, KVCache, slots_of
from gateskip.runtime.skipping import SkippingModel

native = pytest.param(
    "native", marks=pytest.mark.skipif(not ops.has_decoder(), reason="no native engine here")
)
LENGTHS = [200, 140, 90]  # of prompts; windows are of 32 tokens, in 128 slots
AFTER = 30  # tokens that follow each


pytestmark = pytest.mark.usefixtures("no_gradients")


def text(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 512, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("window", "capacity", "slots"),
    [(None, 1000, 1000), (512, 4096, 576), (512, 300, 300), (32, 512, 128), (33, 4096, 128)],
)
def test_slots_of_a_layer(window: int | None, capacity: int, slots: int) -> None:
    assert slots_of(window, capacity) == slots
    assert window is None or slots == capacity or slots >= window + SLACK


@pytest.mark.parametrize("backend", ["gathered", native])
def test_a_cache_is_no_larger_than_windows_ask(
    make_tiny: Callable[..., Path], backend: BackendName
) -> None:
    model = load_model(make_tiny("gemma3_text"), "float32")
    windows = [layer.self_attn.sliding_window for layer in model.model.layers]
    assert None in windows and 32 in windows, "the family has layers of both kinds"
    skipping = SkippingModel(model, backend=backend)
    cache = skipping.new_cache(2, 500)
    assert isinstance(cache, KVCache) and cache.capacity == 512
    assert cache.slots == [512 if window is None else 128 for window in windows]
    assert cache.nbytes() == skipping.cache_bytes(2, 500)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("backend", ["gathered", native])
def test_states_past_windows_are_those_of_whole_sequences(
    make_tiny: Callable[..., Path], family: str, backend: BackendName
) -> None:
    """Prompts of several lengths in pieces, rejected drafts, then tokens alone and many at once."""
    model = load_model(make_tiny(family), "float32")
    skipping, ids = SkippingModel(model, backend=backend, rounded=False), text(3, 230)
    wanted = model(ids).logits
    cache = skipping.new_cache(3, 256)

    def check(states: Tensor, row: int, start: int) -> None:
        found = skipping.head(states)
        torch.testing.assert_close(
            found, wanted[row, start : start + len(found)], atol=2e-4, rtol=2e-4
        )

    for first, last in ((0, 60), (60, 200)):
        counts = [min(max(n - first, 0), last - first) for n in LENGTHS]
        hidden = skipping.forward(ids[:, first:last], cache, [first] * 3, None, counts)
        for row, count in enumerate(counts):
            check(hidden[row, :count], row, first)
    rows = [2, 0, 1]
    starts = [LENGTHS[row] for row in rows]
    skipping.decode(text(3, 17, seed=1).tolist(), cache, rows, starts)  # all of it is rejected
    for taken in (1, 1, AFTER - 2):
        parts = [
            ids[row, start : start + taken].tolist()
            for row, start in zip(rows, starts, strict=True)
        ]
        states = skipping.decode(parts, cache, rows, starts).split(taken)
        for row, start, own in zip(rows, starts, states, strict=True):
            check(own, row, start)
        starts = [start + taken for start in starts]
    copies = cache.rows([1])
    start = LENGTHS[1] + AFTER
    left = ids[1:2, start:].tolist()
    check(skipping.decode(left, copies, [0], [start]), 1, start)


@pytest.mark.skipif(not ops.has_decoder(), reason="no native engine here")
def test_slots_change_no_bit(
    make_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding after prompts in two pieces, in bfloat16, over windows and over all positions."""
    model = load_model(make_tiny("gemma3_text"), "bfloat16")
    skipping, ids = SkippingModel(model, backend="native"), text(2, 220)

    def states() -> list[Tensor]:
        cache = skipping.new_cache(2, 256)
        prompts = [skipping.forward(ids[:, a:b], cache, [a, a]) for a, b in ((0, 150), (150, 199))]
        steps = [
            skipping.decode(ids[:, i : i + 1].tolist(), cache, [0, 1], [i, i])
            for i in range(199, 220)
        ]
        return [*prompts, *steps]

    around = states()
    monkeypatch.setattr(kv_cache, "slots_of", lambda window, capacity: capacity)
    assert all(map(torch.equal, around, states()))


@pytest.mark.parametrize("backend", ["gathered", native])
def test_going_back_too_far_is_refused(
    make_tiny: Callable[..., Path], backend: BackendName
) -> None:
    model = load_model(make_tiny("gemma3_text"), "float32")
    skipping, ids = SkippingModel(model, backend=backend), text(1, 200)
    cache = skipping.new_cache(1, 256)
    skipping.forward(ids, cache, [0])
    skipping.decode([[5] * 10], cache, [0], [200 - SLACK])
    with pytest.raises(ValueError, match="row 0 goes back 65 positions to 135"):
        skipping.decode([[5]], cache, [0], [199 - SLACK])
    skipping.forward(ids[:, :20], cache, [0])  # from its beginning a row is another text


@pytest.mark.skipif(not ops.has_decoder(), reason="no native engine here")
def test_speculation_past_windows_is_lossless(make_tiny: Callable[..., Path]) -> None:
    decoder = gateskip.load(make_tiny("gemma3_text"), backend="native")
    prompts = [text(1, 120)[0].tolist(), text(1, 7, seed=2)[0].tolist()]
    plain = decoder.generate(prompts, 60)
    own: Any = {"draft_weights": "own"}
    drafted = decoder.generate(prompts, 60, "speculate", draft_length=16, lookup=False, **own)
    looked_up = decoder.generate(prompts[:1], 60, "speculate", **own)
    assert drafted.tokens == plain.tokens and looked_up.tokens == plain.tokens[:1]
