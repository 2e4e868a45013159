"""`gateskip serve` as the clients of OpenAI's API see it, on tiny models."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serving import Running, running
from tiny_models import save_gated

from compose.bench.generate import answer_text, chat_ids
from compose.errors import UserError
from compose.outputs.export import decode_default
from compose.serve.model import ServedModel
from compose.serve.settings import ServeSettings
from compose.stages.registry import STAGES

MESSAGES: Any = [{"role": "user", "content": "What is a licence?"}]


@pytest.fixture(scope="module")
def server(make_tiny: Callable[..., Path]) -> Iterator[Running]:
    with running(make_tiny("llama"), max_rows=4, max_queue=8, max_body_kb=64) as served:
        yield served


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def name(server: Running) -> str:
    return server.model.names[0]


def expected(server: Running, messages: Any = MESSAGES, tokens: int = 24, **settings: Any) -> Any:
    """The tokens of `Decoder.generate`."""
    decoder = server.model.decoder
    ids = chat_ids(decoder.tokenizer, messages)
    generation = decoder.generate([ids], tokens, eos=server.model.eos, **settings)
    return generation.tokens[0]


def text_of(server: Running, tokens: list[int]) -> str:
    return answer_text(server.model.decoder.tokenizer, tokens)


# --- answers --------------------------------------------------------------------------------------


def test_models(client: openai.OpenAI, name: str) -> None:
    assert [model.id for model in client.models.list()] == [name]


@pytest.mark.parametrize("use", ["speculate", "skip", "plain"])
def test_an_export_is_served(use: str, tiny_llama: Path, tmp_path: Path) -> None:
    """With every setting that an export's decode stage writes."""
    decode = decode_default(STAGES[use].model_validate({"use": use}).model_dump())
    folder = save_gated(tiny_llama, tmp_path / "export", (0.8,), decode=decode)
    with running(folder, max_rows=2) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        done = client.chat.completions.create(model="export", messages=MESSAGES, max_tokens=24)
        tokens = expected(served, **{**decode, "draft_length": 4} if use == "speculate" else decode)
        assert done.choices[0].message.content == text_of(served, tokens)
        assert done.model_extra is not None and done.model_extra["gateskip"]["mode"] == use


def test_a_folder_that_decodes_without_its_gates_is_refused(
    tiny_llama: Path, tmp_path: Path
) -> None:
    decode = {"mode": "speculate", "draft_budget": 0.8, "target": "original"}
    folder = save_gated(tiny_llama, tmp_path / "export", (0.8,), decode=decode)
    with pytest.raises(UserError, match="target: original"):
        ServedModel(ServeSettings(folder=folder, port=0))


def test_a_chat_is_answered_as_by_generate(
    client: openai.OpenAI, server: Running, name: str
) -> None:
    done = client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=24)
    tokens = expected(server)
    assert done.choices[0].message.content == text_of(server, tokens)
    assert done.choices[0].message.role == "assistant"
    assert done.choices[0].finish_reason == ("length" if len(tokens) == 24 else "stop")
    assert done.usage is not None and done.usage.prompt_tokens_details is not None
    assert done.usage.completion_tokens == len(tokens)
    ids = chat_ids(server.model.decoder.tokenizer, MESSAGES)
    assert done.usage.prompt_tokens == len(ids)
    assert 0 <= (done.usage.prompt_tokens_details.cached_tokens or 0) < len(ids)
    assert done.model_extra is not None
    assert done.model_extra["gateskip"]["mode"] == "plain"


