"""What a stage holds at most beside what its process needs anyway, at a size at which it shows."""

from __future__ import annotations

import multiprocessing
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tiny_models import stored_as

from compose.memory import peak_bytes, reset_peak, resident_bytes
from compose.stages.registry import STAGES, DataSpec, StageJob

FORKS = multiprocessing.get_context("forkserver")
"""Processes that have imported what all of these stages do."""
FORKS.set_forkserver_preload(["compose.stages.registry", "gateskip.training.loop"])
DEEP = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
GATE = {
    "use": "gate",
    "steps": 0,
    "backbone": "frozen",
    "length": 32,
    "budgets": (0.8,),
    "calibration_blocks": 2,
}
WEIGHTS = 512 * 512 + 12 * 512 * (64 * (2 * 8 + 2 * 4) + 3 * 2048)
"""47 million: 95 MB in the folder, 190 in float32."""


def growth(parameters: dict[str, Any], first: StageJob, then: StageJob) -> int:
    """How much this process grows at its peak in a stage on a large model, after one on a small."""
    stage = STAGES[parameters["use"]].model_validate(parameters)
    stage.run(first)
    reset_peak()
    before = resident_bytes()
    stage.run(then)
    return peak_bytes() - before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is set back as Linux does it")
@pytest.mark.parametrize(
    ("most", "parameters"),
    [
        (6.0, {"use": "int4", "compensate": False}),
        (7.0, {"use": "int4"}),
        (6.9, GATE),
        (6.9, {"use": "prune-width", "ratio": 0.2}),
        (5.0, {"use": "prune-hidden", "ratio": 0.2, "round_to": 32}),
        (6.9, {"use": "heal", "backbone": "lora", "steps": 1, "checkpointing": True}),
        (6.0, {"use": "gptq"}),
    ],
    ids=["int4-alone", "int4", "gate", "narrow", "hidden", "heal", "gptq"],
)
def test_no_second_copy_of_the_weights(
    most: float,
    parameters: dict[str, Any],
    make_tiny: Callable[..., Path],
    make_job: Callable[..., StageJob],
    licence_text: Path,
    tmp_path: Path,
) -> None:
    """The mapped file has two bytes a weight. With the model in float32 beside it gates held 8 at
    this size, where sums and one layer are not small beside all weights."""
    spec = DataSpec(source=str(licence_text), limit=80, length=32)
    jobs = []
    for name, sizes in (("small", {}), ("large", DEEP)):
        made = make_tiny("llama", **sizes)
        source = stored_as(made, "bfloat16", tmp_path / name)
        for file in made.glob("tokenizer*"):
            shutil.copy(file, source)
        (target := tmp_path / f"{name}-made").mkdir()
        few = spec.model_copy(update={"limit": 8})
        given = {"train": spec, "calibration": few, "progress": quiet, "dtype": "bfloat16"}
        jobs.append(make_job(source, target, **given))
    with ProcessPoolExecutor(1, mp_context=FORKS) as pool:
        grown = pool.submit(growth, parameters, *jobs).result()
    assert 1.9 * WEIGHTS < grown < most * WEIGHTS


def quiet(done: int, total: int, phase: str, **_: Any) -> None:
    """No progress; a lambda cannot go to another process."""
