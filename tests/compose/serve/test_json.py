"""JSON output and tool calls, as the openai client sees them, on tiny models."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pydantic
import pytest
import torch
from serving import Running, running
from tiny_models import save_gated
from tool_models import save_with_tools

from compose.bench.generate import answer_text, chat_ids
from compose.serve.api.fields import ChatBody, parsed
from compose.serve.constraint import Constraints
from gateskip.decoding.sampling import Sampler

MESSAGES: Any = [{"role": "user", "content": "What is a licence?"}]
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": {
        "type": "object",
        "properties": {
            "kind": {"enum": ["free", "paid", "other"]},
            "year": {"type": "integer", "minimum": 1900, "maximum": 2100},
            "ok": {"type": "boolean"},
        },
        "required": ["kind", "year", "ok"],
        "additionalProperties": False,
    },
    "text": {
        "type": "object",
        "properties": {"title": {"type": "string", "maxLength": 12}, "none": {"type": "null"}},
        "required": ["title"],
        "additionalProperties": False,
    },
    "list": {
        "type": "array",
        "items": {"anyOf": [{"type": "boolean"}, {"const": "é 😀"}]},
        "minItems": 2,
        "maxItems": 3,
    },
    "references": {
        "$defs": {"pair": {"type": "object", "properties": {"x": {"enum": [1, 2.5]}}}},
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/pair"}, "b": {"pattern": "^[ab]{3}$"}},
        "required": ["a", "b"],
    },
}
SCHEMAS["references"]["$defs"]["pair"] |= {"required": ["x"], "additionalProperties": False}
SCHEMAS["references"] |= {"additionalProperties": False}
SCHEMAS["references"]["properties"]["b"]["type"] = "string"


def tool(name: str, **properties: Any) -> Any:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    function = {"name": name, "description": "A function.", "parameters": parameters}
    return {"type": "function", "function": {**function, "strict": True}}


WEATHER = tool(
    "get_weather", city={"enum": ["Bern", "Rome {}"]}, where={"type": "object", "maxProperties": 0}
)
CLOCK = tool("clock", zone={"type": "integer", "minimum": 0, "maximum": 23})
NOTHING: Any = {"type": "function", "function": {"name": "nothing"}}
TOOLS = [WEATHER, CLOCK, NOTHING]
ARGUMENTS = {one["function"]["name"]: one["function"].get("parameters", {}) for one in TOOLS}


def asked(schema: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


def client_of(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def server(make_tiny: Callable[..., Path]) -> Iterator[Running]:
    with running(make_tiny("llama"), name="tiny", max_rows=6) as served:
        yield served


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return client_of(server)


@pytest.fixture(scope="module")
def caller(
    make_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """A model with a template for tools, which calls one after some text."""
    folder = tmp_path_factory.mktemp("tools")
    source = make_tiny("llama", max_position_embeddings=2048)  # the prompt has all tools
    with running(save_with_tools(source, folder / "plain")) as plain:
        body = parsed(ChatBody, {"messages": MESSAGES, "tools": TOOLS})
        prompt = plain.model.chat_prompt(body.messages, body.tools)
        tokens = plain.model.decoder.generate([prompt], 8).tokens[0]
    calls = save_with_tools(source, folder / "calls", tokens[4])
    with running(calls, name="tiny") as served:
        yield served


# --- JSON -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize("name", SCHEMAS)
def test_an_answer_follows_its_schema(client: openai.OpenAI, name: str, temperature: float) -> None:
    done = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        response_format=asked(SCHEMAS[name]),
        temperature=temperature,
        seed=4,
        n=2,
    )
    for choice in done.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), SCHEMAS[name])
    assert done.model_extra is not None and done.model_extra["gateskip"]["mode"] == "plain"


def test_a_typed_answer(client: openai.OpenAI) -> None:
    """As applications ask: a class of pydantic, and whole and streamed answers."""

    class Licence(pydantic.BaseModel):
        kind: Literal["free", "paid"]
        parts: list[bool] = pydantic.Field(max_length=3)

    given: Any = {"model": "tiny", "messages": MESSAGES, "response_format": Licence}
    whole = client.chat.completions.parse(**given).choices[0].message
    assert isinstance(whole.parsed, Licence)
    with client.chat.completions.stream(**given) as stream:
        final = stream.get_final_completion().choices[0].message
    assert final.parsed == whole.parsed and final.content == whole.content


def test_any_object(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        response_format={"type": "json_object"},
        temperature=1.5,
        seed=0,
        n=8,
        max_tokens=60,
    )
    ends = [choice.finish_reason for choice in done.choices]
    assert "stop" in ends and "length" in ends
    for choice in done.choices:
        text = choice.message.content or ""
        assert text.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(text), dict)


def test_a_completion_follows_a_schema(client: openai.OpenAI, server: Running) -> None:
    done = client.completions.create(
        model="tiny",
        prompt=["You may", "The work"],
        max_tokens=300,
        extra_body={"response_format": asked(SCHEMAS["object"])},
    )
    for choice in done.choices:
        jsonschema.validate(json.loads(choice.text), SCHEMAS["object"])


def test_log_probabilities_are_those_before_the_mask(client: openai.OpenAI) -> None:
    asked_for: Any = {"model": "tiny", "messages": MESSAGES, "logprobs": True, "top_logprobs": 1}
    free = client.chat.completions.create(**asked_for, max_tokens=1).choices[0].logprobs
    bound = client.chat.completions.create(
        **asked_for, max_tokens=1, response_format={"type": "json_object"}
    )
    shown = bound.choices[0].logprobs
    assert free and free.content and shown and shown.content
    assert shown.content[0].token == "{" != free.content[0].token
    assert shown.content[0].top_logprobs == free.content[0].top_logprobs
    assert shown.content[0].logprob < free.content[0].logprob


def test_others_have_the_same_tokens_beside_it(client: openai.OpenAI, server: Running) -> None:
    """Free answers beside constrained ones have the tokens of `generate`, and the constrained ones
    those that they have alone, which are those of `generate` with the mask."""
    decoder = server.model.decoder
    texts = [f"{number} licences?" for number in range(3)]
    chats: list[Any] = [[{"role": "user", "content": text}] for text in texts]
    wanted = [
        answer_text(
            decoder.tokenizer,
            decoder.generate([chat_ids(decoder.tokenizer, chat)], 120, eos=server.model.eos).tokens[
                0
            ],
        )
        for chat in chats
    ]
    bound = {"response_format": asked(SCHEMAS["text"]), "temperature": 1.0, "seed": 3}

    def ask(messages: Any, **more: Any) -> str | None:
        given: Any = {"model": "tiny", "messages": messages, "max_tokens": 120, **more}
        return client.chat.completions.create(**given).choices[0].message.content

    alone = ask(MESSAGES, **bound)
    body = parsed(ChatBody, {"messages": MESSAGES, "response_format": bound["response_format"]})
    constraint, ids = server.model.chat_constraint(body), server.model.chat_prompt(body.messages)
    assert constraint is not None
    sampler = Sampler(temperature=1.0, processors=(constraint.mask(len(ids)),))
    tokens = decoder.generate([ids], 120, eos=server.model.eos, sampler=sampler, seed=3).tokens[0]
    assert answer_text(decoder.tokenizer, tokens) == alone
    with ThreadPoolExecutor(6) as pool:
        free = [pool.submit(ask, chat) for chat in chats]
        beside = [pool.submit(ask, MESSAGES, **bound) for _ in range(3)]
        assert [answer.result() for answer in free] == wanted
        assert {answer.result() for answer in beside} == {alone}


def test_a_drafting_server_does_not_draft_for_it(
    make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    decode = {"mode": "speculate", "draft_budget": 0.6, "draft_length": 3, "draft_weights": "own"}
    gated = save_gated(make_tiny("llama"), tmp_path / "gated", (0.6, 0.8), decode=decode)
    with running(gated, name="tiny") as server:
        given: Any = {
            "model": "tiny",
            "messages": MESSAGES,
            "response_format": asked(SCHEMAS["text"]),
        }
        done = client_of(server).chat.completions.create(**given)
        assert done.model_extra is not None
        receipt = done.model_extra["gateskip"]
        assert (receipt["mode"], receipt["drafted"]) == ("plain", 0)
        skipping = client_of(server).chat.completions.create(
            **given, extra_body={"gateskip": {"budget": 0.6}}
        )
        assert skipping.model_extra is not None
        assert 0 < skipping.model_extra["gateskip"]["skipped"] < 1
        for one in (done, skipping):
            content = one.choices[0].message.content or ""
            jsonschema.validate(json.loads(content), SCHEMAS["text"])


# --- calls ----------------------------------------------------------------------------------------


def checked(call: Any) -> Any:
    """A call's name and arguments, which follow the function's schema."""
    assert call.type == "function" and call.id.startswith("call_")
    arguments = json.loads(call.function.arguments)
    jsonschema.validate(arguments, ARGUMENTS[call.function.name])
    return call.function.name, arguments


@pytest.mark.parametrize("template", ["server", "caller"])
def test_a_required_call(template: str, request: pytest.FixtureRequest) -> None:
    """With and without tools in the chat template, streamed and not."""
    client = client_of(request.getfixturevalue(template))
    given: Any = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "tool_choice": "required"}
    names = set()
    for seed in range(4):
        given |= {"temperature": 1.5, "seed": seed}
        (choice,) = client.chat.completions.create(**given).choices
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        (call,) = choice.message.tool_calls or []
        name, arguments = checked(call)
        names.add(name)
        with client.chat.completions.stream(**given) as stream:
            final = stream.get_final_completion().choices[0]
        assert final.finish_reason == "tool_calls"
        (streamed,) = final.message.tool_calls or []
        assert checked(streamed) == (name, arguments)
        assert streamed.function.arguments == call.function.arguments  # type: ignore[union-attr]
    assert len(names) > 1


def test_a_named_function(caller: Running) -> None:
    given: Any = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS}
    for name in ARGUMENTS:
        choice = {"type": "function", "function": {"name": name}}
        done = client_of(caller).chat.completions.create(**given, tool_choice=choice)  # type: ignore
        (call,) = done.choices[0].message.tool_calls or []
        assert checked(call)[0] == name


def test_the_model_calls_where_it_wants(caller: Running) -> None:
    client = client_of(caller)
    given: Any = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "max_tokens": 200}
    one = client.chat.completions.create(**given, parallel_tool_calls=False).choices[0]
    assert one.finish_reason == "tool_calls" and one.message.content
    (call,) = one.message.tool_calls or []
    first = checked(call)
    many = client.chat.completions.create(**given).choices[0].message
    calls = many.tool_calls or []
    assert many.content is not None and many.content.startswith(one.message.content)
    assert checked(calls[0]) == first and len({call.id for call in calls}) == len(calls)

    parts = list(client.chat.completions.create(**given, parallel_tool_calls=False, stream=True))
    deltas = [part.choices[0].delta for part in parts]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == one.message.content
    pieces = [piece for delta in deltas for piece in delta.tool_calls or []]
    assert pieces[0].id and pieces[0].function and pieces[0].function.name == first[0]
    assert all(piece.index == 0 for piece in pieces)
    assert not any(piece.id or (piece.function and piece.function.name) for piece in pieces[1:])
    arguments = "".join((piece.function and piece.function.arguments) or "" for piece in pieces)
    assert arguments == call.function.arguments  # type: ignore[union-attr]
    assert parts[-1].choices[0].finish_reason == "tool_calls"
    assert "tool_call" not in "".join(delta.content or "" for delta in deltas)


def test_the_text_before_a_call_is_free(caller: Running) -> None:
    """The tokens before the call, and the call's first, are those of `generate`."""
    body = parsed(ChatBody, {"messages": MESSAGES, "tools": TOOLS})
    prompt = caller.model.chat_prompt(body.messages, body.tools)
    decoder = caller.model.decoder
    tokens = decoder.generate([prompt], 20, eos=caller.model.eos).tokens[0]
    begin = decoder.tokenizer.convert_tokens_to_ids("<tool_call>")
    text = answer_text(decoder.tokenizer, tokens[: tokens.index(begin)])
    done = client_of(caller).chat.completions.create(
        model="tiny", messages=MESSAGES, tools=TOOLS, parallel_tool_calls=False
    )
    assert done.choices[0].message.content == text


