"""The keys of steps and cells: hashes over all that decides a result.

A step's key covers the stage with its version and parameters, the data it reads, and the key of the
step before it; the key of a cell covers its weights and how they are decoded. No weights are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

from compose.assets import task_file, text_file
from compose.contract import Device
from compose.errors import PlanError
from compose.hashes import hash_file, remembered_hash
from compose.language.positions import Loc
from compose.language.schema import Pipeline
from compose.planning.plan import SOURCE
from compose.stages.base import DataSpec, Stage

SOURCE_VERSION = 1  # raised when the same source begins to be stored in another way


class InputHashes(TypedDict, total=False):
    """SHA-256 of a pipeline's inputs, where they are known; keys leave out the others."""

    model_sha256: str
    """The pinned hash of the source model; it replaces the path of a local folder in keys."""

    data_sha256: Mapping[str, str]
    """Hash of a data set by its source; a local file that is not named here is hashed."""

    file_sha256: Mapping[str, str]
    """Hash of a file that a stage names by its path; one that is not named here is hashed."""

    draft_sha256: Mapping[str, str]
    """The pinned hash of each model that only drafts, by its source."""


def digest(recipe: Mapping[str, Any]) -> str:
    """16 hex digits of the sha256 of a recipe in canonical JSON."""
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class StepKeys:
    """Computes the keys of a pipeline's steps; files that `hashes` lacks are hashed once."""

    def __init__(self, pipeline: Pipeline, hashes: InputHashes) -> None:
        self._pipeline = pipeline
        self._model_sha256 = hashes.get("model_sha256")
        self._files = dict(hashes.get("file_sha256", {}))
        self._data = dict(hashes.get("data_sha256", {}))
        self._drafts = dict(hashes.get("draft_sha256", {}))

    def source(self) -> str:
        """The key of the step that stores the source model."""
        model = self._pipeline.model
        return digest(
            {
                "use": SOURCE,
                "version": SOURCE_VERSION,
                "model": self._model_identity(model.source),
                "dtype": model.dtype,
                **({"keep_blocks": True} if model.keep_blocks else {}),
            }
        )

    def stage(self, name: str, stage: Stage, parent: str, seed: int) -> str:
        """The key of a stage, `name` in the file, on the folder of the step with key `parent`.

        Raises:
            PlanError: a file that the stage or its data names cannot be read.
        """
        hashes = {
            parameter: self._file_sha256(path, ("stages", name, parameter))
            for parameter, path in stage.files().items()
        }
        return digest(
            {
                **stage.identity(hashes),
                "parent": parent,
                "seed": seed,
                "dtype": self._pipeline.model.dtype,
                "data": {split: self.data_identity(split) for split in stage.reads_data},
                **_device(self._pipeline.model.device),
            }
        )

    def cell(
        self,
        weights: str,
        decode: Stage | None,
        peer: str | None = None,
        text: Mapping[str, Any] | None = None,
    ) -> str:
        """The key of a cell: see `cell_key`."""
        device = self._pipeline.model.device
        return cell_key(weights, decode, peer, self._drafts, text, device)

    def _model_identity(self, source: str) -> dict[str, Any]:
        folder = Path(source)
        if not folder.is_absolute():
            return {"source": source, "sha256": self._model_sha256}
        if self._model_sha256 is not None:
            return {"sha256": self._model_sha256}
        return {"folder": source, "files": listing(folder)}

    def data_identity(self, split: Literal["train", "calibration"]) -> dict[str, Any]:
        """What stands for the text of a split in a key.

        Raises:
            PlanError: a file of it cannot be read.
        """
        spec: DataSpec = getattr(self._pipeline.data, split)
        identity: dict[str, Any] = {"limit": spec.limit, "length": spec.length}
        if spec.answered:
            identity["answered"] = [list(spec.weights).index(name) for name in spec.answered]
        if not spec.mix:
            return identity | self._text_identity(spec.source, ("data", split, "source"))
        mix = [
            {"weight": weight, **self._text_identity(source, ("data", split, "mix"))}
            for source, weight in spec.mix.items()
        ]
        return identity | {"mix": mix}

    def _text_identity(self, source: str, loc: Loc) -> dict[str, Any]:
        """What stands for a text: the hash of a file, or a name and its pin."""
        if Path(source).is_absolute():
            sha256 = self._data.get(source)
            return {"sha256": sha256 or self._file_sha256(Path(source), loc)}
        return {"source": source, "sha256": self._data.get(source)}

    def _file_sha256(self, path: Path, loc: Loc) -> str:
        if str(path) not in self._files:
            try:
                self._files[str(path)] = hash_file(path)
            except OSError as error:
                refused = PlanError(f"cannot read {str(path)!r}: {error.strerror}")
                raise self._pipeline.locate(refused, loc) from None
        return self._files[str(path)]


def _device(device: Device) -> dict[str, str]:
    """The part of a key that names the device; empty for the CPU, which older keys do not name."""
    return {} if device == "cpu" else {"device": device}


def text_hashes(sources: Iterable[str], tasks: Iterable[str] = ()) -> dict[str, str]:
    """Source -> SHA-256 of every text that is a file of this machine, and `task NAME` -> that of
    every task whose questions are such a file; empty where there is none.

    A text from a wheel or the hub has no entry: its name identifies it. A file that cannot be read
    has none either; the step that reads it reports the error.
    """
    files = {source: text_file(source) for source in sources}
    files |= {f"task {name}": task_file(name) for name in tasks}
    hashes: dict[str, str] = {}
    for name, file in files.items():
        if file is not None:
            with contextlib.suppress(OSError):
                hashes[name] = remembered_hash(file)
    return hashes


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of every file: a changed folder is noticed without reading weights."""
    files = sorted(path for path in folder.glob("*") if path.is_file())
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def cell_key(
    weights: str,
    decode: Stage | None,
    peer: str | None = None,
    draft_sha256: Mapping[str, str] | None = None,
    text: Mapping[str, Any] | None = None,
    device: Device = "cpu",
) -> str:
    """The key of the cell with these weights (a step's key) and this decode stage, or run by this
    other engine, which may be fitted to a text. `draft_sha256` has the hash of the model that
    drafts, by its source."""
    pin = (draft_sha256 or {}).get(getattr(decode, "draft_model", None) or "")
    named = {} if pin is None else {"draft_model": pin}
    recipe: dict[str, Any] = {"weights": weights, **_device(device)}
    recipe["decode"] = None if decode is None else decode.identity(named)
    if peer is not None:
        recipe["peer"] = peer
    return digest(recipe if text is None else {**recipe, "text": text})
