"""A model folder between stages: lineage, hashes, copies, and the check that it loads again.

An artifact is a Hugging Face folder. It has two kinds of further files: `compose.json` (the steps
that made it, written here) and, with gates, `gates.safetensors` and `gateskip.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.artifacts.intake import GATES, require_weights, weight_files
from compose.errors import ArtifactError, StepError
from compose.hashes import hash_files
from compose.store import read_json, write_json

if TYPE_CHECKING:
    from torch import Tensor

LINEAGE = "compose.json"
GRID_METHOD = "gateskip"
"""`quant_method` of this project's integer grids. The engine's METHOD is the same, but reading it
would load torch."""
GRID_NUMBERS = (".scale", ".minimum")  # whose type is part of the format
PROBE_TOKENS = 48
PROBE_TEXT = (
    "The river rose in the night, and by morning the lower road was under water. "
    "Two engineers measured its depth at 1.35 m, wrote the number down, and asked: "
    "how long until the bridge closes? def hours(level, rate): return (2.0 - level) / rate"
)
"""The text whose logits are compared: prose, digits and code, cut at PROBE_TOKENS tokens."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Dtype -> largest difference of two logits, relative to their range, that counts as equal."""

# Files of a tokenizer, a chat template and a generation config.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
)


def require_model(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder.

    Raises:
        ArtifactError: the folder does not exist, or is not a Hugging Face model folder.
    """
    if not folder.is_dir():
        raise ArtifactError(f"there is no folder {folder}")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ArtifactError(
            f"{folder} is not a model folder: it has no readable config.json",
            fix="name a Hugging Face model folder, such as one that `gateskip export` wrote",
        )
    return config


def is_gated(folder: Path) -> bool:
    """Whether the folder has gates; then only gateskip can load it."""
    return (folder / GATES).is_file()


def has_chat_template(folder: Path) -> bool:
    """Whether the folder's tokenizer has a template for chats."""
    if any(folder.glob("chat_template*")):
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and bool(read_json(config).get("chat_template"))


def dtype_of(folder: Path) -> str:
    """The type that the folder's config states for its floating-point weights."""
    config = require_model(folder)
    text = config.get("text_config") or {}
    stated = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "float32"
    return str(stated).removeprefix("torch.")


def lineage(folder: Path) -> list[dict[str, Any]]:
    """The steps that made the folder, oldest first: the source, then one entry a stage.

    Raises:
        ArtifactError: the folder was not made by this program.
    """
    content = read_json(folder / LINEAGE)
    if not isinstance(content, dict) or not isinstance(content.get("stages"), list):
        raise ArtifactError(f"{folder} has no readable {LINEAGE}, so its lineage is unknown")
    entries: list[dict[str, Any]] = content["stages"]
    return entries


def write_lineage(
    folder: Path, entry: dict[str, Any], before: list[dict[str, Any]] | None = None
) -> None:
    """Write `before` and then `entry` as the folder's lineage; `entry` gets the hash of the
    folder."""
    done = {**entry, "output_sha256": hash_folder(folder)}
    write_json(folder / LINEAGE, {"schema_version": 1, "stages": [*(before or []), done]})


def hash_folder(folder: Path, memory: Path | None = None) -> str:
    """SHA-256 over the names and contents of the folder's files, except its lineage.

    The file `memory`, where given, keeps hashes of files.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    hashes = hash_files(folder, (name for name in names if name != LINEAGE), memory)
    total = hashlib.sha256()
    for name, sha256 in hashes.items():
        total.update(f"{name}\0{sha256}\n".encode())
    return total.hexdigest()


def place_file(source: Path, target: Path, *, link: bool) -> None:
    """Put a file in place: as a hard link where `link` allows and the file system supports it,
    otherwise as a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        try:
            os.link(source.resolve(), target)
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copyfile(source, target)


def copy_companions(source: Path, target: Path) -> None:
    """Give `target` the tokenizer, template and generation files of `source` that it lacks."""
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file() and not (target / path.name).exists():
                place_file(path, target / path.name, link=False)


def copy_source(source: Path, target: Path, dtype: str, *, link: bool) -> None:
    """Fill `target` with the model in `source`, its floating-point weights in `dtype`.

    Weights are cast tensor by tensor, a file at a time. A quantized source is not cast, except for
    the float tensors beside this project's integer grids. With `link`, files that need no change
    are hard links; use it only for folders that nobody edits. Code files are not copied.

    Raises:
        AssetError: the source has no weights in safetensors.
    """
    config = require_model(source)
    packed = config.get("quantization_config") or {}
    method = packed.get("quant_method", "unknown") if isinstance(packed, dict) else "unknown"
    shards = weight_files(source)
    require_weights(source)
    if (packed and method != GRID_METHOD) or dtype_of(source) == dtype:
        _place_all(source, target, link=link)
    else:
        for shard in shards:
            _cast_shard(shard, target / shard.name, dtype)
        _place_index(source, target, shards)
        _place_all(source, target, link=link)
        _state_dtype(target, config, dtype)
    copy_companions(source, target)


def _place_all(source: Path, target: Path, *, link: bool) -> None:
    patterns = ("*.json", "*.safetensors")
    for path in sorted(path for pattern in patterns for path in source.glob(pattern)):
        if path.name != LINEAGE and not (target / path.name).exists():
            place_file(path, target / path.name, link=link)


def _state_dtype(target: Path, config: dict[str, Any], dtype: str) -> None:
    stated = {key: value for key, value in config.items() if key != "torch_dtype"}
    (target / "config.json").unlink(missing_ok=True)  # it may be a link to the source's
    (target / "config.json").write_text(
        json.dumps({**stated, "dtype": dtype}, indent=2) + "\n", encoding="utf-8"
    )


def _cast_shard(source: Path, target: Path, dtype: str) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    float_type = getattr(torch, dtype)
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    cast = {
        name: tensor.to(float_type)
        if tensor.is_floating_point() and not name.endswith(GRID_NUMBERS)
        else tensor
        for name, tensor in tensors.items()
    }
    save_file(cast, target, metadata=metadata or {"format": "pt"})


def _place_index(source: Path, target: Path, shards: list[Path]) -> None:
    """Rewrite the total size in a sharded checkpoint's index, which the cast changed."""
    index = read_json(source / "model.safetensors.index.json")
    if isinstance(index, dict):
        total = sum((target / shard.name).stat().st_size for shard in shards)
        index["metadata"] = {**(index.get("metadata") or {}), "total_size": total}
        write_json(target / "model.safetensors.index.json", index)


def clean_config(folder: Path) -> None:
    """Remove this machine's paths, and references to code in the folder, from config.json.

    The lineage still has the model's origin.
    """
    config = require_model(folder)
    clean = {
        key: value for key, value in config.items() if key not in ("_name_or_path", "auto_map")
    }
    if clean != config:
        write_json(folder / "config.json", clean)


def probe_ids(folder: Path) -> Tensor:
    """Token ids [1, S] of the probe text, by the folder's tokenizer.

    Raises:
        ArtifactError: the tokenizer makes no tokens of English text.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids: Tensor = tokenizer(PROBE_TEXT, return_tensors="pt").input_ids[:, :PROBE_TOKENS]
    if ids.shape[1] == 0:
        raise ArtifactError(f"the tokenizer in {folder} makes no tokens of English text")
    return ids


def probe_logits(folder: Path) -> Tensor:
    """Logits [1, S, V] in float32 of the probe text, from the folder as transformers loads it."""
    import torch

    from gateskip.quantization.folders import load_model

    ids, model = probe_ids(folder), load_model(folder)
    with torch.inference_mode():
        logits: Tensor = model(ids.to(model.device)).logits.float().cpu()
    return logits


def save_probe(folder: Path, path: Path) -> None:
    """Store the folder's probe logits at `path`, for `reload_check` in another process.

    Raises:
        StepError: the logits are not finite, so the stage broke the model.
    """
    from safetensors.torch import save_file

    logits = probe_logits(folder)
    if not bool(logits.isfinite().all()):
        raise StepError("the model that this step made gives logits that are not finite")
    save_file({"logits": logits.contiguous()}, path)


def reload_check(folder: Path, reference: Path) -> dict[str, float]:
    """Load the folder again and compare its probe logits with those stored at `reference`.

    Returns the largest difference, the range of the reference, and the share of the range allowed.

    Raises:
        StepError: the folder's logits differ from those in the process that saved it.
    """
    from safetensors.torch import load_file

    stored, logits = load_file(reference)["logits"], probe_logits(folder)
    allowed = TOLERANCE.get(dtype_of(folder), TOLERANCE["bfloat16"])
    if stored.shape != logits.shape:
        raise StepError(
            f"the folder {folder} gives logits of shape {tuple(logits.shape)} when loaded again, "
            f"and gave {tuple(stored.shape)} where it was saved"
        )
    difference = float((stored - logits).abs().max())
    span = float(stored.max() - stored.min())
    if not difference <= allowed * span:  # also refuses a difference that is not a number
        raise StepError(
            f"the folder {folder} does not give the same logits when loaded again: "
            f"they differ by {difference:.3g} over a range of {span:.3g} "
            f"({allowed:g} of it is allowed)"
        )
    return {"max_abs_diff": difference, "range": span, "allowed_share": allowed}
