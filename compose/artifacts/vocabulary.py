"""The tokens of a model folder, read from tokenizer.json without libraries."""

from __future__ import annotations

from pathlib import Path

from compose.store import read_json


def read_vocabulary(folder: Path) -> dict[str, int] | None:
    """Every token of a folder and its id; None where `folder` is no absolute path, or has no
    tokenizer.json of a known form."""
    written = read_json(folder / "tokenizer.json") if folder.is_absolute() else None
    try:
        tokens = written["model"]["vocab"]  # type: ignore[index]
        if isinstance(tokens, list):  # of a unigram model: [token, score] by id
            tokens = {token: number for number, (token, _) in enumerate(tokens)}
        added = {entry["content"]: entry["id"] for entry in written["added_tokens"]}  # type: ignore[index]
        return dict(tokens) | added
    except (KeyError, TypeError, ValueError):
        return None
