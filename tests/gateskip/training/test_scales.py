"""Packed weights learn by their scales, and stay what they were: packed, and readable by others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from compose.artifacts.folder import copy_companions, probe_ids, probe_logits
from compose.errors import RuleBroken
from compose.stages.registry import STAGES, Bnb, DataSpec, Gate, Gptq, Heal, ModelShape, StageJob
from gateskip.quantization.folders import load_model
from gateskip.training.scales import ScaledLinear, norms, open_scales, save_scales

PACKINGS: dict[str, dict[str, Any]] = {
    "nf4": {"use": "bnb", "format": "nf4"},
    "fp4": {"use": "bnb", "format": "fp4"},
    "int8": {"use": "bnb", "format": "int8"},
    "gptq4": {"use": "gptq", "group_size": 32},
    "gptq3": {"use": "gptq", "group_size": 32, "bits": 3},
    "act-order": {"use": "gptq", "group_size": 32, "act_order": True},
    "not symmetric": {"use": "gptq", "group_size": 32, "sym": False},
    "whole rows": {"use": "gptq", "group_size": -1, "sym": True},
    "mixed": {"use": "gptq", "group_size": 32, "mixed": {"down_proj": 8}},
}
HEALED = {"use": "heal", "backbone": "scales", "steps": 30, "lr": 3e-3, "validate_every": 15}
Run = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.fixture
def run(
    tmp_path: Path, licence_text: Path, tiny_llama: Path, make_job: Callable[..., StageJob]
) -> Run:
    """`run(source, use=..., ...)` makes a folder; returns it and the stage's record."""
    spec = DataSpec(source=str(licence_text), limit=8, length=64)

    def go(source: Path, **parameters: Any) -> tuple[Path, dict[str, Any]]:
        target = tmp_path / f"made-{len(list(tmp_path.iterdir()))}"
        target.mkdir()
        train = spec.model_copy(update={"limit": 40})
        job = make_job(source, target, train=train, calibration=spec, dense=tiny_llama)
        record = STAGES[parameters["use"]].model_validate(parameters).run(job)
        copy_companions(source, target)
        return target, record

    return go


WORTH_IT = {name: packing for name, packing in PACKINGS.items() if name != "int8"}


@pytest.mark.parametrize("packing", WORTH_IT.values(), ids=WORTH_IT)
def test_a_packed_model_comes_nearer_and_only_scales_and_norms_move(
    packing: dict[str, Any], run: Run, tiny_llama: Path
) -> None:
    packed, _ = run(tiny_llama, **packing)
    healed, record = run(packed, **HEALED)
    assert record["held_out"]["after"] < 0.97 * record["held_out"]["before"]
    before, after = (load_file(folder / "model.safetensors") for folder in (packed, healed))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    ends = (".scales", ".absmax", ".SCB", "norm.weight")
    assert moved, "something learned"
    assert all(name.endswith(ends) for name in moved), sorted(moved)
    assert {a.dtype for a in after.values()} == {b.dtype for b in before.values()}
    config = (packed / "config.json").read_text()
    assert (healed / "config.json").read_text() == config
    with safe_open(healed / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
def test_opened_layers_compute_what_the_packed_ones_do(
    packing: dict[str, Any], run: Run, tiny_llama: Path
) -> None:
    packed, _ = run(tiny_llama, **packing)
    model, ids = load_model(packed, "float32"), probe_ids(packed)
    opened = open_scales(model)
    assert len(opened) == 7 * model.config.num_hidden_layers
    asked = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(asked) == len(opened) + len(list(norms(model)))
    with torch.no_grad():
        logits = model(ids).logits
    theirs = probe_logits(packed)  # whose kernels multiply in bfloat16, or round activations
    assert (logits - theirs).abs().mean() < 0.05 * theirs.std()


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
def test_what_is_saved_is_what_was_learned(
    packing: dict[str, Any], run: Run, tiny_llama: Path
) -> None:
    packed, _ = run(tiny_llama, **packing)
    model = load_model(packed, "float32")
    open_scales(model)
    layer = model.model.layers[1].mlp.down_proj
    assert isinstance(layer, ScaledLinear)
    with torch.no_grad():
        layer.gain.copy_(torch.linspace(0.5, 1.5, layer.gain.numel()).view_as(layer.gain))
    target = packed.with_name("rescaled")
    target.mkdir()
    save_scales(model, packed, target)
    again = load_model(target, "float32")
    open_scales(again)
    found = again.model.layers[1].mlp.down_proj
    torch.testing.assert_close(found.codes, layer.codes, atol=2e-2, rtol=1e-3)
    torch.testing.assert_close(found.learned(), layer.learned(), atol=1e-3, rtol=2e-3)


def test_the_planner_knows_what_can_learn(tiny_llama: Path) -> None:
    scales, full = Heal(backbone="scales"), Heal()
    nf4, gptq = Bnb(format="nf4"), Gptq()
    scales.check(None, (nf4,))
    scales.check(None, (Gate(), gptq))
    with pytest.raises(RuleBroken, match="heal-after-quantize"):
        full.check(None, (gptq,))
    with pytest.raises(RuleBroken, match="backbone: full or lora") as raised:
        scales.check(None, ())
    assert raised.value.rule == "scales-are-packing"
    with pytest.raises(RuleBroken, match="double_quant: false"):
        scales.check(None, (Bnb(format="nf4", double_quant=True),))
    shape = replace(SHAPE, quantized="gptq")
    scales.check(shape, ())


SHAPE = ModelShape("llama", 576, 1536, 30, 9, 3, 64, 49152, True)
