"""Speed of answers in JSON beside free ones: tokens per second, and the CPU time of a mask.

    python tools/constrained_speed.py FOLDER [--rows 1 8] [--tokens 200] [--repeats 5]

All answers have the same prompts and as many tokens. `free` is decoded as usual, `stepwise` with
log probabilities, one token a step as an answer in JSON is, and `json` with a schema. They are
measured by turns; the last line is JSON with medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compose.serve.api.fields import CompletionBody, parsed
from compose.serve.constraint import Mask
from compose.serve.model import ServedModel
from compose.serve.server import scheduler_of
from compose.serve.settings import ServeSettings
from gateskip.serving.requests import Event, Finished, Request

SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "year": {"type": "integer", "minimum": 1900, "maximum": 2100},
            "tags": {"type": "array", "items": {"enum": ["free", "paid"]}, "maxItems": 3},
        },
        "required": ["name", "year", "tags"],
        "additionalProperties": False,
    },
}
PROMPT = "A list of programs, as JSON with the name, the year and tags of each:\n"


class TimedMask:
    """A mask that notes its CPU time."""

    def __init__(self, mask: Mask, seconds: list[float]) -> None:
        self._mask, self._seconds = mask, seconds

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        begun = time.thread_time()  # other work on the machine does not count
        result = self._mask(ids, scores)
        self._seconds.append(time.thread_time() - begun)
        return result


def requests(model: ServedModel, kind: str, rows: int, tokens: int, masks: list[float]) -> Any:
    asked: dict[str, Any] = {"prompt": PROMPT, "max_tokens": tokens, "n": rows}
    if kind == "json":
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
        asked["response_format"] = form
    if kind == "stepwise":
        asked["logprobs"] = 0
    body = parsed(CompletionBody, asked)
    made = model.requests(model.text_prompt(PROMPT), body, model.constraint(body))
    for request in made:
        if kind == "json":
            timed = tuple(TimedMask(mask, masks) for mask in request.sampler.processors)
            request = replace(request, sampler=replace(request.sampler, processors=timed))
        yield replace(request, eos=())


def seconds(scheduler: Any, asked: list[Request]) -> float:
    """Seconds from the first token of some requests to the last one."""
    first, done, left = [0.0], threading.Event(), [len(asked)]

    def on_event(event: Event) -> None:
        first[0] = first[0] or time.perf_counter()
        if isinstance(event, Finished):
            assert event.reason == "length", event
            left[0] -= 1
            if not left[0]:
                done.set()

    for request in asked:
        scheduler.submit(request, on_event)
    done.wait()
    return time.perf_counter() - first[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    model = ServedModel(ServeSettings(folder=given.folder, speculate=False))
    scheduler = scheduler_of(model)
    result: dict[str, Any] = {"folder": given.folder.name, "tokens": given.tokens}
    masks: list[float] = []
    begun = time.perf_counter()
    list(requests(model, "json", 1, 8, masks))
    result["first_grammar_s"] = round(time.perf_counter() - begun, 4)
    begun = time.perf_counter()
    list(requests(model, "json", 1, 8, masks))
    result["grammar_s"] = round(time.perf_counter() - begun, 4)
    for rows in given.rows:
        speeds: dict[str, list[float]] = {"free": [], "stepwise": [], "json": []}
        for repeat in range(given.repeats + 1):
            for kind, listed in speeds.items():
                asked = list(requests(model, kind, rows, given.tokens, masks))
                speed = rows * given.tokens / seconds(scheduler, asked)
                if repeat:
                    listed.append(speed)
        medians = {kind: round(statistics.median(listed), 1) for kind, listed in speeds.items()}
        spread = {k: round((max(v) - min(v)) / statistics.median(v), 3) for k, v in speeds.items()}
        result[f"rows {rows}"] = medians
        print(f"{rows} rows: tokens/s {medians}, spread {spread}", flush=True)
    ordered = sorted(1e6 * one for one in masks)
    result["mask_us"] = {
        "p50": round(ordered[len(ordered) // 2]),
        "p95": round(ordered[int(len(ordered) * 0.95)]),
        "max": round(ordered[-1]),
    }
    print(json.dumps(result))
    scheduler.close()


if __name__ == "__main__":
    main()
