"""Models of the Hugging Face hub: their names, their configs, and snapshots in the hub's cache."""

from __future__ import annotations

import re
from pathlib import Path

from compose.artifacts.intake import require_weights, weight_files
from compose.assets import fetch
from compose.assets.fetch import asking_hub
from compose.assets.models.asset import ModelAsset, asset_of
from compose.assets.table import MODELS
from compose.errors import AssetError, suggest
from compose.hashes import hash_file

_TEXT = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")
_SHA256 = re.compile("[0-9a-f]{64}")
_LETTERS = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


def is_hub_id(source: str) -> bool:
    """Whether it looks like `name`, `owner/name` or one of these with `@rev`."""
    name, _, _ = source.partition("@")
    parts = name.split("/")
    legal = all(part and not set(part) - _LETTERS for part in parts)
    return len(parts) <= 2 and legal and not source.startswith((".", "~"))


def require_hub_id(source: str) -> None:
    """Refuse a name that cannot be a hub id: a path to nothing, or a misspelt alias."""
    if not is_hub_id(source):
        raise AssetError(f"there is no model folder {source!r}", fix="check the path")
    if "/" not in source:
        raise AssetError(
            f"model {source!r} is neither a short name nor a folder: {suggest(source, MODELS)}",
            fix="take a short name, a folder, a .gguf file or a hub id (owner/name)",
        )


def hub_config(source: str) -> Path | None:
    """config.json of a hub model: from the hub if it answers, else from the hub's cache."""
    from huggingface_hub import hf_hub_download

    name, _, revision = source.partition("@")
    for offline in (False, True) if fetch.hub_reachable() else (True,):
        try:
            return Path(
                hf_hub_download(
                    name, "config.json", revision=revision or None, local_files_only=offline
                )
            )
        except Exception:  # not cached, not there, gated, or the hub broke off
            continue
    return None


def from_hub(source: str) -> ModelAsset:
    """A snapshot in the hub's own cache, as transformers would make it."""
    name, _, revision = source.partition("@")
    if (folder := cached_snapshot(name, revision or None)) is not None:
        return _asset(name, folder)
    with asking_hub(source):
        folder = _snapshot(name, revision or None, offline=False)
    require_weights(folder)
    return _asset(name, folder)


def _asset(name: str, folder: Path) -> ModelAsset:
    """A snapshot, its large files compared with their names: the hub stores them under their hash.

    Raises:
        AssetError: one of them is damaged.
    """
    for path in weight_files(folder):
        stored = path.resolve()
        if _SHA256.fullmatch(stored.name) and hash_file(stored) != stored.name:
            raise AssetError(
                f"{path.name} of {name} in the hub's cache is not what was downloaded",
                fix=f"remove {stored} and run again",
            )
    return asset_of(folder, f"hub:{name}@{folder.name}")


def cached_snapshot(name: str, revision: str | None = None) -> Path | None:
    """A hub model's folder in the hub's cache, if its weights are there."""
    try:
        folder = _snapshot(name, revision, offline=True)
    except Exception:  # nothing, or not all of it, is cached
        return None
    return folder if weight_files(folder) else None


def _snapshot(name: str, revision: str | None, *, offline: bool) -> Path:
    """The text files and the safetensors of a repository: no code, and nothing pickled."""
    from huggingface_hub import snapshot_download

    files = [*_TEXT, "*.safetensors"]
    return Path(
        snapshot_download(name, revision=revision, allow_patterns=files, local_files_only=offline)
    )
