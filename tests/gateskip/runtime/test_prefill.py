"""Attention over gathered tokens is attention under a mask."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gateskip
from gateskip.calibration.thresholds import mean_logits
from gateskip.decoding import prefill as decode
from gateskip.gates.kinds import make_gates
from gateskip.gates.shortcuts import Shortcuts
from gateskip.kernels import ops
from gateskip.kernels.abi import PrefillUnits
from gateskip.model.families import find_branches
from gateskip.model.gating import ANCHORS
from gateskip.model.projections import AttentionShape, rotate
from gateskip.model.reference import attend, causal
from gateskip.quantization.draft_copy import CopyFormat, integer_copy, read_text
from gateskip.quantization.folders import load_model
from gateskip.runtime.attention import attend_padded, attend_rows, evened
from gateskip.runtime.budget_control import RowThresholds
from gateskip.runtime.gathered import few_sizes
from gateskip.runtime.gathering import TOGETHER, filled
from gateskip.runtime.kv_cache import EVEN
from gateskip.runtime.native import NativeBackend
from gateskip.runtime.native_prefill import NativeOperations
from gateskip.runtime.skipping import SkippingModel

HEADS, KV_HEADS, WIDTH = 6, 2, 16


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("capacity", [300, 320])
@pytest.mark.parametrize("function", [attend_rows, attend_padded])
def test_rows_attend_as_under_a_mask(
    window: int | None, softcap: float | None, share: float, capacity: int, function: Any
) -> None:
    torch.manual_seed(0)
    shape = AttentionShape(HEADS, KV_HEADS, WIDTH, WIDTH**-0.5, softcap, window)
    used, lengths = 300, [300, 7, 141]
    keys, values = (torch.randn(3, KV_HEADS, capacity, WIDTH) for _ in range(2))
    queries = torch.randn(3, HEADS, used, WIDTH)
    slots = torch.arange(used).expand(3, -1)
    keep = (torch.rand(3, used) < share) & (slots < torch.tensor(lengths).unsqueeze(1))
    visible = causal(slots, torch.arange(used), window)
    wanted = attend(queries, keys[:, :, :used], values[:, :, :used], shape, visible)
    gathered = queries.transpose(1, 2)[keep]
    counts = keep.sum(1).tolist()
    for more in (0, 5):  # rows that only fill up come last and are left out
        given = torch.cat((gathered, gathered[:more]))
        found = function(given, counts, slots[keep], (keys, values), shape)
        expected = wanted.transpose(1, 2).flatten(-2)[keep]
        torch.testing.assert_close(found[: len(gathered)], expected)
        assert not found[len(gathered) :].any()


@pytest.mark.parametrize("count", [1, 63, 64, 65])
def test_rows_are_filled_up_with_the_last(count: int) -> None:
    kept = torch.arange(count) * 3
    found = filled(kept)
    assert len(found) % EVEN == 0 and len(found) - count < EVEN
    assert torch.equal(found[:count], kept) and (found[count:] == kept[-1]).all()


@pytest.fixture
def backend(make_tiny: Callable[..., Path]) -> NativeBackend:
    return gateskip.load(make_tiny("llama"), backend="native").skipping.backend


@pytest.fixture
def operations(backend: NativeBackend) -> NativeOperations:
    return backend.operations


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_native_softmax_is_torchs(
    backend: NativeBackend, kind: torch.dtype, window: int | None, softcap: float | None
) -> None:
    torch.manual_seed(0)
    shape = AttentionShape(HEADS, KV_HEADS, WIDTH, WIDTH**-0.5, softcap, window)
    slots = torch.tensor([70, 71, 90, 127, 300, 301, 302])
    keys, values = (torch.randn(1, KV_HEADS, 320, WIDTH, dtype=kind) for _ in range(2))
    queries = torch.randn(len(slots), HEADS, WIDTH, dtype=kind)
    found = [
        attend_rows(queries, [7], slots, (keys, values), shape, softmax=softmax)
        for softmax in (None, backend.operations._softmax)
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sizes", [(9, 3, 64), (14, 2, 64), (8, 8, 128), (32, 1, 96), (6, 2, 16)])
def test_native_attention_is_nearer_to_float32_than_torchs(
    operations: NativeOperations,
    sizes: tuple[int, int, int],
    window: int | None,
    softcap: float | None,
) -> None:
    heads, kv_heads, width = sizes
    torch.manual_seed(0)
    shape = AttentionShape(heads, kv_heads, width, width**-0.5, softcap, window)
    capacity, lengths = 301, torch.tensor([300, 7, 0, 261])  # the last block of keys is cut short
    slots = torch.arange(300).expand(4, -1)
    keep = (torch.rand(4, 300) < 0.5) & (slots < lengths.unsqueeze(1))
    kv = [torch.randn(4, kv_heads, capacity, width).bfloat16() for _ in range(2)]
    queries = torch.randn(int(keep.sum()) + 3, heads, width).bfloat16()  # three only fill up
    if not operations.attends(queries, shape):
        pytest.skip("this processor does not multiply pairs of bfloat16")
    counts, places = keep.sum(1).tolist(), slots[keep]
    exact = attend_rows(queries.float(), counts, places, (kv[0].float(), kv[1].float()), shape)
    torchs = attend_rows(queries, counts, places, (kv[0], kv[1]), shape)
    packed = operations.pack((kv[0], kv[1]), 300)
    found = operations.attend(queries, counts, places, packed, shape)
    assert (found - exact).abs().max() < (torchs - exact).abs().max()
    assert not found[-3:].any()
    alone = counts[0] - 5  # a row's last tokens by themselves: the same bits
    some = slice(5, counts[0])
    first = operations.pack((kv[0][:1], kv[1][:1]), 300)
    rest = operations.attend(queries[some], [alone], places[some], first, shape)
    assert torch.equal(rest, found[some])


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_native_passes_over_rows(make_tiny: Callable[..., Path], kind: torch.dtype) -> None:
    torch.manual_seed(0)
    backend = gateskip.load(make_tiny("llama"), backend="native").skipping.backend
    operations, x = backend.operations, torch.randn(5, 3, 32, dtype=kind)
    rope = (torch.randn(5, 16, dtype=kind), torch.randn(5, 16, dtype=kind))
    near = {"rtol": 0.02, "atol": 0.02} if kind == torch.bfloat16 else {}
    torch.testing.assert_close(operations.rotate(x.clone(), rope), rotate(x, rope), **near)
    hidden, added = torch.randn(9, 64, dtype=kind), torch.randn(3, 64, dtype=kind)
    places = torch.tensor([7, 0, 3])
    wanted = hidden.index_add(0, places, added)
    operations.add_rows(hidden, places, added)
    torch.testing.assert_close(hidden, wanted)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [4, 24, 40])
def test_native_shortcuts_are_torchs(
    make_tiny: Callable[..., Path], kind: torch.dtype, rank: int
) -> None:
    torch.manual_seed(0)
    model = load_model(make_tiny("llama"), "float32")
    gates = make_gates("scalar", len(find_branches(model)), model.config.hidden_size)
    gates.shortcuts = Shortcuts(gates.branches, gates.hidden_size, rank)
    for part in gates.shortcuts.parameters():
        torch.nn.init.normal_(part, std=0.3)
    gates.shortcuts.settle()
    operations = NativeBackend(model, gates).operations
    hidden, x = (torch.randn(2, 10, gates.hidden_size, dtype=kind) for _ in range(2))
    places = torch.tensor([1, 2, 3, 6, 9, 11, 12, 13, 16, 18, 19])
    skip = torch.zeros(20, dtype=torch.bool).index_fill_(0, places, True).view(2, 10)
    wanted = hidden.clone().view(20, -1).float()
    wanted[places] += gates.shortcuts(1, x.view(20, -1)[places].float()).detach()
    operations.add_shortcuts(find_branches(model)[1], hidden, x, skip)
    near = {"rtol": 0.01, "atol": 0.02} if kind == torch.bfloat16 else {}
    torch.testing.assert_close(hidden.view(20, -1), wanted.to(kind), **near)


@pytest.mark.parametrize("count", [1, 64, 65, 513, 8000])
def test_few_sizes_of_keys(count: int) -> None:
    found = evened(count)
    assert found >= count and found % EVEN == 0 and found - count < max(EVEN, count / 4)
    assert len({evened(n) for n in range(1, 8193)}) < 50


@pytest.mark.parametrize("limit", [("PREFILL", 24), ("PIECE", 8)])  # eight tokens of each at once
def test_prompts_in_pieces_are_prompts_in_one(
    make_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, limit: tuple[str, int]
) -> None:
    decoder = gateskip.load(make_tiny("llama"))
    prompts = [list(range(3, 3 + n)) for n in (40, 1, 17)]
    whole = decoder.generate(prompts, 8)
    monkeypatch.setattr(decode, *limit)
    assert decoder.generate(prompts, 8).tokens == whole.tokens


def test_tokens_enter_in_parts_of_few_sizes() -> None:
    cuts = [few_sizes(count) for count in range(9000)]
    assert all(sum(found) == count for count, found in enumerate(cuts))
    sizes = {-(-size // EVEN) * EVEN for found in cuts for size in found}
    assert sizes == {0, *range(EVEN, TOGETHER // 2 + 1, EVEN), TOGETHER}


def test_a_text_that_is_done_leaves_no_cache(make_tiny: Callable[..., Path]) -> None:
    skipping = gateskip.load(make_tiny("llama")).skipping
    cache = skipping.new_cache(1, 16)
    for start, ids in ((0, [3, 4, 5]), (3, [6])):
        skipping.forward(torch.tensor([ids]), cache, [start])
    left = weakref.ref(cache)
    del cache
    assert left() is None


def test_a_cache_takes_what_it_says(make_tiny: Callable[..., Path]) -> None:
    skipping = gateskip.load(make_tiny("gemma3_text")).skipping
    for batch, capacity in ((1, 7), (3, 64), (2, 65)):
        cache = skipping.new_cache(batch, capacity)
        assert cache.nbytes() == skipping.cache_bytes(batch, capacity)
        assert cache.capacity >= capacity and not any(part.any() for part in cache.values)


# -- a whole branch in one call -----------------------------------------------------------------


def stored_and_gated(folder: Path, bits: int) -> tuple[Any, SkippingModel]:
    """A model with gates and shortcuts, in bfloat16 and as it is decoded in so many bits."""
    needed = PrefillUnits.TILE_UNITS if bits == 16 else PrefillUnits.VECTORS
    if ops.prefill_units() < needed:
        pytest.skip("torch multiplies prompts here")
    torch.manual_seed(0)
    model = load_model(folder, "bfloat16")
    made = read_text(model, torch.randint(3, 500, (2, 24)))
    gates = make_gates("scalar", len(find_branches(model)), model.config.hidden_size)
    gates.shortcuts = Shortcuts(gates.branches, gates.hidden_size, 8)
    for part in (gates.weight, *gates.shortcuts.parameters()):
        torch.nn.init.normal_(part, std=0.3)
    gates.shortcuts.settle()
    stored = model if bits == 16 else integer_copy(model, made, CopyFormat(bits, 32))
    return model, SkippingModel(stored, gates, backend="native")


SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}


@pytest.mark.skipif(not ops.has_decoder(), reason="no native engine here")
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("bits", [16, 4])
def test_rows_with_thresholds_of_their_own_pass_a_branch_in_one_call(
    family: str, bits: int, make_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rows: one that enters every branch, one that enters none, and one in between."""
    model, skipping = stored_and_gated(make_tiny(family, **SIZES), bits)
    ids = torch.randint(3, 500, (3, 21))
    means = mean_logits(model, skipping.gates, ids, "project")
    values = torch.stack((torch.full_like(means, -1e9), means, torch.full_like(means, 1e9)))
    whole, calls = NativeOperations.add_branch, []

    def passed() -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        weights = torch.arange(1, values.shape[1] + 1).expand(3, -1)  # tell branches apart
        limits = RowThresholds(values.float(), weights, torch.zeros(3, 21, dtype=torch.long))
        skipping.usage.clear()
        cache = skipping.new_cache(3, 32)
        states = skipping.backend.prefill(ids, cache, [0] * 3, limits)
        return states, limits.entered, skipping.usage.kept

    def counted(*arguments: Any) -> Any:
        calls.append(whole(*arguments))
        return calls[-1]

    monkeypatch.setattr(NativeOperations, "add_branch", counted)
    states, entered, kept = passed()
    assert len(calls) == 8 and all(isinstance(one, torch.Tensor) for one in calls)
    monkeypatch.setattr(NativeOperations, "add_branch", lambda *_: None)
    wanted, counts, usage = passed()
    assert torch.equal(states, wanted.to(states.dtype))
    assert torch.equal(entered, counts) and kept == usage
    assert entered[0].tolist() == [36] * 21
    assert entered[2, ANCHORS:].tolist() == [0] * (21 - ANCHORS)
    assert 0 < entered[1, ANCHORS:].sum() < 36 * (21 - ANCHORS)


