"""The process of one step or one cell: `python -m compose.workers.main ROLE JOB.json`.

    step      make a model folder and store its probe logits      progress, then one answer
    check     load the folder again and compare                   one answer
    continue  decode greedily after the probe text                one answer
    cell      measure: load, quality, speed turns, ...            one answer a command
    answer    generate an answer to a prompt                      pieces of text, then one answer
    chat      hold a conversation: say, reset                     one answer a command, the first
                                                                  one when the model is loaded
    insight   the compute of each token under a folder's gates    one answer
    tune      find the draft that decodes a folder fastest        progress, then one answer
    gguf      write a folder as a GGUF file and load it back      one answer
    convert   make a GGUF file a folder in the cache              progress, then one answer
    compressed-tensors   write a packed folder in that format and read it back   one answer
    probe     try the libraries, for `gateskip doctor`            a message a library, one answer
    fetch     fetch what a plan reads, and make environments      progress, then one answer

Commands come as JSON lines on stdin; messages go out as JSON lines on what was stdout when the
process began (`protocol`). All that is printed in between, by Python or by C, goes to stderr, which
the executor points at a log file. The process ends with its parent (`die_with_parent`).
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from compose.bench.speed.workloads import TurnText
from compose.contract import (
    AnswerJob,
    CellCommand,
    CellJob,
    ChatCommand,
    ChatJob,
    CheckJob,
    CompressedTensorsJob,
    ContinueJob,
    ConvertJob,
    Device,
    FetchJob,
    GgufJob,
    InsightJob,
    ProbeJob,
    Role,
    StepJob,
    TuneJob,
    from_json,
    read_job,
)
from compose.errors import StepError, UserError
from compose.extras import leave_out_torchao
from compose.units import Progress
from compose.workers.probe import probe_libraries
from compose.workers.protocol import Channel, answer, die_with_parent, failure_message
from compose.workers.step import run_step, seed_everything

if TYPE_CHECKING:
    from compose.bench.cell import CellBench
    from compose.bench.peer_cell import PeerBench


def serve_cell(job: CellJob, channel: Channel) -> None:
    """Answer the commands of the parent until `quit`, or until the parent closes the pipe."""
    cells = {job.name: _Cell(job, channel.progress)}
    command: CellCommand
    for command in channel.receive():
        if command["do"] == "quit":
            return
        if command["do"] == "join":
            joining = from_json("cell", command["job"])
            assert isinstance(joining, CellJob)
            cells[joining.name] = _Cell(joining, channel.progress)
            channel.send(answer(dict))
            continue
        if command["do"] == "drop":
            for loaded in cells.values():
                loaded.drop()
            channel.send(answer(return_memory))
            continue
        cell = cells[command.get("cell", job.name)]
        channel.send(answer(partial(cell.measure, command)))


def serve_chat(job: ChatJob, channel: Channel) -> None:
    """Answer the user's messages until the parent closes the pipe. SIGINT stops an answer."""
    from compose.bench.conversation import Conversation

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # between answers there is nothing to stop
    conversation = Conversation(**vars(job))
    channel.send(answer(conversation.load))
    command: ChatCommand
    for command in channel.receive():
        if command["do"] == "reset":
            channel.send(answer(conversation.reset))
        else:
            channel.send(answer(partial(conversation.say, command["text"], channel.text)))


class _Cell:
    """A cell under measurement; `load` comes before every other command."""

    def __init__(self, job: CellJob, progress: Progress) -> None:
        self._job, self._progress = job, progress
        self._bench: CellBench | PeerBench | None = None

    def drop(self) -> None:
        """Forget the model; `load` loads it again."""
        self._bench = None

    def measure(self, command: CellCommand) -> dict[str, Any]:
        """What a command measures.

        Raises:
            StepError: the cell was not loaded before.
        """
        if command["do"] == "roofline":
            return measure_roofline(command["threads"], self._job.device)
        if command["do"] == "load":
            seed_everything(self._job.seed)
            self._bench = open_bench(self._job, self._progress)
            return self._bench.load()
        if self._bench is None:
            raise StepError(f"the cell was asked for {command['do']!r} before it was loaded")
        if command["do"] == "quality":
            return self._bench.quality(Path(command["reference"]))
        if command["do"] == "lossless":
            return self._bench.lossless()
        which = TurnText(
            command["batch"], command["context"], command["category"], command["round"]
        )
        if command["do"] == "warm":
            return self._bench.warm(which, command["threads"])
        return self._bench.speed(which)


