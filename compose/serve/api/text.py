"""The text of an answer that may be shown already: before its stop strings, whole characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compose.bench.text_stream import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AnswerText:
    """Turns tokens into text, and holds back text that may be the beginning of a stop string.

    The text ends before the first stop string. With `strip`, spaces at both ends are left out.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], *, strip: bool
    ) -> None:
        self.raw = ""
        """All text so far, also what is held back, up to a stop string."""
        self.stopped = False
        """Whether a stop string was found."""
        self.given = 0
        """How many characters of `raw` were given."""
        self._tokenizer, self._stops, self._strip = tokenizer, tuple(stops), strip
        self._longest = max(map(len, self._stops), default=0)
        self._stream = TextStream(tokenizer, self._append, strip=False)

    def add(self, token: int) -> str:
        """Take the next token; returns the text that may be shown now."""
        if not self.stopped:
            self._stream.add(token)
        return self._take(len(self.raw) - (0 if self.stopped else self._held()))

    def finish(self) -> str:
        """The rest of the text."""
        whole = self._tokenizer.decode(self._stream.tokens, skip_special_tokens=True)
        self._stream.finish(str(whole))
        return self._take(len(self.raw))

    def _append(self, piece: str) -> None:
        if self.stopped:
            return
        begin = max(0, len(self.raw) - self._longest + 1)
        self.raw += piece
        ends = [at for stop in self._stops if (at := self.raw.find(stop, begin)) >= 0]
        if ends:
            self.raw, self.stopped = self.raw[: min(ends)], True

    def _held(self) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        for length in range(min(self._longest - 1, len(self.raw)), 0, -1):
            if any(stop.startswith(self.raw[-length:]) for stop in self._stops):
                return length
        return 0

    def _take(self, end: int) -> str:
        """The text up to `end` that was not given before."""
        if self._strip:
            end = len(self.raw[:end].rstrip())
        if end <= self.given:
            return ""
        begin, self.given = self.given, end
        piece = self.raw[begin:end]
        return piece.lstrip() if self._strip and begin == 0 else piece
