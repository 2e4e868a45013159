"""Role `step`: make one model folder, with its lineage and the logits of the probe text."""

from __future__ import annotations

import contextlib
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compose.errors import AssetError
from compose.memory import peak_bytes
from compose.processes.messages import StepRequest
from compose.results.environment import library_versions
from compose.units import Progress
from compose.workers.scalars import written
from gateskip.errors import FormatError


def run_step(job: StepRequest, progress: Progress) -> dict[str, Any]:
    """Make the step's model folder with its lineage and probe logits; returns the record.

    No stopwatch decides anything here: what it says is no part of the step's key.

    Raises as the stage, or as fetching the source model, does.
    """
    from gateskip.kernels.autotune import by_capability

    with by_capability():
        return _run_step(job, progress)


def _run_step(job: StepRequest, progress: Progress) -> dict[str, Any]:
    from compose.artifacts import folder as artifact

    target = Path(job["target"])
    target.mkdir(parents=True)
    if (folder := job.get("tensorboard")) is not None:
        progress = written(progress, Path(folder))
    seed_everything(job["seed"])
    started = time.perf_counter()
    if job["stage"] is None:
        before, entry = [], _make_source(job, target, progress)
    else:
        assert job["source"] is not None, "a stage starts from the folder of another step"
        source = Path(job["source"])
        before = artifact.lineage(source)
        own = _run_stage(job["stage"], job, source, target, progress)
        entry = {"input_sha256": before[-1]["output_sha256"], **own}
        artifact.copy_companions(source, target)
    artifact.require_model(target)
    artifact.clean_config(target)
    seconds = time.perf_counter() - started
    peak = peak_bytes()
    entry = {
        "name": job["name"],
        "key": job["key"],
        **entry,
        "seed": job["seed"],
        "dtype": job["dtype"],
        "wall_s": round(seconds, 3),
        "peak_bytes": peak,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **library_versions()},
    }
    artifact.write_lineage(target, entry, before)
    progress(1, 1, "storing the logits of the probe text")
    try:
        artifact.save_probe(target, Path(job["check"]))
    except FormatError as error:
        if job["stage"] is None:
            raise AssetError(f"{job['model']}: {error}") from error
        raise
    return {"wall_s": entry["wall_s"], "peak_bytes": peak, "record": entry.get("record", {})}


def _make_source(job: StepRequest, target: Path, progress: Progress) -> dict[str, Any]:
    """Fetch the source model and place it, in the pipeline's dtype; its entry in the lineage."""
    from compose.artifacts import folder as artifact
    from compose.artifacts.intake import require_source, require_values
    from compose.assets import resolve_model

    progress(0, 1, "fetching")
    cache, keep = Path(job["asset_cache"]), job["keep_blocks"]
    asset = resolve_model(job["model"], cache, progress, keep_blocks=keep)
    stated = {"source": public_source(job["model"])}
    require_source(Path(asset.path))
    progress(0, 1, "placing")
    linkable = not str(asset.origin).startswith("path:")
    artifact.copy_source(Path(asset.path), target, job["dtype"], link=linkable)
    require_values(target, job["model"])
    return {
        "use": "source",
        "parameters": stated | ({"keep_blocks": True} if keep else {}),
        "origin": public_source(str(asset.origin)),
        "licence": licence_of(job["model"], Path(asset.path)),
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


def _run_stage(
    parameters: dict[str, Any],
    job: StepRequest,
    source: Path,
    target: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Run the stage of these parameters on `source`; its entry in the lineage."""
    from compose.stages.registry import STAGES, DataSpec, StageJob

    stage = STAGES[parameters["use"]].model_validate(parameters)
    splits = {name: DataSpec.model_validate(spec) for name, spec in job["data"].items()}
    record = stage.run(
        StageJob(
            source=source,
            target=target,
            seed=job["seed"],
            dtype=job["dtype"],
            train=splits.get("train"),
            calibration=splits.get("calibration"),
            dense=Path(job["dense"]),
            progress=progress,
            work=Path(job["work"]),
            asset_cache=Path(job["asset_cache"]),
        )
    )
    stated = stage.model_dump(mode="json")
    for name, path in stage.files().items():
        stated[name] = path.name
    return {
        "use": stated.pop("use"),
        "version": stage.version,
        "parameters": stated,
        "data": {name: job["data"][name] for name in stage.reads_data if name in job["data"]},
        "record": record,
    }


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch."""
    from accelerate.utils import set_seed  # transformers' own one imports peft and bitsandbytes

    set_seed(seed)
