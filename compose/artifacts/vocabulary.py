"""The tokens of a model folder, read from tokenizer.json without libraries."""

from __future__ import annotations

from pathlib import Path

from compose.store import read_json


def vocabulary_difference(folder: Path, other: Path) -> str | None:
    """Why the token ids of two folders do not mean the same, in words: the first token that
    differs; None where they do, or where a folder has no tokenizer.json that says so."""
    ours, theirs = _vocabulary(folder), _vocabulary(other)
    if ours is None or theirs is None or ours == theirs:
        return None
    token, _ = min(ours.items() ^ theirs.items(), key=lambda item: (item[1], item[0]))
    said = [
        f"{'no token' if token not in tokens else f'token {tokens[token]}'} of {place.name}"
        for tokens, place in ((ours, folder), (theirs, other))
    ]
    return f"it has another tokenizer: {token!r} is {said[0]} and {said[1]}"


def _vocabulary(folder: Path) -> dict[str, int] | None:
    """Every token and its id; None where tokenizer.json is not there, or has another form."""
    written = read_json(folder / "tokenizer.json") if folder.is_absolute() else None
    try:
        tokens = written["model"]["vocab"]  # type: ignore[index]
        if isinstance(tokens, list):  # of a unigram model: [token, score] by id
            tokens = {token: number for number, (token, _) in enumerate(tokens)}
        added = {entry["content"]: entry["id"] for entry in written["added_tokens"]}  # type: ignore[index]
        return dict(tokens) | added
    except (KeyError, TypeError, ValueError):
        return None
