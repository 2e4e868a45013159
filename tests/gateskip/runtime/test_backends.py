"""Backends give the same tokens, are chosen by name, and keep to one device and one arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_device import DEVICE, PretendTensor, onto_device, pretend_device
from tiny_models import save_gated

import gateskip
from gateskip.calibration.fit_shortcuts import fit_shortcuts
from gateskip.calibration.thresholds import calibrate
from gateskip.calibration.warm_start import warm_start
from gateskip.decoding.decoder import Decoder
from gateskip.kernels import build
from gateskip.model.families import FAMILIES, UnsupportedModel
from gateskip.quantization.folders import load_model
from gateskip.runtime.backend import BACKENDS
from gateskip.runtime.gathered import GatheredBackend
from gateskip.runtime.gathering import GatheredPass
from gateskip.runtime.native import NativeBackend
from gateskip.runtime.skipping import SkippingModel, require_one_device

needs_native = pytest.mark.skipif(build.library() is None, reason="no compiled kernels here")
PROMPTS = [[5, 9, 200, 31, 7, 90], [17, 4, 66], [300, 2, 11, 8]]
OWN: dict[str, Any] = {"mode": "speculate", "draft_weights": "own"}
MODES: dict[str, dict[str, Any]] = {
    "plain": {"mode": "plain"},
    "skip": {"mode": "skip", "budget": 0.6},
    "speculate": {"draft_budget": 0.6, "lookup": False, "draft_length": 3, **OWN},
    "lookup": {"draft_length": 2, **OWN},
}


@pytest.fixture(scope="module", params=FAMILIES)
def gated(
    request: pytest.FixtureRequest,
    make_tiny: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A gated folder of a family."""
    target = tmp_path_factory.mktemp(request.param) / "gated"
    return save_gated(make_tiny(request.param), target, (0.8, 0.6), shortcuts=True)


@pytest.fixture(scope="module")
def decoders(gated: Path) -> dict[str, Decoder]:
    """The folder behind every backend that can run it."""
    found = {name: gateskip.load(gated, backend=name) for name in ("reference", "gathered")}
    default = gateskip.load(gated)
    return found | ({"native": default} if default.backend == "native" else {})


@pytest.mark.filterwarnings("ignore:.*decodes in torch")
@pytest.mark.parametrize("mode", MODES)
def test_they_decode_the_same_tokens(decoders: dict[str, Decoder], mode: str) -> None:
    wanted = decoders["reference"].generate(PROMPTS, 12, **MODES[mode])
    alone = [decoders["reference"].generate([p], 12, **MODES[mode]).tokens[0] for p in PROMPTS]
    assert wanted.tokens == alone, "a row does not depend on its batch"
    for name, decoder in decoders.items():
        decoder.skipping.usage.clear()
        found = decoder.generate(PROMPTS, 12, **MODES[mode])
        assert found.tokens == wanted.tokens, name


@pytest.mark.filterwarnings("ignore:.*decodes in torch")
def test_they_count_the_same_compute(decoders: dict[str, Decoder]) -> None:
    saved = {}
    for name, decoder in decoders.items():
        decoder.skipping.usage.clear()
        decoder.generate(PROMPTS, 12, **MODES["skip"])
        saved[name] = decoder.saved(decoder.skipping.usage, 0.6)
    assert len(set(saved.values())) == 1 and saved["gathered"].net > 0