def test_a_stream_has_the_same_text(client: openai.OpenAI, server: Running, name: str) -> None:
    asked: Any = {"model": name, "messages": MESSAGES, "max_tokens": 24}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    *parts, last = chunks
    assert last.choices == [] and last.usage == whole.usage
    assert parts[0].choices[0].delta.role == "assistant"
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content
    assert [part.choices[0].finish_reason for part in parts if part.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert parts[-1].model_extra is not None
    assert parts[-1].model_extra["gateskip"]["drafted"] == 0


def test_a_completion_continues_the_text(client: openai.OpenAI, server: Running, name: str) -> None:
    done = client.completions.create(model=name, prompt="You may reproduce", max_tokens=12)
    decoder = server.model.decoder
    ids = decoder.tokenizer("You may reproduce").input_ids
    tokens = decoder.generate([ids], 12, eos=server.model.eos).tokens[0]
    text = decoder.tokenizer.decode(tokens, skip_special_tokens=True)
    assert done.choices[0].text == text
    by_ids = client.completions.create(model=name, prompt=ids, max_tokens=12)
    assert by_ids.choices[0].text == text
    stream = client.completions.create(model=name, prompt=ids, max_tokens=12, stream=True)
    assert "".join(part.choices[0].text for part in stream) == text


def test_several_prompts_and_choices(client: openai.OpenAI, name: str) -> None:
    asked: Any = {"model": name, "max_tokens": 6, "temperature": 1.0, "seed": 3}
    both = client.completions.create(prompt=["You may", "The work"], n=2, **asked)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    second = client.completions.create(prompt="The work", n=2, **asked)
    assert [c.text for c in both.choices[2:]] == [c.text for c in second.choices]
    assert both.usage is not None and second.usage is not None
    first = client.completions.create(prompt="You may", n=1, **asked)
    assert first.usage is not None
    prompts = first.usage.prompt_tokens + second.usage.prompt_tokens
    assert both.usage.prompt_tokens == prompts


def test_seeds(client: openai.OpenAI, server: Running, name: str) -> None:
    from gateskip.decoding.sampling import Sampler

    asked: Any = {"model": name, "messages": MESSAGES, "max_tokens": 16, "temperature": 1.0}
    one, again = (client.chat.completions.create(**asked, seed=7) for _ in range(2))
    tokens = expected(server, tokens=16, sampler=Sampler(temperature=1.0), seed=7)
    assert one.choices[0].message.content == text_of(server, tokens)
    assert again.choices[0].message.content == one.choices[0].message.content
    three = client.chat.completions.create(**asked, seed=7, n=3)
    texts = [choice.message.content for choice in three.choices]
    assert texts[0] == one.choices[0].message.content and len(set(texts)) == 3
    free = {client.chat.completions.create(**asked).choices[0].message.content for _ in range(3)}
    assert len(free) > 1


def test_stop_strings_are_no_part_of_the_text(
    client: openai.OpenAI, server: Running, name: str
) -> None:
    asked: Any = {"model": name, "messages": MESSAGES, "max_tokens": 24}
    text = client.chat.completions.create(**asked).choices[0].message.content or ""
    middle = len(text) // 2
    stop = text[middle : middle + 5]
    wanted = text[: text.index(stop)].strip()
    for stops in (stop, ["never written", stop]):
        done = client.chat.completions.create(**asked, stop=stops)
        assert done.choices[0].message.content == wanted
        assert done.choices[0].finish_reason == "stop"
        parts = list(client.chat.completions.create(**asked, stop=stops, stream=True))
        assert "".join(part.choices[0].delta.content or "" for part in parts) == wanted


def test_log_probabilities(client: openai.OpenAI, server: Running, name: str) -> None:
    asked: Any = {"model": name, "messages": MESSAGES, "max_tokens": 8}
    chat = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content or []
    assert len(content) == 8
    assert all(len(token.top_logprobs) == 3 for token in content)
    raw = b"".join(bytes(token.bytes or []) for token in content)
    assert raw.decode("utf-8", "replace").strip() == chat.choices[0].message.content
    none = client.chat.completions.create(**asked, logprobs=True)
    assert none.choices[0].logprobs is not None and none.choices[0].logprobs.content
    assert none.choices[0].logprobs.content[0].top_logprobs == []

    done = client.completions.create(model=name, prompt="You may", max_tokens=5, logprobs=2)
    shown = done.choices[0].logprobs
    assert shown is not None and shown.tokens and shown.text_offset and shown.top_logprobs
    assert len(shown.tokens) == len(shown.token_logprobs or []) == 5
    assert shown.text_offset[0] == 0 and sorted(shown.text_offset) == shown.text_offset
    stream = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, stream=True)
    streamed = [
        token
        for part in stream
        for token in (part.choices[0].logprobs.content or [] if part.choices[0].logprobs else [])
    ]
    assert streamed == content


