"""Runs whose workers are scripted, and runs of slow workers that can be ended at a mark."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from compose.artifacts.folder import write_lineage
from compose.bench.speed.workloads import add_turns
from compose.language.schema import Pipeline
from compose.planning.plan import Plan
from compose.planning.planner import make_plan
from compose.processes.executors import TimedHere
from compose.results.io import load_results
from compose.results.schema import Results
from compose.run.runner import RunResult, run
from compose.run.state import Settings
from compose.terminal.live.progress import Board

ROOT = Path(__file__).resolve().parents[2]
TIMED = ("warm", "speed")
Answer = dict[str, Any]


def pipeline(**changes: Any) -> Pipeline:
    """Dense, dropped, gated: five cells."""
    return Pipeline.model_validate(
        {
            "schema": 1,
            "name": "small",
            "model": {"source": "smollm2-135m-instruct"},
            "stages": {
                "drop": {"use": "drop-layers", "count": 1},
                "gates": {"use": "gate", "steps": 0},
                "skip": {"use": "skip"},
                "spec": {"use": "speculate", "draft_budget": 0.5},
            },
            "pipelines": {"cut": ("drop",)},
            "matrix": {"gate": ("none", "gates"), "decode": ("none", "skip", "spec")},
            "benchmark": {
                "threads": 1,
                "speed": {"repeats": 3, "batch_sizes": (1, 4), "min_seconds": 0},
            },
            **changes,
        }
    )


def fill_model(job: Answer) -> Answer:
    """What a step's worker leaves behind."""
    target = Path(job["target"])
    target.mkdir(parents=True)
    (target / "config.json").write_text('{"model_type": "llama"}')
    (target / "model.safetensors").write_text(job["key"])
    full = {"training": [{"step": 1, "loss": 2.0}], "layer_errors": {"up_proj": 0.25}}
    record = full if job["name"] == "gates" else {}
    write_lineage(target, {"name": job["name"], "record": record})
    Path(job["check"]).write_text("logits")
    return {"wall_s": 1.0, "record": record}


def turn_of(number: int, seconds: float = 1.0) -> Answer:
    """What a process tells of a turn in round `number`: 10 + number tokens a second."""
    return {
        "prompt_tokens": round((100 + number) * seconds),
        "prefill_s": seconds,
        "tokens": round((10 + number) * seconds * 8),
        "decode_s": 8 * seconds,
        "ttft_s": 0.5,
        "digest": "a",
        "peak_bytes": 1000 + number,
    }


def speed_numbers(number: int) -> Answer:
    return add_turns([turn_of(number)])


class Script(TimedHere):
    """A scripted executor: what workers answer, and a log of everything that was asked of them."""

    slots = 1
    local = False
    timed_threads = 2
    attempts = 1

    def __init__(self) -> None:
        self.log: list[tuple[str, ...]] = []
        self.live = 0
        self.most_live = 0
        self.closed = 0
        self.break_at: dict[tuple[str, ...], Exception] = {}
        self.decode_rate = {"gates+spec": 3.0}
        self.turn_s: dict[str, float] = {}
        self.drafted: Answer = {
            "draft_length_histogram": {"0": 9, "2": 1},
            **{"drafted": 2, "accepted": 1, "passes": 10, "looked_up": 0},
            **{"positions": [[1, 1], [1, 0]], "draft_s": 0.1, "verify_s": 0.4},
        }
        self.lacking: list[tuple[str, str | None]] = []
        """What a worker that fetches is said to have lacked."""
        self.interrupt_at: tuple[str, ...] | None = None

    def start(self, role: str, job: Path, log: Path, needs: Any = None) -> ScriptedWorker:
        self.live += 1
        self.most_live = max(self.most_live, self.live)
        return ScriptedWorker(self, role, json.loads(job.read_text()))

    def close(self) -> None:
        self.closed += 1

    def note(self, *event: str) -> None:
        self.log.append(event)
        if event == self.interrupt_at:
            raise KeyboardInterrupt
        if event in self.break_at:
            raise self.break_at[event]

    def done(self, *start: str) -> list[tuple[str, ...]]:
        return [event for event in self.log if event[: len(start)] == start]