@pytest.mark.parametrize("rows", [1, 8, 48])
@needs_native
def test_the_phase_decides_the_path_not_the_number_of_rows(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    decoder = gateskip.load(tiny_llama, backend="native")
    skipping, backend, steps = decoder.skipping, decoder.skipping.backend, 0
    assert isinstance(backend, NativeBackend)
    step = backend.engine.step

    def counted(*given: Any) -> Any:
        nonlocal steps
        steps += 1
        return step(*given)

    monkeypatch.setattr(backend.engine, "step", counted)
    cache = skipping.new_cache(rows, 8)
    ids = torch.randint(3, 512, (rows, 1), generator=torch.Generator().manual_seed(1))
    skipping.forward(ids, cache, [0] * rows)
    skipping.forward(ids, cache, [1] * rows)
    assert steps == 0, "prompts and scoring never take the path of decoding"

    def refuse(*_: Any) -> None:
        raise AssertionError("decoding took the path of prompts")

    monkeypatch.setattr(GatheredPass, "run", refuse)
    states = skipping.decode(ids.tolist(), cache, range(rows), [2] * rows)
    assert steps >= 1 and states.shape == (rows, 64)


@pytest.mark.parametrize("family", FAMILIES)
@needs_native
def test_a_row_of_a_large_batch_has_the_bits_that_it_has_alone(
    make_tiny: Callable[..., Path], family: str
) -> None:
    skipping = gateskip.load(make_tiny(family), backend="native").skipping
    ids = torch.randint(3, 512, (70, 9), generator=torch.Generator().manual_seed(1))
    cache, own = skipping.new_cache(70, 16), skipping.new_cache(1, 16)
    skipping.forward(ids[:, :8], cache, [0] * 70)
    skipping.forward(ids[51:52, :8], own, [0])
    # decoding alone starts from the cache that the batch made
    for layer in range(len(own.keys)):
        own.keys[layer][0] = cache.keys[layer][51]
        own.values[layer][0] = cache.values[layer][51]
    states = skipping.decode(ids[:, 8:].tolist(), cache, range(70), [8] * 70)
    alone = skipping.decode(ids[51:52, 8:].tolist(), own, [0], [8])
    assert torch.equal(states[51:52], alone)
    assert torch.equal(skipping.head(states)[51:52], skipping.head(alone))


def test_backends_are_chosen_by_name(tiny_llama: Path, make_tiny: Callable[..., Path]) -> None:
    for name in BACKENDS:
        if name != "native" or build.library() is not None:
            decoder = gateskip.load(tiny_llama, backend=name)
            assert decoder.backend == name == decoder.arithmetic.backend
    with pytest.raises(ValueError, match="backend 'fast': one of reference, gathered, native"):
        SkippingModel(load_model(tiny_llama), backend="fast")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModel, match="activation relu"):
        gateskip.load(make_tiny("llama", hidden_act="relu"), backend="native")
    with pytest.raises(UnsupportedModel, match="native backend runs on a CPU, not on cuda"):
        gateskip.load(tiny_llama, backend="native", device="cuda")


@needs_native
def test_the_arithmetic_is_named(tiny_llama: Path) -> None:
    decoder = gateskip.load(tiny_llama, "bfloat16", backend="native")
    assert decoder.arithmetic.to_dict() == {
        "backend": "native",
        "weights": "bfloat16",
        "activations": "float32",
        "accumulation": "float32",
    }
    assert decoder.scoring_arithmetic.activations in ("bfloat16", "float32")
    gathered = gateskip.load(tiny_llama, "float32", backend="gathered")
    assert str(gathered.arithmetic) == "gathered: float32 x float32, sums in float32"


# -- a device that is not there ---------------------------------------------------------------


def test_the_pretended_device_refuses_what_a_card_would() -> None:
    with pretend_device():
        there = torch.arange(4, device=DEVICE)
        assert isinstance(there, PretendTensor) and (there + 1).device == DEVICE
        assert (there + 1).tolist() == [1, 2, 3, 4]
        with pytest.raises(RuntimeError, match="two devices"):
            there + torch.arange(4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt_neox", "phi3"])
@pytest.mark.parametrize("rule", ["project", "copy"])
def test_the_gathered_backend_keeps_to_its_device(
    make_tiny: Callable[..., Path], family: str, rule: str
) -> None:
    """On an accelerator: the same states as on a CPU, and no operation on two devices."""
    model = load_model(make_tiny(family), "float32")
    blocks = torch.randint(3, 512, (2, 32), generator=torch.Generator().manual_seed(2))
    gates, _ = warm_start(model, blocks)
    gates.shortcuts = fit_shortcuts(model, blocks, 4)
    gates.requires_grad_(False)
    thresholds = calibrate(model, gates, blocks, (0.6,), kv_rule=rule)[0].thresholds
    ids, lengths = torch.randint(3, 512, (3, 20)), [20, 7, 13]

    def run(backend: GatheredBackend, ids: torch.Tensor) -> list[torch.Tensor]:
        cache = backend.new_cache(3, 40)
        found = [backend.prefill(ids, cache, [0] * 3, thresholds, lengths)[0]]
        found.append(backend.decode([[5], [6, 7], [8]], cache, [0, 1, 2], lengths, thresholds))
        found.append(backend.decode([[9, 3]], cache, [1], [9]))
        found.append(backend.prefill(ids, backend.new_cache(3, 20), [0] * 3)[1])
        return [*found, backend.logits(found[-1])]

    with torch.no_grad():
        wanted = run(GatheredBackend(model, gates, rule), ids)
    with pretend_device():
        there = GatheredBackend(onto_device(model), onto_device(gates), rule)
        assert there.operations.device == DEVICE
        found = run(there, PretendTensor(ids))
    for each, other in zip(found, wanted, strict=True):
        assert isinstance(each, PretendTensor)
        torch.testing.assert_close(each.inner, other, atol=1e-4, rtol=1e-4)


def test_weights_on_two_devices_are_refused_by_name(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, "float32")
    assert require_one_device(model, None) == torch.device("cpu")
    model.lm_head.to("meta")
    with pytest.raises(UnsupportedModel, match=r"several devices \(cpu, meta\)"):
        require_one_device(model, None)
