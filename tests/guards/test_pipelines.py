"""Every pipeline that we ship or show parses and plans, without a network."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from compose.language.parse import load_pipeline
from compose.planning.plan import Plan
from compose.planning.planner import make_plan
from compose.planning.prepare import input_hashes, model_shape

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```ya?ml\n(.*?)^```", re.MULTILINE | re.DOTALL)


EXAMPLES = sorted((ROOT / "pipelines").glob("*.yaml"))
"""What a user would start from; studies/ beside them holds the runs behind documents."""

MOST_EXAMPLES = 12


def _shipped() -> list[Path]:
    return sorted((ROOT / "pipelines").rglob("*.yaml"))


def _shown() -> list[tuple[str, str]]:
    """("file:line", text) of each YAML block in a document that is a whole pipeline.

    Only the one with the stage that CONTRIBUTING.md teaches to add is passed over.
    """
    documents = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    found = []
    for document in documents:
        text = document.read_text("utf-8")
        for block in FENCE.finditer(text):
            whole = re.search(r"^(schema|model):", block[1], re.MULTILINE)
            if whole and "use: clip-weights" not in block[1]:
                line = text.count("\n", 0, block.start()) + 2
                found.append((f"{document.relative_to(ROOT).as_posix()}:{line}", block[1]))
    return found


def _plan(path: Path, cache: Path) -> Plan:
    pipeline = load_pipeline(path)
    shape = model_shape(pipeline, cache)
    assert shape is not None, "a pipeline of ours names a model whose sizes are known offline"
    return make_plan(pipeline, shape, input_hashes(pipeline))


def test_there_are_pipelines() -> None:
    assert {"small-matrix.yaml", "from-scratch.yaml", "smollm2-matrix.yaml"} <= {
        path.name for path in _shipped()
    }


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_says_what_it_is_for_and_how_long_it_takes(path: Path) -> None:
    opening = re.match(r"(?:#.*\n)+", path.read_text("utf-8"))
    assert opening and re.search(r"\b(?:hours?|minutes)\b", opening[0])
    assert re.search(rf"gateskip (?:run|search) pipelines/{path.name}|make \w+", opening[0])


def test_examples_are_few() -> None:
    assert len(EXAMPLES) <= MOST_EXAMPLES, "a study belongs in pipelines/studies/"


@pytest.mark.parametrize("path", _shipped(), ids=lambda path: path.name)
def test_shipped(path: Path, tmp_path: Path) -> None:
    plan = _plan(path, tmp_path)
    assert plan.cells[0].chain == (), "the baseline comes first"
    assert load_pipeline(path).name == path.stem, "a run is found under its file's name"


@pytest.mark.parametrize("text", [text for _, text in _shown()], ids=[name for name, _ in _shown()])
def test_shown(text: str, tmp_path: Path) -> None:
    file = tmp_path / "shown.yaml"
    file.write_text(text, "utf-8")
    assert _plan(file, tmp_path).cells


def test_the_matrix_of_the_design(tmp_path: Path) -> None:
    """3 x 2 x 3 x 3 choices: what is excluded or breaks a rule is not planned, all else is."""
    plan = _plan(ROOT / "pipelines" / "smollm2-matrix.yaml", tmp_path)
    chains = {cell.chain for cell in plan.cells}
    assert ("drop3", "gates", "int8", "spec") not in chains
    assert ("spec",) not in chains
    assert ("narrow", "heal", "gates", "int4", "spec") in chains
    # One prune choice: 3 quantizers x (plain + 3 gated decoders). drop3 has no nf4.
    assert len(chains) == 12 + 8 + 12
    assert all(out.rule and out.message for out in plan.left_out)
    assert plan.cell("shipped").chain == ("narrow", "heal", "gates", "int4", "spec")
    keys = [step.key for step in plan.steps]
    assert len(keys) == len(set(keys)), "equal prefixes run once"
