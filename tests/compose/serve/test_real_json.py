"""SmolLM2 answers in JSON and calls a function, beside a free answer that keeps its tokens."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest
from serving import running

from compose.bench.generate import answer_text, chat_ids
from gateskip.kernels import ops

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(not ops.has_decoder(), reason="no native engine here"),
]
FREE: Any = [{"role": "user", "content": "Write a short story about a lighthouse."}]
TEXT = "Anna Berg is 34 years old and works as a baker in Oslo."


class Person(pydantic.BaseModel):
    name: str
    age: int = pydantic.Field(ge=0, le=150)
    city: str
    work: Literal["baker", "teacher", "doctor"]


def test_smollm2(smollm2: Path) -> None:
    with running(smollm2, name="smollm2") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        decoder = server.model.decoder
        ids = chat_ids(decoder.tokenizer, FREE)
        tokens = decoder.generate([ids], 100, eos=server.model.eos).tokens[0]

        def free() -> str | None:
            given: Any = {"model": "smollm2", "messages": FREE, "max_tokens": 100}
            return client.chat.completions.create(**given).choices[0].message.content

        def person() -> Any:
            turn = {"role": "user", "content": f"Give name, age, city and work as JSON.\n{TEXT}"}
            given: Any = {"model": "smollm2", "messages": [turn], "max_tokens": 200}
            done = client.chat.completions.parse(**given, response_format=Person)
            return done.choices[0].message.parsed

        def call() -> Any:
            schema = {
                "type": "object",
                "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"enum": [1, 2, 3]}},
                "required": ["city", "days"],
                "additionalProperties": False,
            }
            function = {"name": "get_weather", "parameters": schema}
            turn = {"role": "user", "content": "How is the weather in Rome for 2 days?"}
            given: Any = {"model": "smollm2", "messages": [turn], "tool_choice": "required"}
            tools: Any = [{"type": "function", "function": function}]
            choice = client.chat.completions.create(**given, tools=tools).choices[0]
            assert choice.finish_reason == "tool_calls"
            (made,) = choice.message.tool_calls or []
            arguments = json.loads(made.function.arguments)  # type: ignore[union-attr]
            jsonschema.validate(arguments, schema)
            return arguments

        with ThreadPoolExecutor(4) as pool:
            free_one, free_two = pool.submit(free), pool.submit(free)
            found, called = pool.submit(person), pool.submit(call)
            text = answer_text(decoder.tokenizer, tokens)
            assert free_one.result() == free_two.result() == text
            assert found.result() == Person(name="Anna Berg", age=34, city="Oslo", work="baker")
            assert called.result()["city"] == "Rome"
