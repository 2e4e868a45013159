"""One JSON object a line in, one out: how a peer's script answers.

Request  {"do": "generate", "with": {...}}
Answer   {"result": {...}} or {"error": "Type: message", "trace": "..."}

The scripts here run in other environments and import nothing of this project.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any


def serve(peer: Any) -> None:
    """Call `peer.NAME(**with)` for each request until the input ends."""
    requests, answers = _own_pipes()
    for line in requests:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            answer = {"result": getattr(peer, request["do"])(**request["with"])}
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            answer = {"error": message, "trace": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _own_pipes() -> tuple[Any, Any]:
    """Standard input and output for the protocol only; output of libraries goes to the error
    log."""
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return requests, answers


def resident_bytes() -> int:
    """Memory that this process uses now, in bytes; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


BARE = resident_bytes()
"""Memory of the bare interpreter; scripts import this module before any library."""


def held_bytes() -> int:
    """Memory used beyond that of the bare interpreter: library, weights, cache and buffers."""
    return resident_bytes() - BARE


def cut(tokens: list[int], stop: list[int]) -> list[int]:
    """Tokens up to the first stop token, which is included."""
    end = next((i for i, token in enumerate(tokens) if token in stop), len(tokens))
    return tokens[: end + 1]


def timed(
    tokens: list[list[int]], started: float, first: float, ended: float, first_tokens: int
) -> dict[str, Any]:
    """The answer to `generate`, with one definition of prefill and decoding for every engine.

    Prefill lasts from the call until every row has its first token, which is the time to first
    token; the rest is decoding. `first_tokens` is the number of tokens when prefill ended.
    """
    return {
        "tokens": tokens,
        "prefill_s": first - started,
        "decode_s": ended - first,
        "ttft_s": first - started,
        "first_tokens": first_tokens,
    }


def one_by_one(
    generate: Callable[..., dict[str, Any]], prompts: list[list[int]], *settings: Any
) -> dict[str, Any]:
    """The answer to `generate` where rows run one after another; times add up."""
    runs = [generate([row], *settings) for row in prompts]
    total = {name: sum(run[name] for run in runs) for name in runs[0] if name != "tokens"}
    return {**total, "tokens": [run["tokens"][0] for run in runs]}


def write_logits(
    path: str, blocks: list[list[int]], vocabulary: int, fill: Callable[[list[int], Any], None]
) -> dict[str, Any]:
    """Write float32 logits [N, S, V] as .npy; `fill(block, row)` sets those of a block [S, V]."""
    import numpy

    shape = (len(blocks), len(blocks[0]), vocabulary)
    written: Any = numpy.lib.format.open_memmap(path, "w+", numpy.float32, shape)  # type: ignore[no-untyped-call]
    for block, row in zip(blocks, written, strict=True):
        fill(block, row)
    written.flush()
    return {"shape": shape}
