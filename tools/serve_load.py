"""How servers with OpenAI's API behave under load: the same requests, by turns.

    python tools/serve_load.py ours=http://127.0.0.1:8000 llama.cpp=http://127.0.0.1:8080
    python tools/serve_load.py ours=URL llama.cpp=URL --clients 1 8 32 --rounds 3 --out load.json
    python tools/serve_load.py ours=URL llama.cpp=URL --chat 10

Each client sends its next request as soon as its last answer ended. A request continues a piece of
English text of 32 to 2,000 tokens by 64 to 256 tokens, greedily and streamed. In each round all
servers get the same requests, one server after the other, and each round has other texts, so that
no prompt repeats. For each number of clients the tool prints tokens per second, the time to the
first token and the time between tokens. The time between two chunks of a stream is divided by the
mean number of tokens in a chunk. Medians are over rounds; percentiles are over all requests.

With `--chat N`, one client holds a chat of N turns after a system prompt of about 1,000 tokens, and
the tool prints the time to the first token of each turn.

With `--generate FOLDER`, this process serves the folder to one client, in turns with calls of
`Decoder.generate` on the same decoder: equal folders in two processes differ in speed by a quarter,
by where their memory lies. `--rounds` prompts, each without drafts and as the folder decodes by
itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import re
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx

from compose.analysis.intervals import paired_speed_ratio
from compose.assets.texts import load_texts
from compose.bench.generate import stop_token_ids
from compose.serve.metrics import Metrics
from compose.serve.model import ServedModel
from compose.serve.port import bound_socket, url_of
from compose.serve.server import ModelServer, scheduler_of
from compose.serve.settings import ServeSettings

TEXT = "heldout-text"
PROMPT = (32, 2000)  # tokens of a prompt
ANSWER = (64, 256)  # tokens of an answer
TOKENS_PER_WORD = 1.35  # of English text, about
REQUESTS = 2  # of each client in a round, on average
FEWEST = 8  # requests of a round
SYSTEM = 1000  # tokens of the system prompt of a chat
TURN = 64  # tokens of an answer of a chat
TIMEOUT = 600.0  # seconds of one request
# A server may close a connection that a client keeps
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=0)


@dataclass(frozen=True)
class Request:
    """A text to continue, and the number of new tokens."""

    prompt: str
    tokens: int


WARM_UP = Request("The history of the city begins with", 16)


@dataclass(frozen=True)
class Answer:
    """Times of one answer."""

    new_tokens: int
    prompt_tokens: int
    first_s: float
    """Seconds to the first token."""
    between_s: tuple[float, ...]
    """Seconds between tokens: of each chunk after the first, divided by its tokens."""


@dataclass(frozen=True)
class Server:
    """A server under test."""

    name: str
    url: str
    model: str


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("servers", nargs="*", metavar="NAME=URL")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chat", type=int, default=0, metavar="TURNS")
    parser.add_argument("--generate", type=Path, metavar="FOLDER")
    parser.add_argument("--extra", type=json.loads, default={}, help="further fields of requests")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    if not (options.servers or options.generate):
        parser.error("name a server, as NAME=URL, or a folder for --generate")
    if options.generate:
        results = _beside_generate(options.generate, options.rounds)
    else:
        results = asyncio.run(_measure(options))
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


async def _measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    async with httpx.AsyncClient(timeout=TIMEOUT, limits=LIMITS) as client:
        servers = [await _server(client, text) for text in options.servers]
        if options.chat:
            return [await _chat(client, server, options.chat) for server in servers]
        for server in servers:  # warm up
            await _load(client, server, _requests(0, 1, -1), 1, options.extra)
        return [
            row
            for clients in options.clients
            for row in await _with_clients(client, servers, clients, options)
        ]


async def _server(client: httpx.AsyncClient, text: str) -> Server:
    name, _, url = text.partition("=")
    models = (await client.get(f"{url}/v1/models")).json()["data"]
    return Server(name, url, models[0]["id"])


async def _with_clients(
    client: httpx.AsyncClient, servers: Sequence[Server], clients: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row of results for each server."""
    rates: dict[str, list[float]] = {server.name: [] for server in servers}
    answers: dict[str, list[Answer]] = {server.name: [] for server in servers}
    for number in range(options.rounds):
        requests = _requests(number, max(FEWEST, REQUESTS * clients), clients)
        order = servers if number % 2 == 0 else servers[::-1]
        for server in order:
            begun = time.perf_counter()
            done = await _load(client, server, requests, clients, options.extra)
            seconds = time.perf_counter() - begun
            rates[server.name].append(sum(answer.new_tokens for answer in done) / seconds)
            answers[server.name] += done
    return [
        _row(server.name, clients, rates[server.name], answers[server.name]) for server in servers
    ]


