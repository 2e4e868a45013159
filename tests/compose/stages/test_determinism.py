"""Every weight stage makes the same folder twice from one seed, and records which seed that was.

A stage that draws numbers must draw them from the seed it is given; a sum that threads add up in
any order, or a clock that decides something, would show here as other bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from compose.artifacts.folder import hash_folder
from compose.stages.registry import STAGES, DataSpec, Stage, StageJob
from compose.workers.step import seed_everything

GATES = {"use": "gate", "steps": 3, "length": 32, "budgets": (0.8, 0.5), "calibration_blocks": 4}
FROZEN = GATES | {"backbone": "frozen"}

RUNS: dict[str, dict[str, Any]] = {
    "gate": GATES,
    "gate-frozen": FROZEN,
    "gate-on-its-own-text": FROZEN,
    "gate-paper": {**FROZEN, "recipe": "paper"},
    "drop-layers": {"use": "drop-layers", "count": 1},
    "drop-layers-greedy": {"use": "drop-layers", "count": 1, "metric": "perplexity-greedy"},
    "prune-width": {"use": "prune-width", "ratio": 0.4, "round_to": 64},
    "prune-heads": {"use": "prune-heads", "count": 2},
    "prune-hidden": {"use": "prune-hidden", "ratio": 0.4, "round_to": 32},
    "prune-branches": {"use": "prune-branches", "budget": 0.5},
    "heal": {"use": "heal", "steps": 3, "length": 32},
    "heal-lora": {"use": "heal", "steps": 3, "length": 32, "backbone": "lora", "lora_rank": 2},
    "int8": {"use": "int8"},
    "int6": {"use": "int6"},
    "int4": {"use": "int4"},
    "int3": {"use": "int3"},
    "int2": {"use": "int2"},
    "bnb-nf4": {"use": "bnb", "format": "nf4"},
    "bnb-int8": {"use": "bnb", "format": "int8"},
    "gptq": {"use": "gptq", "bits": 4, "group_size": 32},
    "autoround": {"use": "autoround", "iters": 2},
    "pack-head": {"use": "pack-head"},
    "draft-network": {"use": "draft-network", "steps": 3, "batch": 2, "inner": 16},
}
"""Stages by what is tried of them."""

AFTER_GATES = ("prune-branches",)
UNEQUAL: dict[str, str] = {}
"""Runs whose folders differ from time to time, and why; empty, as it should stay."""


@pytest.fixture(scope="module")
def gated(
    licence_text: Path,
    tiny_llama: Path,
    make_job: Callable[..., StageJob],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with gates, for stages that need them."""
    return made(
        FROZEN, tiny_llama, tmp_path_factory.mktemp("gated") / "made", licence_text, make_job
    )


def made(
    parameters: dict[str, Any],
    source: Path,
    target: Path,
    text: Path | str,
    make_job: Callable[..., StageJob],
) -> Path:
    """What a stage makes, as its worker seeds it; nothing of an earlier run is in its scratch."""
    stage: Stage = STAGES[parameters["use"]].model_validate(parameters)
    target.mkdir(parents=True)
    AcceleratorState._reset_state()
    seed_everything(7)
    spec = DataSpec(source=str(text), limit=16, length=32)
    stage.run(make_job(source, target, train=spec, calibration=spec, dense=source, seed=7))
    return target


@pytest.mark.parametrize("name", RUNS)
def test_the_same_seed_makes_the_same_folder(
    name: str,
    licence_text: Path,
    tiny_llama: Path,
    gated: Path,
    make_job: Callable[..., StageJob],
    tmp_path: Path,
) -> None:
    if RUNS[name]["use"] == "autoround":
        pytest.importorskip("auto_round")
    source = gated if name in AFTER_GATES else tiny_llama
    read = "self-written" if name.endswith("own-text") else licence_text
    folders = []
    for number in range(2):
        folders.append(made(RUNS[name], source, tmp_path / str(number) / "m", read, make_job))
        # what else the process did must not matter
        torch.rand(number + 3)
        np.random.rand(number + 3)
    assert hash_folder(folders[0]) == hash_folder(folders[1]), difference(*folders)


def difference(one: Path, other: Path) -> str:
    """Which files of two folders differ, and of weights how far apart they are."""
    from safetensors.torch import load_file

    lines = []
    for file in sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file()):
        if (one / file).read_bytes() == (other / file).read_bytes():
            continue
        if file.suffix != ".safetensors":
            lines.append(f"{file} differs")
            continue
        tensors, others = load_file(one / file), load_file(other / file)
        for name, tensor in tensors.items():
            far = (tensor.double() - others[name].double()).abs().max()
            if far > 0:
                lines.append(f"{file}, {name}: {far:.3g} apart")
    return "; ".join(lines)


def test_every_weight_stage_is_made_twice() -> None:
    tried = {run["use"] for run in RUNS.values()}
    assert tried == {use for use, stage in STAGES.items() if stage.acts == "weights"}
    assert UNEQUAL.keys() <= RUNS.keys()


def test_another_seed_draws_other_numbers(
    licence_text: Path, tiny_llama: Path, make_job: Callable[..., StageJob], tmp_path: Path
) -> None:
    """Else the test above would hold of a stage that draws from nothing at all."""
    hashes = set()
    for seed in (1, 2):
        stage = STAGES["gate"].model_validate(GATES)
        target = tmp_path / str(seed) / "m"
        target.mkdir(parents=True)
        AcceleratorState._reset_state()
        seed_everything(seed)
        spec = DataSpec(source=str(licence_text), limit=16, length=32)
        stage.run(make_job(tiny_llama, target, train=spec, calibration=spec, seed=seed))
        hashes.add(hash_folder(target))
    assert len(hashes) == 2
