"""Gate training and healing, for `accelerate launch --use_fsdp` or alone: python FILE MODEL OUT.

Two processes train by DDP and by FSDP with one block in a pass, one process alone with two: the
same blocks in a step. Every process writes each training as OUT/HOW-TRAINING-PROCESSES-RANK.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from gateskip.gates.kinds import make_gates
from gateskip.quantization.folders import load_model
from gateskip.training import heal as healing
from gateskip.training import sharding
from gateskip.training.gate_finetune import _Session, train_gates
from gateskip.training.loop import CHECKPOINT, Loop
from gateskip.training.recipe import HealConfig, LoopConfig, OnPolicy, TrainConfig

MODEL, OUT = Path(sys.argv[1]), Path(sys.argv[2])
BLOCKS = torch.randint(3, 500, (16, 32), generator=torch.Generator().manual_seed(1))
STEPS = 4
SOFT = {"masks": "soft", "budget": 0.6, "backbone_lr": 1e-4}
"""A hard mask has tokens at its very threshold, which rounding lets in or out."""
SETTINGS = {"lr": 1e-4, "weight_decay": 0.1, "precision": "no"}

OWN = OnPolicy(after=0.5, share=1.0, every=10, tokens=8, temperature=0.0)

seen: list[Any] = []
"""Blocks that this process has read."""
held: list[int] = []
"""Numbers of weights and moments that it holds of what trains, at the end of each step."""


wrote: list[float] = []
"""Of the model that writes on-policy text, whenever it does: the sum of what trains in it."""


def noted_writer(writer: Any) -> Any:
    """Note with which weights the student writes."""

    def write(self: Loop, draw: float) -> Any:
        own = self.model.model.layers[0].mlp.up_proj.weight.detach()
        wrote.append(float(own.double().abs().sum()))
        return writer(self, draw)

    return write


def watch(advance: Any) -> Any:
    """Note what a step leaves in the optimizer."""

    def watched(self: Loop) -> Any:
        row = advance(self)
        state = self.optimizer.state.values()
        tensors = [each for moments in state for each in moments.values() if each.ndim]
        own = [*self.trained.values(), *tensors]
        held.append(sum(getattr(each, "_local_tensor", each).numel() for each in own))
        return row

    return watched


def noted(block: Any) -> Any:
    """Note which blocks are read."""

    def read(self: Loop, part: int) -> torch.Tensor:
        found: torch.Tensor = block(self, part)
        seen.append(found.tolist())
        return found

    return read


Loop._block = noted(Loop._block)  # type: ignore[method-assign]
_Session.advance = watch(_Session.advance)  # type: ignore[method-assign]
healing._Healing.advance = watch(healing._Healing.advance)  # type: ignore[method-assign]
healing._Healing.writer = noted_writer(healing._Healing.writer)  # type: ignore[method-assign]


def gate(batch: int, **options: Any) -> tuple[Any, list[dict[str, float]]]:
    """Gates and, if asked, the backbone."""
    model, teacher = load_model(MODEL, "float32"), load_model(MODEL, "float32")
    torch.manual_seed(0)
    gates = make_gates("scalar", 8, 64)
    config = TrainConfig(
        **{**SETTINGS, **SOFT, "steps": STEPS, "validate_every": 2},
        **{"batch": batch, "accumulate": 2, **options},
    )
    dense = None if config.backbone == "frozen" else teacher
    curve = train_gates(model, gates, BLOCKS, config, dense, validation=BLOCKS[:1])
    return torch.nn.ModuleList([model, gates]), curve


def harmed() -> Any:
    """The model with some weights off."""
    model = load_model(MODEL, "float32")
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.up_proj.weight[::2] *= 0.5
    return model


def harmed_sum() -> float:
    """Of that model, what `wrote` would have."""
    return float(harmed().model.layers[0].mlp.up_proj.weight.double().abs().sum())


def heal(batch: int, resumed: bool = False, **options: Any) -> tuple[Any, list[dict[str, float]]]:
    """Distillation into a model with some weights off, whole or broken off and resumed."""
    settings = {**SETTINGS, "steps": STEPS, "batch": batch, "validate_every": 2, **options}
    config = HealConfig(**settings, checkpoint_every=2 if resumed else 50)
    teacher = load_model(MODEL, "float32")

    work = OUT / f"work-{HOW}-{WORLD}" if resumed else None
    if resumed:

        def kill(done: int, *_: Any, **__: Any) -> None:
            if done == 3:
                raise InterruptedError

        try:
            healing.heal(harmed(), teacher, BLOCKS, config, BLOCKS[:1], work, kill)
        except InterruptedError:
            assert work is not None and (WORLD == 2 or (work / CHECKPOINT).is_file())
        if WORLD == 2:
            torch.distributed.barrier()
    model = harmed()
    return model, healing.heal(model, teacher, BLOCKS, config, BLOCKS[:1], work)


def refusals() -> dict[str, str]:
    """What FSDP is refused for, by its name."""
    cases: dict[str, tuple[LoopConfig, str]] = {
        "frozen": (TrainConfig(backbone="frozen"), "no"),
        "scales": (HealConfig(backbone="scales"), "no"),
        "fp16": (HealConfig(), "fp16"),
    }
    told = {}
    for name, (config, precision) in cases.items():
        try:
            sharding.refuse(config, precision)
        except ValueError as error:
            told[name] = str(error)
    return told


WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
TRAININGS: dict[str, Any] = {
    "gate-frozen": lambda batch: gate(batch, backbone="frozen"),
    "gate-full": lambda batch: gate(batch, backbone="full"),
    "gate-lora": lambda batch: gate(batch, backbone="lora", lora_rank=2),
    "gate-on-policy": lambda batch: gate(batch, backbone="full", on_policy=OWN),
    "heal": heal,
    "heal-on-policy": lambda batch: heal(batch, on_policy=OWN),
    "heal-resumed": lambda batch: heal(batch, resumed=True),
}
for HOW in ("ddp", "fsdp")[:WORLD]:
    os.environ[sharding.VARIABLE] = str(HOW == "fsdp").lower()
    sharding.fsdp_requested.cache_clear()
    for name, training in TRAININGS.items():
        if (HOW, name) == ("fsdp", "gate-frozen"):
            continue
        seen.clear()
        held.clear()
        wrote.clear()
        torch.manual_seed(3)
        model, curve = training(2 // WORLD)
        before = dict(load_model(MODEL, "float32").named_parameters())
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        found = {"curve": curve, "weights": weights, "seen": list(seen), "held": held[-1]}
        found |= {"wrote": list(wrote), "harmed": harmed_sum()}
        before = {n: before.get(n.removeprefix("0."), torch.zeros(1)) for n in weights}
        torch.save(found | {"before": before}, OUT / f"{HOW}-{name}-{WORLD}-{RANK}.pt")
torch.save(refusals(), OUT / f"refused-{WORLD}-{RANK}.pt")
if WORLD == 2:
    torch.distributed.destroy_process_group()