def test_without_tools_the_answer_is_text(caller: Running) -> None:
    client = client_of(caller)
    given: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12}
    text = client.chat.completions.create(**given).choices[0].message
    none = client.chat.completions.create(**given, tools=TOOLS, tool_choice="none").choices[0]
    assert none.message.content == text.content and none.message.tool_calls is None


def test_a_call_and_its_result_go_on(caller: Running) -> None:
    """What a client sends back is in the prompt, as the template has it."""
    call = {"id": "call_1", "type": "function"}
    call |= {"function": {"name": "clock", "arguments": '{"zone": 3}'}}
    turns: Any = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "It is noon."},
    ]
    given: Any = {"model": "tiny", "messages": turns, "tools": TOOLS, "max_tokens": 4}
    done = client_of(caller).chat.completions.create(**given)
    body = parsed(ChatBody, {"messages": turns, "tools": TOOLS})
    text = caller.model.decoder.tokenizer.decode(
        caller.model.chat_prompt(body.messages, body.tools)
    )
    assert '{"name": "clock", "arguments": {"zone": 3}}' in text and "tool\nIt is noon." in text
    assert done.usage is not None
    ids = caller.model.chat_prompt(body.messages, body.tools)
    assert done.usage.prompt_tokens == len(ids)


def test_a_call_that_is_cut(caller: Running) -> None:
    given: Any = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "tool_choice": "required"}
    whole = client_of(caller).chat.completions.create(**given)
    (call,) = whole.choices[0].message.tool_calls or []
    assert whole.usage is not None
    for limit in range(1, whole.usage.completion_tokens, 7):
        cut = client_of(caller).chat.completions.create(**given, max_tokens=limit).choices[0]
        assert cut.finish_reason == "length"
        for begun in cut.message.tool_calls or []:
            arguments = begun.function.arguments  # type: ignore[union-attr]
            assert call.function.arguments.startswith(arguments)  # type: ignore[union-attr]


