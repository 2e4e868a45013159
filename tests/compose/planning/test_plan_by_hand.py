"""What a plan says of a small pipeline, written out whole."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compose.errors import PlanError
from compose.language.parse import load_pipeline
from compose.language.schema import Data, Matrix, Model, Pipeline, TrainSpec
from compose.outputs.gather import _texts_seen
from compose.outputs.run_folder import learns_from
from compose.planning.keys import SOURCE_VERSION, InputHashes, StepKeys, digest
from compose.planning.plan import Plan
from compose.planning.planner import make_plan
from compose.stages.base import DataSpec
from compose.stages.registry import RULES, Gate, Heal, ModelShape, Speculate
from compose.store import Store, read_json, write_json, write_text

TEXT = """\
name: t
model: {source: smollm2-135m-instruct}
stages:
  gates: {use: gate}
  nf4:   {use: bnb, format: nf4}
  spec:  {use: speculate, draft_budget: 0.5}
pipelines:
  quick: [gates, spec]
matrix:
  gate:     [none, gates]
  quantize: [none, nf4]
  exclude:
    - {gate: gates, quantize: nf4}
"""


def plan_of(folder: Path, text: str = TEXT) -> Plan:
    path = folder / "p.yaml"
    path.write_text(text, encoding="utf-8")
    return make_plan(load_pipeline(path))


def test_cells_and_what_asked_for_them(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert [(cell.name, cell.chain, cell.origin, cell.plain) for cell in plan.cells] == [
        ("dense", (), "baseline", None),
        ("quick", ("gates", "spec"), "pipeline", "gates"),
        ("nf4", ("nf4",), "matrix", None),
        ("gates", ("gates",), "matrix", None),
    ]
    assert [cell.aliases for cell in plan.cells] == [(), (), (), ()]
    (left,) = plan.left_out
    assert (left.name, left.chain, left.rule) == ("gates+nf4", ("gates", "nf4"), "exclude")
    assert left.message == RULES["exclude"]
    alone = plan_of(tmp_path, TEXT.replace("matrix:", "more_seeds: [3]\nmatrix:", 1))
    repeats = [cell for cell in alone.cells if cell.repeats is not None]
    assert [(c.name, c.chain, c.origin, c.repeats) for c in repeats] == [
        ("nf4@3", ("nf4",), "matrix", "nf4"),
        ("gates@3", ("gates",), "matrix", "gates"),
    ]


def test_a_plain_cell_that_nobody_asked_for(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, TEXT[: TEXT.index("matrix")])
    assert [(cell.name, cell.origin) for cell in plan.cells] == [
        ("dense", "baseline"),
        ("quick", "pipeline"),
        ("gates", "plain"),
    ]


def test_steps_and_their_titles(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, TEXT.replace("[gates, spec]", "[gates, nf4, spec]"))
    titles = {plan.title(step): step for step in plan.steps}
    assert list(titles) == ["source", "gates", "gates+nf4", "nf4"]
    last = titles["gates+nf4"]
    assert (last.name, last.chain, last.seed) == ("nf4", ("gates", "nf4"), 0)
    assert last.parent == titles["gates"].key and titles["source"].parent is None
    assert plan.lineage(last.key) == (titles["source"], titles["gates"], last)
    assert plan.step(last.key) is last
    with pytest.raises(KeyError):
        plan.step("0" * 16)
    assert all(len(step.key) == 16 for step in plan.steps)


def test_the_plan_for_scripts(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    data = plan.to_json()
    assert data["schema_version"] == 1 and data["run"] == "t" and data["baseline"] == "dense"
    assert set(data) == {
        "schema_version",
        "run",
        "baseline",
        "limits",
        "steps",
        "cells",
        "left_out",
    }
    assert [step["name"] for step in data["steps"]] == ["source", "gates", "nf4"]
    assert data["steps"][0]["stage"] is None and data["steps"][2]["stage"]["format"] == "nf4"
    assert data["steps"][2]["stage"]["skip"] == [] and data["steps"][1]["chain"] == ["gates"]
    assert data["cells"][0]["decode"] is None and data["cells"][0]["chain"] == []
    assert data["cells"][1]["decode"]["use"] == "speculate"
    assert data["cells"][1]["chain"] == ["gates", "spec"] and data["cells"][1]["aliases"] == []


def test_cells_by_name(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert plan.cell("quick").chain == ("gates", "spec")
    with pytest.raises(PlanError, match=r"^cell 'gates\+nf4' is left out: .* \[rule exclude\]$"):
        plan.cell("gates+nf4")
    with pytest.raises(PlanError, match=r"^no cell is named 'gatez': did you mean 'gates'\?"):
        plan.cell("gatez")


def test_where_a_cells_model_is(tmp_path: Path) -> None:
    plan, store = plan_of(tmp_path), Store(tmp_path / "store")
    cell = plan.cell("nf4")
    assert plan.model_folder(cell, store) == tmp_path / "store" / cell.weights / "model"
    named = replace(cell, folder="/models/m")
    assert plan.model_folder(named, store) == Path("/models/m")


def test_a_file_that_is_gone_is_named_at_its_line(tmp_path: Path) -> None:
    """It was there when the pipeline was read."""
    for text, place in (
        (TEXT.replace("{use: gate}", "{use: gate, init: gone.txt}"), "4:28"),
        (TEXT.replace("stages:", "data: {calibration: {source: gone.txt}}\nstages:"), "3:30"),
        (
            TEXT.replace("stages:", "data: {train: {source: gone.txt}}\nstages:")
            .replace("{use: gate}", "{use: heal}")
            .replace("[gates, spec]", "[gates]"),
            "3:24",
        ),
    ):
        (tmp_path / "gone.txt").write_text("x")
        path = tmp_path / "p.yaml"
        path.write_text(text, encoding="utf-8")
        pipeline = load_pipeline(path)
        (tmp_path / "gone.txt").unlink()
        with pytest.raises(PlanError) as caught:
            make_plan(pipeline)
            pytest.fail(place)
        wanted = f"p.yaml:{place}: cannot read '{tmp_path}/gone.txt': No such file or directory"
        assert wanted in str(caught.value)


def hashed(recipe: dict[str, Any]) -> str:
    """The first 16 digits of the sha256 of JSON without spaces, its names sorted."""
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_keys_are_what_they_are_said_to_hash() -> None:
    """Written out: a key that changes without notice makes every run begin again."""
    gate, heal = Gate(init="/nowhere/g"), Heal()
    pipeline = Pipeline(
        name="t",
        seed=5,
        model=Model(source="m", dtype="bfloat16"),
        data=Data(
            train=TrainSpec(source="one", limit=7), calibration=DataSpec(source="two", length=99)
        ),
        stages={"gates": gate, "heal": heal, "spec": Speculate(draft_budget=0.5)},
        pipelines={"a": ("heal", "gates", "spec")},
    )
    train, calibration = pipeline.data.train, pipeline.data.calibration
    known: InputHashes = {
        "model_sha256": "aa",
        "data_sha256": {train.source: "bb", calibration.source: "cc"},
        "file_sha256": {"/nowhere/g": "dd"},
    }
    plan = make_plan(pipeline, None, known)
    source = hashed(
        {
            **{"use": "source", "version": SOURCE_VERSION, "dtype": "bfloat16"},
            "model": {"source": "m", "sha256": "aa"},
        }
    )
    texts = {
        "train": (train, "bb"),
        "calibration": (calibration, "cc"),
    }

    def key(stage: Any, files: dict[str, str], parent: str) -> str:
        data = {
            split: {
                **{"limit": texts[split][0].limit, "length": texts[split][0].length},
                **{"source": texts[split][0].source, "sha256": texts[split][1]},
            }
            for split in stage.reads_data
        }
        more = {"parent": parent, "seed": 5, "dtype": "bfloat16", "data": data}
        return hashed(stage.identity(files) | more)

    healed = key(heal, {}, source)
    gated = key(gate, {"init": "dd"}, healed)
    assert heal.reads_data and gate.reads_data, "what they read is part of their keys"
    assert [step.key for step in plan.steps] == [source, healed, gated]
    decode = Speculate(draft_budget=0.5).identity({})
    assert plan.cell("a").key == hashed({"weights": gated, "decode": decode})
    assert plan.cells[0].key == hashed({"weights": source, "decode": None})
    assert (plan.cell("a").weights, plan.cells[0].weights) == (gated, source)


def test_keys_of_local_folders_and_files(tmp_path: Path) -> None:
    folder, text = tmp_path / "model", tmp_path / "a.txt"
    folder.mkdir()
    (folder / "b").write_bytes(b"12")
    (folder / "a").write_bytes(b"1")
    (folder / "inner").mkdir()
    text.write_bytes(b"words")
    pipeline = Pipeline.model_validate(
        {
            "name": "t",
            "model": {"source": str(folder), "dtype": "float32"},
            "data": {"train": {"source": str(text), "limit": 3}},
            "stages": {"heal": {"use": "heal"}},
            "pipelines": {"a": ["heal"]},
        }
    )
    keys = StepKeys(pipeline, {})
    listing = [(n, (folder / n).stat().st_size, (folder / n).stat().st_mtime_ns) for n in "ab"]
    base = {"use": "source", "version": SOURCE_VERSION, "dtype": "float32"}
    assert keys.source() == hashed(base | {"model": {"folder": str(folder), "files": listing}})
    pinned = StepKeys(pipeline, {"model_sha256": "ff"})
    assert pinned.source() == hashed(base | {"model": {"sha256": "ff"}})
    own = pipeline.data.train
    identity = {"limit": 3, "length": own.length, "sha256": hashlib.sha256(b"words").hexdigest()}
    assert keys.data_identity("train") == identity
    named = StepKeys(pipeline, {"data_sha256": {str(text): "ee"}})
    assert named.data_identity("train") == identity | {"sha256": "ee"}


def test_other_engines_are_cells_on_the_untouched_model(tmp_path: Path) -> None:
    text = TEXT + "benchmark: {against: ['llama.cpp:q8_0']}\nseed: 4\n"
    plan = plan_of(tmp_path, text)
    cell = plan.cell("llama.cpp:q8_0")
    assert plan.cells[-1] is cell
    assert (cell.chain, cell.origin, cell.peer, cell.decode) == ((), "peer", "llama.cpp:q8_0", None)
    assert cell.weights == plan.cells[0].weights == plan.steps[0].key
    recipe = {"weights": cell.weights, "decode": None, "peer": "llama.cpp:q8_0"}
    assert cell.key == hashed(recipe)
    with pytest.raises(PlanError, match=r"'llama\.cpp:q8_0' is another engine: name a chain"):
        plan_of(tmp_path, text + "export: {'llama.cpp:q8_0': {to: out}}\n")


def test_a_calibrated_engine_depends_on_the_calibration_text(tmp_path: Path) -> None:
    """Its key changes with the text; that of the same engine without text does not."""
    peers = ["llama.cpp:q4_0", "llama.cpp:q4_0+imatrix"]
    text = TEXT[: TEXT.index("stages")] + "stages: {nf4: {use: bnb, format: nf4}}\n"
    text += f"pipelines: {{packed: [nf4]}}\nbenchmark: {{against: {peers}}}\n"
    plans = [
        plan_of(tmp_path, text + f"data: {{calibration: {{source: {source}, limit: 3}}}}\n")
        for source in ("calibration-text", "training-text")
    ]
    plain, weighed = ([plan.cell(name) for plan in plans] for name in peers)
    assert plain[0].key == plain[1].key and weighed[0].key != weighed[1].key
    assert [cell.calibrates_peer for cell in (*plain, *weighed)] == [False, False, True, True]
    spec = plans[0].pipeline.data.calibration
    identity = {"limit": 3, "length": spec.length, "source": spec.source, "sha256": None}
    recipe = {"weights": weighed[0].weights, "decode": None, "peer": peers[1]}
    assert weighed[0].key == hashed({**recipe, "text": {"seed": 0, **identity}})
    read = {cell.name: _texts_seen(plans[0], cell) for cell in plans[0].cells}
    assert read == {"dense": (), "packed": (), peers[0]: (), peers[1]: ("calibration-text",)}
    assert learns_from(plans[0]) == [("calibration-text", 3)], "and may be contaminated by it"
    assert learns_from(plan_of(tmp_path, text.replace("+imatrix", "+fa"))) == []


def test_repeats_keep_their_chain(tmp_path: Path) -> None:
    """A skip cell is repeated beside its plain one, and points at the plain one of its seed."""
    text = (
        TEXT[: TEXT.index("matrix")].replace("speculate, draft_budget: 0.5", "skip")
        + "more_seeds: [3]\n"
    )
    cells = {cell.name: cell for cell in plan_of(tmp_path, text).cells}
    assert list(cells) == ["dense", "quick", "gates", "quick@3", "gates@3"]
    repeat = cells["quick@3"]
    assert (repeat.chain, repeat.origin) == (("gates", "spec"), "pipeline")
    assert (repeat.plain, repeat.repeats) == ("gates@3", "quick")
    assert cells["gates@3"].origin == "plain" and cells["gates@3"].plain is None
    assert repeat.weights == cells["gates@3"].weights != cells["gates"].weights


def test_files_of_the_store(tmp_path: Path) -> None:
    """JSON as people read it, in UTF-8 whatever the locale; scratch in a place of its own."""
    path = tmp_path / "a" / "b.json"
    write_json(path, {"name": "é", "values": [1]})
    assert path.read_bytes() == '{\n "name": "é",\n "values": [\n  1\n ]\n}\n'.encode()
    write_text(tmp_path / "c.txt", "ü")
    assert (tmp_path / "c.txt").read_bytes() == "ü".encode()
    assert read_json(path) == {"name": "é", "values": [1]}
    store = Store(tmp_path)
    assert store.work("0" * 16) == tmp_path / ".work" / ("0" * 16)
    assert store.model("1") == tmp_path / "1" / "model" and store.path("1") == tmp_path / "1"


def test_a_plain_cell_that_has_a_name_gets_no_other(tmp_path: Path) -> None:
    text = TEXT[: TEXT.index("matrix")].replace("pipelines:", "pipelines:\n  named: [gates]")
    cells = [(cell.name, cell.aliases, cell.plain) for cell in plan_of(tmp_path, text).cells]
    assert cells == [("dense", (), None), ("named", (), None), ("quick", (), "named")]


def test_two_cells_of_one_name(tmp_path: Path) -> None:
    text = TEXT.replace("quick: [gates, spec]", "nf4: [gates]")
    with pytest.raises(PlanError) as caught:
        plan_of(tmp_path, text)
    message = str(caught.value)
    assert "p.yaml:8:3: 'nf4' names two cells: ('gates',) and ('nf4',)" in message
    assert message.endswith("fix: give the pipeline another name")


def test_memory_of_steps_follows_the_shape(tmp_path: Path) -> None:
    """Each step is estimated on what the steps before it left, and for the text it trains on."""
    text = TEXT[: TEXT.index("pipelines")] + "  drop: {use: drop-layers, count: 2}\n"
    text += "  heal: {use: heal}\npipelines: {a: [drop, heal]}\n"
    text += "data: {train: {length: 128}}\n"
    path = tmp_path / "p.yaml"
    path.write_text(text, encoding="utf-8")
    shape = ModelShape("llama", 576, 1536, 30, 9, 3, 64, 49152, True)
    pipeline = load_pipeline(path)
    source, drop, heal = make_plan(pipeline, shape).steps
    assert source.memory is None and drop.stage is not None and heal.stage is not None
    assert drop.memory == drop.stage.memory(shape, 128)
    assert heal.memory == heal.stage.memory(replace(shape, num_layers=28), 128)
    assert heal.memory != heal.stage.memory(shape, 128)
    assert [step.memory for step in make_plan(pipeline).steps] == [None, None, None]


def test_what_a_key_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        digest({"a": float("nan")})


def test_mistakes_of_a_pipeline_built_by_a_program() -> None:
    matrix = Matrix.model_validate({"gate": ["gatez"]})
    pipeline = Pipeline(name="t", model=Model(source="m"), stages={"gates": Gate()}, matrix=matrix)
    (problem,) = pipeline.problems()
    with pytest.raises(PlanError) as caught:
        make_plan(pipeline)
    assert caught.value.fix == problem.fix and problem.message in str(caught.value)
