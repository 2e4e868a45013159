"""A number that other code or other libraries measured is not published beside new ones."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from compose.language.schema import Pipeline
from compose.outputs import run_folder
from compose.outputs.gather import gather
from compose.outputs.run_folder import (
    MEASURE_VERSION,
    RunFolder,
    is_measured,
    only_code_changed,
    phase_key,
    read_phase,
    write_phase,
)
from compose.outputs.sessions import speed_settings
from compose.planning import fingerprint as module
from compose.planning.fingerprint import (
    MEASURING,
    ROOT,
    cpp_tokens,
    fingerprint,
    fingerprint_of,
    python_parts,
)
from compose.planning.keys import digest
from compose.planning.plan import Plan
from compose.planning.planner import make_plan
from compose.planning.prepare import input_hashes
from compose.terminal.show import plan_state


@pytest.fixture
def plan() -> Plan:
    raw = {
        "schema": 1,
        "name": "small",
        "model": {"source": "smollm2-135m-instruct"},
        "stages": {"drop": {"use": "drop-layers", "count": 1}},
        "pipelines": {"cut": ["drop"]},
    }
    return make_plan(Pipeline.model_validate(raw))


QUALITY = {"perplexity": {"dataset": "heldout-text", "value": 7.5}}


def _measure(plan: Plan, out: Path) -> RunFolder:
    """Records of every phase of both cells, as a run leaves them."""
    run = RunFolder.of(plan, out)
    for cell in plan.cells:
        write_phase(run, plan, cell, "load", {"size": {"disk_bytes": 1}}, 1.0)
        write_phase(run, plan, cell, "quality", QUALITY, 1.0)
    return run


def test_other_versions_make_an_old_perplexity_unknown(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, (dense, cut) = _measure(plan, tmp_path), plan.cells
    assert is_measured(run, plan, dense)
    record = read_phase(run, plan, dense, "quality")
    assert record is not None and record["fingerprint"] == fingerprint()
    assert not only_code_changed(run, plan, cut)

    other = fingerprint_of(ROOT, {"torch": "0.0"})
    monkeypatch.setattr(run_folder, "fingerprint", lambda: other)
    assert read_phase(run, plan, dense, "quality") is None
    assert not is_measured(run, plan, dense)
    facts: dict[str, Any] = {"failures": {}, "session": None, "environment": {}, "command": None}
    assert gather(run, plan, **facts).cells == ()


def test_the_plan_says_why_a_cell_is_measured_again(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _measure(plan, tmp_path)
    assert [cell["cached"] for cell in plan_state(plan, run)["cells"]] == [True, True]
    monkeypatch.setattr(run_folder, "fingerprint", lambda: "0" * 16)
    for cell in plan_state(plan, run)["cells"]:
        assert not cell["cached"] and cell["why"] == "code or libraries changed"
    run.record("cut", "load").unlink()  # never measured as a whole
    assert "why" not in plan_state(plan, run)["cells"][1]


def test_weights_outlive_a_change_of_the_code(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "library_versions", lambda: {"torch": "0.0"})
    fingerprint.cache_clear()
    again = make_plan(plan.pipeline)
    fingerprint.cache_clear()
    assert [step.key for step in again.steps] == [step.key for step in plan.steps]


def test_any_source_and_any_version_counts(tmp_path: Path) -> None:
    for name in MEASURING:
        assert (ROOT / name).exists(), name
        place = tmp_path / name
        if not place.suffix:
            place = place / "kernel.cpp"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("1\n")
    first = fingerprint_of(tmp_path, {"torch": "2.13"})
    assert first == fingerprint_of(tmp_path, {"torch": "2.13"}) and len(first) == 16
    assert first != fingerprint_of(tmp_path, {"torch": "2.14"})
    cache = tmp_path / "gateskip" / "__pycache__"
    cache.mkdir()
    (cache / "load.pyc").write_bytes(b"compiled")
    assert first == fingerprint_of(tmp_path, {"torch": "2.13"})
    (tmp_path / "compose" / "assets" / "rows.py").write_text("2\n")
    assert first != fingerprint_of(tmp_path, {"torch": "2.13"})


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources that measure."""
    root = tmp_path_factory.mktemp("sources")
    for name in MEASURING:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    return root