class ScriptedWorker:
    def __init__(self, script: Script, role: str, job: Answer) -> None:
        self.script, self.role, self.job = script, role, job
        self.commands: list[Answer] = []
        self.stopped = False

    def send(self, message: Answer) -> None:
        self.commands.append(message)

    def receive(self) -> Answer:
        assert not self.stopped
        if self.role == "step":
            self.script.note("step", self.job["name"])
            return {"ok": True, "result": fill_model(self.job)}
        if self.role == "fetch":
            return {"ok": True, "result": self.script.lacking}
        if self.role == "check":
            self.script.note("check")
            return {"ok": True, "result": {"max_abs_diff": 0.0}}
        return {"ok": True, "result": self.measure(self.commands.pop(0))}

    def measure(self, command: Answer) -> Answer:
        name, do = command.get("cell", self.job["name"]), command["do"]
        place = (str(command["batch"]), str(command["round"])) if do in TIMED else ()
        if do == "join":
            name = command["job"]["name"]
        self.script.note(do, name, *place)
        if do in ("join", "drop"):
            return {}
        if do == "load":
            return {"size": {"disk_bytes": 100, "resident_bytes": 200}, "kernels": {"native": 3}}
        if do == "lossless":
            forced = {"forced_draft_length": 3, "drafts_by_prompt": [[10, 5], [10, 7]]}
            return {"lossless": True, "acceptance_rate": 0.6, **forced}
        if do == "roofline":
            return {"memory_gb_per_s": 20.0}
        if do in TIMED:
            turn = turn_of(command["round"], self.script.turn_s.get(name, 1.0))
            turn["tokens"] = round(turn["tokens"] * self.script.decode_rate.get(name, 1.0))
            if name.endswith("spec"):
                turn["speculation"] = self.script.drafted
            return turn
        if name == "dense":
            Path(command["reference"]).write_text("hidden")
        assert Path(command["reference"]).is_file(), "the baseline comes first"
        value = 10.0 if name == "dense" else 12.0
        perplexity = {"dataset": "wikitext2", "value": value, "tokens": 64}
        tasks = {"arc_easy": {"metric": "acc", "value": 5 / value, "n": 9, "ci95": [0.1, 0.9]}}
        compute = {"saved_net": 0.2} if name == "gates+skip" else {}
        return {"perplexity": perplexity, "tasks": tasks, "compute": compute}

    def stop(self) -> None:
        if not self.stopped:
            self.stopped = True
            self.script.live -= 1


def go(out: Path, script: Script, plan: Plan | None = None, **settings: Any) -> RunResult:
    console = Console(file=io.StringIO(), width=200)
    plan = plan or make_plan(pipeline())
    given = Settings(out, out / "cache", "gateskip run", **settings)
    result = run(plan, given, script, Board(console))
    assert script.live == 0, "no worker may be left"
    result_text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Traceback" not in result_text
    return result


def results_of(out: Path) -> Results:
    return load_results(out / "small" / "results.json")