def _row(name: str, clients: int, rates: list[float], answers: list[Answer]) -> dict[str, Any]:
    first = [answer.first_s for answer in answers]
    between = [seconds for answer in answers for seconds in answer.between_s]
    row = {
        "server": name,
        "clients": clients,
        "tokens_per_s": [round(rate, 2) for rate in rates],
        "requests": len(answers),
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "new_tokens": sum(answer.new_tokens for answer in answers),
        "first_token_s": {"p50": _percentile(first, 50), "p95": _percentile(first, 95)},
        "between_tokens_s": {"p50": _percentile(between, 50), "p95": _percentile(between, 95)},
    }
    print(
        f"{name:12} {clients:3} clients  {statistics.median(rates):7.1f} tokens/s"
        f"  first token {_percentile(first, 50):.2f} s, p95 {_percentile(first, 95):.2f} s"
        f"  between tokens p95 {1000 * _percentile(between, 95):.0f} ms",
        flush=True,
    )
    return row


def _percentile(values: Sequence[float], percent: int) -> float:
    ordered = sorted(values)
    return (
        round(ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)], 4) if ordered else 0.0
    )


def _requests(number: int, count: int, salt: int) -> list[Request]:
    """Requests of a round: lengths and texts are drawn by its number."""
    draw = random.Random(f"{number} {salt}")
    words = _words()
    requests = []
    for _ in range(count):
        length = math.exp(draw.uniform(*map(math.log, PROMPT)))
        start = draw.randrange(len(words) - PROMPT[1])
        text = " ".join(words[start : start + round(length / TOKENS_PER_WORD)])
        requests.append(Request(text, draw.randint(*ANSWER)))
    return requests


@cache
def _words() -> list[str]:
    return re.findall(r"\S+", "\n".join(load_texts(TEXT).rows))


async def _load(
    client: httpx.AsyncClient,
    server: Server,
    requests: Sequence[Request],
    clients: int,
    extra: dict[str, Any],
) -> list[Answer]:
    """Answers to all requests; so many clients take the next one as soon as they are free."""
    waiting, done = list(reversed(requests)), list[Answer]()

    async def work() -> None:
        while waiting:
            request = waiting.pop()
            done.append(await _ask(client, server, "completions", _fields(request) | extra))

    await asyncio.gather(*(work() for _ in range(clients)))
    return done


def _fields(request: Request) -> dict[str, Any]:
    return {"prompt": request.prompt, "max_tokens": request.tokens, "temperature": 0}


async def _ask(
    client: httpx.AsyncClient, server: Server, path: str, fields: dict[str, Any]
) -> Answer:
    """One streamed answer."""
    body = {"model": server.model, "stream": True, "stream_options": {"include_usage": True}}
    begun, times, usage = time.perf_counter(), list[float](), dict[str, Any]()
    async with client.stream("POST", f"{server.url}/v1/{path}", json=body | fields) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if any(_text(choice) for choice in chunk.get("choices", ())):
                times.append(time.perf_counter())
            usage = chunk.get("usage") or usage
    count = usage["completion_tokens"]
    each = (count - 1) / max(1, len(times) - 1)  # tokens of a chunk
    between = tuple((b - a) / max(1.0, each) for a, b in pairwise(times))
    first = (times[0] if times else time.perf_counter()) - begun
    return Answer(count, usage["prompt_tokens"], first, between)


def _text(choice: dict[str, Any]) -> str:
    """The text of a chunk."""
    return choice.get("text") or (choice.get("delta") or {}).get("content") or ""


