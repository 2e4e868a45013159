"""YAML -> Pipeline: the worked example word for word, and every mistake at its line and column."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from compose.errors import PipelineError
from compose.language.parse import load_pipeline, to_json_schema
from compose.language.schema import DEFAULT_STAGES, Matrix, Model, Pipeline
from compose.planning.planner import make_plan
from compose.stages.registry import DropLayers, Gate, Speculate

WORKED_EXAMPLE = """\
schema: 1
name: smollm2-matrix
seed: 0
model:
  source: smollm2-135m-instruct        # alias, hub id, or local folder
  dtype: bfloat16
data:
  train:       {source: calibration-text, limit: 2000, length: 512}
  calibration: {source: calibration-text, limit: 128, length: 512}
stages:                                # what chains are made of
  drop3:  {use: drop-layers, count: 3}
  narrow: {use: prune-width, ratio: 0.2}
  heal:   {use: heal, steps: 200}
  gates:  {use: gate, kind: scalar, steps: 300, budget: 0.8}
  nf4:    {use: bnb, format: nf4}
  gptq4:  {use: gptq, bits: 4, group_size: 64}
  skip80: {use: skip, budget: 0.8}
  spec:   {use: speculate, draft_budget: 0.5, draft_length: auto}
pipelines:                             # named chains
  shipped: [narrow, heal, gates, gptq4, spec]
matrix:                                # every combination, axes in chain order
  prune:    [none, drop3, [narrow, heal]]
  gate:     [none, gates]
  quantize: [none, nf4, gptq4]
  decode:   [none, skip80, spec]
  exclude:
    - {prune: drop3, quantize: nf4}
benchmark:
  baseline: dense
  speed:   {prompt_tokens: 128, new_tokens: 128, repeats: 5, batch_sizes: [1, 8]}
  quality: {perplexity: wikitext2, tasks: [arc_easy, piqa, lambada_openai], limit: 500}
export:
  shipped: {to: exports/shipped}
"""
FIVE_LINES = """\
schema: 1
name: first
model:
  source: smollm2-135m-instruct
