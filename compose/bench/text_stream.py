"""The text of an answer while it is written: whole characters, piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers.decoders import DecodeStream
    from transformers import PreTrainedTokenizerBase


def silent(text: str) -> None:
    """Ignore a piece of text."""


class TextStream:
    """Decodes tokens one by one, and gives each piece of text once it is complete.

    A character of several bytes may need several tokens: the tokenizer's own DecodeStream waits for
    all of them. Spaces at either end of the answer are left out, as in `answer_text`, unless
    `strip` is False.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        on_text: Callable[[str], None],
        *,
        strip: bool = True,
    ) -> None:
        self.tokens: list[int] = []
        self._strip = strip
        self._shown, self._space = "", ""
        self._on_text = on_text
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._stream = _decode_stream()

    def add(self, token: int) -> None:
        """Take the next token, and give the text that it completes."""
        self.tokens.append(token)
        if self._backend is None:  # a tokenizer in Python: the text comes as a whole
            return
        piece = self._space + self._decoded(token)
        if not self._strip:
            self._give(piece)
            return
        if not self._shown:
            piece = piece.lstrip()
        whole = piece.rstrip()
        self._space = piece[len(whole) :]  # until it is known whether something follows
        self._give(whole)

    def _decoded(self, token: int) -> str:
        try:
            return self._stream.step(self._backend, token) or ""
        except Exception:  # bytes before it are no character, and their tokenizer gives up
            self._stream = _decode_stream()
            return self._stream.step(self._backend, token) or ""

    def finish(self, text: str) -> None:
        """Give the rest of the whole answer, such as a character that was never completed."""
        if text.startswith(self._shown):
            self._give(text[len(self._shown) :])

    def _give(self, piece: str) -> None:
        if piece:
            self._shown += piece
            self._on_text(piece)


def _decode_stream() -> DecodeStream:
    from tokenizers.decoders import DecodeStream

    return DecodeStream(skip_special_tokens=True)
