"""Runs a peer in a separate process: JSON lines over its standard input and output.

Engines need separate processes because they disturb each other. With llama.cpp in the same process,
this program died of SIGILL on a processor with AMX: the AMX tile configuration belongs to a thread,
and oneDNN sets it, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from compose.bench.peers.table import PeerName
from compose.capacity import core_count
from compose.errors import StepError

LAST_LINES = 15
"""Lines of a peer's output that an error shows."""
CLOSING_S = 10.0


@dataclass(frozen=True)
class PreparedPeer:
    """The settings of a `PeerProcess`; all paths are on this machine."""

    name: str
    """The user's name for it: `llama.cpp:q4_k_m`."""
    engine: str
    option: str
    python: Path
    """The interpreter of its environment."""
    script: Path
    model: Path
    """The folder or file that the engine reads."""
    vocabulary: int
    """Vocabulary of the model folder; further columns of a peer's logits are cut off."""
    disk_bytes: int
    """Bytes of weights and graph on disk."""
    versions: dict[str, str]
    settings: str
    """The engine's settings, in one sentence."""
    flash: bool = False


class PeerProcess:
    """A running peer: `load` once for each shape, then `generate` and `logits`.

    Use it as a context manager; the process ends with the block. Every method raises StepError
    where the peer fails or dies, with the last lines that it wrote.
    """

    def __init__(self, prepared: PreparedPeer, threads: int) -> None:
        self.prepared, self.threads = prepared, threads
        self._stack = contextlib.ExitStack()
        self._ask: Any = None

    def __enter__(self) -> PeerProcess:
        peer = self.prepared
        self._ask = self._stack.enter_context(
            _talk(peer.name, peer.python, peer.script, self.threads)
        )
        return self

    def __exit__(self, *exit_info: object) -> None:
        self._stack.close()

    def load(self, context: int, batch: int) -> dict[str, Any]:
        """Load the model for `batch` rows of at most `context` tokens, prompt and answer together.

        It may be called again for another shape. A short run warms everything up. Returns
        `versions`, `flags` (how the library was built), and `resident_bytes` beyond a bare
        interpreter.
        """
        peer = self.prepared
        loaded: dict[str, Any] = self._ask(
            "load",
            model=str(peer.model),
            option=peer.option,
            threads=self.threads,
            context=context,
            batch=batch,
            flash=peer.flash,
        )
        return {"versions": peer.versions, **loaded}

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        stop: Sequence[int] = (),
        ignore_stop: bool = False,
    ) -> dict[str, Any]:
        """Continue the prompts greedily by up to `new_tokens` each, by the engine's batching.

        Returns `tokens` (a stop token is the last of its row), `prefill_s` (from the call until
        every row has its first token, which is `ttft_s`), `decode_s` (the rest) and `first_tokens`,
        the number of tokens when prefill ended.
        """
        rows = [list(map(int, row)) for row in prompts]
        answer: dict[str, Any] = self._ask(
            "generate",
            prompts=rows,
            new_tokens=new_tokens,
            stop=list(map(int, stop)),
            ignore_stop=ignore_stop,
        )
        return answer

    def logits(self, blocks: Sequence[Sequence[int]], path: Path) -> numpy.ndarray[Any, Any]:
        """Logits after every token of the blocks [N][S]: float32 [N, S, V], mapped from `path`.

        Blocks have one length; each is computed from an empty cache. The peer writes `path` as
        .npy; V is the vocabulary of the model folder.
        """
        rows = [list(map(int, row)) for row in blocks]
        self._ask("logits", blocks=rows, path=str(path), vocabulary=self.prepared.vocabulary)
        return numpy.load(path, mmap_mode="r")  # type: ignore[no-any-return]


def converted(name: PeerName, python: Path, source: Path, target: Path, **fitted: Any) -> None:
    """Have an engine's script write its input for an option; for a calibrated one, `fitted` holds
    `importance` (a file of `write_importance`) or `rows` of token ids.

    Raises:
        StepError: it failed.
    """
    given = {"source": str(source), "target": str(target), "option": name.option, **fitted}
    threads = core_count()
    with _talk(name.text, python, name.engine.script_path, threads) as ask:
        ask("convert", **given, threads=threads)


def write_importance(
    name: PeerName, python: Path, source: Path, target: Path, rows: Sequence[Sequence[int]]
) -> None:
    """Have llama.cpp run a GGUF file over token ids [N][S] and write its importance matrix.

    Raises:
        StepError: it failed.
    """
    threads = core_count()
    given = {"source": str(source), "target": str(target), "rows": rows, "threads": threads}
    with _talk(name.text, python, name.engine.script_path, threads) as ask:
        ask("importance", **given)


@contextlib.contextmanager
def _talk(name: str, python: Path, script: Path, threads: int) -> Iterator[Any]:
    """Start a script; yields a function that sends one request and returns the result."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        child = subprocess.Popen(
            [str(python), "-u", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=_environment(threads),
            text=True,
            encoding="utf-8",
        )
        assert child.stdin is not None and child.stdout is not None

        def ask(do: str, **args: Any) -> Any:
            line = ""
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(json.dumps({"do": do, "with": args}) + "\n")  # type: ignore[union-attr]
                child.stdin.flush()  # type: ignore[union-attr]
                line = child.stdout.readline()  # type: ignore[union-attr]
            if not line:
                raise StepError(f"peer {name} {_ending(child)} in {do}{_last_lines(log)}")
            answer = json.loads(line)
            if "error" in answer:
                raise StepError(f"peer {name} failed in {do}: {answer['error']}{_last_lines(log)}")
            return answer["result"]

        try:
            yield ask
        finally:
            _close(child)


def _environment(threads: int) -> dict[str, str]:
    """Environment variables of the process: its number of threads, without this project's Python
    path."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return {
        **inherited,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def _close(child: subprocess.Popen[str]) -> None:
    """End a script by closing its input; kill a script that does not end."""
    with contextlib.suppress(BrokenPipeError):
        child.stdin.close()  # type: ignore[union-attr]
    try:
        child.wait(CLOSING_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    child.stdout.close()  # type: ignore[union-attr]


def _ending(child: subprocess.Popen[str]) -> str:
    """How a process ended, in words."""
    try:
        code = child.wait(CLOSING_S)
    except subprocess.TimeoutExpired:
        return "closed its output"
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _last_lines(log: Any) -> str:
    log.seek(0)
    lines = [line.rstrip() for line in log.read().splitlines() if line.strip()]
    return "".join(f"\n  {line}" for line in lines[-LAST_LINES:])
