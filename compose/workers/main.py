"""The process of one step or one cell: `python -m compose.workers.main ROLE JOB.json`.

    step      make a model folder and store its probe logits      progress, then one answer
    check     load the folder again and compare                   one answer
    continue  decode greedily after the probe text                one answer
    cell      measure: load, quality, speed turns, ...            one answer a command
    answer    generate an answer to a prompt                      one answer
    insight   the compute of each token under a folder's gates    one answer
    tune      find the draft that decodes a folder fastest        progress, then one answer
    gguf      write a folder as a GGUF file and load it back      one answer
    convert   make a GGUF file a folder in the cache              progress, then one answer
    compressed-tensors   write a packed folder in that format and read it back   one answer
    probe     try the libraries, for `gateskip doctor`            a message a library, one answer

Commands come as JSON lines on stdin; messages go out as JSON lines on what was stdout when the
process began (`protocol`). All that is printed in between, by Python or by C, goes to stderr, which
the executor points at a log file. The process ends with its parent (`lifetime`).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from compose.errors import UserError
from compose.processes.messages import CheckRequest, ContinueRequest, Role, StepRequest
from compose.workers.cell import serve_cell
from compose.workers.job_file import read_job
from compose.workers.lifetime import die_with_parent
from compose.workers.probe import probe_libraries
from compose.workers.protocol import Channel, answer, failure_message
from compose.workers.step import run_step

Job = dict[str, Any]
"""A job file whose keys are the arguments of the function that does it."""


def _step(job: StepRequest, channel: Channel) -> dict[str, Any]:
    return run_step(job, channel.progress)


def _check(job: CheckRequest, channel: Channel) -> dict[str, float]:
    from compose.artifacts.folder import reload_check

    return reload_check(Path(job["folder"]), Path(job["reference"]))


def _continue(job: ContinueRequest, channel: Channel) -> list[int]:
    from compose.bench.generate import continue_probe

    return continue_probe(Path(job["folder"]), job["tokens"], job["settings"])


def _answer(job: Job, channel: Channel) -> dict[str, Any]:
    from compose.bench.generate import answer as generate

    folder, prompt = Path(job.pop("folder")), job.pop("prompt")
    return generate(folder, prompt, **job)


def _insight(job: Job, channel: Channel) -> dict[str, Any]:
    from compose.bench.insight import insight

    return insight(Path(job["folder"]), job["text"], job["budget"])


def _tune(job: Job, channel: Channel) -> dict[str, Any]:
    from compose.bench.speed.tune import tune

    return tune(Path(job.pop("folder")), progress=channel.progress, **job)


def _gguf(job: Job, channel: Channel) -> dict[str, Any]:
    from compose.artifacts.gguf.write import write_gguf

    return write_gguf(Path(job["folder"]), Path(job["file"]), job["kind"])


def _convert(job: Job, channel: Channel) -> str:
    from compose.assets import resolve_model

    cache, keep = Path(job["cache"]), job["keep_blocks"]
    return str(resolve_model(job["source"], cache, channel.progress, keep_blocks=keep).path)


def _compressed(job: Job, channel: Channel) -> dict[str, Any]:
    from compose.artifacts.compressed_tensors import write_compressed

    return write_compressed(Path(job["folder"]), Path(job["target"]))


def _probe(job: Job, channel: Channel) -> None:
    probe_libraries(channel.send)


ROLES: dict[Role, Callable[[Any, Channel], Any]] = {
    "step": _step,
    "check": _check,
    "continue": _continue,
    "answer": _answer,
    "insight": _insight,
    "tune": _tune,
    "gguf": _gguf,
    "convert": _convert,
    "compressed-tensors": _compressed,
    "probe": _probe,
}
"""The roles that give one answer. `cell` gives one a command."""


def main(role: Role, job_file: str) -> int:
    """Do the role on the job file; 0 when the answer is good."""
    parent = os.environ.pop("GATESKIP_PARENT", None)
    die_with_parent(None if parent is None else int(parent))
    channel = Channel()
    # int8 layers warn at every multiplication that they cast its input.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    print(f"--- {role} {job_file} {datetime.now(UTC).isoformat(timespec='seconds')}", flush=True)
    try:
        job = read_job(Path(job_file))
    except UserError as error:
        channel.send(failure_message(error))
        return error.exit_code
    if role == "cell":
        serve_cell(job, channel)
        return 0
    message = answer(lambda: ROLES[role](job, channel))
    channel.send(message)
    return 0 if message["ok"] else 1


if __name__ == "__main__":
    role, job_file = sys.argv[1:]
    sys.exit(main(cast(Role, role), job_file))