def _now(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Fingerprints are those of the sources at `root` from now on."""
    monkeypatch.setattr(module, "ROOT", root)
    fingerprint.cache_clear()


def test_a_move_and_a_mended_sentence_leave_cells_measured_and_an_operator_does_not(
    plan: Plan, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _now(monkeypatch, sources)
    run, cell = _measure(plan, tmp_path), plan.cells[0]
    assert is_measured(run, plan, cell)

    scorer = sources / "compose" / "bench" / "quality" / "continuations.py"
    moved = scorer.rename(sources / "compose" / "bench" / "peers" / "endings.py")
    for file in sources.rglob("*.py"):
        text = file.read_text("utf-8")
        file.write_text(
            text.replace("compose.bench.quality.continuations", "compose.bench.peers.endings")
        )
    text = moved.read_text("utf-8")
    moved.write_text(text.replace('"""', '"""Mended: ', 1).replace("\n\n\n", "\n\n\n# A note.\n"))
    _now(monkeypatch, sources)
    assert is_measured(run, plan, cell)

    assert text.count("max_length - ") + text.count("len(rows) - 1")
    changed = text.replace("len(rows) - 1", "len(rows) + 1").replace(
        "max_length - ", "max_length + "
    )
    moved.write_text(changed)
    _now(monkeypatch, sources)
    assert not is_measured(run, plan, cell) and only_code_changed(run, plan, cell)
    fingerprint.cache_clear()


def test_a_constant_in_cpp_counts_and_its_comment_does_not(sources: Path) -> None:
    file = sources / "gateskip" / "kernels" / "src" / "simd" / "codes.h"
    text, before = file.read_text("utf-8"), fingerprint_of(sources, {})
    file.write_text(
        "/* BLOCK / 5 */\n" + text.replace("BLOCK / 4;  ", "BLOCK  /\n  4; // changed ")
    )
    assert fingerprint_of(sources, {}) == before
    file.write_text(text.replace("BLOCK / 4;", "BLOCK / 8;"))
    assert fingerprint_of(sources, {}) != before
    file.write_text(text)


BEFORE = '''"""A module."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from gateskip.model import compute
from gateskip.gates.base import Gate

if TYPE_CHECKING:
    from torch import Tensor

LIMIT = 3


class Scorer(Gate):
    """Scores."""

    rows: int
    """Rows of a batch."""

    def score(self, x: Tensor, of: int = 2) -> Tensor:
        """Its score."""
        total: int = compute.count(x)  # all
        if of > LIMIT:
            return np.log(x)
        return total - of
'''
MODULES = {"gateskip.model", "gateskip.model.compute", "gateskip.gates.base", "gateskip.cost.flops"}


def _parts(text: str) -> list[bytes]:
    return sorted(python_parts(text, MODULES))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""A module."""\n', ""),
        ('        """Its score."""\n', ""),
        ("  # all", ""),
        ("total: int =", "total ="),
        ("x: Tensor, of: int = 2) -> Tensor", "x, of=2)"),
        ("LIMIT = 3", "LIMIT: Final = (\n    3\n)"),
        ("from gateskip.gates.base import", "from gateskip.gates.kinds import"),
        ("    from torch import Tensor\n", "    from torch import Tensor, nn\n"),
        ("import numpy as np\n", "import numpy as np\nfrom gateskip.errors import Refused\n"),
    ],
)
def test_what_computes_nothing_changes_nothing(old: str, new: str) -> None:
    assert BEFORE.count(old) == 1
    assert _parts(BEFORE.replace(old, new)) == _parts(BEFORE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("total - of", "total + of"),
        ("of > LIMIT", "of >= LIMIT"),
        ("LIMIT = 3", "LIMIT = 3.0"),
        ("of: int = 2", "of: int = 4"),
        ("import numpy as np", "import torch as np"),
        ("compute.count", "compute.counted"),
        ("    rows: int\n", ""),
        ("class Scorer(Gate)", "class Scorer"),
    ],
)
def test_what_computes_changes_it(old: str, new: str) -> None:
    assert BEFORE.count(old) == 1
    assert _parts(BEFORE.replace(old, new)) != _parts(BEFORE)


def test_a_renamed_module_and_a_split_file_change_nothing() -> None:
    renamed = BEFORE.replace(
        "from gateskip.model import compute", "from gateskip.cost import flops"
    )
    assert _parts(renamed.replace("compute.count", "flops.count")) == _parts(BEFORE)
    imports, constant, scorer = re.split(r"(LIMIT = 3\n)", BEFORE)
    split = [*_parts(constant), *_parts(imports + "from gateskip.limits import LIMIT\n" + scorer)]
    assert sorted(split) == _parts(BEFORE)


def test_tokens_of_cpp() -> None:
    def tokens(text: str) -> list[str]:
        return list(cpp_tokens(text))

    assert tokens("int  x=1; // one\n/* two */ int\ty ;") == tokens("int x = 1;\nint y;")
    assert tokens("int x") != tokens("intx")
    assert tokens("a + +b") != tokens("a ++b")
    assert tokens('f("a  // b")') == ["f", "(", '"a  // b"', ")"]
    assert tokens('R"x(a /* " */)x"') == ['R"x(a /* " */)x"']
    assert tokens("1'000'000.5e-3f + '\"'") == ["1'000'000.5e-3f", "+", "'\"'"]
    assert tokens("#define A 1\nB") != tokens("#define A 1 B")
    assert tokens("#define A \\\n  1\nB") == tokens("#define A 1 // one\n\nB")
    assert tokens('#include "old.h"\n#include <cmath>\n') == tokens(
        '#include <cmath>\n#include "new.h"'
    )
    assert tokens("#include <cmath>") != tokens("#include <math>")


def test_an_edited_text_makes_what_was_measured_on_it_unknown(tmp_path: Path) -> None:
    names = ("train", "scored", "asked", "checked", "timed")
    files = {name: tmp_path / f"{name}.txt" for name in names}
    for file in files.values():
        file.write_text("one")
    text = {name: str(file) for name, file in files.items()}
    raw = {
        "name": "small",
        "model": {"source": "smollm2-135m-instruct"},
        "data": {"train": {"source": text["train"]}},
        "stages": {"heal": {"use": "heal"}, "spec": {"use": "speculate"}},
        "pipelines": {"healed": ("heal",), "drafts": ("spec",)},
        "benchmark": {
            "speed": {"prompts": text["timed"]},
            "quality": {"perplexity": text["scored"], "own_answers": {"source": text["asked"]}},
            "lossless": {"source": text["checked"]},
        },
    }
    plan = make_plan(Pipeline.model_validate(raw))

    def keys() -> dict[str, Any]:
        """What each kind of record is kept under now."""
        return {
            "dense": phase_key(plan, plan.cell("dense"), "quality"),
            "healed": phase_key(plan, plan.cell("healed"), "quality"),
            "drafts": phase_key(plan, plan.cell("drafts"), "lossless"),
            "load": phase_key(plan, plan.cell("dense"), "load"),
            "speed": speed_settings(plan, {}, fingerprint()),
        }

    changed_by = {
        "train": {"dense"},
        "scored": {"dense", "healed"},
        "asked": {"dense", "healed"},
        "checked": {"drafts"},
        "timed": {"speed"},
    }
    for name, expected in changed_by.items():
        before = keys()
        assert keys() == before
        files[name].write_text("two")
        after = keys()
        assert {each for each in before if after[each] != before[each]} == expected, name


def test_a_local_copy_makes_what_was_measured_without_it_unknown(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = plan.pipeline.model_dump()
    raw["benchmark"]["quality"] |= {"perplexity": ("wikitext2",), "tasks": ("piqa", "arithmetic")}
    scored = make_plan(Pipeline.model_validate(raw))

    def key() -> str:
        return phase_key(scored, scored.cell("dense"), "quality")

    monkeypatch.setenv("GATESKIP_DATA", str(tmp_path))
    keys = [key()]
    for name in ("wikitext2_raw_test.txt", "piqa_val.jsonl", "arc_easy_test.jsonl"):
        (tmp_path / name).write_text("one")
        keys.append(key())
    (tmp_path / "piqa_val.jsonl").write_text("two")
    keys.append(key())
    assert keys[2] == keys[3], "no phase reads it"
    assert len(set(keys)) == 4
    monkeypatch.delenv("GATESKIP_DATA")
    assert key() == keys[0]


def test_a_stage_that_reads_a_local_copy_is_known_by_it(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = plan.pipeline.model_dump() | {"data": {"train": {"source": "wikitext2"}}}
    pipeline = Pipeline.model_validate(raw)
    assert "wikitext2" not in input_hashes(pipeline)["data_sha256"]
    (tmp_path / "wikitext2_raw_test.txt").write_text("text")
    monkeypatch.setenv("GATESKIP_DATA", str(tmp_path))
    assert input_hashes(pipeline)["data_sha256"]["wikitext2"] == hashlib.sha256(b"text").hexdigest()


def test_without_a_text_file_the_keys_are_what_they_were(plan: Plan) -> None:
    """Numbers of earlier versions stay current."""
    cell, benchmark = plan.cell("cut"), plan.pipeline.benchmark.model_dump(mode="json")
    reads = {"threads": None, "seed": 0, "baseline": plan.cells[0].key}
    reads |= {"quality": benchmark["quality"]}
    recipe = {"cell": cell.key, "phase": "quality", "reads": reads, "version": MEASURE_VERSION}
    assert phase_key(plan, cell, "quality", "0" * 16) == digest(recipe | {"code": "0" * 16})
    assert "files" not in speed_settings(plan, {}, "0" * 16)
