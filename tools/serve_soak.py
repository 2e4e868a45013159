"""Minutes of mixed load on one server: each answer is compared with `Decoder.generate`.

    python tools/serve_soak.py exports/quickstart --minutes 10

The program starts `gateskip serve FOLDER` with 8 rows and a queue of 16, and lets clients of five
kinds work at the same time:

- ordinary clients check each answer, streamed or not;
- slow clients read a stream with pauses, and check the answer;
- leaving clients close the connection after a few tokens;
- malformed clients send bodies that the server must refuse;
- one client sends 64 requests at once every ten seconds; it counts refusals (429), and checks the
  other answers.

At the end the program kills the server with SIGTERM, prints counts and the server's memory, and
exits with 1 if an answer was wrong or lost, a refusal had another status, or the server ended.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from compose.assets.texts import load_texts
from compose.bench.generate import answer_text, stop_token_ids

ROWS, QUEUE = 8, 16
TASKS = 48  # different requests
PROMPT, ANSWER = (10, 600), (8, 96)  # words of a prompt, tokens of an answer
ORDINARY, SLOW, LEAVING, MALFORMED = 6, 2, 2, 1  # clients
FLOOD, EVERY_S = 64, 10.0
WARM_UPS = 3
PAUSE_S = 0.05
SETTLED_S = 60.0  # after which memory is compared
WATCH_S = 5.0  # between two looks at memory
REFUSED = {400, 413, 422, 429}
BODIES: tuple[bytes, ...] = (
    b"",
    b"{",
    b"[]",
    b'{"prompt": 7}',
    b'{"prompt": "a", "max_tokens": -1}',
    b'{"prompt": "a", "temperature": 1e999}',
    b'{"prompt": "a", "logit_bias": {"5": 1}}',
    b'{"prompt": [999999999]}',
    b"\xff\xfe" * 100,
    b'{"prompt": "' + b"a" * 3_000_000 + b'"}',
)


@dataclass(frozen=True)
class Task:
    """A request and its right answer."""

    prompt: str
    tokens: int
    text: str


@dataclass
class Soak:
    """The load and what came of it."""

    url: str
    client: httpx.AsyncClient
    tasks: list[Task]
    until: float
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def warm_up(self) -> None:
        """Use all rows, those of prefixes included, as far as any request will: memory of the cache
        is taken when it is first used."""
        longest = max(self.tasks, key=lambda task: len(task.prompt))
        for _ in range(WARM_UPS):
            texts = [f"{number} {longest.prompt}" for number in range(ROWS + QUEUE)]
            tasks = [Task(text, ANSWER[1], "") for text in texts]
            await asyncio.gather(*(self._read(task) for task in tasks))

    async def _read(self, task: Task) -> None:
        async with self._stream(task, stream=False) as response:
            await response.aread()

    async def ordinary(self, draw: random.Random) -> None:
        """One request; every second one is streamed."""
        task = draw.choice(self.tasks)
        await self._checked(task, stream=draw.random() < 0.5, pause=0.0)

    async def slow(self, draw: random.Random) -> None:
        """A stream that is read with pauses."""
        await self._checked(draw.choice(self.tasks), stream=True, pause=PAUSE_S)

    async def leaving(self, draw: random.Random) -> None:
        """A stream that is closed after a few chunks."""
        async with self._stream(draw.choice(self.tasks)) as response:
            if response.status_code == 200:
                wanted = draw.randint(1, 4)
                async for _ in response.aiter_lines():
                    wanted -= 1
                    if not wanted:
                        break
        self.counts["left"] += 1

    async def malformed(self, draw: random.Random) -> None:
        """A body that must be refused."""
        body, headers = draw.choice(BODIES), {"Content-Type": "application/json"}
        answer = await self.client.post(f"{self.url}/v1/completions", content=body, headers=headers)
        self.counts[f"malformed: {answer.status_code}"] += 1
        if answer.status_code not in REFUSED:
            self.wrong.append(f"status {answer.status_code} for {body[:60]!r}")
        await asyncio.sleep(0.2)

    async def flood(self, draw: random.Random) -> None:
        """Many requests at once."""
        tasks = [draw.choice(self.tasks) for _ in range(FLOOD)]
        await asyncio.gather(*(self._checked(task, stream=False, pause=0.0) for task in tasks))
        await asyncio.sleep(EVERY_S)

    async def work(self, do: Callable[[random.Random], Awaitable[None]], seed: int) -> None:
        """One kind of client until the time is over."""
        draw = random.Random(seed)
        while time.monotonic() < self.until:
            try:
                await do(draw)
            except httpx.HTTPError as error:
                self.wrong.append(f"{do}: {type(error).__name__} {error}")
                await asyncio.sleep(1)

    async def _checked(self, task: Task, *, stream: bool, pause: float) -> None:
        """Ask, and compare the answer; a full queue may refuse."""
        async with self._stream(task, stream=stream) as response:
            if response.status_code == 429:
                self.counts["refused: 429"] += 1
                return
            text = ""
            if not stream:
                body = json.loads(await response.aread())
                text = body["choices"][0]["text"] if response.status_code == 200 else str(body)
            else:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        for choice in json.loads(line.removeprefix("data: "))["choices"]:
                            text += choice["text"]
                    await asyncio.sleep(pause)
        self.counts["right" if text.strip() == task.text else "wrong"] += 1
        if text.strip() != task.text:
            self.wrong.append(f"{text!r} is not {task.text!r}")

    def _stream(self, task: Task, *, stream: bool = True) -> Any:
        body = {"prompt": task.prompt, "max_tokens": task.tokens, "stream": stream}
        return self.client.stream("POST", f"{self.url}/v1/completions", json=body)


def main() -> None:
    """Prepare answers, start the server, load it, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    options = parser.parse_args()
    tasks = right_answers(options.folder)
    command = [sys.executable, "-m", "compose", "serve", str(options.folder), "--port", "0"]
    command += ["--max-rows", str(ROWS), "--max-queue", str(QUEUE)]
    output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **output) as server:
        try:
            url = _url(server)
            soak, memory = asyncio.run(_soak(url, tasks, options.minutes * 60, server.pid))
            alive = server.poll() is None
            server.send_signal(signal.SIGTERM)
            code = server.wait(60)
        finally:
            server.kill()
    settled = [size for at, size in memory if at > SETTLED_S] or [size for _, size in memory]
    for name, count in sorted(soak.counts.items()):
        print(f"{name:16} {count}")
    minutes = [f"{size / 1e6:.0f}" for at, size in memory if at % 60 < WATCH_S]
    print(f"memory each minute: {', '.join(minutes)} MB; after the first minute at most")
    print(f"{max(settled) / settled[0] - 1:+.1%}, at the end {settled[-1] / settled[0] - 1:+.1%}")
    print(f"alive: {alive}, exit code after SIGTERM: {code}, wrong: {len(soak.wrong)}")
    for text in soak.wrong[:5]:
        print(" ", text)
    sys.exit(bool(soak.wrong) or not alive or code != 0)


