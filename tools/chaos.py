"""Runs that are killed, starved, damaged and stopped, and resumed: `make chaos`.

A small pipeline on a tiny model runs once undisturbed. Then, as often as asked, it is disturbed:

    kill    SIGKILL at a random moment, to the whole run or to one of its processes
    full    the disk is full from a random moment on (a tmpfs; needs the right to mount one)
    flip    one byte anywhere in the store of a finished run is changed
    stop    SIGSTOP of a worker at a random moment, for a while

After each the run is resumed, and has to end with the results of the undisturbed one (all but what
a stopwatch says, and where memory went), with the same weights. Nothing that had been finished is
repeated: stored steps keep their manifests, unless they were damaged, and measured cells their
records. No process and no temporary file is left. Whatever does not hold is printed, and the exit
code is 1. `--publish` writes the counts and each outcome to reports/published/chaos/summary.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from tiny_models import save_tiny  # noqa: E402

from compose.results.environment import git_commit  # noqa: E402

PUBLISHED = ROOT / "reports" / "published" / "chaos" / "summary.json"
MARK = "GATESKIP_CHAOS"
"""A variable that all processes of a run inherit, by which those that are left are found."""
DISK_BYTES = 300_000_000
PATIENCE_S = 900.0
"""How long a run may take; a machine that does other things, too, is slow."""
GONE_S = 20.0
"""How long processes may take to end after the run has ended."""

PIPELINE = """\
schema: 1
name: chaos
model: {{source: {model}}}
data:
  train: {{source: {text}, limit: 8, length: 32}}
  calibration: {{source: {text}, limit: 8, length: 32}}
stages:
  gates: {{use: gate, steps: 4, length: 32, batch: 2, budgets: [0.8, 0.5], calibration_blocks: 4}}
  int8: {{use: int8}}
  skip: {{use: skip, budget: 0.8}}
pipelines:
  small: [int8]
  gated: [gates, skip]
benchmark:
  threads: 1
  speed: {{prompt_tokens: 8, new_tokens: 4, min_seconds: 0, repeats: 2}}
  quality: {{perplexity: {text}, perplexity_tokens: 64, own_answers: null}}
"""

TIMED = (
    *("seconds", "speed", "environment", "command", "step_seconds", "step_peak_bytes", "verdict"),
    *(
        "tokens_per_s",
        "choices",
        "speculation",
        "resident_bytes",
        "peak_bytes",
        "beside_bytes",
        "wall_s",
        "decode",
    ),
)
"""Keys of results that say how long something took, how much memory it did, or what follows."""

OWN_RECORD = ("model/compose.json",)
"""Files of a stored step that tell how long making it took."""


@dataclass
class Outcome:
    """What came of one disturbed run."""

    kind: str
    what: str
    """What was done to it."""
    after_s: float | None = None
    """Seconds from its begin."""
    exit_code: int | None = None
    """Of the disturbed run; None where there was none."""
    resumed_exit_code: int | None = None
    finished_before: int = 0
    """Steps and cells that were finished when it was resumed."""
    repeated: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    processes_left: list[str] = field(default_factory=list)
    files_left: list[str] = field(default_factory=list)
    tracebacks: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether nothing was lost, repeated or left."""
        bad = (self.repeated, self.differences, self.processes_left, self.files_left)
        return self.resumed_exit_code == 0 and not any((*bad, self.tracebacks))