# --- refusals -------------------------------------------------------------------------------------

CHAT = {"messages": MESSAGES}
DEEP: Any = {"type": "string"}
for _ in range(400):
    DEEP = {"type": "array", "items": DEEP}
SCHEMA_MISTAKES: dict[str, tuple[Any, str]] = {
    "not": ({"not": {"type": "string"}}, "not"),
    "a type": ({"type": "strin"}, "strin"),
    "a far reference": ({"$ref": "https://example.org/x.json"}, "example.org"),
    "a missing reference": ({"$ref": "#/$defs/x"}, "x"),
    "a pattern": ({"type": "string", "pattern": "(?=a)b"}, "look"),
    "an unclosed pattern": ({"type": "string", "pattern": "(a"}, "unclosed group"),
    "a format": ({"type": "string", "format": "no-such-format"}, "no-such-format"),
    "nothing fits": ({"type": "integer", "minimum": 3, "maximum": 1}, ""),
    "depth": (DEEP, "recursion"),
    "leniency": ({"not": {"type": "string"}, "x-guidance": {"lenient": True}}, "not"),
}


@pytest.mark.parametrize("case", SCHEMA_MISTAKES)
def test_a_schema_that_cannot_be_followed(server: Running, case: str) -> None:
    schema, reason = SCHEMA_MISTAKES[case]
    before = server.scheduler.snapshot().requests
    function = {"name": "f", "parameters": schema}
    for more in (
        {"response_format": asked(schema)},
        {"tools": [{"type": "function", "function": function}], "tool_choice": "required"},
    ):
        refused = httpx.post(f"{server.url}/v1/chat/completions", json={**CHAT, **more})
        assert refused.status_code == 400, refused.text
        error = refused.json()["error"]
        assert error["param"] == next(iter(more)) and "cannot be followed" in error["message"]
        assert reason in error["message"]
    assert server.scheduler.snapshot().requests == before


