"""Every weight stage on a tiny model: run, reload, and what must survive it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from drafts import SKIPPING

import gateskip
from compose.artifacts.folder import copy_companions, probe_logits
from compose.errors import UserError
from compose.stages.base import ModelShape, Stage
from compose.stages.registry import STAGES, DataSpec, StageJob

GATES = {"use": "gate", "steps": 4, "length": 32, "budgets": (0.8, 0.5), "calibration_blocks": 4}
RUNS: dict[str, dict[str, Any]] = {
    "gate-trained": GATES,
    "gate-frozen": GATES | {"backbone": "frozen"},
    "gate-copy": GATES | {"backbone": "frozen", "kv": "copy", "allocation": "uniform"},
    "gate-sensitivity": GATES | {"backbone": "frozen", "allocation": "sensitivity"},
    "drop-layers": {"use": "drop-layers", "count": 1},
    "prune-width": {"use": "prune-width", "ratio": 0.4, "round_to": 64},
    "prune-heads": {"use": "prune-heads", "count": 2},
    "prune-hidden": {"use": "prune-hidden", "ratio": 0.4, "round_to": 32},
    "heal": {"use": "heal", "steps": 3, "length": 32},
    "heal-lora": {"use": "heal", "steps": 3, "length": 32, "backbone": "lora", "lora_rank": 2},
    "nf4": {"use": "bnb", "format": "nf4"},
    "int8": {"use": "bnb", "format": "int8"},
    "gptq4": {"use": "gptq", "bits": 4, "group_size": 64},
    "head8": {"use": "pack-head"},
    "drafts": {"use": "draft-network", "steps": 3, "batch": 2, "inner": 16, "vocabulary": 64},
}


# LLM.int8 rounds activations, gptqmodel's CPU kernel computes in bfloat16; our engine does neither.
# transformers knows nothing of a head in 8 bits.
ROUNDING = {"int8": 0.2, "gptq4": 0.15, "head8": 0.15}


@pytest.fixture
def run(
    licence_text: Path, tmp_path: Path, tiny_llama: Path, make_job: Callable[..., StageJob]
) -> Callable[..., Path]:
    """`run(stage, source)` makes a folder as the worker does."""

    def go(parameters: dict[str, Any], source: Path = tiny_llama, dense: Path = tiny_llama) -> Path:
        stage: Stage = STAGES[parameters["use"]].model_validate(parameters)
        target = tmp_path / f"made-{len(list(tmp_path.iterdir()))}"
        target.mkdir()
        spec = DataSpec(source=str(licence_text), limit=200, length=32)
        go.records[target.name] = stage.run(
            make_job(source, target, train=spec, calibration=spec, dense=dense)
        )
        copy_companions(source, target)
        return target

    go.records = {}
    return go


def config(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


@pytest.mark.parametrize("name", RUNS)
def test_every_weight_stage_makes_a_model(
    name: str, run: Callable[..., Path], tiny_llama: Path
) -> None:
    stage = STAGES[RUNS[name]["use"]].model_validate(RUNS[name])
    folder = run(RUNS[name])
    shape = ModelShape.from_config(config(folder))
    promised = stage.reshape(ModelShape.from_config(config(tiny_llama)))
    assert (shape.num_layers, shape.intermediate_size) == (
        promised.num_layers,
        promised.intermediate_size,
    )
    assert "LICENSE" not in (folder / "config.json").read_text()
    assert "Apache" not in (folder / "config.json").read_text(), "calibration text was kept"
    own = probe_logits(folder)
    assert bool(own.isfinite().all())
    decoder = gateskip.load(folder, rounded=False)
    ids = decoder.tokenizer("Grant of Copyright License").input_ids
    cache = decoder.skipping.new_cache(1, len(ids))
    with torch.inference_mode():
        hidden = decoder.skipping.forward(torch.tensor([ids]), cache, [0])
        engine = decoder.skipping.head(hidden)
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder)
        # evaluating, bitsandbytes multiplies 4-bit weights in bfloat16 where AVX-512 has it
        model.train(name == "nf4")
        theirs = model(torch.tensor([ids])).logits
    torch.testing.assert_close(engine, theirs.float(), atol=ROUNDING.get(name, 2e-3), rtol=0)
    if RUNS[name]["use"] == "gate":
        assert set(decoder.grid) >= {0.8, 0.5, 0.97}, "and what lies between"
        plain = decoder.generate([ids], 16).tokens
        own_tokens = decoder.generate([ids], 16, "speculate", draft_length=3, **SKIPPING)
        assert own_tokens.tokens == plain


def test_healing_says_how_far_it_came(run: Callable[..., Path], tiny_llama: Path) -> None:
    """The stage's record, of a model that a prune stage has damaged."""
    heal = {"use": "heal", "steps": 40, "length": 32, "lr": 3e-4, "precision": "no"}
    narrow = run({"use": "prune-width", "ratio": 0.5, "round_to": 64})
    healed = run(heal | {"validate_every": 10}, narrow)
    record = run.records[healed.name]
    assert record["held_out"]["after"] < record["held_out"]["before"]
    assert [row["step"] for row in record["training"]] == list(range(41))
    assert record["train_tokens"] == 40 * 32
    dense, before, after = (probe_logits(folder) for folder in (tiny_llama, narrow, healed))
    assert (after - dense).square().mean() < (before - dense).square().mean()


