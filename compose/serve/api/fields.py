"""The fields of requests: those that are answered, accepted without effect, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from compose.errors import suggest
from compose.serve.api.errors import ApiError, invalid
from compose.serve.api.formats import ResponseFormat, Schema, Tool, ToolCall, ToolChoice
from compose.serve.api.strict import Body

HARMLESS = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    "prompt_cache_retention",
}
"""Fields without effect on an answer."""

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
}
"""Fields of OpenAI's API that this server refuses, with the values that ask for nothing."""

Parsed = TypeVar("Parsed", bound="Body")


class GateskipOptions(Body):
    """How an answer is decoded; by default, as the folder says."""

    budget: float | None = Field(default=None, gt=0, le=1)
    """Share of the branches' multiply-adds that is computed; needs mode `skip`."""
    mode: Literal["plain", "skip", "speculate"] | None = None
    token_shares: bool = False
    """Whether the answer says which share of compute chose each token."""
    deadline_s: float | None = Field(default=None, gt=0)
    """Seconds after which the answer ends with the tokens that it has."""


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Options(Body):
    """Fields of both kinds of requests."""

    model: str | None = None
    n: int = Field(default=1, ge=1, le=128)
    stop: list[str] = Field(default=[], max_length=16)
    seed: int | None = None
    temperature: float = Field(default=0.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    max_tokens: int | None = Field(default=None, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    gateskip: GateskipOptions = GateskipOptions()

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        stops = [value] if isinstance(value, str) else value
        if isinstance(stops, list) and "" in stops:
            raise ValueError("a stop string must not be empty")
        return stops

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def schema_of_answer(self) -> Schema | None:
        """The JSON schema that the answer follows; None for text."""
        return None if self.response_format is None else self.response_format.schema_of_answer

    @property
    def constrained(self) -> bool:
        """Whether some tokens may be forbidden in the answer."""
        return self.schema_of_answer is not None

    @property
    def tops(self) -> int | None:
        """How many most probable tokens come with each token; None without log probabilities."""
        raise NotImplementedError


class ChatMessage(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    name: str | None = None
    tool_calls: list[ToolCall] = Field(default=[])
    """The calls in an earlier answer."""
    tool_call_id: str | None = Field(default=None, validate_default=True)
    """The call whose result a message of the role tool has."""
    content: str | None = Field(default=None, validate_default=True)

    @field_validator("tool_calls")
    @classmethod
    def _of_the_assistant(cls, value: list[ToolCall], info: ValidationInfo) -> list[ToolCall]:
        if value and info.data.get("role") != "assistant":
            raise ValueError("only messages of the assistant have tool_calls")
        return value

    @field_validator("tool_call_id")
    @classmethod
    def _of_a_tool(cls, value: str | None, info: ValidationInfo) -> str | None:
        if (value is not None) != (info.data.get("role") == "tool"):
            raise ValueError("tool_call_id is needed with the role tool, and only there")
        return value

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, value: Any, info: ValidationInfo) -> Any:
        """The text of parts [{"type": "text", "text"}]; only beside calls there may be none."""
        if value is None and not info.data.get("tool_calls"):
            raise ValueError("content is needed")
        if not isinstance(value, list):
            return value
        for part in value:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"only parts of type 'text' are supported, not {kind!r}")
        return "".join(part["text"] for part in value)


class ChatBody(Options):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    tools: list[Tool] = Field(default=[], max_length=128)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise ValueError("max_tokens and max_completion_tokens differ: leave one out")
            self.max_tokens = self.max_completion_tokens
        return self

    @field_validator("tools")
    @classmethod
    def _different(cls, value: list[Tool]) -> list[Tool]:
        names = [tool.function.name for tool in value]
        if len(set(names)) < len(names):
            raise ValueError("two functions have the same name")
        return value

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _typed(cls, value: Any) -> Any:
        return {"type": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _choice_fits(self) -> Self:
        choice = self.tool_choice
        if choice is not None and choice.type in ("required", "function") and not self.tools:
            raise ValueError("tool_choice needs tools")
        named = None if choice is None or choice.function is None else choice.function.name
        if named is not None and named not in (tool.function.name for tool in self.tools):
            raise ValueError(f"tool_choice: no tool has the name {named}")
        if not self.callable_tools:
            return self
        if self.schema_of_answer is not None:
            raise ValueError("response_format is not supported beside tools; use tool_choice none")
        if self.gateskip.token_shares:
            raise ValueError("token_shares is not supported beside tools; use tool_choice none")
        if self.logprobs:
            raise ValueError("logprobs is not supported beside tools; use tool_choice none")
        return self

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools that the answer may call."""
        choice = self.tool_choice
        if choice is None or choice.type in ("auto", "required"):
            return self.tools
        named = None if choice.function is None else choice.function.name
        return [tool for tool in self.tools if tool.function.name == named]

    @property
    def constrained(self) -> bool:
        """Whether some tokens may be forbidden in the answer."""
        return bool(self.callable_tools) or self.schema_of_answer is not None

    @property
    def must_call(self) -> bool:
        """Whether the answer is one call of a tool, and no text."""
        return self.tool_choice is not None and self.tool_choice.type in ("required", "function")

    @property
    def tops(self) -> int | None:
        """How many most probable tokens come with each token; None without log probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(Options):
    """POST /v1/completions."""

    prompt: list[str | list[int]] = Field(min_length=1)
    max_tokens: int | None = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=20)

    @field_validator("prompt", mode="before")
    @classmethod
    def _listed_prompts(cls, value: Any) -> Any:
        """A list of prompts, each a text or token ids."""
        if isinstance(value, str):
            return [value]
        if not isinstance(value, list):
            raise ValueError("a prompt is a text, a list of token ids, or a list of these")
        if value and all(_is_id(item) for item in value):
            return [value]
        for item in value:
            ids = isinstance(item, list) and all(map(_is_id, item))
            if not (isinstance(item, str) or ids):
                raise ValueError("a prompt is a text, a list of token ids, or a list of these")
        return value

    @property
    def tops(self) -> int | None:
        """How many most probable tokens come with each token; None without log probabilities."""
        return self.logprobs


class TokenizeBody(Body):
    """POST /tokenize: a text, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None

    @model_validator(mode="after")
    def _one_text(self) -> Self:
        if (self.prompt is None) == (not self.messages):
            raise ValueError("give prompt (a text) or messages (a list)")
        return self


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def parsed(kind: type[Parsed], values: Any) -> Parsed:
    """The fields of a body. Raises ApiError for the first mistake, with the name of its field."""
    if not isinstance(values, dict):
        raise invalid("the body must be a JSON object", code="invalid_json")
    known = _known(kind, values)
    messages = known.get("messages")
    if isinstance(messages, list):
        known["messages"] = [
            _known(ChatMessage, turn, f"messages[{i}].") if isinstance(turn, dict) else turn
            for i, turn in enumerate(messages)
        ]
    try:
        return kind.model_validate(known)
    except ValidationError as error:
        raise _mistake(error) from None


def _known(kind: type[BaseModel], values: dict[str, Any], place: str = "") -> dict[str, Any]:
    """The fields that `kind` has, without those that ask for nothing."""
    given = {name: value for name, value in values.items() if value is not None}
    known = {}
    for name, value in given.items():
        if name in kind.model_fields:
            known[name] = value
        elif name in UNSUPPORTED:
            if value not in UNSUPPORTED[name]:
                raise invalid(
                    f"{place}{name} is not supported by this server",
                    f"{place}{name}",
                    "unsupported_parameter",
                )
        elif name not in HARMLESS and not (place and name in ("refusal", "annotations")):
            hint = suggest(name, kind.model_fields)
            raise invalid(
                f"unknown field {place}{name[:100]}; {hint}",
                place + name[:100],
                "unknown_parameter",
            )
    return known


def _mistake(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = ""
    for part in first["loc"]:
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else part
    message = first["msg"].removeprefix("Value error, ")
    missing = first["type"] == "missing"
    return invalid(
        f"{param}: {message}" if param else message,
        param or None,
        "missing_parameter" if missing else "invalid_value",
    )
