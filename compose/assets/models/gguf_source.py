"""GGUF files as models: each becomes a Hugging Face folder in the cache, once for its content.

cache/models/gguf-SHA256-vN/NAME           weights dequantized to float32
cache/models/gguf-SHA256-vN-blocks2/NAME   weights in the file's own blocks, as grids
cache/models/gguf-SHA256-vN...-TYPE/NAME   floating-point weights in that type
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from compose.artifacts.folder import hash_folder
from compose.artifacts.gguf.block_grids import FLOATS
from compose.artifacts.gguf.read import main_storage, write_folder
from compose.assets.fetch import build_once, read_record
from compose.assets.models.asset import ModelAsset, digest, is_whole, read_config
from compose.hashes import remembered_hash
from compose.units import Progress

CONVERSION = 1  # raised when the same GGUF file begins to give another folder
BLOCKS = "-blocks2"  # another number when the same blocks begin to give other grids
GRIDS = "grids"


def gguf_pin(file: Path, *, keep_blocks: bool) -> str:
    """A hash that stands for the folder that the file becomes.

    Raises:
        ArtifactError: the file cannot be read.
    """
    return digest([remembered_hash(file), CONVERSION, *([BLOCKS] if keep_blocks else [])])


def converted(file: Path, cache: Path, *, keep_blocks: bool, dtype: str = "float32") -> Path | None:
    """The file's folder, where it has been made and is whole; a file that changed has another."""
    target = _target(file, cache, keep_blocks=keep_blocks, dtype=dtype)
    record = read_record(target)
    return target / record["folder"] if record is not None and _whole(target, record) else None


def from_gguf(
    file: Path,
    cache: Path,
    progress: Progress | None,
    *,
    keep_blocks: bool,
    dtype: str = "float32",
) -> ModelAsset:
    """The model in a file, converted once; weights that are not blocks have the type `dtype`.

    Raises:
        ArtifactError: the file cannot be read as a model, and why.
        AssetError: the cache cannot be written.
    """
    name = file.stem

    def build(unfinished: Path) -> dict[str, Any]:
        if progress is not None:
            progress(0, 1, f"reading {file.name}")
        folder = unfinished / name
        grids = write_folder(file, folder, keep_blocks=keep_blocks, dtype=dtype)
        facts = {"folder": name, "sha256": hash_folder(folder), "stored": main_storage(file)}
        return facts | ({GRIDS: grids} if keep_blocks else {})

    target = _target(file, cache, keep_blocks=keep_blocks, dtype=dtype)
    record = build_once(target, build, note=file.name, whole=functools.partial(_whole, target))
    folder = target / record["folder"]
    note = _note(record["stored"], record.get(GRIDS))
    origin = f"gguf:{file.name}#{remembered_hash(file)}"
    return ModelAsset(folder, origin, record["sha256"], read_config(folder), note)


def grids_text(folder: Path) -> str | None:
    """How the blocks of a converted file are held, and with what errors; None where dequantized."""
    text: str | None = (read_record(folder.parent) or {}).get(GRIDS)
    return text


def _note(stored: str, grids: str | None) -> str | None:
    """A note for cards and reports: that the weights once were quantized."""
    if grids is not None:
        return f"the weights are the blocks of the GGUF file: {grids}"
    if stored in FLOATS:
        return None
    return (
        f"the weights once were {stored}, and lie on that grid: a quantizer of as many bits finds "
        "much of it again, so what it loses is understated"
    )


def _whole(target: Path, record: dict[str, Any]) -> bool:
    """Whether the folder is as it was made; its name is part of the record, and stays inside."""
    name = str(record.get("folder"))
    return Path(name).name == name and is_whole(target / name, record)


def _target(file: Path, cache: Path, *, keep_blocks: bool, dtype: str) -> Path:
    end = (BLOCKS if keep_blocks else "") + ("" if dtype == "float32" else f"-{dtype}")
    return cache / "models" / f"gguf-{remembered_hash(file)[:16]}-v{CONVERSION}{end}"
