"""Planning, and every command that computes nothing, leaves torch and its kind unloaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "pipelines" / "smollm2-matrix.yaml"
HEAVY = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "gateskip.gates.learned",  # training.recipe is light: the gate stage reads it
    "gptqmodel",
    "lm_eval",
    "optimum",
    "torch",
    "torch_pruning",
    "transformers",
)


def _heavy_after(code: str, *args: str) -> tuple[set[str], str]:
    """Run `code` in a new interpreter; what it loaded of HEAVY, and all that it printed."""
    ending = f"\nprint('loaded:', *(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}{ending}", *args],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *printed, last = done.stdout.splitlines()
    return set(last.removeprefix("loaded:").split()), "\n".join(printed)


def test_the_guard_sees() -> None:
    assert _heavy_after("import torch") == ({"torch"}, "")


def test_planning(tmp_path: Path) -> None:
    loaded, printed = _heavy_after(
        "from pathlib import Path\n"
        "from compose.planning.prepare import load_plan\n"
        "print(len(load_plan(Path(sys.argv[1]), Path(sys.argv[2])).cells))",
        str(EXAMPLE),
        str(tmp_path),
    )
    assert loaded == set()
    assert int(printed) > 1


@pytest.mark.parametrize(
    "module",
    ["compose.run.runner", "compose.results.schema", "compose.analysis.pick", "reports"],
)
def test_importing(module: str) -> None:
    assert _heavy_after(f"import {module}")[0] == set()


@pytest.mark.parametrize(
    "args",
    [["--version"], ["--help"], ["schema"], ["validate", str(EXAMPLE)], ["plan", str(EXAMPLE)]],
    ids=lambda args: args[0],
)
def test_commands(args: list[str]) -> None:
    code = (
        "from compose.cli import main\n"
        "sys.argv[0] = 'gateskip'\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code"
    )
    loaded, printed = _heavy_after(code, *args)
    assert loaded == set()
    assert printed
