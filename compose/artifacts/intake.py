"""Checks of a source model before any stage runs; each refusal names file and tensor.

A folder's code is never run, and weights are never unpickled: both would run untrusted code.
transformers fills a missing tensor with random numbers; `load_model` refuses it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compose.artifacts.safetensors_header import stored_tensors
from compose.errors import AssetError, ComposeError, shortened
from compose.store import read_json

GATES = "gates.safetensors"
DRAFTS = "draft_network.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files with a model's weights."""
    return sorted(path for path in folder.glob("*.safetensors") if path.name not in (GATES, DRAFTS))


def require_source(folder: Path) -> None:
    """Refuse a model folder by its files, without importing libraries or reading weights.

    Raises:
        AssetError: its weights are pickled or cut short, or it has no tokenizer.
    """
    require_config(folder)
    require_weights(folder)
    held: set[str] = set()
    try:
        for file in weight_files(folder):
            held |= stored_tensors(file).keys()
    except ComposeError as error:
        raise AssetError(f"{folder}: {error.message}", fix=error.fix) from error
    _require_indexed(folder, held)
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise AssetError(
            f"{folder} has no tokenizer ({', '.join(TOKENIZERS[:3])})",
            fix="save the model's tokenizer into the folder: tokenizer.save_pretrained(FOLDER)",
        )


def require_config(folder: Path) -> dict[str, Any]:
    """config.json of a source. Raises AssetError where it is not a JSON mapping."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise AssetError(f"{folder / 'config.json'} is not a readable JSON mapping")
    return config


def require_weights(folder: Path) -> None:
    """Refuse a folder without safetensors; name pickled weights. Raises AssetError."""
    if weight_files(folder):
        return
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if not pickled:
        raise AssetError(
            f"{folder} has a config.json but no weights (*.safetensors)",
            fix="name a folder that save_pretrained wrote",
        )
    raise AssetError(
        f"{folder} has pickled weights ({pickled[0]}), which run code when they are read",
        fix="use a safetensors version; or, if you trust the file, load it with transformers "
        "and save_pretrained it to another folder",
    )


def _refuse_code(folder: Path, source: str) -> None:
    """Refuse an architecture that transformers lacks, whose code is in the folder."""
    from transformers import CONFIG_MAPPING

    config = require_config(folder)
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        return
    brings = "auto_map" in config
    named = shortened(repr(kind))
    why = ", and code in a model folder is never run" if brings else ""
    raise AssetError(
        f"{source}: transformers has no model type {named}{why}",
        fix="use a model whose architecture transformers has",
    )


def _require_indexed(folder: Path, held: set[str]) -> None:
    """Require every tensor and file that the index of a sharded checkpoint names."""
    if not (folder / INDEX).is_file():
        return
    index = read_json(folder / INDEX)
    named = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(named, dict):
        raise AssetError(f"{folder / INDEX} is not readable JSON that maps tensors to files")
    for file in dict.fromkeys(map(str, named.values())):
        if Path(file).name != file or not (folder / file).is_file():
            raise AssetError(
                f"{folder}: {INDEX} names {shortened(repr(file))}, which does not exist"
            )
    lost = [name for name in named if name not in held]
    if lost:
        raise AssetError(f"{folder}: {INDEX} names the tensor {lost[0]}, which no file has")


def require_values(folder: Path, source: str) -> None:
    """Refuse unknown architectures, weights that are not finite, and tokenizers that do not fit.

    `source` is the model's name in messages; `folder` may be a temporary one.

    Raises:
        AssetError: with the first such tensor, or with the token that has no embedding.
    """
    from safetensors import safe_open

    _refuse_code(folder, source)
    for file in weight_files(folder):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
                    bad = int((~tensor.float().isfinite()).sum())
                    raise AssetError(
                        f"{source}: {bad} numbers of the tensor {name} are not finite",
                        fix="fetch the model again, or name another",
                    )
    _require_rows(folder, source)


def _require_rows(folder: Path, source: str) -> None:
    from transformers import AutoTokenizer

    try:
        vocabulary: dict[str, int] = AutoTokenizer.from_pretrained(folder).get_vocab()
    except Exception as error:  # the library that reads it raises its own, and more than one
        why = shortened(str(error).replace(str(folder), source))
        raise AssetError(
            f"{source}: its tokenizer cannot be read: {why}",
            fix="save the model's tokenizer into the folder again",
        ) from error
    config = require_config(folder)
    text = config.get("text_config")
    rows = (text if isinstance(text, dict) else config).get("vocab_size")
    beyond = {
        token: row for token, row in vocabulary.items() if isinstance(rows, int) and row >= rows
    }
    if beyond:
        token = min(beyond, key=beyond.__getitem__)
        raise AssetError(
            f"{source}: the tokenizer has {max(vocabulary.values()) + 1} tokens, but the model only"
            f" {rows} embeddings: {shortened(repr(token))} has the id {beyond[token]}",
            fix="use the tokenizer that belongs to the model",
        )