matrix: default
"""


def load(folder: Path, text: str) -> Pipeline:
    path = folder / "p.yaml"
    path.write_text(text, encoding="utf-8")
    return load_pipeline(path)


def refusal(folder: Path, text: str) -> str:
    """The message for a file that is refused, without the folder."""
    with pytest.raises(PipelineError) as caught:
        load(folder, text)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(f"{folder}/", "")


def changed(old: str, new: str) -> str:
    """The worked example with its first `old` replaced."""
    assert old in WORKED_EXAMPLE
    return WORKED_EXAMPLE.replace(old, new, 1)


def test_worked_example_parses_word_for_word(tmp_path: Path) -> None:
    pipeline = load(tmp_path, WORKED_EXAMPLE)
    assert pipeline.model == Model(source="smollm2-135m-instruct", dtype="bfloat16")
    assert (pipeline.data.train.limit, pipeline.data.calibration.limit) == (2000, 128)
    assert pipeline.stages["drop3"] == DropLayers(count=3)
    assert pipeline.stages["gates"] == Gate()
    assert pipeline.stages["spec"] == Speculate(draft_budget=0.5, draft_length="auto")
    assert pipeline.pipelines == {"shipped": ("narrow", "heal", "gates", "gptq4", "spec")}
    assert pipeline.matrix is not None
    assert list(pipeline.matrix.axes) == ["prune", "gate", "quantize", "decode"]
    assert pipeline.matrix.axes["prune"] == ((), ("drop3",), ("narrow", "heal"))
    assert pipeline.matrix.exclude == ({"prune": "drop3", "quantize": "nf4"},)
    assert pipeline.benchmark.speed.batch_sizes == (1, 8)
    assert pipeline.benchmark.quality.perplexity == ("wikitext2",)
    assert pipeline.export["shipped"].to == "exports/shipped"


def test_five_lines_mean_gates_quantizers_and_decoders(tmp_path: Path) -> None:
    pipeline = load(tmp_path, FIVE_LINES)
    assert pipeline.matrix is not None
    assert list(pipeline.matrix.axes) == ["gate", "quantize", "decode"]
    assert pipeline.stages == DEFAULT_STAGES
    assert pipeline.benchmark.quality.perplexity == ("wikitext2", "heldout-text")


def test_a_file_that_names_no_variant_is_refused_with_the_lines_to_add(tmp_path: Path) -> None:
    model = FIVE_LINES.replace("matrix: default\n", "")
    alone = refusal(tmp_path, model)
    assert alone.startswith("p.yaml:3:1: the file names a model but no variant of it")
    assert "fix: add the line `matrix: default`" in alone
    stages = model + "stages:\n  int4: {use: int4}\n  gates: {use: gate}\n  low: {use: skip}\n"
    said = refusal(tmp_path, stages)
    assert said.startswith("p.yaml:5:1: the file names stages but no variant that uses them")
    assert said.endswith(
        "or add `matrix: default` (gates, 8 or 4 bits and ways of decoding, in every combination)"
    )
    block = "pipelines:\n  int4: [int4]\n  gates: [gates]\n  low: [gates, low]\n"
    assert block in said.replace("\n    ", "\n") and "pipelines:" in said
    plan = make_plan(load(tmp_path, stages + block))
    assert [cell.name for cell in plan.cells] == ["dense", "int4", "gates", "low"]
    for empty in ("pipelines: {}\n", "matrix: null\n", "search: null\n"):
        assert "no variant that uses them" in refusal(tmp_path, stages + empty)
    assert load(tmp_path, stages + "search: {}\n").matrix is None


def test_a_stage_that_fits_no_short_chain_has_no_line_in_the_fix(tmp_path: Path) -> None:
    text = FIVE_LINES.replace("matrix: default", "stages: {low: {use: skip}}")
    assert "fix: name chains of stages under `pipelines`, or add" in refusal(tmp_path, text)


def test_other_mistakes_are_told_before_missing_variants(tmp_path: Path) -> None:
    text = FIVE_LINES.replace("matrix: default", "stages: {g: {use: gate, init: none.bin}}")
    assert "there is no file" in refusal(tmp_path, text)


def test_named_chains_alone_mean_no_matrix(tmp_path: Path) -> None:
    text = FIVE_LINES.replace("matrix: default", "stages: {h: {use: heal}}\npipelines: {a: [h]}")
    pipeline = load(tmp_path, text)
    assert pipeline.matrix is None
    assert list(pipeline.stages) == ["h"]


def test_own_stage_takes_the_place_of_a_default_one(tmp_path: Path) -> None:
    pipeline = load(tmp_path, FIVE_LINES + "stages: {gates: {use: gate, steps: 7}}\n")
    assert pipeline.stages["gates"] == Gate(steps=7)
    assert pipeline.stages["spec"] == DEFAULT_STAGES["spec"]


def test_numbers_in_every_notation(tmp_path: Path) -> None:
    for text in ("1e-4", "1.0e-4", "0.0001"):
        pipeline = load(tmp_path, FIVE_LINES + f"stages: {{h: {{use: heal, lr: {text}}}}}\n")
        assert pipeline.stages["h"].model_dump()["lr"] == 1e-4


def test_perplexity_takes_one_several_or_none(tmp_path: Path) -> None:
    for text, expected in [("a", ("a",)), ("[a, b]", ("a", "b")), ("null", ())]:
        pipeline = load(tmp_path, FIVE_LINES + f"benchmark: {{quality: {{perplexity: {text}}}}}\n")
        assert pipeline.benchmark.quality.perplexity == expected


def test_anchors_and_merge_keys(tmp_path: Path) -> None:
    pipeline = load(
        tmp_path,
        FIVE_LINES
        + "stages:\n"
        + "  a: &a {use: heal, steps: 5, batch: 2}\n"
        + "  b: {<<: *a, steps: 6}\n"
        + "  c: *a\n",
    )
    dumped = {name: pipeline.stages[name].model_dump() for name in "abc"}
    assert dumped["a"] == dumped["c"]
    assert dumped["b"] == dumped["a"] | {"steps": 6}


GROUPED = """\
schema: 1
name: grouped
model: {source: smollm2-135m-instruct}
stages:
  gates:
    use: gate
    gate: {kind: mlp, shortcut: {attention: 8, mlp: 16}}
    train: {steps: 30, on_policy: {after: 0.4}}
    calibrate: {budgets: [0.8]}
pipelines: {gated: [gates]}
"""
FLAT = """\
schema: 1
name: grouped
model: {source: smollm2-135m-instruct}
stages:
  gates:
    use: gate
    kind: mlp
    shortcut: {attention: 8, mlp: 16}
    steps: 30
    on_policy: {after: 0.4}
    budgets: [0.8]
