"""How much memory each stage's process holds at its peak on a model of a larger shape.

    python tools/memory_at_size.py llama-1b --out runs/memory        (`--help` has its options)

Random weights, every stage in a process of its own, by default 16 blocks of 512 tokens: states of
the text are 4 bytes a channel and token, and the only thing that more text adds to. The most that a
process held counts what it maps of the model's file. Writes `summary.json`, stage by stage.

Takes about an hour on two cores at the size of 1B.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from shapes import SHAPES, write_random

from compose.artifacts.folder import copy_companions
from compose.assets.fetch import default_cache
from compose.memory import peak_bytes
from compose.results.environment import capture_environment
from compose.stages.registry import STAGES, DataSpec, ModelShape, StageJob

STAGES_RUN: dict[str, dict[str, Any]] = {
    "drop-layers": {"use": "drop-layers", "count": 2},
    "prune-heads": {"use": "prune-heads", "count": 16},
    "prune-width": {"use": "prune-width", "ratio": 0.2},
    "prune-hidden": {"use": "prune-hidden", "ratio": 0.2},
    "heal-lora": {"use": "heal", "backbone": "lora", "steps": 2, "checkpointing": True},
    "gate": {
        "use": "gate",
        "backbone": "frozen",
        "steps": 2,
        "checkpointing": True,
        "budgets": [0.8],  # each takes a pass over the text
        "calibration_blocks": 8,
    },
    "int4-without-compensation": {"use": "int4", "compensate": False},
    "int4": {"use": "int4"},
    "gptq": {"use": "gptq"},
}
AFTER = {"heal-lora": "prune-width"}
"""Stages that start from what another one made."""


def main() -> None:
    """Write the model, run the stages, and keep what each one held."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--out", type=Path, default=Path("runs/memory"))
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--only", action="append", choices=STAGES_RUN)
    options = parser.parse_args()
    folder = options.out / options.shape
    if not (folder / "config.json").is_file():
        write_random(options.shape, folder)
    file = options.out / "summary.json"
    summary = json.loads(file.read_text()) if file.is_file() else {"stages": {}}
    where = capture_environment()
    summary["processor"] = where["processor"]
    spawn = multiprocessing.get_context("spawn")
    for name in options.only or STAGES_RUN:
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            source = options.out / AFTER[name] if name in AFTER else folder
            given = (STAGES_RUN[name], source, folder, options.out / name, options.blocks)
            measured = pool.submit(held, *given).result()
        command = (
            f"python tools/memory_at_size.py {options.shape} --only {name}"
            f" --blocks {options.blocks}"
        )
        measured |= {"commit": where["git_commit"], "command": command, "blocks": options.blocks}
        summary["stages"][name] = measured
        print(name, json.dumps(measured), flush=True)
        file.write_text(json.dumps(summary, indent=1) + "\n")


def held(
    parameters: dict[str, Any], source: Path, dense: Path, made: Path, blocks: int
) -> dict[str, Any]:
    """The peak of this process in a stage, its estimate, both in GB, and the seconds it took. What
    the stage makes lies in `made`."""
    stage = STAGES[parameters["use"]].model_validate(parameters)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    shape = ModelShape.from_config(config)
    stage.check(shape, ())
    text = DataSpec(source="calibration-text", limit=blocks, length=512)
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    job = StageJob(
        source=source,
        target=made,
        seed=0,
        dtype="bfloat16",
        train=text,
        calibration=text,
        dense=dense,
        progress=lambda done, total, phase, **_: None,
        work=made.with_name(f"{made.name}-work"),
        asset_cache=default_cache(),
    )
    started = time.perf_counter()
    stage.run(job)
    seconds = time.perf_counter() - started
    estimate = stage.memory(shape, 512)
    copy_companions(source, made)
    return {
        "parameters": parameters,
        "peak_gb": round(peak_bytes() / 1e9, 2),
        "estimated_gb": round(estimate / 1e9, 2),
        "seconds": round(seconds),
    }


if __name__ == "__main__":
    main()