class Chaos:
    """The undisturbed run, and how others are disturbed and compared with it."""

    def __init__(self, folder: Path, seed: int, stop_seconds: float) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.stop_seconds = stop_seconds
        self.token = uuid.uuid4().hex
        self.cache = os.environ.get("GATESKIP_CACHE") or str(folder / "cache")
        self.file = folder / "chaos.yaml"
        model = save_tiny(folder / "model", "llama")
        text = ROOT / "docs" / "structure.md"
        copied = folder / "text.txt"
        copied.write_text(text.read_text("utf-8"), "utf-8")
        self.file.write_text(PIPELINE.format(model=model, text=copied), "utf-8")
        self.undisturbed = folder / "undisturbed"
        started = time.monotonic()
        code, told = self.finish(self.undisturbed)
        assert code == 0, told
        self.seconds = time.monotonic() - started
        self.wanted = comparable(self.undisturbed)

    def start(self, out: Path, *more: str) -> subprocess.Popen[str]:
        """`gateskip run` on the pipeline, in a session of its own, with its own scratch."""
        scratch = self.folder / "scratch"
        scratch.mkdir(exist_ok=True)
        environment = {**os.environ, MARK: self.token, "TMPDIR": str(scratch)}
        environment |= {"PYTHONPATH": str(ROOT), "GATESKIP_CACHE": self.cache}
        command = [sys.executable, "-m", "compose", "run", str(self.file), "--out", str(out)]
        return subprocess.Popen(
            [*command, "--workers", "2", *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )

    def finish(self, out: Path, *more: str) -> tuple[int, str]:
        """Run to the end: exit code, and what was printed."""
        process = self.start(out, *more)
        told, _ = process.communicate(timeout=PATIENCE_S)
        return process.returncode, told

    def processes(self) -> list[psutil.Process]:
        """Processes of our runs that are alive."""
        return [each for each in psutil.process_iter() if self._is_ours(each)]

    def _is_ours(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error, OSError):
            alive = process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid()
            return alive and process.environ().get(MARK) == self.token
        return False

    def wait(self, process: subprocess.Popen[str]) -> float | None:
        """Wait for a random moment of a run; None where it ended before that."""
        moment = self.random.uniform(0.02, 0.98) * self.seconds
        end = time.monotonic() + moment
        while time.monotonic() < end:
            if process.poll() is not None:
                return None
            time.sleep(0.02)
        return round(moment, 2)

    # --- Disturbances ---------------------------------------------------------------------------

    def kill(self, out: Path) -> Outcome | None:
        """SIGKILL to the run's whole process group and its workers', or to one process."""
        process = self.start(out)
        after = self.wait(process)
        ours = self.processes()
        if after is None or not ours:
            process.communicate()
            return None
        if self.random.random() < 0.5:
            what, victims = "every process", ours
        else:
            victims = [self.random.choice(ours)]
            what = "the run" if victims[0].pid == process.pid else "one worker"
        for victim in victims:
            with contextlib.suppress(psutil.Error):
                victim.kill()
        told, _ = process.communicate(timeout=PATIENCE_S)
        return self.resume(Outcome("kill", what, after, process.returncode), out, told)

    def stop(self, out: Path) -> Outcome | None:
        """SIGSTOP of a worker, for a while; the run goes on by itself."""
        process = self.start(out)
        after = self.wait(process)
        workers = [each for each in self.processes() if each.pid != process.pid]
        if after is None or not workers:
            process.communicate()
            return None
        victim = self.random.choice(workers)
        with contextlib.suppress(psutil.Error):
            victim.suspend()
        time.sleep(self.stop_seconds)
        with contextlib.suppress(psutil.Error):
            victim.resume()
        told, _ = process.communicate(timeout=PATIENCE_S)
        what = f"a worker, for {self.stop_seconds:g} s"
        return self.resume(Outcome("stop", what, after, process.returncode), out, told)

    def fill(self, out: Path) -> Outcome | None:
        """A disk of its own that is full from a random moment on."""
        with small_disk(out):
            process = self.start(out / "runs")
            after = self.wait(process)
            if after is None:
                process.communicate()
                return None
            ballast = out / "ballast"
            with contextlib.suppress(OSError), ballast.open("wb") as file:
                while True:
                    file.write(b"\0" * (1 << 16))
            told, _ = process.communicate(timeout=PATIENCE_S)
            ballast.unlink()
            outcome = Outcome("full", "no byte free", after, process.returncode)
            return self.resume(outcome, out / "runs", told)

    def flip(self, out: Path) -> Outcome:
        """One byte of a finished run's store; every cell is then measured again."""
        shutil.copytree(self.undisturbed, out, symlinks=True)
        store = out / "store"
        files = [path for path in store.rglob("*") if path.is_file() and path.stat().st_size]
        file = self.random.choice(sorted(files))
        place = self.random.randrange(file.stat().st_size)
        data = bytearray(file.read_bytes())
        data[place] ^= 1 << self.random.randrange(8)
        file.write_bytes(data)
        name = file.relative_to(store).as_posix()
        what = f"byte {place} of {name.partition('/')[2] or name}"
        outcome = Outcome("flip", what)
        key = name.partition("/")[0]
        outcome.damaged = [] if key.startswith(".") else [key]
        return self.resume(outcome, out, "", "--again")

    # --- Resumed, and compared ------------------------------------------------------------------

    def resume(self, outcome: Outcome, out: Path, told: str, *more: str) -> Outcome:
        """Run to the end what was disturbed, and note all that does not hold."""
        outcome.processes_left = self.left_processes()
        steps, records = stored(out), measured(out)
        outcome.finished_before = len(steps) + (0 if more else len(records))
        outcome.resumed_exit_code, again = self.finish(out, "--retry-failed", *more)
        for text in (told, again):
            if "Traceback (most recent call last)" in text:
                outcome.tracebacks.append(text[-2000:])
        if outcome.resumed_exit_code != 0:
            outcome.differences.append(again[-2000:])
        now = stored(out)
        repeated = [key for key, was in steps.items() if now.get(key) != was]
        outcome.repeated = [f"step {key}" for key in repeated if key not in outcome.damaged]
        if not more:
            kept = measured(out)
            outcome.repeated += [f"cell {n}" for n, was in records.items() if kept.get(n) != was]
        with contextlib.suppress(OSError, ValueError):
            outcome.differences += differences(self.wanted, comparable(out))
        outcome.processes_left += self.left_processes()
        outcome.files_left = left_files(out, self.folder / "scratch")
        return outcome

    def left_processes(self) -> list[str]:
        """Processes that have not ended in time; they are ended here."""
        end = time.monotonic() + GONE_S
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.1)
        names = []
        for process in left:
            with contextlib.suppress(psutil.Error):
                names.append(shlex.join(process.cmdline()[:6]))
                process.kill()
        return names


