"""How a model writes calls of functions, as its chat template tells it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

BEGIN, END = "<tool_call>", "</tool_call>"
EXAMPLE = BEGIN + '\n{"name": '
"""What templates of Hermes and Qwen say on the form of a call."""
PROBE = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "",
        "parameters": {"type": "object", "properties": {}},
    },
}


@dataclass(frozen=True)
class CallFormat:
    """The text of a call, and the tokens before and after it; None where there are none."""

    begin: int | None = None
    end: int | None = None

    def head(self, name: str) -> str:
        """The text before the arguments of a function."""
        return f'{self._line}{{"name": {json.dumps(name)}, "arguments": '

    @property
    def tail(self) -> str:
        """The text after the arguments."""
        return "}" + self._line

    @property
    def _line(self) -> str:
        return "" if self.begin is None else "\n"


BARE = CallFormat()
"""A call as the whole answer, for templates without a form that is known here."""


@dataclass(frozen=True)
class ToolTemplate:
    """What a chat template does with tools."""

    shows_tools: bool
    """Whether the prompt has them."""
    calls: CallFormat | None
    """The form of calls that the template asks for, if it is known here."""


def tool_template(tokenizer: Any) -> ToolTemplate:
    """What the chat template of a tokenizer does with tools."""
    plain, shown = _rendered(tokenizer, None), _rendered(tokenizer, [PROBE])
    if shown is None or shown == plain:
        return ToolTemplate(False, None)
    begin, end = _token(tokenizer, BEGIN), _token(tokenizer, END)
    known = EXAMPLE in shown and begin is not None and end is not None
    return ToolTemplate(True, CallFormat(begin, end) if known else None)


def _rendered(tokenizer: Any, tools: list[dict[str, Any]] | None) -> str | None:
    """A prompt with tools; None where the template refuses it."""
    turns = [{"role": "user", "content": "probe"}]
    try:
        text = tokenizer.apply_chat_template(
            turns, tools=tools, add_generation_prompt=True, tokenize=False
        )
    except Exception:  # a template refuses by an exception of its own
        return None
    return str(text)


def _token(tokenizer: Any, text: str) -> int | None:
    """The only token of a text; None where it has several."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return int(ids[0]) if len(ids) == 1 else None