def right_answers(folder: Path) -> list[Task]:
    """Requests with the answers of plain decoding."""
    import gateskip

    decoder = gateskip.load(folder)
    words = re.findall(r"\S+", "\n".join(load_texts("heldout-text").rows))
    draw, tasks = random.Random(0), []
    for _ in range(TASKS):
        start, count = draw.randrange(len(words) - PROMPT[1]), draw.randint(*PROMPT)
        prompt, tokens = " ".join(words[start : start + count]), draw.randint(*ANSWER)
        ids = decoder.tokenizer(prompt).input_ids
        answer = decoder.generate([ids], tokens, eos=stop_token_ids(decoder)).tokens[0]
        tasks.append(Task(prompt, tokens, answer_text(decoder.tokenizer, answer)))
    return tasks


async def _soak(
    url: str, tasks: list[Task], seconds: float, pid: int
) -> tuple[Soak, list[tuple[float, int]]]:
    """The load, and the server's memory at times since the start."""
    begun, memory = time.monotonic(), list[tuple[float, int]]()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        soak = Soak(url, client, tasks, begun + seconds)
        kinds = (
            (soak.ordinary, ORDINARY),
            (soak.slow, SLOW),
            (soak.leaving, LEAVING),
            (soak.malformed, MALFORMED),
            (soak.flood, 1),
        )
        seeds = itertools.count()
        work = [soak.work(do, next(seeds)) for do, clients in kinds for _ in range(clients)]

        await soak.warm_up()
        begun, soak.until = time.monotonic(), time.monotonic() + seconds

        async def watch() -> None:
            while time.monotonic() < soak.until:
                await asyncio.sleep(WATCH_S)
                if psutil.pid_exists(pid):
                    memory.append((time.monotonic() - begun, psutil.Process(pid).memory_info().rss))

        await asyncio.gather(*work, watch())
    return soak, memory


def _url(server: subprocess.Popen[str]) -> str:
    """The address that the server prints when it is ready; its output is read to the end."""
    assert server.stdout is not None
    for line in server.stdout:
        print("server:", line, end="")
        if match := re.search(r"http://[\d.]+:\d+", line):
            threading.Thread(target=server.stdout.read, daemon=True).start()
            return match.group()
    raise SystemExit("the server did not start")


if __name__ == "__main__":
    main()