def stored(out: Path) -> dict[str, tuple[str, int]]:
    """Key -> digest and inode of the manifest of every step that is stored."""
    found = {}
    for file in (out / "store").glob("[!.]*/manifest.json"):
        with contextlib.suppress(OSError, ValueError):
            manifest = json.loads(file.read_text("utf-8"))
            found[file.parent.name] = (str(manifest.get("digest")), file.stat().st_ino)
    return found


def measured(out: Path) -> dict[str, tuple[int, ...]]:
    """Cell -> inodes of its records, of every cell whose phases all have one."""
    cells: dict[str, tuple[int, ...]] = {}
    for folder in (out / "chaos" / "cells").glob("[!.]*"):
        records = sorted(folder.glob("[!.]*.json"))
        if len(records) == 2:  # load, and quality or the lossless check
            cells[folder.name] = tuple(record.stat().st_ino for record in records)
    return cells


def comparable(out: Path) -> dict[str, Any]:
    """What two runs must agree on: results without timings, and the hashes of stored files."""
    results = json.loads((out / "chaos" / "results.json").read_text("utf-8"))
    hashes = {}
    for file in sorted((out / "store").glob("[!.]*/manifest.json")):
        sha256 = json.loads(file.read_text("utf-8"))["sha256"]
        hashes[file.parent.name] = {k: v for k, v in sha256.items() if k not in OWN_RECORD}
    return {"results": without_timings(results), "store": hashes}


def without_timings(value: Any) -> Any:
    """A result without the keys in `TIMED`, at every depth."""
    if isinstance(value, dict):
        return {k: without_timings(each) for k, each in value.items() if k not in TIMED}
    return [without_timings(each) for each in value] if isinstance(value, list) else value


