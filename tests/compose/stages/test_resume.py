"""A step that was killed goes on where it was, and makes the folder that it would have made."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from compose.artifacts.folder import hash_folder
from compose.stages.registry import STAGES, DataSpec, StageJob
from compose.workers.step import seed_everything
from gateskip.rounding import layerwise

GATES = {
    "use": "gate",
    "backbone": "frozen",
    "steps": 3,
    "length": 32,
    "budgets": (0.9,),
    "calibration_blocks": 2,
    "shortcut": 4,
}

RUNS: dict[str, dict[str, Any]] = {
    "int8": {"use": "int8"},
    "int4": {"use": "int4"},
    "int4-gptq-format": {"use": "int4", "offset": "integer"},
    "int4-some": {"use": "int4", "skip": ("down_proj",), "mixed": {"v_proj": 8}},
    "allocated": {"use": "int4", "allocate": {"bits_per_weight": 4.5}},
    "gate": GATES | {"prompt_budgets": (0.9,)},
    "gate-lora": GATES | {"backbone": "lora", "lora_rank": 2, "init": "open"},
}


class Killed(Exception):
    """The process ends here."""


def run(
    parameters: dict[str, Any], job: Callable[..., StageJob], target: Path, kill_at: int | None
) -> list[str]:
    """Run a stage as its worker does, until its `kill_at`-th word of progress; all of its words."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    AcceleratorState._reset_state()
    seed_everything(7)
    words: list[str] = []

    def progress(done: int, total: int, phase: str, **_: Any) -> None:
        words.append(phase)
        if len(words) == kill_at:
            raise Killed

    STAGES[parameters["use"]].model_validate(parameters).run(job(target, progress))
    return words


@pytest.fixture
def job(
    licence_text: Path, tiny_llama: Path, make_job: Callable[..., StageJob]
) -> Callable[..., StageJob]:
    spec = DataSpec(source=str(licence_text), limit=16, length=32)

    def make(target: Path, progress: Any) -> StageJob:
        given = {"train": spec, "calibration": spec, "dense": tiny_llama, "seed": 7}
        return make_job(tiny_llama, target, progress=progress, **given)

    return make


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_step_makes_the_same_folder(
    name: str, job: Callable[..., StageJob], tmp_path: Path
) -> None:
    """Killed half-way and then again, each time going on from there."""
    words = run(RUNS[name], job, tmp_path / "whole" / "m", None)
    broken = tmp_path / "broken" / "m"
    for kill_at in (len(words) // 2, len(words) // 4):
        with pytest.raises(Killed):
            run(RUNS[name], job, broken, max(1, kill_at))
    rest = run(RUNS[name], job, broken, None)
    assert hash_folder(broken) == hash_folder(tmp_path / "whole" / "m")
    assert len(rest) <= len(words)


def test_layers_that_are_finished_are_not_rounded_again(
    job: Callable[..., StageJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed):
        run({"use": "int4"}, job, tmp_path / "m", 4)  # as the fourth of four layers begins
    assert len(list((tmp_path / "m-work" / "layers").glob("*.safetensors"))) == 3
    rounded: list[Any] = []
    inner = layerwise._round_layer

    def counted(layer: Any, *arguments: Any) -> Any:
        rounded.append(layer)
        return inner(layer, *arguments)

    monkeypatch.setattr(layerwise, "_round_layer", counted)
    run({"use": "int4"}, job, tmp_path / "m", None)
    assert len(rounded) == 1


def test_a_damaged_layer_is_rounded_again(job: Callable[..., StageJob], tmp_path: Path) -> None:
    run({"use": "int4"}, job, tmp_path / "whole", None)
    with pytest.raises(Killed):
        run({"use": "int4"}, job, tmp_path / "m", 4)
    file = tmp_path / "m-work" / "layers" / "layer-1.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    run({"use": "int4"}, job, tmp_path / "m", None)
    assert hash_folder(tmp_path / "m") == hash_folder(tmp_path / "whole")


def test_gates_are_not_calibrated_again(
    job: Callable[..., StageJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was finished before the last part is read: a warm start, budgets, budgets of prompts."""
    from gateskip.calibration import thresholds, warm_start

    parameters = GATES | {"prompt_budgets": (0.9,), "steps": 0}
    words = run(parameters, job, tmp_path / "m", None)

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("this was finished")

    monkeypatch.setattr(warm_start, "warm_start", again)
    monkeypatch.setattr(thresholds, "calibrate_everywhere", again)
    assert len(run(parameters, job, tmp_path / "m", None)) < len(words)


KILLED = """
import os, signal, sys
from pathlib import Path
from compose.contract import DataSpec, StageJob
from compose.stages.registry import STAGES
from compose.workers.step import seed_everything

source, target, text, last = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

def progress(done, total, phase, **_):
    if phase.startswith("rounding") and done == last:
        os.kill(os.getpid(), signal.SIGKILL)

target.mkdir(parents=True)
seed_everything(7)
spec = DataSpec(source=text, limit=16, length=32)
STAGES["int4"].model_validate({"use": "int4"}).run(
    StageJob(
        source=source, target=target, seed=7, dtype="float32", train=spec, calibration=spec,
        dense=source, work=target.with_name("work"), asset_cache=target.with_name("cache"),
        progress=progress,
    )
)
"""


@pytest.mark.slow
def test_a_process_that_is_killed_between_layers(
    tiny_llama: Path, licence_text: Path, tmp_path: Path
) -> None:
    def go(target: Path, last: int) -> int:
        shutil.rmtree(target, ignore_errors=True)
        arguments = [str(tiny_llama), str(target), str(licence_text), str(last)]
        return subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False).returncode

    whole, broken = tmp_path / "whole" / "m", tmp_path / "broken" / "m"
    assert go(whole, -1) == 0
    assert go(broken, 2) == -signal.SIGKILL
    assert sorted(file.name for file in (tmp_path / "broken" / "work" / "layers").iterdir()) == [
        "layer-0.safetensors",
        "layer-1.safetensors",
    ]
    assert go(broken, -1) == 0
    assert hash_folder(broken) == hash_folder(whole)
