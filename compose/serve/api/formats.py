"""The fields that ask for JSON: formats of answers, tools, and calls of tools in messages."""

from __future__ import annotations

import json
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from compose.serve.api.strict import Body

NAME = r"^[a-zA-Z0-9_-]{1,64}$"
"""Names of functions and of schemas."""
Schema = dict[str, Any]


class NamedSchema(Body):
    """A JSON schema that answers follow."""

    name: str = Field(pattern=NAME)
    description: str | None = None
    given: Schema = Field(alias="schema")
    strict: bool | None = None
    """Answers follow the schema whether or not it is strict."""


class ResponseFormat(Body):
    """What an answer is: text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("json_schema is needed with the type json_schema, and only there")
        return self

    @property
    def schema_of_answer(self) -> Schema | None:
        """The JSON schema that the answer follows; None for text."""
        if self.json_schema is not None:
            return self.json_schema.given
        return {"type": "object"} if self.type == "json_object" else None


class Function(Body):
    """A function that the model may call."""

    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None
    """Arguments follow `parameters` whether or not it is strict."""


class Tool(Body):
    """A tool of a chat."""

    type: Literal["function"]
    function: Function


class FunctionName(Body):
    """The function that a request names."""

    name: str = Field(pattern=NAME)


class ToolChoice(Body):
    """Whether the answer calls a function, and which."""

    type: Literal["none", "auto", "required", "function"]
    function: FunctionName | None = None

    @model_validator(mode="after")
    def _has_its_name(self) -> Self:
        if (self.function is not None) != (self.type == "function"):
            raise ValueError("a function's name is needed with the type function, and only there")
        return self


class CalledFunction(Body):
    """The name and the arguments of a call."""

    name: str
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _is_an_object(cls, value: str) -> str:
        try:
            arguments = json.loads(value)
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise ValueError("arguments must be the text of a JSON object")
        return value


class ToolCall(Body):
    """A call in an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
