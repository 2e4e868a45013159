"""The bytes of single tokens, which need not be whole characters."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

BYTE = re.compile(r"<0x([0-9A-F]{2})>")
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece writes a space so."""


class TokenBytes:
    """Gives the bytes that a token of a tokenizer adds to a text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._byte_level = chr(256 + ord(" ")) in tokenizer.get_vocab()

    def shown(self, token: int) -> str:
        """A token as text; of a special token, which adds none, its name."""
        if token in self._special:
            return str(self._tokenizer.convert_ids_to_tokens(token))
        return self(token).decode("utf-8", "replace")

    def __call__(self, token: int) -> bytes:
        """The bytes of a token; none for a special token."""
        if token in self._special:
            return b""
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        if (byte := BYTE.fullmatch(piece)) is not None:
            return bytes([int(byte[1], 16)])
        table = byte_of_letter()
        if self._byte_level and all(letter in table for letter in piece):
            return bytes(table[letter] for letter in piece)
        return piece.replace(SPACE, " ").encode("utf-8")


@cache
def byte_of_letter() -> dict[str, int]:
    """The letters by which byte-level BPE writes bytes: printable ones are themselves, the others
    follow from 256 on (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}