pipelines: {gated: [gates]}
"""


def test_settings_in_groups_mean_what_they_mean_without(tmp_path: Path) -> None:
    grouped, flat = load(tmp_path, GROUPED), load(tmp_path, FLAT)
    assert grouped.stages["gates"] == flat.stages["gates"]
    assert grouped.stages["gates"].model_dump() == flat.stages["gates"].model_dump()
    assert [s.key for s in make_plan(grouped).steps] == [s.key for s in make_plan(flat).steps]
    assert grouped.stages["gates"].identity({})["params"]["steps"] == 30, "keys are of flat names"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "{steps: 30",
            "{stepz: 30",
            "8:13: unknown key 'stepz' in stages.gates.train: did you mean",
        ),
        (
            "steps: 30",
            "steps: '30'",
            "8:20: stages.gates.train.steps: expected a whole number, not",
        ),
        ("after: 0.4", "afer: 1", "8:36: unknown key 'afer' in stages.gates.train.on_policy: did"),
        ("kind: mlp,", "kind: none,", "7:18: stages.gates.gate.kind: expected 'scalar', 'vector'"),
        ("mlp: 16", "mpl: 16", "7:48: unknown key 'mpl' in stages.gates.gate.shortcut: did you"),
        ("steps: 30", "kind: mlp", "8:13: stages.gates.train.kind: kind belongs in gate"),
        ("steps: 30", "recipe: ours", "8:13: stages.gates.train.recipe: recipe belongs outside"),
        (
            "use: gate",
            "use: gate\n    steps: 1",
            "9:13: stages.gates.train.steps: steps is given twice",
        ),
        ("{budgets: [0.8]}", "7", "9:5: stages.gates.calibrate: expected a mapping of settings"),
        ("kind: mlp,", "init: gone.safetensors,", "7:18: there is no file "),
    ],
)
def test_a_mistake_in_a_group_has_its_line(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    assert old in GROUPED
    with pytest.raises(PipelineError) as caught:
        load(tmp_path, GROUPED.replace(old, new, 1))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("benchmark:", "bencmark:", "28:1: unknown key 'bencmark': did you mean 'benchmark'?"),
        ("steps: 300", "stepz: 1", "14:37: unknown key 'stepz' in stages.gates: did you mean"),
        ("repeats: 5", "repets: 5", "30:50: unknown key 'repets' in benchmark.speed: did you"),
        ("limit: 2000", "limt: 1", "8:43: unknown key 'limt' in data.train: did you mean 'limit'?"),
        ("{to:", "{too:", "33:13: unknown key 'too' in export.shipped: did you mean 'to'?"),
        ("name: smoll", "nmae: smoll", "2:1: unknown key 'nmae': did you mean 'name'?"),
        ("steps: 300", "steps: '300'", "14:44: stages.gates.steps: expected a whole number, not"),
        ("steps: 300", "steps: 3.5", "14:44: stages.gates.steps: expected a whole number, not 3.5"),
        ("steps: 300", "steps: true", "14:44: stages.gates.steps: expected a whole number, not t"),
        (
            "steps: 300",
            "steps: ~",
            "14:44: stages.gates.steps: expected a whole number, not nothing",
        ),
        ("budget: 0.8", "budget: 8", "14:57: stages.gates.budget: expected a number of at most 1"),
        ("ratio: 0.2", "ratio: .nan", "12:37: stages.narrow.ratio: expected a finite number"),
        ("kind: scalar", "place: before", "14:11: stages.gates: place: before multiplies a branch"),
        ("kind: scalar", "kind: scaler", "14:29: stages.gates.kind: expected 'scalar', 'vector',"),
        (
            "length: auto",
            "length: x",
            "18:61: stages.spec.draft_length: expected 'auto' or a whole",
        ),
        ("bfloat16", "bf16", "6:10: model.dtype: expected 'float32', 'bfloat16' or 'float16', not"),
        (
            "steps: 300",
            "on_policy: {afer: 0.5}",
            "14:49: unknown key 'afer' in stages.gates.on_policy: did you mean 'after'?",
        ),
        (
            "steps: 300",
            "shortcut: {attention: 8, mpl: 8}",
            "14:62: unknown key 'mpl' in stages.gates.shortcut: did you mean 'mlp'?",
        ),
        (
            "steps: 300",
            "shortcut: {mlp: 8}",
            "14:37: stages.gates.shortcut lacks the key 'attention'",
        ),
        (
            "steps: 300",
            "shortcut: low",
            "14:47: stages.gates.shortcut: expected a whole number or a mapping, not 'low'",
        ),
        ("schema: 1", "schema: 2", "1:9: schema: expected 1, not 2"),
        ("name: smollm2-matrix\n", "", "1:1: the file lacks the key 'name'"),
        ("seed: 0", "seed: 0\nseed: 1", "4:1: the key 'seed' is given twice (first on line 3)"),
        ("seed: 0", "seed: [1]", "3:7: seed: expected a whole number, not a list"),
        ("seed: 0", "seed: {a: 1}", "3:7: seed: expected a whole number, not a mapping"),
        ("use: gptq,", "use: gptqq,", "16:17: unknown stage 'gptqq': did you mean 'gptq'?"),
        ("use: gptq, ", "", "16:11: stages.gptq4 lacks the key 'use'"),
        ("{use: skip, budget: 0.8}", "7", "17:11: stages.skip80: expected a mapping, not 7"),
        ("count: 3", "count: 3, layers: [1]", "11:11: stages.drop3: drop-layers needs either"),
        ("drop3:", "none: ", "11:3: stages.none: 'none' is a reserved name"),
        ("drop3:", "a+b: ", "11:3: stages.a+b: 'a+b' is not a name"),
        ("gptq4, spec]", "gptq5, spec]", "20:34: no stage is named 'gptq5': did you mean 'gptq4'?"),
        ("drop3, [n", "drop4, [n", "22:20: no stage is named 'drop4': did you mean 'drop3'?"),
        ("heal]]", "haal]]", "22:36: no stage is named 'haal': did you mean 'heal'?"),
        ("nf4, gptq4]", "nf4, nf4]", "24:25: axis 'quantize' has the choice nf4 twice"),
        ("nf4, gptq4]", "nf4, 4]", "24:25: matrix.quantize[2]: expected text or a list, not 4"),
        ("[none, nf4, gptq4]", "none", "24:13: matrix.quantize: expected a list, not 'none'"),
        ("[none, gates]", "[]", "23:13: matrix.gate: expected a list of at least 1, not an empty"),
        ("{prune: d", "{prun: d", "27:8: the matrix has no axis 'prun': did you mean 'prune'?"),
        ("quantize: nf4}", "quantize: nf}", "27:32: axis 'quantize' has no choice nf: did you"),
        ("{prune: drop3, quantize: nf4}", "{}", "27:7: this entry excludes every combination"),
        ("[1, 8]", "[1, 1]", "30:75: benchmark.speed.batch_sizes: 1 is listed twice"),
        ("source: smoll", "source: ./smoll", "5:11: there is no model (config.json) in"),
        (
            "train:       {source: calibration-text",
            "train: {source: a.jsonl",
            "8:19: there is no",
        ),
        ("steps: 300", "init: g.safetensors", "14:43: there is no file 'g.safetensors'"),
    ],
)
def test_mistake_is_reported_at_its_place(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert refusal(tmp_path, changed(old, new)).startswith(f"p.yaml:{message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "p.yaml:1:1: the file is empty\n  fix: begin with 'schema: 1'"),
        ("# only a comment\n", "p.yaml:1:1: the file is empty"),
        ("- a\n- b\n", "p.yaml:1:1: a pipeline is a mapping of keys, not a list"),
        ("\nsmollm2\n", "p.yaml:2:1: a pipeline is a mapping of keys, not 'smollm2'"),
        ("a: [1\nb: 2\n", "p.yaml:2:2: not YAML: expected ',' or ']'"),
        ("a: 1\n---\nb: 2\n", "p.yaml:2:1: not YAML: but found another document"),
        ("a: \x07\n", "p.yaml:1:4: not YAML: unacceptable character U+0007"),
        ("a: *b\n", "p.yaml:1:4: not YAML: found undefined alias 'b'"),
        ("a: &a [*a]\n", "p.yaml:1:4: this alias refers to a value that contains it"),
        ("a: !x 1\n", "p.yaml:1:4: the tag '!x' is not supported"),
        ("[a]: 1\n", "p.yaml:1:1: a key must be text"),
        ("<<: 3\n", "p.yaml:1:5: '<<' needs a mapping"),
        ("name: x\nmodel: smollm2\n", "p.yaml:2:8: model: expected a mapping, not 'smollm2'"),
        ("name: x\nmodel: {source: m}\nmatrix: all\n", "p.yaml:3:9: matrix: 'all' is not a matrix"),
        ("name: x\nmodel: {source: m}\nmatrix: {}\n", "p.yaml:3:1: the matrix has no axis"),
    ],
)
def test_file_that_is_no_pipeline(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, text).startswith(message)


def test_first_mistake_is_reported_in_full_and_the_others_are_counted(tmp_path: Path) -> None:
    text = (
        changed("steps: 300", "stepz: 1")
        .replace("seed: 0", "seed: x")
        .replace("repeats: 5", "repeats: 0")
    )
    message = refusal(tmp_path, text)
    assert message.startswith("p.yaml:3:7: seed: expected a whole number, not 'x'")
    assert message.endswith("and 2 more problems, on lines 14, 30")


def test_file_that_is_not_there_names_the_ones_beside_it(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").touch()
    with pytest.raises(PipelineError, match=r"there is no such file\n.*'quickstart.yaml'"):
        load_pipeline(tmp_path / "quikstart.yaml")
    with pytest.raises(PipelineError, match="cannot read it: Is a directory"):
        load_pipeline(tmp_path)


def test_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(PipelineError, match="not UTF-8"):
        load_pipeline(tmp_path / "p.yaml")


def test_paths_are_taken_from_the_folder_of_the_file(tmp_path: Path) -> None:
    for name in ("g.safetensors", "a.txt", "b.jsonl", "c.txt", "d.json", "e.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    pipeline = load(
        tmp_path,
        """\
