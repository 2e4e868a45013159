"""Keys and values in 8 bits: both backends, windows, skipping, speculation, and pipelines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gateskip
from compose.outputs.export import decode_default
from compose.stages.decode import Plain, Speculate
from gateskip.gates.kinds import make_gates
from gateskip.kernels import ops
from gateskip.model.families import UnsupportedModel
from gateskip.model.gating import NEVER_SKIP
from gateskip.quantization.folders import load_model
from gateskip.runtime.backend import BackendName
from gateskip.runtime.kv_cache import KVCache, from_int8, to_int8
from gateskip.runtime.skipping import SkippingModel

needs_engine = pytest.mark.skipif(not ops.has_decoder(), reason="no native engine here")
native = pytest.param("native", marks=needs_engine)


pytestmark = pytest.mark.usefixtures("no_gradients")


def text(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 512, (rows, length), generator=torch.Generator().manual_seed(seed))


def in_8_bits(model: Any, backend: BackendName, *given: Any) -> SkippingModel:
    skipping = SkippingModel(model, *given, backend=backend, rounded=False)
    skipping.kv_cache = "int8"
    return skipping


def error(found: Tensor, wanted: Tensor) -> float:
    """Of the states of most tokens: where a gate's logit lies at its threshold, a branch more or
    less is entered."""
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median())


def test_bytes_and_scales() -> None:
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)) * 4
    x[1, 2] = 0
    codes, scales = to_int8(x)
    assert codes.dtype == torch.int8 and scales.shape == (3, 5)
    found = from_int8(codes, scales, torch.float32)
    assert (
        float(((found - x).abs() / x.abs().amax(-1, keepdim=True).clamp_min(1)).max()) < 0.5 / 127
    )
    assert not found[1, 2].any()


@pytest.mark.parametrize("backend", ["gathered", native])
def test_a_cache_in_8_bits_takes_what_it_says(
    make_tiny: Callable[..., Path], backend: BackendName
) -> None:
    model = load_model(make_tiny("gemma3_text"), "bfloat16")
    whole = SkippingModel(model, backend=backend).cache_bytes(2, 300)
    skipping = in_8_bits(model, backend)
    cache = skipping.new_cache(2, 300)
    assert isinstance(cache, KVCache) and cache.keys[0].dtype == torch.int8
    assert cache.nbytes() == skipping.cache_bytes(2, 300) < 0.65 * whole, "heads of 16 channels"
    assert cache.rows([1, 0]).nbytes() == cache.nbytes()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("rule", ["project", "copy"])
@needs_engine
def test_backends_keep_the_same_bytes(
    make_tiny: Callable[..., Path], family: str, rule: str
) -> None:
    """Skipping, in prompts in pieces and in decoding, past windows: near float32's states, and what
    a rejected draft left is overwritten."""
    model = load_model(make_tiny(family), "float32")
    branches = 2 * len(model.model.layers)
    torch.manual_seed(1)
    gates = make_gates("scalar", branches, model.config.hidden_size).requires_grad_(False)
    gates.weight.mul_(10)  # type: ignore[operator]
    some = [NEVER_SKIP] + [5.0] * (branches - 1)
    plain = SkippingModel(model, gates, rule)
    models = [plain, *(in_8_bits(model, name, gates, rule) for name in ("gathered", "native"))]  # type: ignore[arg-type]
    ids, found = text(2, 170, seed=4), []
    for each in models:
        cache = each.new_cache(2, 192)
        prompts = [each.forward(ids[:, a:b], cache, [a, a], some) for a, b in ((0, 20), (20, 150))]
        each.decode(text(2, 9, seed=5).tolist(), cache, [0, 1], [150, 150], some)
        steps = [
            each.decode(ids[:, a:b].tolist(), cache, [0, 1], [a, a], some).unflatten(0, (2, -1))
            for a, b in ((150, 151), (151, 160), (160, 170))
        ]
        found.append(torch.cat([*prompts, *steps], 1))
    wanted, torchs, engines = found
    assert 1e-4 < error(torchs, wanted) < 0.05, "8 bits are not float32"
    assert error(engines, torchs) < 1e-3


@needs_engine
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_rows_and_speculation_have_the_tokens_of_plain_decoding(
    make_tiny: Callable[..., Path], family: str
) -> None:
    decoder = gateskip.load(make_tiny(family), backend="native")
    prompts = [text(1, 120)[0].tolist(), text(1, 7, seed=2)[0].tolist()]
    plain = decoder.generate(prompts, 40, kv_cache="int8").tokens
    assert decoder.generate(prompts[1:], 40, kv_cache="int8").tokens == plain[1:]
    settings: dict[str, Any] = {"draft_length": 16, "draft_budget": 1.0, "kv_cache": "int8"}
    assert decoder.generate(prompts, 40, "speculate", **settings).tokens == plain
    assert decoder.skipping.kv_cache == "model", "a call leaves the decoder as it was"
    decoder.skipping.kv_cache = "int8"
    assert decoder.generate(prompts, 40).tokens == plain


def test_what_cannot_be_kept_is_refused(make_tiny: Callable[..., Path]) -> None:
    model = load_model(make_tiny("llama"), "float32")
    with pytest.raises(ValueError, match="kv_cache 'int4': one of model, int8"):
        SkippingModel(model).kv_cache = "int4"  # type: ignore[assignment]
    with pytest.raises(UnsupportedModel, match="kv_cache: model"):
        in_8_bits(model, "reference").new_cache(1, 8)


def test_a_stage_and_what_an_export_says_of_it() -> None:
    assert not Plain().skips() and Plain().kv_cache == "int8"
    stated = decode_default(Plain().model_dump(mode="json"))
    assert stated == {"mode": "plain", "kv_cache": "int8"}
    drafted = Speculate(draft_budget=1, draft_weights="int4")
    assert "kv_cache" not in decode_default(drafted.model_dump(mode="json"))
    own = drafted.model_copy(update={"kv_cache": "int8"})
    assert decode_default(own.model_dump(mode="json"))["kv_cache"] == "int8"
