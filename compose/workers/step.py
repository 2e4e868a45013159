"""Role `step`: make one model folder, with its lineage and the logits of the probe text."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compose.contract import StepJob
from compose.errors import AssetError
from compose.memory import peak_bytes
from compose.results.environment import library_versions
from compose.units import Progress
from compose.workers.scalars import written
from gateskip.errors import FormatError


def run_step(job: StepJob, progress: Progress) -> dict[str, Any]:
    """Make the step's model folder with its lineage and probe logits; returns the record.

    Nothing here depends on measured time, which is not part of the step's key.

    Raises as the stage, or as fetching the source model, does.
    """
    from gateskip.kernels.autotune import by_capability
    from gateskip.training.loop import training_on

    if job.tensorboard is not None:
        progress = written(progress, job.tensorboard)
    with by_capability(), training_on(job.device):
        return _run_step(replace(job, progress=progress))


def _run_step(job: StepJob) -> dict[str, Any]:
    from compose.artifacts import folder as artifact

    target = job.target
    target.mkdir(parents=True)
    seed_everything(job.seed)
    started = time.perf_counter()
    if job.stage is None:
        before, entry = [], _make_source(job)
    else:
        before = artifact.lineage(job.source)
        entry = {"input_sha256": before[-1]["output_sha256"], **_run_stage(job.stage, job)}
        artifact.copy_companions(job.source, target)
    artifact.require_model(target)
    artifact.clean_config(target)
    seconds = time.perf_counter() - started
    peak = peak_bytes()
    entry = {
        "name": job.name,
        "key": job.key,
        **entry,
        "seed": job.seed,
        "dtype": job.dtype,
        "wall_s": round(seconds, 3),
        "peak_bytes": peak,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **library_versions()},
    }
    artifact.write_lineage(target, entry, before)
    job.progress(1, 1, "storing the logits of the probe text")
    try:
        artifact.save_probe(target, job.check)
    except FormatError as error:
        if job.stage is None:
            raise AssetError(f"{job.model}: {error}") from error
        raise
    return {"wall_s": entry["wall_s"], "peak_bytes": peak, "record": entry.get("record", {})}


def _make_source(job: StepJob) -> dict[str, Any]:
    """Fetch the source model and place it, in the pipeline's dtype; its entry in the lineage."""
    from compose.artifacts import folder as artifact
    from compose.artifacts.intake import require_source, require_values
    from compose.assets import resolve_model

    job.progress(0, 1, "fetching")
    keep = job.keep_blocks
    asset = resolve_model(job.model, job.asset_cache, job.progress, keep_blocks=keep)
    stated = {"source": public_source(job.model)}
    require_source(Path(asset.path))
    job.progress(0, 1, "placing")
    linkable = not str(asset.origin).startswith("path:")
    artifact.copy_source(Path(asset.path), job.target, job.dtype, link=linkable)
    require_values(job.target, job.model)
    return {
        "use": "source",
        "parameters": stated | ({"keep_blocks": True} if keep else {}),
        "origin": public_source(str(asset.origin)),
        "licence": licence_of(job.model, Path(asset.path)),
        "input_sha256": asset.sha256,
        "record": {} if asset.note is None else {"notes": [asset.note]},
    }


def public_source(source: str) -> str:
    """A source without this machine's folders: of a path, only the last part stays."""
    kind, _, rest = source.rpartition("path:")
    if kind == "" and Path(rest).is_absolute():
        return f"path:{Path(rest).name}"
    return source


def licence_of(source: str, folder: Path) -> str | None:
    """The licence that an alias states, or the front matter of a folder's README.md; else None."""
    from compose.assets import MODELS

    if source in MODELS:
        return MODELS[source].licence
    with contextlib.suppress(OSError, UnicodeDecodeError):
        _, _, rest = (folder / "README.md").read_text(encoding="utf-8").partition("---\n")
        for line in rest.partition("\n---")[0].splitlines():
            key, _, value = line.partition(":")
            if key == "license" and value.strip():
                return value.strip()
    return None


def _run_stage(parameters: Mapping[str, Any], job: StepJob) -> dict[str, Any]:
    """Run the stage of these parameters; its entry in the lineage."""
    from compose.stages.registry import STAGES

    stage = STAGES[parameters["use"]].model_validate(parameters)
    record = stage.run(job)
    stated = stage.model_dump(mode="json")
    for name, path in stage.files().items():
        stated[name] = path.name
    texts = {"train": job.train, "calibration": job.calibration}
    return {
        "use": stated.pop("use"),
        "version": stage.version,
        "parameters": stated,
        "data": {
            name: spec.model_dump(mode="json")
            for name in stage.reads_data
            if (spec := texts[name]) is not None
        },
        "record": record,
    }


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch."""
    from accelerate.utils import set_seed  # transformers' own one imports peft and bitsandbytes

    set_seed(seed)