def test_tokenize(server: Running) -> None:
    tokenizer = server.model.decoder.tokenizer
    text = httpx.post(f"{server.url}/tokenize", json={"prompt": "You may 😀"}).json()
    assert text["tokens"] == tokenizer("You may 😀").input_ids
    chat = httpx.post(f"{server.url}/tokenize", json={"messages": MESSAGES}).json()
    assert chat["tokens"] == chat_ids(tokenizer, MESSAGES) and chat["count"] == len(chat["tokens"])


def test_harmless_and_neutral_fields_are_taken(client: openai.OpenAI, name: str) -> None:
    client.chat.completions.create(
        model=name,
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "Be short."}]},
            {"role": "user", "content": "Hello", "name": "ada"},
        ],
        max_completion_tokens=2,
        user="ada",
        metadata={"a": "b"},
        store=False,
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        response_format={"type": "text"},
        top_p=0.9,
        extra_body={"top_k": 5},
    )


def test_a_deadline_ends_an_answer(client: openai.OpenAI, name: str) -> None:
    done = client.chat.completions.create(
        model=name, messages=MESSAGES, extra_body={"gateskip": {"deadline_s": 1e-4}}
    )
    assert done.choices[0].finish_reason == "length"
    assert done.usage is not None and done.usage.completion_tokens < 400


# --- skipping and drafts --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gated(make_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("gated") / "shipped"
    decode = {"mode": "speculate", "draft_budget": 0.6, "draft_length": 3, "draft_weights": "own"}
    return save_gated(make_tiny("llama"), target, (0.6, 0.8), decode=decode)


def test_a_request_asks_for_a_mode_or_a_budget(gated: Path) -> None:
    with running(gated, name="alias") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["alias", "shipped"]

        def ask(**options: Any) -> tuple[str | None, dict[str, Any]]:
            done = client.chat.completions.create(
                model="shipped",
                messages=MESSAGES,
                max_tokens=24,
                extra_body={"gateskip": options} if options else {},
            )
            assert done.model_extra is not None
            return done.choices[0].message.content, done.model_extra["gateskip"]

        drafted, receipt = ask()
        assert receipt["mode"] == "speculate" and receipt["drafted"] > 0
        assert 0 <= receipt["accepted"] <= receipt["drafted"]
        plain, receipt = ask(mode="plain")
        assert plain == drafted and (receipt["mode"], receipt["drafted"]) == ("plain", 0)
        skipping, receipt = ask(budget=0.6)
        assert (receipt["mode"], receipt["budget"]) == ("skip", 0.6)
        assert 0 < receipt["skipped"] < 1
        tokens = expected(server, mode="skip", budget=0.6)
        assert skipping == text_of(server, tokens)
        assert ask(mode="skip")[1]["budget"] == 0.8
        for options, why in (
            ({"mode": "plain", "budget": 0.8}, "leave the budget out"),
            ({"budget": 0.1}, "budget 0.1"),
            ({"mode": "fast"}, "gateskip.mode"),
        ):
            with pytest.raises(openai.BadRequestError, match=why):
                ask(**options)


def test_the_share_of_compute_of_each_token(gated: Path) -> None:
    """Texts of tokens make up the answer, in a stream and whole, also where text was held back."""
    with running(gated) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        (model,) = client.models.list()
        assert model.model_extra is not None
        skipping = {"mode": "speculate", "budget": None, "budgets": [0.6, 0.8]}
        assert model.model_extra["gateskip"] == skipping
        tokens = expected(server, mode="skip", budget=0.6)
        text = text_of(server, tokens)
        asked: Any = {"model": model.id, "messages": MESSAGES, "max_tokens": 24}
        asked["extra_body"] = {"gateskip": {"budget": 0.6, "token_shares": True}}
        for stop in (None, [text[-4:-2]], ["never \N{SNOWMAN}", text[-1] + "#"]):
            whole = client.chat.completions.create(**asked, stop=stop, n=2)
            for choice in whole.choices:
                shares = choice.model_extra["gateskip"]["token_shares"]
                assert "".join(share["text"] for share in shares) == choice.message.content
            texts, parts, values = "", "", list[Any]()
            for chunk in client.chat.completions.create(**asked, stop=stop, stream=True):
                (piece,) = chunk.choices
                texts += piece.delta.content or ""
                for share in piece.model_extra["gateskip"]["token_shares"]:
                    parts += share["text"]
                    values.append(share["compute"])
            assert texts == parts == whole.choices[0].message.content
            known = {value for value in values if value is not None}
            assert len(known) > 3 and 0 < min(known) < max(known) < 1
        plain = client.chat.completions.create(model=model.id, messages=MESSAGES, max_tokens=4)
        assert "gateskip" not in (plain.choices[0].model_extra or {})


