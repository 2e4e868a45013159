"""GGUF files as models: each becomes a Hugging Face folder in the cache, once for its content.

cache/models/gguf-SHA256-vN/NAME         weights dequantized to float32
cache/models/gguf-SHA256-vN-blocks/NAME  weights in the file's own blocks, where they are grids
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from compose.artifacts.folder import hash_folder
from compose.artifacts.gguf.read import main_storage, write_folder
from compose.assets.fetch import build_once, read_record
from compose.assets.models.asset import ModelAsset, digest, is_whole, read_config
from compose.hashes import remembered_hash
from compose.units import Progress

CONVERSION = 1  # raised when the same GGUF file begins to give another folder
BLOCKS = "-blocks"
FLOATS = ("F32", "F16", "BF16")


def gguf_pin(file: Path, *, keep_blocks: bool) -> str:
    """A hash that stands for the folder that the file becomes.

    Raises:
        ArtifactError: the file cannot be read.
    """
    return digest([remembered_hash(file), CONVERSION, *([BLOCKS] if keep_blocks else [])])


def converted(file: Path, cache: Path, *, keep_blocks: bool) -> Path | None:
    """The file's folder, where it has been made and is whole; a file that changed has another."""
    target = _target(file, cache, keep_blocks=keep_blocks)
    record = read_record(target)
    return target / record["folder"] if record is not None and _whole(target, record) else None


def from_gguf(
    file: Path, cache: Path, progress: Progress | None, *, keep_blocks: bool
) -> ModelAsset:
    """The model in a file, converted once.

    Raises:
        ArtifactError: the file cannot be read as a model, and why.
        AssetError: the cache cannot be written.
    """
    name = file.stem

    def build(unfinished: Path) -> dict[str, Any]:
        if progress is not None:
            progress(0, 1, f"reading {file.name}")
        write_folder(file, unfinished / name, keep_blocks=keep_blocks)
        stored = main_storage(file)
        return {"folder": name, "sha256": hash_folder(unfinished / name), "stored": stored}

    target = _target(file, cache, keep_blocks=keep_blocks)
    record = build_once(target, build, note=file.name, whole=functools.partial(_whole, target))
    folder = target / record["folder"]
    note = _note(record["stored"], keep_blocks=keep_blocks)
    origin = f"gguf:{file.name}#{remembered_hash(file)}"
    return ModelAsset(folder, origin, record["sha256"], read_config(folder), note)


def _note(stored: str, *, keep_blocks: bool) -> str | None:
    """A note for cards and reports: that the weights once were quantized."""
    if stored in FLOATS:
        return None
    if keep_blocks:
        return f"the weights are the blocks of the GGUF file ({stored}), not rounded again"
    return (
        f"the weights once were {stored}, and lie on that grid: a quantizer of as many bits finds "
        "much of it again, so what it loses is understated"
    )


def _whole(target: Path, record: dict[str, Any]) -> bool:
    """Whether the folder is as it was made; its name is part of the record, and stays inside."""
    name = str(record.get("folder"))
    return Path(name).name == name and is_whole(target / name, record)


def _target(file: Path, cache: Path, *, keep_blocks: bool) -> Path:
    end = BLOCKS if keep_blocks else ""
    return cache / "models" / f"gguf-{remembered_hash(file)[:16]}-v{CONVERSION}{end}"