REQUIRED = {**CHAT, "tool_choice": "required"}
MISTAKES: dict[str, tuple[Any, str]] = {
    "no schema": ({**CHAT, "response_format": {"type": "json_schema"}}, "json_schema is needed"),
    "a schema for text": (
        {**CHAT, "response_format": {**asked({}), "type": "text"}},
        "json_schema is needed",
    ),
    "a kind": ({**CHAT, "response_format": {"type": "xml"}}, "response_format.type"),
    "a schema's name": (
        {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        "response_format.json_schema.name",
    ),
    "no tools": (REQUIRED, "tool_choice needs tools"),
    "another function": (
        {**CHAT, "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
        "no tool has the name x",
    ),
    "a choice": ({**CHAT, "tools": TOOLS, "tool_choice": "maybe"}, "tool_choice.type"),
    "no name": ({**CHAT, "tools": TOOLS, "tool_choice": {"type": "function"}}, "name is needed"),
    "a bad name": (
        {**REQUIRED, "tools": [{"type": "function", "function": {"name": 'x"'}}]},
        "tools[0].function.name",
    ),
    "another kind of tool": ({**CHAT, "tools": [{"type": "web_search"}]}, "tools[0].type"),
    "twice": ({**REQUIRED, "tools": [CLOCK, CLOCK]}, "the same name"),
    "both": (
        {**REQUIRED, "tools": TOOLS, "response_format": {"type": "json_object"}},
        "response_format is not supported beside tools",
    ),
    "log probabilities": ({**REQUIRED, "tools": TOOLS, "logprobs": True}, "logprobs"),
    "token shares": (
        {**REQUIRED, "tools": TOOLS, "gateskip": {"token_shares": True}},
        "token_shares is not supported beside tools",
    ),
    "auto": ({**CHAT, "tools": TOOLS}, "no <tool_call> form"),
    "a result": (
        {"messages": [{"role": "tool", "tool_call_id": "1", "content": "x"}]},
        "takes no tools",
    ),
    "a call": (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
                }
            ]
        },
        "takes no tools",
    ),
    "arguments": (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "[]"}}],
                }
            ]
        },
        "messages[0].tool_calls[0].function.arguments",
    ),
    "no content": ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
    "a result of whom": (
        {"messages": [{"role": "tool", "content": "x"}]},
        "messages[0].tool_call_id",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named(server: Running, case: str) -> None:
    body, reason = MISTAKES[case]
    refused = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert refused.status_code == 400, refused.text
    assert reason in refused.json()["error"]["message"]


def test_a_completion_has_no_tools(server: Running) -> None:
    body = {"prompt": "x", "tools": TOOLS}
    refused = httpx.post(f"{server.url}/v1/completions", json=body)
    assert refused.status_code == 400 and "tools is not supported" in refused.text


def test_without_the_library_the_extra_is_named(
    server: Running, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = server.model
    fresh = Constraints(model.tokenizer, model.decoder.skipping.model.config.vocab_size, model.eos)
    monkeypatch.setattr(model, "_constraints", fresh)
    for name in ("llguidance", "llguidance.hf"):
        monkeypatch.setitem(sys.modules, name, None)
    given: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4}
    with pytest.raises(openai.BadRequestError, match=r"pip install 'gateskip-compose\[serve\]'"):
        client.chat.completions.create(**given, response_format={"type": "json_object"})
    assert client.chat.completions.create(**given).choices[0].message.content


def test_an_error_of_a_grammar_has_no_text_of_the_answer(server: Running) -> None:
    """It goes to the log; here a token that the grammar forbids, which no mask lets through."""
    body = parsed(ChatBody, {"messages": MESSAGES, "response_format": asked(SCHEMAS["object"])})
    constraint = server.model.chat_constraint(body)
    assert constraint is not None
    wrong = server.model.decoder.tokenizer("licence").input_ids
    with pytest.raises(RuntimeError) as failed:
        constraint.mask(1)(torch.tensor([[5, *wrong]]), torch.zeros(1, 512))
    assert str(failed.value) == "the grammar of an answer failed: InternalError"