def test_prefixes_on_disk(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    """A server that starts again has the prompts of the one before."""
    folder = make_tiny("llama", max_position_embeddings=4096)
    prompt = [5 + place % 300 for place in range(1500)]
    answers = []
    for _ in range(2):
        with running(folder, prefix_dir=tmp_path / "prefixes", max_rows=2) as server:
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
            done = client.completions.create(model=folder.name, prompt=prompt, max_tokens=8)
            assert done.usage is not None and done.usage.prompt_tokens_details is not None
            answers.append((done.choices[0].text, done.usage.prompt_tokens_details.cached_tokens))
            tokens = server.model.decoder.generate([prompt], 8, eos=server.model.eos).tokens[0]
            tokenizer = server.model.decoder.tokenizer
            assert answers[-1][0] == tokenizer.decode(tokens, skip_special_tokens=True)
    assert answers == [(answers[0][0], 0), (answers[0][0], 1024)]


# --- errors ---------------------------------------------------------------------------------------

CHAT = {"messages": MESSAGES}
BAD: dict[str, tuple[Any, str]] = {
    "no messages": ({}, "messages"),
    "empty messages": ({"messages": []}, "messages"),
    "a role": ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content",
    ),
    "tool calls": (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
        "messages[0].tool_calls[0].function",
    ),
    "tools": ({**CHAT, "tools": [{"type": "function"}]}, "tools[0].function"),
    "functions": ({**CHAT, "functions": [{"name": "f"}]}, "functions"),
    "json": ({**CHAT, "response_format": {"type": "json_schema"}}, "response_format"),
    "bias": ({**CHAT, "logit_bias": {"5": 1}}, "logit_bias"),
    "penalty": ({**CHAT, "frequency_penalty": 0.5}, "frequency_penalty"),
    "unknown": ({**CHAT, "temprature": 1}, "temprature"),
    "text for a number": ({**CHAT, "max_tokens": "5"}, "max_tokens"),
    "true for a number": ({**CHAT, "n": True}, "n"),
    "zero tokens": ({**CHAT, "max_tokens": 0}, "max_tokens"),
    "two limits": ({**CHAT, "max_tokens": 1, "max_completion_tokens": 2}, None),
    "tops alone": ({**CHAT, "top_logprobs": 2}, None),
    "heat": ({**CHAT, "temperature": -1}, "temperature"),
    "an empty stop": ({**CHAT, "stop": ["a", ""]}, "stop"),
    "many answers": ({**CHAT, "n": 20}, "n"),
    "stream options": ({**CHAT, "stream_options": {"include_usage": True}}, None),
    "a budget": ({**CHAT, "gateskip": {"budget": 0.8}}, "gateskip"),
    "drafts": ({**CHAT, "gateskip": {"mode": "speculate"}}, "gateskip.mode"),
    "shares": ({**CHAT, "gateskip": {"token_shares": True}}, "gateskip.token_shares"),
    "too long": ({"messages": [{"role": "user", "content": "word " * 600}]}, None),
    "a long answer": ({**CHAT, "max_tokens": 100_000}, None),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_named(server: Running, case: str) -> None:
    body, param = BAD[case]
    refused = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["param"] == param
    if param is not None:
        assert param.split(".")[-1] in error["message"]


def test_a_long_prompt_is_refused_with_the_numbers(client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.BadRequestError, match=r"has \d\d\d+ tokens.* is 4\d\d") as refused:
        client.completions.create(model=name, prompt=[5] * 500, max_tokens=4)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="token id 999999"):
        client.completions.create(model=name, prompt=[5, 999_999])
    with pytest.raises(openai.BadRequestError, match="no tokens"):
        client.completions.create(model=name, prompt="")
    with pytest.raises(openai.BadRequestError, match="echo is not supported"):
        client.completions.create(model=name, prompt="x", echo=True)


