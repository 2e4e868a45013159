"""Which files a measured cell passes: from its pipeline file to the records in its run's folder.

    python tools/cell_files.py

A small pipeline (a tiny Llama, one dropped layer) runs in a temporary folder. Every process of the
run notes which functions of this project it calls; functions that only an import calls are left
out. The program prints the files of the packages in `WAY`, then their number, and whether that is
above `MOST`. docs/structure.md lists the same files.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

MOST = 32
WAY = (
    *("compose/terminal/commands/pipelines.py", "compose/contract.py"),
    *("compose/language/", "compose/planning/"),
    *("compose/run/", "compose/outputs/", "compose/processes/", "compose/workers/"),
    *("compose/stages/", "compose/bench/"),
)
"""Left out are what all packages use (errors, store, units, memory), data and models by name, the
engine, and what comes after the measurement: results, reports, the terminal."""
STAGE = ("compose/stages/prune/", "compose/stages/text/", "compose/stages/gate_transfer.py")
"""What this stage does, and not how it is told."""
BEFORE = (
    *("compose/run/preflight.py", "compose/run/room.py", "compose/run/estimate.py"),
    "compose/workers/fetch.py",
)
"""What is looked for, and fetched, before the first step."""
AFTER = ("compose/outputs/gather.py", "compose/outputs/gather_speed.py")

PIPELINE = """\
schema: 1
name: small
model: {{source: {model}}}
stages: {{drop: {{use: drop-layers, count: 1}}}}
pipelines: {{dropped: [drop]}}
benchmark:
  threads: 1
  quality: {{perplexity: [heldout-text], perplexity_tokens: 512, tasks: [], own_answers: null}}
  speed: {{repeats: 1, min_seconds: 0, prompt_tokens: 16, new_tokens: 8}}
"""

TRACE = """\
import builtins, os, sys, threading
root, noted, seen = os.environ["TRACE_ROOT"], os.environ["TRACE_FILE"], set()
out = os.open(noted, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def note(frame, event, argument):
    code = frame.f_code
    if event != "call" or code in seen:
        return
    if not code.co_filename.startswith(root) or code.co_name == "<module>":
        seen.add(code)
        return
    caller = frame
    while caller is not None:
        module = caller.f_globals.get("__name__")
        if caller.f_code.co_name == "<module>" and module != "__main__":
            return
        caller = caller.f_back
    seen.add(code)
    os.write(out, (code.co_filename[len(root):] + "\\n").encode())
load = builtins.__import__
def load_unseen(*arguments, **named):
    before = sys.getprofile()
    sys.setprofile(None)
    try:
        return load(*arguments, **named)
    finally:
        sys.setprofile(before)
builtins.__import__ = load_unseen
threading.setprofile(note)
sys.setprofile(note)
"""
"""What `sitecustomize` holds: Python runs it in every process of the run as it begins. Noting calls
of imports, too, would take most of the time."""


def files_passed() -> list[str]:
    """Paths of the files, below the root, whose functions a whole run of the pipeline calls."""
    from tiny_models import save_tiny

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = save_tiny(folder / "model", "llama", 0, max_position_embeddings=1024)
        (folder / "small.yaml").write_text(PIPELINE.format(model=model), encoding="utf-8")
        (folder / "trace").mkdir()
        (folder / "trace" / "sitecustomize.py").write_text(TRACE, encoding="utf-8")
        paths = os.pathsep.join((str(folder / "trace"), str(ROOT)))
        traced = {"TRACE_ROOT": f"{ROOT}{os.sep}", "TRACE_FILE": str(folder / "files.txt")}
        subprocess.run(
            [sys.executable, "-m", "compose", "run", "small.yaml", "--out", "runs", "--quiet"],
            cwd=folder,
            env={**os.environ, **traced, "PYTHONPATH": paths},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        return sorted(set((folder / "files.txt").read_text(encoding="utf-8").split("\n")) - {""})


def on_the_way(files: list[str]) -> list[str]:
    """Those files that are counted."""
    left_out = (*BEFORE, *STAGE, *AFTER)
    return [each for each in files if each.startswith(WAY) and not each.startswith(left_out)]


def main() -> int:
    """Run, print, and exit with 1 where there are too many."""
    files = on_the_way(files_passed())
    print(*files, sep="\n")
    print(f"{len(files)} files: {'ok' if len(files) <= MOST else f'more than {MOST}'}")
    return int(len(files) > MOST)


if __name__ == "__main__":
    sys.exit(main())