name: local
model: {source: model}
data: {train: {source: a.txt}, calibration: {source: ./b.jsonl}}
stages: {gates: {use: gate, init: g.safetensors}}
pipelines: {gated: [gates]}
benchmark:
  quality: {perplexity: [c.txt, wikitext2]}
  lossless: {source: d.json}
  speed: {prompts: e.jsonl}
export: {dense: {to: out}}
""",
    )
    assert pipeline.model.source == str(tmp_path / "model")
    assert pipeline.data.train.source == str(tmp_path / "a.txt")
    assert pipeline.data.calibration.source == str(tmp_path / "b.jsonl")
    assert pipeline.stages["gates"].files() == {"init": tmp_path / "g.safetensors"}
    assert pipeline.benchmark.quality.perplexity == (str(tmp_path / "c.txt"), "wikitext2")
    assert pipeline.benchmark.lossless.source == str(tmp_path / "d.json")
    assert pipeline.benchmark.speed.prompts == str(tmp_path / "e.jsonl")
    assert pipeline.export["dense"].to == "out"


def test_pipeline_survives_json(tmp_path: Path) -> None:
    pipeline = load(tmp_path, WORKED_EXAMPLE)
    again = Pipeline.model_validate_json(pipeline.model_dump_json(by_alias=True))
    assert again.model_dump() == pipeline.model_dump()


def test_program_builds_a_pipeline_without_a_file() -> None:
    pipeline = Pipeline(name="x", model=Model(source="m"), stages={"g": Gate()}, pipelines={})
    assert list(pipeline.problems()) == []
    with pytest.raises(ValidationError):
        Pipeline(name="x", model=Model(source="m"), sed=1)  # type: ignore[call-arg]


def test_program_builds_a_matrix_whose_names_are_checked() -> None:
    matrix = Matrix.model_validate({"gate": ["none", "gatez"]})
    pipeline = Pipeline(name="x", model=Model(source="m"), stages={"gates": Gate()}, matrix=matrix)
    (problem,) = pipeline.problems()
    assert problem.loc == ("matrix", "gate", 1)


def test_json_schema_describes_every_key() -> None:
    schema = to_json_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert set(schema["required"]) == {"name", "model"}
    assert "schema" in schema["properties"] and "schema_version" not in schema["properties"]
    for name, part in [("pipeline", schema), *schema["$defs"].items()]:
        for key, info in part.get("properties", {}).items():
            assert info.get("description") or "$ref" in info, f"{name}.{key}"
    assert {"const": "default", "type": "string"} in schema["properties"]["matrix"]["anyOf"]
    variants = [each["required"] for each in schema["anyOf"]]
    assert variants == [["pipelines"], ["matrix"], ["search"]]


def test_language_and_planner_leave_torch_unloaded() -> None:
    code = (
        "import sys, compose.language.parse, compose.planning.planner, compose.language.schema\n"
        "print(sorted({'torch', 'transformers', 'gateskip.gates.learned'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