# A fork server as it is, but for a stage and a measurement that take their time and leave marks.
SLOW_WORKER = """
import json, os, shutil, sys, time, types
from functools import partial
from pathlib import Path
from dataclasses import make_dataclass
from compose.workers import fork_server, main
from compose.stages.registry import DropLayers

marks = Path(os.environ["TEST_MARKS"])
pause, hold = float(os.environ["TEST_PAUSE"]), os.environ["TEST_HOLD"]

def mark(name):
    with (marks / name).open("a") as file:
        file.write("x")
    print("printed by a library", flush=True)
    return 600.0 if name == hold else pause

def slow_run(self, job):
    import torch
    from safetensors.torch import load_file, save_file
    checkpoint = job.work / "checkpoint.json"
    drawn = json.loads(checkpoint.read_text()) if checkpoint.is_file() else []
    generator = torch.Generator().manual_seed(job.seed)
    for step in range(6):
        number = float(torch.rand((), generator=generator))
        if step < len(drawn):
            continue
        drawn.append(number)
        (job.work / "new").write_text(json.dumps(drawn))
        (job.work / "new").replace(checkpoint)
        rest = mark(f"train-{step}")
        job.progress(step + 1, 6, "")
        time.sleep(rest)
    tensors = load_file(job.source / "model.safetensors")
    tensors["model.norm.weight"] *= 1 + sum(drawn)
    shutil.copyfile(job.source / "config.json", job.target / "config.json")
    save_file(tensors, job.target / "model.safetensors", metadata={"format": "pt"})
    return {"training": [{"step": i + 1, "loss": n} for i, n in enumerate(drawn)]}

class SlowBench:
    def __init__(self, job, progress):
        self.job = job
    def load(self):
        mark(f"load-{self.job.name}")
        return {"size": {"disk_bytes": (self.job.folder / "model.safetensors").stat().st_size}}
    def quality(self, reference):
        time.sleep(mark(f"quality-{self.job.name}"))
        if self.job.name == "dense":
            reference.write_text("hidden")
        return {"perplexity": {"dataset": "wikitext2", "value": 10.0, "tokens": 4}}
    def warm(self, which, threads):
        return {}
    def speed(self, which):
        time.sleep(mark(f"speed-{self.job.name}-{which.round}"))
        return {
            "prompt_tokens": 8, "prefill_s": 1.0, "ttft_s": 1.0, "tokens": 80, "decode_s": 8.0,
        }

DropLayers.run = slow_run
bench = types.ModuleType("compose.bench.cell")
bench.CellBench = SlowBench
sys.modules["compose.bench.cell"] = bench
main.ROLES["fetch"] = lambda job, channel: []  # nothing here reads a text
fork_server.run()
"""

RUNNER = """
import sys
from compose.processes import fork_server
from compose.cli import app
fork_server.SERVER = [sys.executable, {worker!r}]
app(sys.argv[1:])
"""

SLOW_PIPELINE = """\
schema: 1
name: slow
model: {{source: {model}}}
stages: {{drop: {{use: drop-layers, count: 1}}}}
pipelines: {{dropped: [drop]}}
benchmark: {{threads: 1, speed: {{repeats: 4, min_seconds: 0}}}}
export: {{dropped: {{to: {export}}}}}
"""


class SlowRun:
    """`gateskip run` as a process of its own, in a folder, with marks that tell how far it is."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.marks, self.out = folder, folder / "marks", folder / "runs"
        self.marks.mkdir(parents=True)
        self.file = folder / "slow.yaml"
        self.file.write_text(SLOW_PIPELINE.format(model=model, export=folder / "export"))
        (folder / "worker.py").write_text(SLOW_WORKER)
        (folder / "run.py").write_text(RUNNER.format(worker=str(folder / "worker.py")))

    def start(self, pause: float, hold: str = "") -> subprocess.Popen[str]:
        """Begin; workers rest for `pause` seconds at each mark, and at `hold` until ended."""
        environment = {"PYTHONPATH": str(ROOT), "TEST_MARKS": str(self.marks), "TEST_HOLD": hold}
        return subprocess.Popen(
            [sys.executable, self.folder / "run.py", "run", self.file, "--out", self.out],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment, "TEST_PAUSE": str(pause)},
            # Ctrl-C is ignored in what a shell starts in its background, the tests included.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )

    def finish(self) -> str:
        """Run to the end; what it printed."""
        out, err = (process := self.start(0.0)).communicate(timeout=600)
        assert process.returncode == 0, err
        assert "printed by" not in out + err, "what libraries print goes to the log"
        return out

    def end_at(self, mark: str, *numbers: signal.Signals) -> tuple[int, str]:
        """Run until `mark` is left, end it by signals in a row; exit code and stderr."""
        process = self.start(0.0, hold=mark)
        end = time.monotonic() + 300
        while not (self.marks / mark).is_file():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end, f"never came to {mark}"
            time.sleep(0.02)
        family = psutil.Process(process.pid).children(recursive=True)
        assert family, "it works in processes of their own"
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.1)  # as fast as a hand is; equal ones at once would be one
        _, err = process.communicate(timeout=300)
        _, alive = psutil.wait_procs(family, timeout=60)
        assert alive == [], "no worker outlives the run"
        return process.returncode, err

    def count(self, mark: str) -> int:
        path = self.marks / mark
        return len(path.read_text()) if path.is_file() else 0

    def results(self) -> Results:
        return load_results(self.out / "slow" / "results.json")