def differences(wanted: Any, found: Any, place: str = "") -> list[str]:
    """Where two values differ, by path."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        keys = sorted(wanted.keys() | found.keys())
        return [
            each
            for key in keys
            for each in differences(wanted.get(key), found.get(key), f"{place}/{key}")
        ]
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        pairs = enumerate(zip(wanted, found, strict=True))
        return [d for i, (one, other) in pairs for d in differences(one, other, f"{place}/{i}")]
    return [] if wanted == found else [f"{place}: {wanted!r} is now {found!r}"[:300]]


def left_files(out: Path, scratch: Path) -> list[str]:
    """Temporary files and folders below a run, its store and the scratch of its processes."""
    store = out / "store"
    left = [path for name in (".temp", ".work") for path in (store / name).glob("*")]
    left += [path for path in out.rglob(".*") if path.name[1:2].isdigit()]
    left += list((out / "chaos").rglob(".scratch"))
    return sorted(str(path) for path in [*left, *scratch.iterdir()])


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A tmpfs at `folder` while the block runs.

    Raises:
        PermissionError: this user may not mount one.
    """
    folder.mkdir(parents=True)
    size = ["-o", f"size={DISK_BYTES},mode=700"]
    command = ["mount", "-t", "tmpfs", *size, "gateskip-chaos", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise PermissionError(str(error)) from None
    if done.returncode:
        raise PermissionError(done.stderr.strip())
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


def disturb(
    chaos: Chaos, kind: str, count: int, disturbance: Callable[[Path], Outcome | None]
) -> list[Outcome]:
    """So many runs disturbed in one way; those that ended too early do not count."""
    outcomes: list[Outcome] = []
    for number in range(3 * count):
        if len(outcomes) == count:
            break
        out = chaos.folder / f"{kind}-{number}"
        outcome = disturbance(out)
        if outcome is not None:
            outcomes.append(outcome)
            sign = "✓" if outcome.holds else "✗"
            at = "" if outcome.after_s is None else f" after {outcome.after_s:g} s"
            print(f"{sign} {kind} {len(outcomes)} of {count}: {outcome.what}{at}", flush=True)
            for problem in problems(outcome):
                print(f"    {problem}", flush=True)
        if outcome is None or outcome.holds:
            shutil.rmtree(out, ignore_errors=True)
    return outcomes


def problems(outcome: Outcome) -> list[str]:
    """What does not hold, in lines."""
    lines = [] if outcome.resumed_exit_code == 0 else [f"resumed: {outcome.resumed_exit_code}"]
    for name in ("repeated", "differences", "processes_left", "files_left", "tracebacks"):
        lines += [f"{name}: {each}" for each in getattr(outcome, name)[:8]]
    return lines


def summary(arguments: argparse.Namespace, outcomes: list[Outcome], skipped: dict[str, str]) -> Any:
    """Counts, and each outcome: what is published."""
    counts = {
        kind: {
            "runs": len(own),
            "hold": sum(each.holds for each in own),
            "finished_before": sum(each.finished_before for each in own),
            "repeated": sum(len(each.repeated) for each in own),
            "made_again_because_damaged": sum(len(each.damaged) for each in own),
        }
        for kind in ("kill", "full", "flip", "stop")
        if (own := [each for each in outcomes if each.kind == kind])
    }
    options = ("kills", "full", "flips", "stops", "stop_seconds", "seed")
    asked = " ".join(f"--{name.replace('_', '-')} {getattr(arguments, name)}" for name in options)
    return {
        "command": f"python tools/chaos.py {asked}",
        "commit": git_commit(),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": sys.version.split()[0],
        "counts": counts,
        "skipped": skipped,
        "outcomes": [asdict(each) | {"holds": each.holds} for each in outcomes],
    }


def options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--full", type=int, default=8)
    parser.add_argument("--flips", type=int, default=8)
    parser.add_argument("--stops", type=int, default=4)
    parser.add_argument("--stop-seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where runs are kept; else a temporary folder")
    parser.add_argument("--publish", action="store_true", help=f"write {PUBLISHED.name}")
    return parser.parse_args(arguments)


def main(given: list[str] | None = None) -> int:
    """Disturb as many runs as asked; 1 where something does not hold."""
    arguments = options(given)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="gateskip-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    chaos = Chaos(folder.absolute(), arguments.seed, arguments.stop_seconds)
    print(f"undisturbed: {len(chaos.wanted['results']['cells'])} cells", flush=True)
    outcomes = disturb(chaos, "kill", arguments.kills, chaos.kill)
    outcomes += disturb(chaos, "flip", arguments.flips, chaos.flip)
    outcomes += disturb(chaos, "stop", arguments.stops, chaos.stop)
    skipped: dict[str, str] = {}
    try:
        outcomes += disturb(chaos, "full", arguments.full, chaos.fill)
    except PermissionError as error:
        skipped["full"] = f"a tmpfs cannot be mounted: {error}"
        print(f"- full: skipped, {skipped['full']}", flush=True)
    found = summary(arguments, outcomes, skipped)
    if arguments.publish:
        PUBLISHED.parent.mkdir(parents=True, exist_ok=True)
        PUBLISHED.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(json.dumps({"counts": found["counts"], "skipped": skipped}))
    asked = arguments.kills + arguments.flips + arguments.stops
    asked += 0 if skipped else arguments.full
    whole = len(outcomes) == asked and all(each.holds for each in outcomes)
    if arguments.folder is None and whole:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