def test_other_paths_models_and_kinds(server: Running, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    assert httpx.get(f"{server.url}/v1/none").json()["error"]["code"] == "not_found"
    wrong = httpx.get(f"{server.url}/v1/completions")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
    form = httpx.post(f"{server.url}/tokenize", content=b'{"prompt": "x"}')
    assert form.status_code == 415


def test_a_large_body_is_refused(server: Running) -> None:
    path = f"{server.url}/v1/completions"
    kind = {"content-type": "application/json"}
    stated = httpx.post(path, content=b" " * 70_000, headers=kind)
    assert stated.status_code == 413 and stated.json()["error"]["code"] == "body_too_large"
    pieces = httpx.post(path, content=(b" " * 1000 for _ in range(70)), headers=kind)
    assert pieces.status_code == 413


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 60_000,
        b'{"prompt": "\\ud800"}',
        b'{"prompt": NaN}',
        b'{"prompt": "x", "max_tokens": 1' + b"0" * 5000 + b"}",
    ],
)
def test_what_is_not_json_is_refused(server: Running, body: bytes) -> None:
    kind = {"content-type": "application/json"}
    refused = httpx.post(f"{server.url}/v1/completions", content=body, headers=kind)
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["type"] == "invalid_request_error"


def test_a_failed_answer_shows_no_inside(
    server: Running, client: openai.OpenAI, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr(server.model, "chat_prompt", broken)
    with pytest.raises(openai.InternalServerError) as failed:
        client.chat.completions.create(model=name, messages=MESSAGES)
    assert "secret" not in str(failed.value) and "Traceback" not in str(failed.value)


# --- the page, metrics ----------------------------------------------------------------------------


def test_the_page_lets_no_other_script_run(server: Running) -> None:
    page = httpx.get(server.url)
    assert page.status_code == 200 and "<textarea" in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
    assert "http://" not in page.text and "https://" not in page.text


def test_metrics(server: Running, client: openai.OpenAI, name: str) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    def values() -> dict[str, float]:
        text = httpx.get(f"{server.url}/metrics").text
        return {
            sample.name + "".join(sorted(set(sample.labels.values()) - {"0"})): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    before = values()
    client.completions.create(model=name, prompt="You may", max_tokens=5)
    after = values()

    def grown(metric: str) -> float:
        return after.get(metric, 0) - before.get(metric, 0)

    end = time.monotonic() + 30
    while not grown("gateskip_requests_totallength") and time.monotonic() < end:
        after = values()  # an answer is counted once the client has it
    assert grown("gateskip_generated_tokens_total") == 5
    assert grown("gateskip_requests_totallength") == 1
    assert grown("gateskip_first_token_seconds_count") == 1
    assert grown("gateskip_http_responses_total200") >= 1
    assert after["gateskip_queued_requests"] == 0
    assert {"gateskip_cache_bytes", "gateskip_reused_tokens_total"} <= set(after)


def test_health(server: Running) -> None:
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_cors_is_off(server: Running) -> None:
    headers = {"origin": "https://example.org", "access-control-request-method": "POST"}
    asked = httpx.options(f"{server.url}/v1/completions", headers=headers)
    assert "access-control-allow-origin" not in asked.headers


def test_a_log_line_has_no_prompt(
    server: Running, client: openai.OpenAI, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "gateskip.serve")
    client.completions.create(model=name, prompt="You may", max_tokens=5)
    lines: list[str] = []
    end = time.monotonic() + 30
    while not lines and time.monotonic() < end:  # the line follows the answer
        time.sleep(0.01)
        lines = [r.getMessage() for r in caplog.records if "/v1/completions" in r.getMessage()]
    (line,) = lines
    assert line.startswith("POST /v1/completions 200, ") and " + 5 tokens" in line
    assert "You may" not in json.dumps(line)
