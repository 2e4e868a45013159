"""Carries gates through stages that change the model under them: as they are, or for the remaining
branches, calibrated again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.artifacts.folder import is_gated
from compose.errors import RuleBroken
from compose.stages.base import Stage, StageJob
from compose.stages.gate import Gate

if TYPE_CHECKING:
    from gateskip.checkpoint import GateFile


def require_gates_that_move(stage: Stage, before: tuple[Stage, ...]) -> None:
    """Refuse to remove layers under gates that are tied to layer numbers (router gates).

    Raises:
        RuleBroken: `prune-after-gate`.
    """
    if any(isinstance(earlier, Gate) and earlier.kind == "router" for earlier in before):
        raise RuleBroken(
            "prune-after-gate",
            f"{stage.use} cannot come after router gates: they sit at every second layer",
            fix=f"put {stage.use} before the gates, or use another kind of gates",
        )


def carry_gates(job: StageJob) -> None:
    """Copy the source's gates unchanged into the target, where the source has gates."""
    for name in ("gates.safetensors", "gateskip.json"):
        if (job.source / name).is_file():
            shutil.copyfile(job.source / name, job.target / name)


def thresholds_from_decoding(folder: Path) -> bool:
    """Whether a folder's gates are calibrated on decoded text. Decoding differs between bfloat16
    and float32, so `keep_gates` then needs the stored type."""
    from gateskip.checkpoint import load_gates

    file = load_gates(folder) if is_gated(folder) else None
    return file is not None and _stage_of(file).calibrate_on != "text"


def keep_gates(
    job: StageJob, model: Any, layers: list[int], gone: frozenset[int] = frozenset()
) -> None:
    """Give the target the source's gates for the remaining branches, where the source has gates.

    `model` is the pruned model in float32; `layers` are the old numbers of its layers, `gone` the
    new numbers of branches that no token may enter. Removing layers changes the input of later
    gates, so thresholds are calibrated again as the gate stage did, on the same text.
    """
    if not is_gated(job.source):
        return
    from transformers import AutoTokenizer

    from compose.stages.text.split_text import split_blocks
    from gateskip.checkpoint import GateFile, load_gates, save_gates
    from gateskip.model.families import device_of

    file = load_gates(job.source)
    assert file is not None, "a gated folder holds gates"
    stage = _stage_of(file)
    rows = [2 * layer + part for layer in layers for part in (0, 1)]  # attention, MLP
    gates = file.gates.rows(rows).to(device_of(model)).requires_grad_(False)
    gates.attach(model)
    sensitivity = file.sensitivity and [file.sensitivity[row] for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(job.source)
    blocks = split_blocks(job, "calibration", tokenizer, stage.length, stage.calibration_blocks)
    budgets = stage.calibrate(job, model, gates, blocks, sensitivity, gone)
    training = {**file.training, "branches": rows}
    save_gates(
        job.target, GateFile.of(gates, file.kv_rule, budgets, sensitivity, training, file.decode)
    )


def _stage_of(file: GateFile) -> Gate:
    """The stage that made a gates file."""
    return Gate.model_validate(file.training["parameters"])
