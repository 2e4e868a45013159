"""The port: keys, hosts, a full queue, clients that leave, stopping, malformed requests."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from serving import Running, running, without_end

import compose.extras
from compose.errors import UserError
from compose.serve.model import cache_bytes
from compose.serve.port import bound_socket
from compose.serve.replicas import shares_of_cores
from compose.serve.settings import ServeSettings, from_json
from compose.terminal.commands.serve import serve

ROOT = Path(__file__).resolve().parents[3]
MESSAGES: Any = [{"role": "user", "content": "What is a licence?"}]
LONG: Any = {"messages": MESSAGES, "max_tokens": 12_000, "temperature": 1.0}


@pytest.fixture(scope="module")
def endless(make_tiny: Callable[..., Path]) -> Path:
    """A model with a long context and without an end token: its answers take seconds."""
    return without_end(make_tiny("llama", max_position_embeddings=16384))


@pytest.fixture(scope="module")
def small(endless: Path) -> Iterator[Running]:
    """One row, and one request that may wait."""
    with running(endless, max_rows=1, max_queue=1, max_context=16000) as served:
        yield served


@contextlib.contextmanager
def started(folder: Path, *options: str, key: str | None = None) -> Iterator[tuple[Any, str, Path]]:
    """`gateskip serve` in a process: it, its address, and its log."""
    log = folder.with_name(f"{folder.name}-{time.monotonic_ns()}.log")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {} if key is None else {"GATESKIP_API_KEY": key}
    command = [sys.executable, "-m", "compose", "serve", str(folder), "--port", "0", *options]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, env=environment, text=True
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("http"), log.read_text()
        yield process, line.split()[0], log
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


class Stream:
    """A stream of which the first line has come."""

    def __init__(self, url: str, **more: Any) -> None:
        self._client = httpx.Client(timeout=60)
        body = {**LONG, "stream": True, **more}
        request = self._client.build_request("POST", f"{url}/v1/chat/completions", json=body)
        self._response = self._client.send(request, stream=True)
        assert self._response.status_code == 200
        self._lines = self._response.iter_lines()
        next(self._lines)

    def rest(self) -> list[str]:
        """The lines that follow."""
        return [line for line in self._lines if line]

    def close(self) -> None:
        """Leave."""
        self._response.close()
        self._client.close()


# --- clients that leave, and the queue ------------------------------------------------------------


def test_a_client_that_leaves_ends_its_answer(small: Running) -> None:
    before = small.scheduler.snapshot().requests.get("cancelled", 0)
    stream = Stream(small.url)
    stream.close()
    small.wait(rows=0, queued=0)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{small.url}/v1/chat/completions", json=LONG, timeout=0.5)
    snapshot = small.wait(rows=0, queued=0)
    assert snapshot.requests["cancelled"] == before + 2
    assert snapshot.new_tokens < 12_000


def test_a_full_queue_refuses(small: Running) -> None:
    small.wait(rows=0, queued=0)
    running_one = Stream(small.url)
    small.wait(rows=1, queued=0)
    short: Any = {"url": f"{small.url}/v1/completions", "json": {"prompt": "x", "max_tokens": 1}}
    waiting = threading.Thread(target=httpx.post, kwargs={**short, "timeout": 60})
    waiting.start()
    small.wait(rows=1, queued=1)
    refused = httpx.post(**short)
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
    assert int(refused.headers["retry-after"]) >= 1
    running_one.close()
    waiting.join(30)
    small.wait(rows=0, queued=0)
    again = httpx.post(**short)
    assert again.status_code == 200


def test_the_cache_is_bounded(endless: Path) -> None:
    """Half of the free memory by default; a smaller cache has fewer rows."""
    free = psutil.virtual_memory().available
    whole = cache_bytes(ServeSettings(folder=endless))
    assert 0.25 * free < whole < 0.75 * free
    assert cache_bytes(ServeSettings(folder=endless, replicas=4)) < 0.4 * whole
    with running(endless, max_context=4000, cache_mb=10) as server:
        assert 1 <= server.model.limits.rows < 8
        assert server.scheduler.snapshot().cache_bytes <= 10_000_000
    with pytest.raises(UserError, match=r"cannot be served.*\n.*--max-context"):
        serve(endless, port=0, max_context=16000, cache_mb=1)


def test_a_prefix_dir_that_cannot_be_written(endless: Path, tmp_path: Path) -> None:
    """It is refused before the model is loaded; replicas get it by their settings."""
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"(?s)file.*--prefix-dir"):
            serve(endless, port=0, prefix_dir=wrong)
    given = ServeSettings(folder=endless, prefix_dir=tmp_path)
    assert from_json(given.to_json()) == given


# --- keys and hosts -------------------------------------------------------------------------------


def test_another_host_name_is_refused(small: Running) -> None:
    """A page of another site, whose name was made to lead here, may not use the server."""
    port = small.url.rpartition(":")[2]
    for host, status in (
        ("evil.example", 403),
        (f"evil.example:{port}", 403),
        (f"localhost:{port}", 200),
        ("[::1]", 200),
        ("127.0.0.1", 200),
    ):
        assert httpx.get(f"{small.url}/v1/models", headers={"host": host}).status_code == status


def test_a_key(tiny_llama: Path) -> None:
    with running(tiny_llama, api_key="geheim-ü") as server:
        for given in (None, "Bearer wrong", "Bearer", "geheim-"):
            headers = {} if given is None else {"authorization": given}
            refused = httpx.get(f"{server.url}/v1/models", headers=headers)
            assert refused.status_code == 401, given
            assert refused.json()["error"]["code"] == "invalid_api_key"
        given = "Bearer geheim-ü".encode()
        assert httpx.get(f"{server.url}/metrics", headers={"authorization": given}).is_success
        assert httpx.get(f"{server.url}/health").is_success and httpx.get(server.url).is_success
        assert httpx.get(f"{server.url}/metrics").status_code == 401


# --- malformed requests ---------------------------------------------------------------------------


def _malformed(draw: random.Random) -> Any:
    """A body of any shape: right names with wrong values, and the reverse."""
    names = ["messages", "prompt", "n", "stop", "seed", "temperature", "top_p", "top_k", "model"]
    names += ["max_tokens", "logprobs", "top_logprobs", "stream", "stream_options", "gateskip"]
    names += ["tools", "user", "echo", "x\x00y", ""]
    leaf = [None, True, -1, 0, 1, 2**70, 1e308, "", "a", "\u202e😀", [], {}, "user", 3.5]

    def value(depth: int) -> Any:
        kind = draw.randrange(4 if depth else 1)
        if kind == 0:
            return draw.choice(leaf)
        if kind == 1:
            return [value(depth - 1) for _ in range(draw.randrange(4))]
        if kind == 2:
            return {"role": draw.choice(leaf), "content": value(depth - 1)}
        return {draw.choice(names): value(depth - 1) for _ in range(draw.randrange(4))}

    body = {name: value(3) for name in draw.sample(names, draw.randrange(6))}
    if draw.random() < 0.7:
        body["messages"] = [{"role": "user", "content": draw.choice(["hi", "", "\x00", 5])}]
    return {**body, "max_tokens": draw.choice([1, 1, value(1)])}


def test_malformed_requests_end_nothing(tiny_llama: Path) -> None:
    draw, statuses = random.Random(0), set()
    with running(tiny_llama) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        for _ in range(60):
            path = draw.choice(["/v1/chat/completions", "/v1/completions", "/tokenize"])
            text = json.dumps(_malformed(draw)).encode()
            if draw.random() < 0.2:
                text = text[: draw.randrange(len(text))]
            answer = client.post(path, content=text, headers={"content-type": "application/json"})
            assert answer.status_code in (200, 400, 404), (text, answer.text)
            statuses.add(answer.status_code)
            if answer.status_code != 200:
                assert set(answer.json()) == {"error"}
        assert client.get("/health").is_success
    assert {200, 400} <= statuses


def test_bytes_that_are_no_http(tiny_llama: Path) -> None:
    with running(tiny_llama) as server:
        port = int(server.url.rpartition(":")[2])
        for data in (
            b"\x16\x03\x01\x00",
            b"GET\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        ):
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(data)
        assert httpx.get(f"{server.url}/health").is_success


# --- the process ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_sigterm_lets_answers_end(endless: Path) -> None:
    with started(endless, "--name", "endless") as (process, url, log):
        stream = Stream(url, max_tokens=600)
        process.send_signal(signal.SIGTERM)
        last = stream.rest()[-2:]
        assert last[1] == "data: [DONE]"
        assert json.loads(last[0].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert process.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
        assert "POST /v1/chat/completions 200" in log.read_text()
        assert "licence" not in log.read_text()


def test_openai_sees_a_stopped_server(endless: Path) -> None:
    """Answers that run when the server closes end with an error, not with a cut text."""
    with running(endless, max_context=16000) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        stream = client.chat.completions.create(model=server.model.names[0], stream=True, **LONG)
        next(iter(stream))
        threading.Thread(target=server.scheduler.close).start()
        with pytest.raises(openai.APIError, match="stopping"):
            list(stream)
        refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        assert httpx.get(f"{server.url}/health").is_success
        server.server.service.draining = True
        assert httpx.get(f"{server.url}/health").status_code == 503


def test_the_command_says_what_is_wrong(tiny_llama: Path, tmp_path: Path) -> None:
    with bound_socket("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(UserError, match=r"in use\n.*--port"):
            serve(tiny_llama, port=taken.getsockname()[1])
    with pytest.raises(UserError, match=r"config\.json"):
        serve(tmp_path, port=0)
    with pytest.raises(UserError, match="no gates"):
        serve(tiny_llama, port=0, budget=0.8)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> None:
    monkeypatch.setattr(compose.extras, "find_spec", lambda name: name != "uvicorn" or None)
    with pytest.raises(UserError, match=r"pip install 'gateskip-compose\[serve\]'"):
        serve(tiny_llama)


# --- replicas -------------------------------------------------------------------------------------


def test_cores_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 8}, raising=False)
    assert shares_of_cores(2) == [[0, 1], [2, 3]]
    with pytest.raises(UserError, match="there are 5"):
        shares_of_cores(6)


def _pids(parent: int) -> dict[int, int]:
    """Process ids of the replicas, by their number."""
    return {
        number: child.pid
        for number, child in enumerate(
            sorted(psutil.Process(parent).children(), key=lambda child: child.create_time())
        )
    }


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="replicas need two cores")
def test_a_killed_replica_loses_only_its_requests(endless: Path) -> None:
    with started(endless, "--replicas", "2", "--max-rows", "12") as (process, url, log):
        for _ in range(600):
            if "replica 1 serves" in log.read_text():
                break
            time.sleep(0.1)
        first, second = _pids(process.pid).values()
        streams = [Stream(url, max_tokens=3900) for _ in range(12)]
        os.kill(second, signal.SIGKILL)
        ended = []
        for stream in streams:
            try:
                ended.append(stream.rest()[-1])
            except httpx.HTTPError:
                ended.append("lost")
        assert set(ended) == {"data: [DONE]", "lost"}
        for _ in range(600):
            if log.read_text().count("replica 1 serves") == 2:
                break
            time.sleep(0.1)
        assert "replica 1 ended (killed by SIGKILL): it is started again" in log.read_text()
        assert _pids(process.pid)[0] == first
        for _ in range(600):  # the new replica shares its counts a little after it serves
            metrics = httpx.get(f"{url}/metrics").text
            if 'replica="0"' in metrics and 'replica="1"' in metrics:
                break
            time.sleep(0.1)
        else:
            raise AssertionError(metrics)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
