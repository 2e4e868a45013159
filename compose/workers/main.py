"""The process in which one step or one cell runs: `python -m compose.workers.main ROLE JOB.json`.

    step    make a model folder and store what it predicts     progress lines, then one answer
    check   load the folder again and compare                   one answer
    speak   continue the probe text greedily                    one answer
    cell    measure: load, quality, lossless, speed, quit       one answer a command
    answer  generate an answer to a prompt                      one answer
    insight look at a text under a folder's gates               one answer
    gguf    write a folder as a GGUF file and load it back      one answer
    probe   try the libraries, for `gateskip doctor`            one message a library, one answer

Commands come as JSON lines on stdin; messages go out as JSON lines on what was stdout when the
process began. Everything that is printed in between, by Python or by C, goes to stderr, which the
executor has pointed at a log file. The process ends with its parent, and takes its children along.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import logging
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from compose.errors import ComposeError, StepError
from compose.extras import missing_extra
from compose.memory import peak_bytes
from compose.store import read_json

Job = dict[str, Any]
Message = dict[str, Any]
PROGRESS_EVERY_S = 0.2
PR_SET_PDEATHSIG = 1

# Whose versions may change what a stage makes: recorded in the lineage.
LIBRARIES = (
    "gateskip-compose",
    "torch",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "gptqmodel",
    "optimum",
    "torch-pruning",
)


class Channel:
    """The worker's private ends of its pipes; stdin and stdout are taken from everybody else."""

    def __init__(self) -> None:
        self.commands: IO[str] = os.fdopen(os.dup(0), "r", encoding="utf-8")
        self.messages: IO[str] = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        sys.stdout.flush()
        os.dup2(2, 1)
        self._reported = 0.0

    def send(self, message: Message) -> None:
        """One message; a parent that is gone does not hear it, and that is no error."""
        with contextlib.suppress(BrokenPipeError):
            self.messages.write(json.dumps(message, default=str) + "\n")
            self.messages.flush()

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Report progress, not more often than anybody can read; the last report goes out."""
        now = time.monotonic()
        if done >= total or now - self._reported >= PROGRESS_EVERY_S:
            self._reported = now
            self.send({"progress": [done, total, note]})

    def receive(self) -> Iterator[Message]:
        """Commands, until the parent closes its end."""
        for line in self.commands:
            yield json.loads(line)


def answer(work: Callable[[], Any]) -> Message:
    """The result of `work` as a message; what it raises becomes data."""
    try:
        return {"ok": True, "result": work()}
    except Exception as error:
        traceback.print_exc()
        return failure_message(error)


def failure_message(error: Exception) -> Message:
    """An exception as data: what it says, its kind in `compose.errors`, and its traceback.

    A library of an extra that is not installed is told as the user's mistake.
    """
    missing = missing_extra(error) if isinstance(error, ModuleNotFoundError) else None
    told = missing or error
    known = isinstance(told, ComposeError)
    text = str(told) if known else f"{type(told).__name__}: {told}"
    return {
        "ok": False,
        "error": text.strip(),
        "kind": type(told).__name__ if known else StepError.__name__,
        "traceback": "".join(traceback.format_exception(error)),
    }


# --- Steps ---------------------------------------------------------------------------------------


def run_step(job: Job, channel: Channel) -> dict[str, Any]:
    """Make the step's model folder with its lineage and probe logits; returns the record."""
    from compose.artifacts import folder as artifact

    target = Path(job["target"])
    target.mkdir(parents=True)
    seed_everything(job["seed"])
    started = time.perf_counter()
    if job["stage"] is None:
        before, entry = [], make_source(job, target, channel)
    else:
        source = Path(job["source"])
        before = artifact.lineage(source)
        entry = {"input_sha256": before[-1]["output_sha256"], **make_stage(job, target, channel)}
        artifact.copy_companions(source, target)
    artifact.require_model(target)
    artifact.clean_config(target)
    seconds = time.perf_counter() - started
    peak = peak_bytes()
    entry = {
        "name": job["name"],
        "key": job["key"],
        **entry,
        "seed": job["seed"],
        "dtype": job["dtype"],
        "wall_s": round(seconds, 3),
        "peak_bytes": peak,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": library_versions(),
    }
    artifact.write_lineage(target, entry, before)
    channel.progress(1, 1, "storing what the model predicts")
    artifact.save_probe(target, Path(job["check"]))
    return {"wall_s": entry["wall_s"], "peak_bytes": peak, "record": entry.get("record", {})}


