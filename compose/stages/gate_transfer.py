"""Gates of a model that changes under them: they go along, or what is left of them does, calibrated
again."""

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
    """Refuse to take layers from under gates that know themselves by the number of their layer.

    Raises:
        RuleBroken: `prune-after-gate`.
    """
    if any(isinstance(earlier, Gate) and earlier.kind == "router" for earlier in before):
        raise RuleBroken(
            "prune-after-gate",
            f"{stage.use} cannot come after router gates: they sit at every second layer",
            fix=f"put {stage.use} before the gates, or take another kind",
        )


def carry_gates(job: StageJob) -> None:
    """Give the target the source's gates as they are, where it has any."""
    for name in ("gates.safetensors", "gateskip.json"):
        if (job.source / name).is_file():
            shutil.copyfile(job.source / name, job.target / name)


def thresholds_from_decoding(folder: Path) -> bool:
    """Whether a folder's gates are calibrated by decoding. The engine decodes otherwise in bfloat16
    than in float32, which `keep_gates` needs then."""
    from gateskip.checkpoint import load_gates

    file = load_gates(folder) if is_gated(folder) else None
    return file is not None and _stage_of(file).calibrate_on != "text"


def keep_gates(
    job: StageJob, model: Any, layers: list[int], gone: frozenset[int] = frozenset()
) -> None:
    """Give the target the gates that the source has, where it has any.

    `model` is what is left of the source, and computes in float32; `layers` are the old numbers of
    its layers, `gone` the new numbers of branches that no token may enter. What goes changes what
    later gates read, so thresholds are calibrated as the gate stage did, on the same text.
    """
    if not is_gated(job.source):
        return
    from transformers import AutoTokenizer

    from compose.stages.text.split_text import split_blocks
    from gateskip.checkpoint import GateFile, load_gates, save_gates

    file = load_gates(job.source)
    assert file is not None, "a gated folder holds gates"
    stage = _stage_of(file)
    rows = [2 * layer + part for layer in layers for part in (0, 1)]  # attention, MLP
    gates = file.gates.rows(rows).requires_grad_(False)
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
    """The stage that made a file of gates."""
    return Gate.model_validate(file.training["parameters"])