def return_memory() -> dict[str, Any]:
    """Give memory that nothing uses back to the system, so that what comes next lies elsewhere."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    return {}


def measure_roofline(threads: int, device: Device = "cpu") -> dict[str, float]:
    """What the machine's device reads and multiplies at most, with so many threads."""
    import torch

    from compose.bench.speed.measure import roofline

    torch.set_num_threads(threads)
    return roofline(device)


def open_bench(job: CellJob, progress: Progress) -> CellBench | PeerBench:
    """What measures the cell; it loads nothing yet."""
    if job.peer is None:
        from compose.bench.cell import CellBench

        return CellBench(job, progress)
    from compose.bench.peer_cell import PeerBench

    return PeerBench(job, job.peer, progress, partial(_calibration_rows, job, progress))


def _calibration_rows(job: CellJob, progress: Progress) -> list[list[int]]:
    """Token ids [N][S] of the calibration text, as stages get them."""
    from transformers import AutoTokenizer

    from compose.stages.text.split_text import SplitText

    assert job.calibration is not None, "a calibrated peer is given its text"
    text = SplitText(
        spec=job.calibration,
        split="calibration",
        tokenizer=AutoTokenizer.from_pretrained(job.folder),
        length=job.calibration.length,
        dense=job.folder,
        cache=job.asset_cache,
        seed=2 * job.seed,
        progress=progress,
    )
    rows: list[list[int]] = text.blocks(job.calibration.limit).tolist()
    return rows


def _step(job: StepJob, channel: Channel) -> dict[str, Any]:
    return run_step(job, channel.progress)


def _check(job: CheckJob, channel: Channel) -> dict[str, float]:
    from compose.artifacts.folder import reload_check

    return reload_check(job.folder, job.reference)


def _continue(job: ContinueJob, channel: Channel) -> list[int]:
    from compose.bench.generate import continue_probe

    return continue_probe(job.folder, job.tokens, job.settings)


def _answer(job: AnswerJob, channel: Channel) -> dict[str, Any]:
    from compose.bench.generate import answer as generate

    return generate(**vars(job), on_text=channel.text)


def _insight(job: InsightJob, channel: Channel) -> dict[str, Any]:
    from compose.bench.insight import insight

    return insight(job.folder, job.text, job.budget)


def _tune(job: TuneJob, channel: Channel) -> dict[str, Any]:
    from compose.bench.speed.tune import tune

    return tune(**vars(job), progress=channel.progress)


def _gguf(job: GgufJob, channel: Channel) -> dict[str, Any]:
    from compose.artifacts.gguf.write import write_gguf

    return write_gguf(job.folder, job.file, job.kind, job.name)


def _convert(job: ConvertJob, channel: Channel) -> str:
    from compose.assets.models.gguf_source import from_gguf

    how: dict[str, Any] = {"keep_blocks": job.keep_blocks, "dtype": job.dtype}
    return str(from_gguf(job.source, job.cache, channel.progress, **how).path)


def _compressed(job: CompressedTensorsJob, channel: Channel) -> dict[str, Any]:
    from compose.artifacts.compressed_tensors import write_compressed

    return write_compressed(job.folder, job.target, job.dense)


def _fetch(job: FetchJob, channel: Channel) -> list[tuple[str, str | None]]:
    from compose.workers.fetch import fetch

    return fetch(job, channel.progress)


def _probe(job: ProbeJob, channel: Channel) -> None:
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
    "fetch": _fetch,
}
"""The roles that give one answer. `cell` and `chat` give one a command."""


def main(role: Role, job_file: str) -> int:
    """Do the role on the job file; 0 when the answer is good."""
    parent = os.environ.pop("GATESKIP_PARENT", None)
    die_with_parent(None if parent is None else int(parent))
    channel = Channel()
    leave_out_torchao()
    # int8 layers warn at every multiplication that they cast its input.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    print(f"--- {role} {job_file} {datetime.now(UTC).isoformat(timespec='seconds')}", flush=True)
    try:
        job = read_job(role, Path(job_file))
    except UserError as error:
        channel.send(failure_message(error))
        return error.exit_code
    if isinstance(job, CellJob):
        serve_cell(job, channel)
        return 0
    if isinstance(job, ChatJob):
        serve_chat(job, channel)
        return 0
    message = answer(lambda: ROLES[role](job, channel))
    channel.send(message)
    return 0 if message["ok"] else 1


if __name__ == "__main__":
    role, job_file = sys.argv[1:]
    sys.exit(main(cast(Role, role), job_file))