def make_source(job: Job, target: Path, channel: Channel) -> dict[str, Any]:
    """Fetch the source model and place it, in the pipeline's dtype; its entry in the lineage."""
    from compose.artifacts import folder as artifact
    from compose.assets import resolve_model

    channel.progress(0, 1, "fetching")
    asset = resolve_model(job["model"], Path(job["asset_cache"]), channel.progress)
    channel.progress(0, 1, "placing")
    linkable = not str(asset.origin).startswith("path:")
    artifact.copy_source(Path(asset.path), target, job["dtype"], link=linkable)
    return {
        "use": "source",
        "parameters": {"source": public_source(job["model"])},
        "origin": public_source(str(asset.origin)),
        "licence": licence_of(job["model"], Path(asset.path)),
        "input_sha256": asset.sha256,
    }


def public_source(source: str) -> str:
    """A source as it may be published: of a path on this machine only the last part stays."""
    kind, _, rest = source.rpartition("path:")
    if kind == "" and Path(rest).is_absolute():
        return f"path:{Path(rest).name}"
    return source


def licence_of(source: str, folder: Path) -> str | None:
    """The model's licence: an alias states it, a folder's README.md in its first lines may."""
    from compose.assets import MODELS

    if source in MODELS:
        return MODELS[source].licence
    with contextlib.suppress(OSError, UnicodeDecodeError):
        _, _, rest = (folder / "README.md").read_text(encoding="utf-8").partition("---\n")
        for line in rest.partition("\n---")[0].splitlines():
            key, _, value = line.partition(":")
            if key == "license" and value.strip():
                return value.strip()
    return None


def make_stage(job: Job, target: Path, channel: Channel) -> dict[str, Any]:
    """Run the stage; its entry in the lineage."""
    from compose.stages.registry import STAGES, DataSpec, StageJob

    stage = STAGES[job["stage"]["use"]].model_validate(job["stage"])
    splits = {name: DataSpec.model_validate(spec) for name, spec in job["data"].items()}
    record = stage.run(
        StageJob(
            source=Path(job["source"]),
            target=target,
            seed=job["seed"],
            dtype=job["dtype"],
            train=splits.get("train"),
            calibration=splits.get("calibration"),
            dense=Path(job["dense"]),
            progress=channel.progress,
            work=Path(job["work"]),
            asset_cache=Path(job["asset_cache"]),
        )
    )
    parameters = stage.model_dump(mode="json")
    for name, path in stage.files().items():
        parameters[name] = path.name
    return {
        "use": parameters.pop("use"),
        "version": stage.version,
        "parameters": parameters,
        "data": {name: job["data"][name] for name in stage.reads_data if name in job["data"]},
        "record": record,
    }


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch."""
    from transformers import set_seed

    set_seed(seed)


def library_versions() -> dict[str, str]:
    """Installed versions of what makes results."""
    versions = {"python": sys.version.split()[0]}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def run_check(job: Job, channel: Channel) -> dict[str, float]:
    """Compare the folder's logits in this process with those of the process that saved it."""
    from compose.artifacts.folder import reload_check

    return reload_check(Path(job["folder"]), Path(job["reference"]))


def run_speak(job: Job, channel: Channel) -> list[int]:
    """The tokens with which the folder continues the probe text."""
    from compose.bench.generate import speak

    return speak(Path(job["folder"]), job["tokens"], job["settings"])


def run_answer(job: Job, channel: Channel) -> dict[str, Any]:
    """Answer a prompt."""
    from compose.bench.generate import answer as generate

    folder, prompt = Path(job.pop("folder")), job.pop("prompt")
    return generate(folder, prompt, **job)


def run_insight(job: Job, channel: Channel) -> dict[str, Any]:
    """Look at a text under a folder's gates."""
    from compose.bench.insight import insight

    return insight(Path(job["folder"]), job["text"], job["budget"])


def run_race(job: Job, channel: Channel) -> dict[str, Any]:
    """Time ways of decoding a folder against each other."""
    from compose.bench.race import race

    return race(Path(job.pop("folder")), progress=channel.progress, **job)


def run_tune(job: Job, channel: Channel) -> dict[str, Any]:
    """Find the draft that decodes a folder fastest."""
    from compose.bench.tune import tune

    return tune(Path(job.pop("folder")), progress=channel.progress, **job)


