"""Rows of text: a text, a prompt with or without its response, or a chat."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compose.errors import AssetError

Message = dict[str, str]
"""One turn of a chat: {"role": ..., "content": ...}."""

_TEXT = ("text", "content")
_PROMPT = ("prompt", "instruction", "question", "turns", "goal", "query", "context")
_RESPONSE = ("response", "output", "answer", "completion", "continuation")
_CHAT = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}


@dataclass(frozen=True)
class TextData:
    """Rows of text in a fixed order."""

    name: str
    """The requested alias, hub id or file name."""
    rows: list[str]
    """Each row as plain text; a chat is its turns, one below the other."""
    prompts: list[str] | None
    """The first user turn of each row, where rows are prompts or chats."""
    chats: list[list[Message]] | None
    """The rows as chats, where they are: a tokenizer with a chat template renders these."""
    origin: str
    """`wheel:...`, `hub:ID:CONFIG@SPLIT`, `path:FILE` or `package:FILE`."""
    sha256: str
    """Hash over the rows."""
    categories: list[str] | None = None
    """The `category` of each row, where all rows have one."""


def cut_rows(data: TextData, limit: int | None) -> TextData:
    """The first `limit` rows."""
    if limit is None or limit >= len(data.rows):
        return data
    rows = data.rows[:limit]
    chats = None if data.chats is None else data.chats[:limit]
    prompts = None if data.prompts is None else data.prompts[:limit]
    categories = None if data.categories is None else data.categories[:limit]
    return TextData(data.name, rows, prompts, chats, data.origin, _hash(rows), categories)


def _hash(rows: list[str]) -> str:
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode("utf-8")).hexdigest()


def pack_rows(name: str, items: Iterable[Any], origin: str) -> TextData:
    """Rows of one kind: texts stay texts, prompts and chats become chats; empty rows are dropped.

    Raises:
        AssetError: a row is none of these, or none is left.
    """
    rows_in = ((_whole(item, name, number), item) for number, item in enumerate(items, 1))
    filled = [(row, item) for row, item in rows_in if row]
    parsed = [row for row, _ in filled]
    if not parsed:
        raise AssetError(f"{name} holds no rows")
    rows = [row if isinstance(row, str) else _plain(row) for row in parsed]
    chats = [row for row in parsed if not isinstance(row, str)]
    if len(chats) < len(parsed):
        return TextData(name, rows, None, None, origin, _hash(rows))
    prompts = [_first_user(chat) for chat in chats]
    named = [str(item["category"]) for _, item in filled if "category" in item]
    categories = named if len(named) == len(rows) else None
    return TextData(name, rows, prompts, chats, origin, _hash(rows), categories)


def _whole(item: Any, name: str, number: int) -> str | list[Message]:
    """A row whose text can be written as UTF-8: JSON can state halves of surrogate pairs."""
    row = _parse(item, name, number)
    try:
        (row if isinstance(row, str) else _plain(row)).encode("utf-8")
    except UnicodeEncodeError as error:
        raise AssetError(
            f"row {number} of {name} holds half of a surrogate pair ({error.reason})",
            fix="write the character itself, or its whole pair",
        ) from error
    return row


def _parse(item: Any, name: str, number: int) -> str | list[Message]:
    if isinstance(item, str):
        return item
    if isinstance(item, list):
        return _chat(item, name, number)
    if isinstance(item, Mapping):
        if (turns := _first(item, _CHAT)) is not None:
            return _chat(turns, name, number)
        if (prompt := _first(item, _PROMPT)) is not None:
            return _exchange(item, prompt)
        if any(isinstance(item.get(key), str) for key in _TEXT):
            return str(_first(item, _TEXT) or "")
    raise AssetError(
        f"row {number} of {name} is no text: {json.dumps(item, default=str)[:80]}",
        fix="a row has `text`, `prompt` (and `response`), or `messages`",
    )


def _first(item: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((item[key] for key in keys if item.get(key)), None)


def _exchange(item: Mapping[str, Any], prompt: Any) -> list[Message]:
    """A prompt with the text it speaks of, and its response, as a chat of one or two turns."""
    question = str(prompt[0]) if isinstance(prompt, list) else str(prompt)
    about = item.get("input")
    if isinstance(about, str) and about.strip():
        question = f"{question}\n\n{about}"
    chat = [{"role": "user", "content": question}]
    response = _first(item, _RESPONSE)
    if isinstance(response, str):
        chat.append({"role": "assistant", "content": response})
    return chat


def _chat(turns: Any, name: str, number: int) -> list[Message]:
    try:
        chat = []
        for turn in turns:
            role = str(turn.get("role") or turn["from"])
            content = str(turn["content"] if "content" in turn else turn["value"])
            chat.append({"role": _ROLES.get(role, role), "content": content})
    except (AttributeError, KeyError, TypeError) as error:
        raise AssetError(
            f"row {number} of {name} is no chat: {json.dumps(turns, default=str)[:80]}",
            fix='a turn is {"role": ..., "content": ...}',
        ) from error
    return chat


def _plain(chat: list[Message]) -> str:
    return "\n".join(turn["content"] for turn in chat)


def _first_user(chat: list[Message]) -> str:
    turns = [turn["content"] for turn in chat if turn["role"] == "user"]
    return turns[0] if turns else chat[0]["content"]
