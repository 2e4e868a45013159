"""`gateskip serve` as LangChain's client sees it, on a tiny model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from serving import Running, running

from compose.bench.generate import answer_text, chat_ids
from gateskip.decoding.sampling import Sampler

MESSAGES = [SystemMessage("Be short."), HumanMessage("What is a licence?")]
TURNS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is a licence?"},
]


@pytest.fixture(scope="module")
def server(make_tiny: Callable[..., Path]) -> Iterator[Running]:
    with running(make_tiny("llama"), max_rows=4, api_key="secret") as served:
        yield served


def chat_of(server: Running, **settings: Any) -> ChatOpenAI:
    given = {"model": server.model.names[0], "api_key": "secret", "max_retries": 0}
    return ChatOpenAI(base_url=f"{server.url}/v1", **{**given, "max_tokens": 24, **settings})


def expected(server: Running, **settings: Any) -> str:
    """The text of `Decoder.generate`."""
    decoder = server.model.decoder
    ids = chat_ids(decoder.tokenizer, TURNS)
    tokens = decoder.generate([ids], 24, eos=server.model.eos, **settings).tokens[0]
    return answer_text(decoder.tokenizer, tokens)


def test_a_chat(server: Running) -> None:
    answer = chat_of(server).invoke(MESSAGES)
    assert isinstance(answer, AIMessage) and answer.content == expected(server)
    ids = chat_ids(server.model.decoder.tokenizer, TURNS)
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["input_tokens"] == len(ids)
    assert answer.response_metadata["finish_reason"] in ("length", "stop")
    assert answer.response_metadata["model_name"] == server.model.names[0]


def test_a_stream(server: Running) -> None:
    parts = list(chat_of(server, stream_usage=True).stream(MESSAGES))
    assert len(parts) > 2
    whole = AIMessageChunk(content="")
    for part in parts:
        whole = whole + part
    assert whole.content == expected(server)
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] > 2


def test_clients_at_the_same_time(server: Running) -> None:
    async def ask() -> list[Any]:
        chat = chat_of(server)
        return await chat.abatch([MESSAGES] * 6)

    assert {answer.content for answer in asyncio.run(ask())} == {expected(server)}


def test_seeds_and_several_answers(server: Running) -> None:
    chat = chat_of(server, temperature=1.0, seed=7, n=3)
    choices = chat.generate([MESSAGES]).generations[0]
    wanted = [expected(server, sampler=Sampler(temperature=1.0), seed=seed) for seed in (7, 8, 9)]
    assert [choice.text for choice in choices] == wanted and len(set(wanted)) == 3


def test_stop_strings(server: Running) -> None:
    text = expected(server)
    stop = text[len(text) // 2 : len(text) // 2 + 5]
    wanted = text[: text.index(stop)].strip()
    assert chat_of(server).invoke(MESSAGES, stop=[stop]).content == wanted
    parts = chat_of(server, stop=[stop]).stream(MESSAGES)
    assert "".join(str(part.content) for part in parts) == wanted


def test_log_probabilities(server: Running) -> None:
    answer = chat_of(server, logprobs=True, top_logprobs=2).invoke(MESSAGES)
    tokens = answer.response_metadata["logprobs"]["content"]
    raw = b"".join(bytes(token["bytes"]) for token in tokens)
    assert raw.decode("utf-8", "replace").strip() == answer.content
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)
    assert tokens[0]["logprob"] == tokens[0]["top_logprobs"][0]["logprob"], "greedy"


def test_mistakes(server: Running) -> None:
    with pytest.raises(openai.AuthenticationError, match="API key"):
        chat_of(server, api_key="wrong").invoke(MESSAGES)
    with pytest.raises(openai.BadRequestError, match="logit_bias is not supported"):
        chat_of(server).invoke(MESSAGES, logit_bias={"5": 1})
    with pytest.raises(openai.BadRequestError, match="gateskip: this model has no gates"):
        chat_of(server, extra_body={"gateskip": {"budget": 0.8}}).invoke(MESSAGES)
