"""A process that answers prompts with prefixes from a folder: `prefix_process.py` and a job.

The job is JSON on stdin, {"model", "prefixes", "threads", "prompts"}; the answer is a JSON list of
[tokens, reused tokens] on stdout, one for each prompt.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from served import LIMITS, Listener

import gateskip
from gateskip.decoding import prefill
from gateskip.serving import slots
from gateskip.serving.requests import Request
from gateskip.serving.scheduler import Scheduler

PIECE = 64


def main() -> None:
    """Answer the prompts one after the other."""
    job: dict[str, Any] = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    prefill.PIECE = slots.PIECE = PIECE
    decoder = gateskip.load(job["model"], backend="native")
    limits = replace(LIMITS, prefixes=0, prefix_dir=Path(job["prefixes"]))
    scheduler, answers = Scheduler(decoder, limits), list[Any]()
    scheduler.start()
    for prompt in job["prompts"]:
        heard = Listener()
        scheduler.submit(Request(prompt=tuple(prompt), max_new_tokens=8), heard)
        answers.append([heard.end and heard.tokens, heard.end.receipt.reused_tokens])
    scheduler.close()
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
