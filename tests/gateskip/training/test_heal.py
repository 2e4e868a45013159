"""Healing: it brings a damaged model nearer to the dense one, stops in time, outlives a kill."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import stored_as

from compose.artifacts.packed_folder import load_as_stored
from compose.errors import UserError
from compose.stages.heal import hold_out
from gateskip.quantization.folders import load_model
from gateskip.training.heal import best_row, heal, worn_out
from gateskip.training.loop import adapt
from gateskip.training.recipe import HealConfig

CONFIG = HealConfig(steps=12, lr=1e-3, precision="no", validate_every=4, checkpoint_every=4)


@pytest.fixture(scope="module")
def blocks() -> torch.Tensor:
    return torch.randint(3, 512, (10, 48), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def damaged(tiny_llama: Path) -> Callable[[], Any]:
    """A model whose MLPs lost half of what they add."""

    def make() -> Any:
        model = load_model(tiny_llama, "float32")
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.down_proj.weight.mul_(0.5)
        return model

    return make


def distance(model: Any, dense: Any, blocks: torch.Tensor) -> float:
    """Mean KL(dense || model) over tokens of blocks [N, S], from the models' own logits."""
    with torch.no_grad():
        target, found = (m(blocks).logits.log_softmax(-1) for m in (dense, model))
    return float((target.exp() * (target - found)).sum(-1).mean())


OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"backbone": "lora", "lora_rank": 4, "lr": 1e-2},
    "accumulate": {"accumulate": 2, "batch": 2},
    "temperature": {"temperature": 2.0},
    "bf16": {"precision": "bf16"},
    "checkpointing": {"checkpointing": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_comes_nearer_to_the_dense_model(
    options: dict[str, Any],
    damaged: Callable[[], Any],
    tiny_llama: Path,
    blocks: torch.Tensor,
) -> None:
    model, dense = damaged(), load_model(tiny_llama, "float32")
    before = {name: p.clone() for name, p in model.named_parameters()}
    away = distance(model, dense, blocks[8:])
    curve = heal(model, dense, blocks[:8], replace(CONFIG, **options), blocks[8:])
    assert distance(model, dense, blocks[8:]) < 0.95 * away
    assert curve[0] == {"step": 0.0, "valid": pytest.approx(away, rel=2e-2)}
    assert [row["step"] for row in curve if "valid" in row] == [0, 4, 8, 12]
    after = dict(model.named_parameters())
    assert after.keys() == before.keys(), "low-rank updates are merged"
    name = "model.embed_tokens.weight"
    assert torch.equal(after[name], before[name])
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        name = f"model.layers.1.{name}.weight"
        assert not torch.equal(after[name], before[name]), name


def test_the_best_weights_stay_and_training_stops(
    damaged: Callable[[], Any], tiny_llama: Path, blocks: torch.Tensor
) -> None:
    """A learning rate that ruins the model: what comes out is what went in."""
    model, dense = damaged(), load_model(tiny_llama, "float32")
    before = [p.clone() for p in model.parameters()]
    config = replace(CONFIG, lr=3.0, steps=40, patience=2)
    curve = heal(model, dense, blocks[:8], config, blocks[8:])
    assert curve[-1]["step"] == 8, "two validations brought nothing"
    best = best_row(curve)
    assert best is not None and best["step"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_without_held_out_text_the_last_weights_stay(
    damaged: Callable[[], Any], tiny_llama: Path, blocks: torch.Tensor
) -> None:
    model, dense = damaged(), load_model(tiny_llama, "float32")
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    curve = heal(model, dense, blocks, replace(CONFIG, steps=2, validate_every=0))
    assert [set(row) for row in curve] == [{"step", "loss"}] * 2
    assert not torch.equal(before, model.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("backbone", ["full", "lora"])
def test_a_broken_run_ends_as_an_unbroken_one(
    backbone: Any,
    damaged: Callable[[], Any],
    tiny_llama: Path,
    blocks: torch.Tensor,
    tmp_path: Path,
) -> None:
    dense, config = load_model(tiny_llama, "float32"), replace(CONFIG, backbone=backbone)
    whole = damaged()
    curve = heal(whole, dense, blocks[:8], config, blocks[8:])

    class Killed(Exception):
        pass

    def kill(done: int, total: int, phase: str, **_: float | str) -> None:
        if done == 7:
            raise Killed

    with pytest.raises(Killed):
        heal(damaged(), dense, blocks[:8], config, blocks[8:], tmp_path, kill)
    again, rest = damaged(), list[int]()
    resumed = heal(
        again,
        dense,
        blocks[:8],
        config,
        blocks[8:],
        tmp_path,
        lambda done, total, phase, **_: rest.append(done),
    )
    assert rest[0] == 5, "goes on after the checkpoint at step 4"
    assert resumed == curve
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True)
    )


def test_updates_of_fused_projections_learn(
    make_tiny: Callable[..., Path], blocks: torch.Tensor
) -> None:
    """Phi3 keeps queries, keys and values in one matrix, which our own passes read in parts."""
    folder = make_tiny("phi3")
    model, dense = load_model(folder, "float32"), load_model(folder, "float32")
    with torch.no_grad():
        model.model.layers[0].self_attn.qkv_proj.weight.mul_(0.5)
    before = model.model.layers[0].self_attn.qkv_proj.weight.clone()
    config = replace(CONFIG, backbone="lora", steps=4, lr=1e-2)
    heal(model, dense, blocks, config)
    assert not torch.equal(before, model.model.layers[0].self_attn.qkv_proj.weight)


def test_updates_learn_beside_weights_as_they_are_stored(
    damaged: Callable[[], Any], tiny_llama: Path, blocks: torch.Tensor, tmp_path: Path
) -> None:
    """The student's and the teacher's alike; they are merged into the type that is stored."""
    (bad := damaged()).to(torch.bfloat16).save_pretrained(tmp_path / "bad")
    stored = (tmp_path / "bad" / "model.safetensors").read_bytes()
    dense = stored_as(tiny_llama, "bfloat16", tmp_path / "dense")
    config = replace(CONFIG, backbone="lora", lora_rank=4, lr=1e-2)
    curves, healed = [], []
    for load in (load_as_stored, partial(load_model, dtype="float32")):
        model, teacher = load(tmp_path / "bad"), load(dense)
        curves.append(heal(model, teacher, blocks[:8], config, blocks[8:]))
        healed.append(dict(model.named_parameters()))
    as_stored, wide = curves
    assert as_stored[0] == wide[0], "untouched, both are as far away"
    assert as_stored[-1]["valid"] == pytest.approx(wide[-1]["valid"], rel=0.05)
    best = best_row(as_stored)
    assert best is not None and best["valid"] < 0.95 * as_stored[0]["valid"]
    assert healed[0].keys() == healed[1].keys() == dict(bad.named_parameters()).keys()
    learned = "model.layers.1.mlp.down_proj.weight"
    assert healed[0][learned].dtype == torch.bfloat16
    assert not torch.equal(healed[0][learned], bad.state_dict()[learned])
    assert (tmp_path / "bad" / "model.safetensors").read_bytes() == stored


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_teacher_as_it_is_stored_teaches_as_one_in_float32(
    precision: Any,
    damaged: Callable[[], Any],
    tiny_llama: Path,
    blocks: torch.Tensor,
    tmp_path: Path,
) -> None:
    dense = stored_as(tiny_llama, "bfloat16", tmp_path / "dense")
    config = replace(CONFIG, precision=precision, steps=4)
    healed = []
    for teacher in (load_as_stored(dense), load_model(dense, "float32")):
        model = damaged()
        curve = heal(model, teacher, blocks[:8], config, blocks[8:])
        healed.append((curve, list(model.parameters())))
    (curve, found), (wide, expected) = healed
    assert curve == wide
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gates_train_the_updates_of_fused_projections(
    make_tiny: Callable[..., Path], blocks: torch.Tensor
) -> None:
    from gateskip.model.reference import masked_forward

    model = load_model(make_tiny("phi3"), "float32")
    adapt(model, HealConfig(backbone="lora"))
    masked_forward(model, blocks[:1]).square().sum().backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not silent


@pytest.mark.parametrize(
    ("valid", "patience", "over"),
    [
        ([3, 2, 1], 1, False),
        ([3, 2, 2.5], 1, True),
        ([3, 2, 2.5], 2, False),
        ([3, 2, 2.5, 2], 2, True),
        ([1, 2, 3], 0, False),
        ([], 1, False),
    ],
)
def test_patience(valid: list[float], patience: int, over: bool) -> None:
    curve = [{"step": i, "valid": value} for i, value in enumerate(valid)]
    assert worn_out([*curve, {"step": 99, "loss": math.inf}], patience) is over


def test_held_out_blocks_are_not_trained_on() -> None:
    blocks = torch.arange(20).view(10, 2)
    train, held_out = hold_out(blocks, 4)
    assert held_out is not None
    assert (train.tolist(), held_out.tolist()) == (blocks[:8].tolist(), blocks[8:].tolist())
    assert hold_out(blocks, 0) == (blocks, None)
    with pytest.raises(UserError, match="validate_every: 0"):
        hold_out(blocks[:3], 4)