def run_gguf(job: Job, channel: Channel) -> dict[str, float]:
    """Write a model folder as a GGUF file and load it back."""
    from compose.artifacts.gguf import write_gguf

    return write_gguf(Path(job["folder"]), Path(job["file"]), job["kind"])


def run_probe(job: Job, channel: Channel) -> None:
    """Try the libraries, one message each."""
    from compose.terminal.doctor import probe_libraries

    probe_libraries(channel.send)


# --- Cells ---------------------------------------------------------------------------------------


def serve_cell(job: Job, channel: Channel) -> None:
    """Measure one cell, command by command, until `quit` or the parent's end."""
    bench: Any = None

    def obey(command: Message) -> Any:
        nonlocal bench
        if command["do"] == "load":
            seed_everything(job["seed"])
            bench = open_bench(job)
            return bench.load()
        if bench is None:
            raise StepError(f"the cell was asked for {command['do']!r} before it was loaded")
        if command["do"] == "quality":
            return bench.quality(Path(command["reference"]))
        if command["do"] == "lossless":
            return bench.lossless()
        return bench.speed(command["round"], command["batch"], command["threads"])

    for command in channel.receive():
        if command["do"] == "quit":
            return
        channel.send(answer(partial(obey, command)))


def open_bench(job: Job) -> Any:
    """The cell's measuring instrument."""
    from compose.bench.cell import CellBench, CellJob

    return CellBench(
        CellJob(
            name=job["name"],
            folder=Path(job["folder"]),
            baseline_folder=Path(job["baseline_folder"]),
            decode=job["decode"],
            benchmark=job["benchmark"],
            seed=job["seed"],
            dtype=job["dtype"],
            asset_cache=Path(job["asset_cache"]),
            reference=Path(job["reference"]),
            threads=job["threads"],
            learns_from=[(source, limit) for source, limit in job["learns_from"]],
        )
    )


# --- Life and death ------------------------------------------------------------------------------


def die_with_parent(parent: int | None) -> None:
    """End this process, and everything that it starts, when its parent ends, however that ends.

    The kernel kills this process when its parent dies (Linux). A forked guard sees stdin close,
    or this process vanish, and kills the whole process group. `parent` is the expected parent:
    when it was dead before we got here, there is nobody to work for.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)
    if os.getpgid(0) != os.getpid():
        return  # not the leader of its group: started by hand, so the group is not ours to kill
    watched, held = os.pipe()
    guard = os.fork()
    if guard == 0:
        os.close(held)
        _guard(watched)
    os.close(watched)
    atexit.register(_dismiss, guard)  # `held` stays open until this process ends


def _guard(watched: int) -> None:
    """The guard's whole life: wait until stdin or `watched` hangs up, then kill the group."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.dup2(2, 1)  # the message pipe must close when the worker ends, not when we do
    waiting = select.poll()
    for end in (0, watched):
        waiting.register(end, select.POLLHUP)
    while not any(event & (select.POLLHUP | select.POLLERR) for _, event in waiting.poll()):
        pass
    os.killpg(0, signal.SIGKILL)


def _dismiss(guard: int) -> None:
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(guard, signal.SIGKILL)
        os.waitpid(guard, 0)


def quieten() -> None:
    """int8 layers warn at every multiplication that they cast its input: floods, for one fact."""
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


ROLES: dict[str, Callable[[Job, Channel], Any]] = {
    "step": run_step,
    "check": run_check,
    "speak": run_speak,
    "answer": run_answer,
    "insight": run_insight,
    "race": run_race,
    "tune": run_tune,
    "gguf": run_gguf,
    "probe": run_probe,
}
"""What a worker does that gives one answer; a cell gives many."""


def main(arguments: list[str]) -> int:
    """Run the role on the job file; 0 when the answer is good."""
    role, job_file = arguments
    parent = os.environ.pop("GATESKIP_PARENT", None)
    die_with_parent(None if parent is None else int(parent))
    channel = Channel()
    quieten()
    job = read_json(Path(job_file))
    print(f"--- {role} {job_file} {datetime.now(UTC).isoformat(timespec='seconds')}", flush=True)
    if role == "cell":
        serve_cell(job, channel)
        return 0
    message = answer(lambda: ROLES[role](job, channel))
    channel.send(message)
    return 0 if message["ok"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
