"""Constrains answers to JSON schemas and to calls of functions, with the library llguidance.

A grammar gives the tokens that may come next; a mask removes the others from the logits of its
row. So a constrained row is decoded like any row whose sampler needs its logits: one token a step,
beside others, whose bits it does not change.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compose.extras import command
from compose.serve.api.errors import ApiError, invalid
from compose.serve.api.formats import Schema, Tool
from compose.serve.call_format import CallFormat

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

SPACES = r" |\n{1,2}[ \t]{0,20}"
"""White space between the parts of JSON: bounded, so that no answer goes on with it forever."""
FORM: JsonCompileOptions = {
    "whitespace_pattern": SPACES,
    "whitespace_flexible": True,
    "item_separator": ",",
    "key_separator": ":",
    "lenient": False,
    "coerce_one_of": False,
}
"""How JSON is written; a schema may not change it."""
REASON = 400
"""Most characters of the library's reason for a refusal."""


class Mask:
    """A LogitsProcessor of transformers for one row: tokens that the grammar forbids get -inf.

    Without `begin` the whole answer follows the grammar. With it, text is free until the token
    `begin`, from which on the grammar holds up to the token `end`; then text is free again, or, if
    `once`, the answer ends.
    """

    def __init__(
        self,
        grammar: LLMatcher,
        prompt_tokens: int,
        *,
        begin: int | None = None,
        end: int | None = None,
        once: bool = False,
    ) -> None:
        self._grammar, self._begin, self._end, self._once = grammar, begin, end, once
        self._read = prompt_tokens
        self._active = grammar.deep_copy() if begin is None else None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """The scores [1, V] of the token after ids [1, S]. Raises RuntimeError where the grammar
        exceeds a limit of the library."""
        for token in ids[0, self._read :].tolist():
            self._take(token)
        self._read = ids.shape[1]
        if self._active is None:
            return scores
        allowed = torch.frombuffer(bytearray(self._active.compute_logit_bias()), dtype=torch.uint8)
        self._check(self._active)
        forbidden = allowed[: scores.shape[-1]] == 0
        return scores.masked_fill(forbidden, float("-inf"))

    def _take(self, token: int) -> None:
        """Go on with a token of the answer."""
        if self._active is None and token == self._begin:
            self._active = self._grammar.deep_copy()
        if self._active is None:
            return
        self._active.consume_token(token)
        self._check(self._active)
        if token == self._end and self._begin is not None and not self._once:
            self._active = None

    def _check(self, grammar: LLMatcher) -> None:
        if grammar.is_error():  # its message has text of the answer, which is not for logs
            raise RuntimeError(f"the grammar of an answer failed: {grammar.stop_reason()}")


@dataclass(frozen=True)
class Constraint:
    """A grammar that was checked, and where in an answer it holds; see `Mask`."""

    grammar: LLMatcher
    begin: int | None = None
    end: int | None = None
    once: bool = False

    def mask(self, prompt_tokens: int) -> Mask:
        """The mask of one answer to a prompt of some tokens."""
        begin, end, once = self.begin, self.end, self.once
        return Mask(self.grammar, prompt_tokens, begin=begin, end=end, once=once)


class Constraints:
    """Makes constraints for a model's tokenizer; `eos` are the tokens that end an answer."""

    def __init__(self, tokenizer: Any, vocabulary: int, eos: Sequence[int]) -> None:
        self._tokenizer, self._vocabulary, self._eos = tokenizer, vocabulary, list(eos)

    def json(self, schema: Schema, param: str) -> Constraint:
        """The answer is JSON that follows a schema.

        Raises ApiError where the library refuses the schema; `param` is the field that has it.
        """
        return Constraint(self._json(schema, f"{param}: the schema", param))

    def calls(
        self, tools: Sequence[Tool], form: CallFormat, *, must_call: bool, once: bool
    ) -> Constraint:
        """Calls of functions, with arguments that follow their schemas: as the only answer
        (`must_call`), or in a text, one of them (`once`) or more.

        Raises ApiError as `json`.
        """
        for tool in tools:  # each alone: the reason then names its function
            self._json(arguments_of(tool), f"tools: the schema of {tool.function.name}", "tools")
        grammar = self._calls(tools, form)
        if must_call:
            return Constraint(grammar)
        return Constraint(grammar, form.begin, form.end, once)

    def _json(self, schema: Schema, what: str, param: str) -> LLMatcher:
        """The grammar of JSON that follows a schema."""
        tokenizer = self._tokens  # raises where the library is missing
        from llguidance import LLMatcher

        try:
            text = LLMatcher.grammar_from_json_schema(schema, overrides=FORM)
        except (ValueError, RecursionError):
            raise invalid(f"{what} is nested too deeply", param) from None
        return _checked(LLMatcher(tokenizer, text, log_level=0), what, param)

    def _calls(self, tools: Sequence[Tool], form: CallFormat) -> LLMatcher:
        """The grammar of one call of one of the functions, with the tokens around it."""
        tokenizer = self._tokens
        from llguidance import LLMatcher

        text = LLMatcher.grammar_from_lark(_calls_rule(tools, form))
        matcher = LLMatcher(tokenizer, text, log_level=0)
        return _checked(matcher, "tools: the grammar of all functions", "tools")

    @cached_property
    def _tokens(self) -> LLTokenizer:
        """The tokens' bytes, read once."""
        try:
            from llguidance.hf import from_tokenizer
        except ModuleNotFoundError as error:
            raise _unsupported(
                f"the library {error.name} is not installed: {command('serve')}"
            ) from None
        try:
            return from_tokenizer(self._tokenizer, self._vocabulary, self._eos)
        except Exception as error:  # of the library's own types
            raise _unsupported(
                f"the library llguidance cannot read the tokenizer: {error}"
            ) from None


def arguments_of(tool: Tool) -> Schema:
    """The schema of a function's arguments; without one there are none."""
    given = tool.function.parameters
    return {"type": "object", "additionalProperties": False} if given is None else given


def _checked(grammar: LLMatcher, what: str, param: str) -> LLMatcher:
    """Raises ApiError for a grammar that the library refuses, with its reason."""
    if grammar.is_error():
        reason = " ".join(grammar.get_error().split())[:REASON]
        raise invalid(f"{what} cannot be followed: {reason}", param)
    return grammar


def _calls_rule(tools: Sequence[Tool], form: CallFormat) -> str:
    """The rules, in the variant of Lark that the library reads."""
    around = [f"<[{token}]>" if token is not None else "" for token in (form.begin, form.end)]
    calls = [f"call_{i}" for i in range(len(tools))]
    rules = [f"start: {around[0]} ({' | '.join(calls)}) {around[1]}"]
    for i, tool in enumerate(tools):
        head, tail = json.dumps(form.head(tool.function.name)), json.dumps(form.tail)
        schema = json.dumps({**arguments_of(tool), "x-guidance": FORM})
        rules += [f"call_{i}: {head} arguments_{i} {tail}", f"arguments_{i}: %json {schema}"]
    return "\n".join(rules)


def _unsupported(reason: str) -> ApiError:
    return invalid(f"JSON output and tools are not supported here: {reason}", code="unsupported")