@pytest.mark.skipif(not ops.has_decoder(), reason="no native engine here")
@pytest.mark.parametrize(
    "family", ["llama", "mistral", "gemma2", "gemma3_text", "qwen3", "smollm3"]
)
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("skips", [False, True])
def test_a_branch_in_one_call_has_the_bits_of_its_parts(
    family: str,
    bits: int,
    rows: int,
    skips: bool,
    make_tiny: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Norms after branches, windows that come around, layers without positions, shortcuts, padding;
    from slot 0 on and after other tokens."""
    model, skipping = stored_and_gated(make_tiny(family, **SIZES), bits)
    first, second = (torch.randint(3, 500, (rows, n)) for n in (21, 50))
    means = mean_logits(model, skipping.gates, second, "project").tolist()
    # Of four layers: all enter, some do, all do though gates were asked, and none does
    limits = [-math.inf, -math.inf, *means[2:4], -1e9, -1e9, math.inf, math.inf]
    calls, whole = {"mlp": 0, "attention": 0}, NativeOperations.add_branch

    def counted(operations: Any, branch: Any, *others: Any) -> int | None:
        found = whole(operations, branch, *others)
        calls[branch.kind] += found is not None
        return found

    def states() -> tuple[list[torch.Tensor], list[torch.Tensor], list[int]]:
        skipping.usage.clear()
        cache, least = skipping.new_cache(rows, 96), limits if skips else None
        lengths, full_from = [50, 31, 17][:rows], [49, 30, 10][:rows]
        found = [skipping.forward(first, cache, [0] * rows, least)]
        last = skipping.forward(second, cache, [21] * rows, least, lengths, full_from)
        found += [own[:length] for own, length in zip(last, lengths, strict=True)]
        real = [
            part[row, :, : 21 + length] if part.shape[2] > 71 else part[row]
            for part in (*cache.keys, *cache.values)
            for row, length in enumerate(lengths)
        ]
        return found, real, skipping.usage.kept

    monkeypatch.setattr(NativeOperations, "add_branch", counted)
    found, kept, entered = states()
    assert calls == {"mlp": 8, "attention": 8}
    monkeypatch.setattr(NativeOperations, "add_branch", lambda *_: None)
    wanted, kept_too, counts = states()
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(found, wanted, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept, kept_too, strict=True))
    assert entered == counts
    tokens = sum([50, 31, 17][:rows]) + 21 * rows
    some = [tokens, tokens, *counts[2:4], tokens, tokens]
    assert counts[:6] == ([tokens] * 6 if not skips else some)
    assert not skips or 4 * rows < sum(counts[2:4]) < 2 * tokens - 4