async def _chat(client: httpx.AsyncClient, server: Server, turns: int) -> dict[str, Any]:
    """Seconds to the first token of each turn of a chat."""
    words = _words()
    messages = [{"role": "system", "content": " ".join(words[: round(SYSTEM / TOKENS_PER_WORD)])}]
    first = []
    for turn in range(turns):
        said = " ".join(words[10_000 + 40 * turn : 10_030 + 40 * turn])
        messages.append({"role": "user", "content": f"Continue this text: {said}"})
        begun, at, text = time.perf_counter(), None, ""
        body = {"model": server.model, "messages": messages, "max_tokens": TURN, "stream": True}
        url = f"{server.url}/v1/chat/completions"
        async with client.stream("POST", url, json=body | {"temperature": 0}) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line.removeprefix("data: ")).get("choices", ())
                    new = "".join(map(_text, choices))
                    at = at or (time.perf_counter() if new else None)
                    text += new
        messages.append({"role": "assistant", "content": text})
        first.append(round((at or time.perf_counter()) - begun, 4))
    print(f"{server.name:12} first token of each turn: {', '.join(f'{s:.3f}' for s in first)} s")
    return {"server": server.name, "first_token_s": first}


def _beside_generate(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Speed of one client's requests as a multiple of `generate`'s, for each mode."""
    settings = ServeSettings(folder=folder)
    model = ServedModel(settings)
    server = ModelServer(settings, model, scheduler_of(model), Metrics())
    bound, ready = bound_socket("127.0.0.1", 0), threading.Event()
    threading.Thread(target=server.run_on, args=(bound, ready.set), daemon=True).start()
    ready.wait()
    served = Server("ours", url_of(bound), model.names[0])
    with ProcessPoolExecutor(1, get_context("spawn")) as client:
        return [_in_turns(client, served, model, mode, rounds) for mode in ("plain", "default")]


def _in_turns(
    client: ProcessPoolExecutor, server: Server, model: ServedModel, mode: str, rounds: int
) -> dict[str, Any]:
    decoder, draw = model.decoder, random.Random(0)
    plain = {"mode": "plain"}
    eos, extra = stop_token_ids(decoder), {"gateskip": plain} if mode == "plain" else {}
    settings: dict[str, Any] = plain if mode == "plain" else dict(decoder.defaults)
    speeds: dict[str, list[float]] = {"server": [], "generate": []}
    for request in [WARM_UP, *_requests(0, rounds, -2)]:
        ids = decoder.tokenizer(request.prompt).input_ids
        for way in draw.sample(list(speeds), 2):
            if way == "server":
                tokens, seconds = client.submit(_ask_alone, server, request, extra).result()
            else:
                begun = time.perf_counter()
                answer = decoder.generate([ids], request.tokens, eos=eos, **settings)
                tokens, seconds = len(answer.tokens[0]), time.perf_counter() - begun
            speeds[way].append(tokens / seconds)
    for of_way in speeds.values():
        del of_way[0]
    ratio = paired_speed_ratio(speeds["server"], speeds["generate"])
    assert ratio is not None, "two rounds or more"
    print(
        f"{mode:8} server {statistics.median(speeds['server']):.1f}, generate"
        f" {statistics.median(speeds['generate']):.1f} tokens/s, ratio {ratio.value:.3f}"
        f" ({ratio.low:.3f} to {ratio.high:.3f})",
        flush=True,
    )
    return {"mode": mode, "tokens_per_s": speeds, "ratio": [ratio.value, ratio.low, ratio.high]}


def _ask_alone(server: Server, request: Request, extra: dict[str, Any]) -> tuple[int, float]:
    """New tokens of one answer, and its seconds, from a process without a model."""

    async def ask() -> tuple[int, float]:
        async with httpx.AsyncClient(timeout=TIMEOUT, limits=LIMITS) as client:
            begun = time.perf_counter()
            answer = await _ask(client, server, "completions", _fields(request) | extra)
            return answer.new_tokens, time.perf_counter() - begun

    return asyncio.run(ask())


if __name__ == "__main__":
    main()
