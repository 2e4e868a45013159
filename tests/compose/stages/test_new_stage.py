"""A new stage is one file and one row: pages, schema and reports follow from what it declares."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("gateskip", "compose", "reports")
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LAST_ROW = "    Speculate,\n)"
ASK = """
import json, sys
from compose.language.parse import load_pipeline, to_json_schema
from compose.outputs.gather import _step_infos
from compose.planning.composition import as_markdown
from compose.planning.planner import make_plan
from compose.results.schema import CellResult
from compose.analysis.families import family_of, weights_of
plan = make_plan(load_pipeline(sys.argv[1]))
found = {}
for planned in plan.cells:
    steps, chain = _step_infos(plan, planned), planned.chain
    cell = CellResult(name=planned.name, chain=chain, steps=steps, status="ok")
    found[planned.name] = [family_of(cell), weights_of(cell)]
print(json.dumps({"page": as_markdown(), "schema": to_json_schema(), "families": found}))
"""
PIPELINE = """
schema: 1
name: clipped
model: {source: smollm2-135m-instruct}
stages: {clip: {use: clip-weights, sigmas: 3}}
pipelines: {clipped: [clip]}
"""


def in_a_tree_with(folder: Path, changes: dict[str, str]) -> Any:
    """What ASK prints in a copy of the packages that has CONTRIBUTING's stage, changed as told, as
    one file more and one row more."""
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (code,) = CODE.findall((ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    (folder / "compose" / "stages" / "clip.py").write_text(code, "utf-8")
    registry = folder / "compose" / "stages" / "registry.py"
    text = registry.read_text("utf-8")
    assert LAST_ROW in text
    text = text.replace(LAST_ROW, "    Speculate,\n    ClipWeights,\n)")
    row = "from compose.stages.clip import ClipWeights\nfrom compose.stages.decode"
    registry.write_text(text.replace("from compose.stages.decode", row), "utf-8")
    (folder / "clipped.yaml").write_text(PIPELINE, "utf-8")
    done = subprocess.run(
        [sys.executable, "-c", ASK, "clipped.yaml"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("role", "family", "weights"),
    [
        ("heal", "dense", "not quantized"),
        ("prune", "pruned", "not quantized"),
        ("quantize", "quantized", "clip-weights"),
    ],
)
def test_all_else_follows_from_a_file_and_a_row(
    role: str, family: str, weights: str, tmp_path: Path
) -> None:
    told = in_a_tree_with(tmp_path, {'Role] = "heal"': f'Role] = "{role}"'})
    assert told["families"]["clipped"] == [family, weights]
    assert "| `clip-weights` |" in told["page"]
    stage = told["schema"]["$defs"]["ClipWeights"]["properties"]
    assert stage["sigmas"]["default"] == 4.0
    assert stage["sigmas"]["description"].startswith("How many standard deviations")


def test_a_parameter_without_a_default_is_given_by_the_stage_itself(tmp_path: Path) -> None:
    own = '    example: ClassVar[dict[str, Any]] = {"sigmas": 4}\n\n    use: Literal'
    changes = {"default=4.0, gt=0": "gt=0", "    use: Literal": own}
    told = in_a_tree_with(tmp_path, changes)
    assert "| `clip-weights` |" in told["page"]