def test_every_weight_stage_has_a_run() -> None:
    for stage in STAGES.values():
        assert (stage.acts == "weights") == (stage.run is not Stage.run), stage.__name__


def test_frozen_gates_leave_the_weights_alone(run: Callable[..., Path], tiny_llama: Path) -> None:
    folder = run(RUNS["gate-frozen"])
    assert (folder / "model.safetensors").read_bytes() == (
        tiny_llama / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("quantizer", ["nf4", pytest.param("gptq4", marks=pytest.mark.slow)])
def test_gates_on_packed_weights_and_packed_after_gates(
    quantizer: str, run: Callable[..., Path]
) -> None:
    after = run(RUNS["gate-frozen"], run(RUNS[quantizer]))
    before = run(RUNS[quantizer], run(RUNS["gate-frozen"]))
    for folder in (after, before):
        decoder = gateskip.load(folder)
        assert decoder.kernels.get("PackedLinear", 0) in (0, 28)
        ids = decoder.tokenizer("Subject to the terms").input_ids
        plain = decoder.generate([ids], 24).tokens
        speculated = decoder.generate([ids], 24, "speculate", draft_length=4, **SKIPPING)
        assert speculated.tokens == plain
        decoder.skipping.usage.clear()
        decoder.generate([ids], 24, "skip", budget=0.5)
        assert decoder.saved(decoder.skipping.usage, 0.5).net > 0.1


def test_gates_go_on_from_a_file(run: Callable[..., Path]) -> None:
    made = run(RUNS["gate-frozen"])
    again = run(GATES | {"backbone": "frozen", "steps": 0, "init": str(made / "gates.safetensors")})
    assert (again / "gates.safetensors").read_bytes() == (made / "gates.safetensors").read_bytes()
    with pytest.raises(UserError, match="8 branches"):
        run(
            GATES | {"init": str(made / "gates.safetensors"), "backbone": "frozen"},
            run(RUNS["drop-layers"]),
        )


def test_equal_seeds_make_equal_gates(run: Callable[..., Path]) -> None:
    first, second = run(RUNS["gate-trained"]), run(RUNS["gate-trained"])
    for name in ("gates.safetensors", "model.safetensors", "gateskip.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_dropped_layer_is_the_one_that_does_least(
    run: Callable[..., Path], tiny_llama: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    lazy = tmp_path / "lazy"
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.mul_(1e-3)
        model.model.layers[2].mlp.down_proj.weight.mul_(1e-3)
    model.save_pretrained(lazy)
    copy_companions(tiny_llama, lazy)
    folder = run(RUNS["drop-layers"], lazy)
    kept = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(
        kept.model.layers[2].mlp.up_proj.weight, model.model.layers[3].mlp.up_proj.weight
    )


def test_pruned_neurons_are_the_idle_ones(
    run: Callable[..., Path], tiny_llama: Path, tmp_path: Path
) -> None:
    """A model half of whose neurons do nothing loses nothing."""
    from transformers import AutoModelForCausalLM

    idle = tmp_path / "idle"
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, ::2] = 0
    model.save_pretrained(idle)
    copy_companions(tiny_llama, idle)
    folder = run({"use": "prune-width", "ratio": 0.5, "round_to": 64}, idle)
    torch.testing.assert_close(probe_logits(folder), probe_logits(idle), atol=1e-4, rtol=0)


def test_int8_decodes_through_the_engine(run: Callable[..., Path]) -> None:
    """bitsandbytes' own layers round activations by rows, ours by blocks: nearly the same."""
    from gateskip.quantization.folders import load_model
    from gateskip.quantization.packed_linear import PackedLinear

    folder = run({"use": "bnb", "format": "int8"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder = gateskip.load(folder)
    assert decoder.skipping.engine is not None
    assert decoder.kernels["PackedLinear"] == 4 * 7
    timed = decoder.kernel_times["Linear8bitLt 8 bits 64 x 128"]
    assert min(timed.values()) > 0
    layer = decoder.skipping.model.model.layers[0].mlp.down_proj
    assert isinstance(layer, PackedLinear) and layer.bits == 8
    ids = decoder.tokenizer("Grant of Copyright License").input_ids
    with torch.inference_mode():
        cache = decoder.skipping.new_cache(1, 32)
        hidden = decoder.skipping.forward(torch.tensor([ids[:8]]), cache, [0])
        ours = decoder.skipping.head(hidden)
        theirs = load_model(folder)(torch.tensor([ids[:8]])).logits
    assert (ours - theirs).abs().mean() < 0.05 * theirs.float().std()


@pytest.mark.slow
def test_packed_gptq_weights_are_the_modules_own(run: Callable[..., Path]) -> None:
    """Symmetric or not: what our kernels unpack is what gptqmodel dequantizes."""
    from gateskip.quantization.folders import load_model
    from gateskip.quantization.packed_linear import _from_gptq

    for settings in ({}, {"sym": False}, {"bits": 8}, {"bits": 8, "sym": False}):
        model = load_model(run(RUNS["gptq4"] | settings), "float32")
        for layer in model.model.layers:
            theirs = layer.mlp.down_proj.dequantize_weight().T.float()
            packed = _from_gptq(layer.mlp.down_proj)
            assert packed is not None
            ours = packed.unpacked()
            torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)
