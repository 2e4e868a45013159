"""Decoding after many tokens, whose slots come in parts: as torch attends, each row by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gateskip.kernels import ops
from gateskip.quantization.folders import load_model
from gateskip.runtime.kv_cache import KVFormat
from gateskip.runtime.skipping import SkippingModel

pytestmark = [
    pytest.mark.skipif(not ops.has_decoder(), reason="no native engine here"),
    pytest.mark.usefixtures("no_gradients"),
]

LENGTHS = [1100, 511, 40]  # of prompts: three parts of 512 slots, one that fills up, and one
LONG: dict[str, Any] = {"max_position_embeddings": 2048, "num_hidden_layers": 4}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "heads of 64": (
        "llama",
        {"head_dim": 64, "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2},
    ),
    "one kv head": (
        "llama",
        {"head_dim": 64, "hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 1},
    ),
    "heads of 24": ("qwen3", {"head_dim": 24}),
    "soft caps": ("gemma2", {"head_dim": 64, "attn_logit_softcapping": 2.0}),
    "windows": ("gemma3_text", {"head_dim": 64, "sliding_window": 600}),
}
ALLOWED: dict[tuple[str, KVFormat], float] = {
    ("float32", "model"): 1e-5,
    ("bfloat16", "model"): 0.05,  # torch rounds between products, the engine does not
    ("float32", "int8"): 0.03,  # the engine rounds queries, too
}


def text(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 512, (rows, length), generator=torch.Generator().manual_seed(seed))


def filled(model: SkippingModel) -> Any:
    """A cache that holds prompts of `LENGTHS`."""
    cache = model.new_cache(len(LENGTHS), 1200)
    model.forward(text(len(LENGTHS), max(LENGTHS)), cache, [0] * len(LENGTHS), None, LENGTHS)
    return cache


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "kind"), ALLOWED)
def test_parts_of_a_context_are_the_whole_of_it(
    make_tiny: Callable[..., Path], shape: str, dtype: str, kind: KVFormat
) -> None:
    """Rows of unlike lengths beside each other, several tokens of a row in one pass, past where the
    second row's slots fill a part; and the bits are those of each row alone."""
    family, sizes = SHAPES[shape]
    model = load_model(make_tiny(family, **LONG, **sizes), dtype)
    torchs = SkippingModel(model)
    native = SkippingModel(model, backend="native", rounded=False)
    rows, states, caches = range(len(LENGTHS)), [], []
    for each in (torchs, native):
        each.kv_cache = kind
        caches.append(filled(each))
        found = [
            each.decode(text(3, width, seed=begin).tolist(), caches[-1], rows, starts)
            for begin, width in ((0, 1), (1, 3), (4, 1))
            if (starts := [length + begin for length in LENGTHS])
        ]
        states.append(torch.cat(found).float())
    wanted, engine = states
    off = (engine - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert float(off.median()) < ALLOWED[dtype, kind] and float(off.max()) < 0.1, off
    after = [length + 5 for length in LENGTHS]
    tokens = text(3, 1, seed=9).tolist()
    together = native.decode(tokens, caches[1], rows, after)
    alone = [native.decode([tokens[r]], caches[1], [r], [after[r]]) for r in rows]
    assert torch.equal(together, torch.cat(alone))


def test_threads_do_not_change_bits(make_tiny: Callable[..., Path]) -> None:
    family, sizes = SHAPES["heads of 64"]
    native = SkippingModel(load_model(make_tiny(family, **LONG, **sizes)), backend="native")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            cache = filled(native)
            torch.set_num_threads(threads)
            found.append(native.decode([[5], [6]], cache, [0, 1], [1100, 511]))
            torch.set_num_threads(before)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
