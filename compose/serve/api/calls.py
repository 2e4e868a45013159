"""The calls of functions in an answer, while it is decoded."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compose.serve.api.text import AnswerText
from compose.serve.call_format import CallFormat

HEAD = re.compile(r'\s*\{"name": "([^"]+)", "arguments": ')
"""The text of a call before its arguments."""
CLOSING = "} \t\n"
"""Characters that may end the call, and not its arguments: they are given when more follows."""


@dataclass(frozen=True)
class CallDelta:
    """What is new in a call: first its id and its function's name, then text of its arguments."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


class CallReader:
    """Takes the tokens of calls out of an answer; `new_text` makes an empty text.

    The grammar of the answer fixes how a call is written: see `CallFormat.head`.
    """

    def __init__(self, form: CallFormat, new_text: Callable[[], AnswerText]) -> None:
        self.called = False
        """Whether the answer has a call."""
        self._form, self._new_text = form, new_text
        self._index = 0
        self._call = _Call(0, new_text()) if form.begin is None else None

    def add(self, token: int) -> list[CallDelta] | None:
        """Take the next token; None where it is not a part of a call."""
        if self._call is None:
            if token != self._form.begin:
                return None
            self._call = _Call(self._index, self._new_text())
            return []
        if token != self._form.end:
            return self._noted(self._call.add(token))
        self._index += 1
        return self.finish()

    def finish(self) -> list[CallDelta]:
        """The rest of a call, at its end or that of the answer."""
        call, self._call = self._call, None
        return [] if call is None else self._noted(call.finish())

    def _noted(self, deltas: list[CallDelta]) -> list[CallDelta]:
        self.called = self.called or bool(deltas)
        return deltas


class _Call:
    """One call: its text so far, and how much of its arguments was given."""

    def __init__(self, index: int, text: AnswerText) -> None:
        self._index, self._stream = index, text
        self._text = ""
        self._given = 0

    def add(self, token: int) -> list[CallDelta]:
        self._text += self._stream.add(token)
        return self._until(len(self._text.rstrip(CLOSING)))

    def finish(self) -> list[CallDelta]:
        """The rest of the arguments, without the brace that closes the call if it has come."""
        self._text += self._stream.finish()
        end = len(self._text)
        if _is_json(self._text):
            end = self._text.rindex("}")
        return self._until(end)

    def _until(self, end: int) -> list[CallDelta]:
        """What is new up to a place in the text."""
        call_id = name = None
        if not self._given and (head := HEAD.match(self._text)) is not None:
            call_id, name = f"call_{uuid.uuid4().hex[:24]}", head[1]
            self._given = head.end()
        if not self._given or (name is None and end <= self._given):
            return []
        begin, self._given = self._given, max(end, self._given)
        return [CallDelta(self._index, self._text[begin : self._given], call_id, name)]


def whole_calls(deltas: Sequence[CallDelta]) -> list[CallDelta]:
    """The calls whose parts these are, each whole."""
    calls: dict[int, CallDelta] = {}
    for delta in deltas:
        begun = calls.get(delta.index)
        if begun is None:
            calls[delta.index] = delta
        else:
            arguments = begun.arguments + delta.arguments
            calls[delta.index] = CallDelta(delta.index, arguments, begun.id, begun.name)
    return list(calls.values())


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
