"""Plans: the steps and cells of a pipeline, what is left out and why, and what keys mean."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from compose.errors import PipelineError, PlanError, RuleBroken
from compose.language.parse import load_pipeline
from compose.language.schema import Matrix, Model, Pipeline
from compose.planning.keys import InputHashes
from compose.planning.plan import SOURCE, Cell, Plan, Step
from compose.planning.planner import make_plan
from compose.stages.quantize.integers import Allocate, Int4
from compose.stages.registry import (
    RULES,
    Bnb,
    DropLayers,
    Gate,
    Gptq,
    Heal,
    ModelShape,
    PruneWidth,
    Speculate,
)

SHAPE = ModelShape("llama", 576, 1536, 30, 9, 3, 64, 49152, True)
STAGES = """\
name: t
model: {source: smollm2-135m-instruct}
stages:
  drop3:  {use: drop-layers, count: 3}
  narrow: {use: prune-width, ratio: 0.2, round_to: 32}
  heal:   {use: heal}
  gates:  {use: gate}
  nf4:    {use: bnb, format: nf4}
  gptq4:  {use: gptq, group_size: 64}
  wide:   {use: gptq, group_size: 128}
  skip80: {use: skip}
  spec:   {use: speculate, draft_budget: 0.5}
"""
MATRIX = """\
matrix:
  gate:     [none, gates]
  quantize: [none, nf4]
  decode:   [none, spec]
"""


def plan_of(folder: Path, text: str, shape: ModelShape | None = SHAPE) -> Plan:
    path = folder / "p.yaml"
    path.write_text(STAGES + text, encoding="utf-8")
    return make_plan(load_pipeline(path), shape)


def refusal(folder: Path, text: str, shape: ModelShape | None = SHAPE) -> str:
    with pytest.raises(PlanError) as caught:
        plan_of(folder, text, shape)
    return str(caught.value).replace(f"{folder}/", "")


def names(plan: Plan) -> list[str]:
    return [cell.name for cell in plan.cells]


def gate_pipeline(gate: Gate, *, seed: int = 0) -> Pipeline:
    return Pipeline(
        name="t",
        seed=seed,
        model=Model(source="m"),
        stages={"gates": gate, "gptq4": Gptq()},
        pipelines={"a": ("gates", "gptq4")},
    )


def last_key(pipeline: Pipeline, known: InputHashes | None = None) -> str:
    return make_plan(pipeline, SHAPE, known).steps[-1].key


def test_matrix_is_every_combination_that_the_rules_allow(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, MATRIX)
    assert names(plan) == ["dense", "nf4", "gates", "gates+spec", "gates+nf4", "gates+nf4+spec"]
    assert [(left.name, left.rule) for left in plan.left_out] == [
        ("spec", "decode-needs-gates"),
        ("nf4+spec", "decode-needs-gates"),
    ]
    assert plan.left_out[0].message == "no gate stage comes before speculate"


def test_equal_prefixes_run_once_and_parents_come_first(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, MATRIX)
    assert [step.name for step in plan.steps] == [SOURCE, "nf4", "gates", "nf4"]
    seen: set[str] = set()
    for step in plan.steps:
        assert step.parent is None or step.parent in seen
        assert len(step.key) == 16 and int(step.key, 16) >= 0
        seen.add(step.key)
    last = plan.steps[-1]
    assert last.chain == ("gates", "nf4")
    assert [step.name for step in plan.lineage(last.key)] == [SOURCE, "gates", "nf4"]


def test_cells_point_at_weights_decoder_and_plain_cell(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, MATRIX)
    plain, spec = plan.cell("gates+nf4"), plan.cell("gates+nf4+spec")
    assert plain.weights == spec.weights == plan.steps[-1].key
    assert (plain.decode, plain.plain) == (None, None)
    assert (spec.decode, spec.plain) == (Speculate(draft_budget=0.5), "gates+nf4")
    assert plain.key != spec.key
    assert plan.cell("dense").weights == plan.steps[0].key


VERIFIED = """\
  spec80: {use: speculate, draft_weights: int4, verify_budget: 0.8}
pipelines: {a: [gates, spec80]}
"""


def test_drafts_that_are_verified_at_a_budget_are_compared_with_skipping(tmp_path: Path) -> None:
    """The cell that skips at that budget is added, and the plain one that it is compared with."""
    plan = plan_of(tmp_path, VERIFIED)
    spec, skip = plan.cell("a"), plan.cell("gates+skip80")
    assert names(plan) == ["dense", "a", "gates+skip80", "gates"]
    assert (spec.plain, skip.plain, skip.origin) == ("gates+skip80", "gates", "plain")
    assert spec.decode == Speculate(draft_weights="int4", draft_budget=0.8, verify_budget=0.8)
    assert spec.weights == skip.weights
    with pytest.raises(
        PipelineError, match=r"p.yaml:\d+:\d+: .*at that budget, and there is none"
    ) as raised:
        plan_of(tmp_path, VERIFIED.replace("0.8", "0.7"))
    assert raised.value.fix == "add one: skip70: {use: skip, budget: 0.7}"
    with pytest.raises(PipelineError, match=r"at that budget, and there is none") as raised:
        plan_of(tmp_path, VERIFIED.replace("verify_budget", "prompt_budget"))
    assert raised.value.fix == "add one: skip80: {use: skip, budget: 1, prompt_budget: 0.8}"


def test_dense_is_planned_even_when_nobody_asks(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "pipelines: {a: [gates]}\n")
    assert [(cell.name, cell.origin) for cell in plan.cells] == [
        ("dense", "baseline"),
        ("a", "pipeline"),
    ]


def test_plain_cell_is_added_for_a_decode_stage(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "pipelines: {a: [gates, spec], b: [gates, skip80]}\n")
    assert names(plan) == ["dense", "a", "b", "gates"]
    assert plan.cell("a").plain == plan.cell("b").plain == "gates"
    assert plan.cell("gates").origin == "plain"


def test_named_chain_gives_its_name_to_the_plain_cell(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "pipelines: {a: [gates, spec], b: [gates]}\n")
    assert names(plan) == ["dense", "a", "b"]
    assert plan.cell("a").plain == "b"


def test_named_chain_that_the_matrix_has_too_is_one_cell(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, MATRIX + "pipelines: {best: [gates, nf4, spec], none-at-all: []}\n")
    best, dense = plan.cell("best"), plan.cell("dense")
    assert best.aliases == ("gates+nf4+spec",)
    assert plan.cell("gates+nf4+spec") is best
    assert dense.aliases == ("none-at-all",)
    assert len(plan.cells) == 6


def test_equal_stages_of_two_names_are_one_step_and_one_cell() -> None:
    pipeline = Pipeline(
        name="t",
        model=Model(source="m"),
        stages={"x": Bnb(format="nf4"), "y": Bnb(format="nf4")},
        pipelines={"a": ("x",), "b": ("y",)},
    )
    plan = make_plan(pipeline, SHAPE)
    assert len(plan.steps) == 2
    assert [(cell.name, cell.aliases) for cell in plan.cells] == [("dense", ()), ("a", ("b",))]


def test_name_of_another_cell_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, "pipelines:\n  gates: [narrow, gates]\n" + MATRIX)
    assert message.startswith("p.yaml:14:3: 'gates' names two cells")


def test_excluded_combinations_are_listed(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, MATRIX + "  exclude: [{gate: gates, quantize: nf4}]\n")
    assert names(plan) == ["dense", "nf4", "gates", "gates+spec"]
    excluded = [left.name for left in plan.left_out if left.rule == "exclude"]
    assert excluded == ["gates+nf4", "gates+nf4+spec"]


def test_excluded_cell_that_is_needed_all_the_same_is_planned(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, MATRIX + "  exclude: [{gate: gates, decode: none}]\n")
    assert plan.cell("gates").origin == "plain"
    assert "gates" not in [left.name for left in plan.left_out]


@pytest.mark.parametrize(
    ("chain", "column", "stage", "rule"),
    [
        ("[gptq4, narrow]", 14, "narrow", "prune-after-quantize"),
        ("[nf4, gptq4]", 12, "gptq4", "two-quantizers"),
        ("[nf4, spec]", 12, "spec", "decode-needs-gates"),
        ("[gates, spec, nf4]", 20, "nf4", "decode-last"),
        ("[heal, wide]", 13, "wide", "group-divides"),
    ],
)
def test_named_chain_that_breaks_a_rule_is_an_error_at_its_line(
    tmp_path: Path, chain: str, column: int, stage: str, rule: str
) -> None:
    message = refusal(tmp_path, f"pipelines:\n  a: {chain}\n")
    assert message.startswith(f"p.yaml:14:{column}: cell 'a', stage '{stage}': ")
    assert f"[rule {rule}]" in message


def test_named_chain_in_block_style_is_an_error_at_the_stage(tmp_path: Path) -> None:
    message = refusal(tmp_path, "pipelines:\n  a:\n    - gptq4\n    - heal\n")
    assert message.startswith("p.yaml:16:7: cell 'a', stage 'heal': heal cannot come after gptq")


def test_same_break_in_the_matrix_is_left_out(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "matrix:\n  q: [none, gptq4, wide]\n  p: [none, drop3]\n")
    assert names(plan) == ["dense", "drop3", "gptq4"]
    assert [(left.name, left.rule) for left in plan.left_out] == [
        ("gptq4+drop3", "prune-after-quantize"),
        ("wide", "group-divides"),
        ("wide+drop3", "group-divides"),
    ]
    assert all(left.rule in RULES for left in plan.left_out)


def test_rules_on_sizes_see_what_pruning_left(tmp_path: Path) -> None:
    chain = "pipelines: {a: [narrow, gptq4]}\n"
    plan_of(tmp_path, chain)  # 1536 -> 1216 = 19 groups of 64
    odd = ModelShape("llama", 576, 1568, 30, 9, 3, 64, 49152, True)  # -> 1248 = 19.5 groups
    assert "does not divide the 1248 inputs of down_proj" in refusal(tmp_path, chain, odd)


def test_without_a_shape_only_order_is_checked(tmp_path: Path) -> None:
    plan_of(tmp_path, "pipelines: {a: [wide]}\n", None)
    message = refusal(tmp_path, "pipelines: {a: [wide, wide]}\n", None)
    assert "[rule two-quantizers]" in message


def test_export_of_an_unknown_cell_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, MATRIX + "export:\n  gates+nf: {to: out}\n")
    assert message.startswith("p.yaml:18:3: no cell is named 'gates+nf': did you mean 'gates+nf4'?")


def test_export_of_a_cell_that_is_left_out_names_the_rule(tmp_path: Path) -> None:
    message = refusal(tmp_path, MATRIX + "export:\n  nf4+spec: {to: out}\n")
    assert message.startswith("p.yaml:18:3: cell 'nf4+spec' is left out: no gate stage")
    assert message.endswith("[rule decode-needs-gates]")


def test_export_takes_aliases(tmp_path: Path) -> None:
    text = "pipelines: {a: [gates, nf4]}\nexport: {gates+nf4: {to: out}, dense: {to: o}}\n"
    assert plan_of(tmp_path, MATRIX + text).cell("gates+nf4").name == "a"


def test_further_seeds_repeat_what_has_weights_of_its_own(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path, "more_seeds: [1, 2]\npipelines: {a: [gates, spec], b: [gates, skip80]}\n"
    )
    repeats = {cell.name: cell for cell in plan.cells if cell.repeats is not None}
    assert list(repeats) == ["b@1", "b@2", "gates@1", "gates@2"]
    assert repeats["b@2"].repeats == "b"
    assert repeats["b@2"].plain == "gates@2"
    seeds = {plan.title(step): step.seed for step in plan.steps}
    assert seeds == {"source": 0, "gates": 0, "gates@1": 1, "gates@2": 2}
    alone = plan_of(tmp_path, "seed: 2\npipelines: {b: [gates, skip80]}\n")
    assert alone.cell("b").key == repeats["b@2"].key, "a seed means the same in both places"


@pytest.mark.parametrize("seeds", ["[1, 1]", "[0]"])
def test_a_seed_named_twice_is_refused_at_its_place(tmp_path: Path, seeds: str) -> None:
    with pytest.raises(PipelineError, match=r"p\.yaml:13:\d+: seed \d is listed twice"):
        plan_of(tmp_path, f"more_seeds: {seeds}\npipelines: {{a: [gates]}}\n")


def test_baseline_comes_first_and_must_exist(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, MATRIX + "benchmark: {baseline: gates}\n")
    assert names(plan)[:3] == ["gates", "dense", "nf4"]
    message = refusal(tmp_path, MATRIX + "benchmark: {baseline: gatez}\n")
    assert message.startswith("p.yaml:17:23: no cell is named 'gatez': did you mean 'gates'?")


@pytest.mark.parametrize("baseline", ["c", "b", "gates@1", "b@1"])
def test_a_baseline_that_others_cannot_be_compared_with_is_refused(
    tmp_path: Path, baseline: str
) -> None:
    text = "more_seeds: [1]\npipelines: {b: [gates, skip80], c: [gates, spec]}\n"
    message = refusal(tmp_path, text + f"benchmark: {{baseline: {baseline}}}\n")
    assert message.startswith(f"p.yaml:15:23: the baseline '{baseline}' ")
    assert message.endswith("fix: name 'gates'")
    unscored = f"{{baseline: {baseline}, quality: {{perplexity: null, own_answers: null}}}}"
    if "@" in baseline:
        assert "is not timed" in refusal(tmp_path, text + f"benchmark: {unscored}\n")
    else:
        assert names(plan_of(tmp_path, text + f"benchmark: {unscored}\n"))[0] == baseline


def test_same_inputs_give_the_same_plan(tmp_path: Path) -> None:
    first, second = plan_of(tmp_path, MATRIX), plan_of(tmp_path, MATRIX)
    assert first.to_json() == second.to_json()
    assert first.cells == second.cells and first.steps == second.steps


def test_key_follows_all_that_decides_the_result() -> None:
    base = gate_pipeline(Gate())
    key = last_key(base)
    assert last_key(gate_pipeline(Gate())) == key
    changed = [
        gate_pipeline(Gate(steps=301)),
        gate_pipeline(Gate(), seed=1),
        base.model_copy(update={"model": Model(source="other")}),
        base.model_copy(update={"model": Model(source="m", dtype="bfloat16")}),
        base.model_copy(
            update={"data": base.data.model_copy(update={"calibration": base.data.train})}
        ),
    ]
    keys = [last_key(each) for each in changed] + [last_key(base, {"model_sha256": "ff"})]
    assert len({key, *keys}) == len(keys) + 1


def test_key_follows_the_version_of_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    key = last_key(gate_pipeline(Gate()))
    monkeypatch.setattr(Gate, "version", Gate.version + 1)
    assert last_key(gate_pipeline(Gate())) != key


def test_key_ignores_data_that_no_stage_reads() -> None:
    def bnb(limit: int) -> str:
        pipeline = Pipeline.model_validate(
            {
                "name": "t",
                "model": {"source": "m"},
                "data": {"train": {"limit": limit}},
                "stages": {"nf4": {"use": "bnb", "format": "nf4"}},
                "pipelines": {"a": ["nf4"]},
            }
        )
        return last_key(pipeline)

    assert bnb(1) == bnb(2)


def test_key_follows_the_content_of_a_file_and_not_its_path(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a", "b", "c")]
    for file, content in zip(files, (b"x", b"x", b"y"), strict=True):
        file.write_bytes(content)
    first, same, other = (last_key(gate_pipeline(Gate(init=str(file)))) for file in files)
    assert first == same != other
    known: InputHashes = {"file_sha256": {str(files[0]): "ff"}}
    assert last_key(gate_pipeline(Gate(init=str(files[0]))), known) not in (first, other)


def test_key_follows_the_content_of_a_data_file(tmp_path: Path) -> None:
    text = "data: {train: {source: a.txt}}\npipelines: {a: [heal]}\n"
    keys = []
    for content in ("x", "x", "y"):
        (tmp_path / "a.txt").write_text(content)
        keys.append(plan_of(tmp_path, text).steps[-1].key)
    assert keys[0] == keys[1] != keys[2]


def test_key_of_a_local_model_follows_its_files_or_its_hash(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    pipeline = Pipeline(name="t", model=Model(source=str(model)))
    before, pinned = last_key(pipeline), last_key(pipeline, {"model_sha256": "ff"})
    (model / "model.safetensors").write_bytes(b"weights")
    assert last_key(pipeline) != before
    assert last_key(pipeline, {"model_sha256": "ff"}) == pinned


def test_gates_file_that_is_gone_is_refused() -> None:
    with pytest.raises(PlanError, match="cannot read '/nowhere/g': No such file"):
        make_plan(gate_pipeline(Gate(init="/nowhere/g")))


def test_names_in_a_pipeline_built_by_a_program_are_checked() -> None:
    matrix = Matrix.model_validate({"gate": ["gatez"]})
    pipeline = Pipeline(name="t", model=Model(source="m"), stages={"gates": Gate()}, matrix=matrix)
    with pytest.raises(PlanError, match="no stage is named 'gatez': did you mean 'gates'"):
        make_plan(pipeline)


def test_rule_broken_without_a_file_still_names_cell_and_stage() -> None:
    pipeline = gate_pipeline(Gate()).model_copy(update={"pipelines": {"a": ("gptq4", "gates")}})
    with pytest.raises(RuleBroken, match=r"^cell 'a', stage 'gates': .*\[rule gate-after-quan"):
        make_plan(pipeline)


def test_plan_as_json(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, MATRIX)
    data = json.loads(json.dumps(plan.to_json()))
    assert data["baseline"] == "dense" and data["run"] == "t"
    assert set(data["steps"][0]) == set(Step.__dataclass_fields__)
    assert set(data["cells"][0]) == set(Cell.__dataclass_fields__)
    stage = data["steps"][1]["stage"]
    assert (stage["use"], stage["format"], stage["skip"]) == ("bnb", "nf4", [])
    assert data["left_out"][0] == {
        "name": "spec",
        "chain": ["spec"],
        "rule": "decode-needs-gates",
        "message": "no gate stage comes before speculate",
    }


def test_worked_example_plans() -> None:
    path = Path(__file__).parents[3] / "pipelines" / "smollm2-matrix.yaml"
    plan = make_plan(load_pipeline(path), SHAPE)
    assert len(plan.cells) == 32  # 3 prunings x (3 + 3 x 3), less 4 excluded
    assert len(plan.steps) == 17
    shipped = plan.cell("shipped")
    assert shipped.aliases == ("narrow+heal+gates+int4+spec",)
    assert shipped.plain == "narrow+heal+gates+int4"
    assert {left.rule for left in plan.left_out} == {"decode-needs-gates", "exclude"}


def test_memory_is_estimated_where_sizes_are_known() -> None:
    """Training everything takes ten times what training gates beside the mapped file does."""
    shape = ModelShape("llama", 576, 1536, 30, 9, 3, 64, 49152, True)
    assert shape.weights == pytest.approx(134.5e6, rel=0.01)
    frozen, full = Gate(backbone="frozen").memory(shape), Gate(backbone="full").memory(shape)
    head = 4 * 49152 * 576  # in float32 for its product
    assert full - frozen == 18 * shape.weights - head
    written = Gate(backbone="frozen", calibrate_on="written").memory(shape)
    assert written - frozen == 2 * shape.weights - head, "the engine decodes in float32"
    assert replace(shape, num_layers=15).weights < shape.weights
    short, long = (Heal().memory(shape, length) for length in (256, 1024))
    assert short < long < 2 * short, "what a step keeps counts"
    thrifty = Heal(checkpointing=True).memory(shape, 1024)
    assert thrifty < long
    wide = replace(shape, intermediate_size=16384)
    plain, fitted = (PruneWidth(ratio=0.2, refit=refit).memory(wide) for refit in (False, True))
    assert 1 < (fitted - plain) / (4 * 16384**2) < 4, "products of one layer, not of all"
    assert DropLayers(count=1).memory(shape) < PruneWidth(ratio=0.2).memory(shape)
    full, updates = Heal().memory(shape), Heal(backbone="lora").memory(shape)
    assert full - updates == 14 * shape.weights, "updates learn beside mapped files"
    gradients = Allocate(size_mb=90, by="gradients")
    rounded, measured, estimated = (
        Int4(allocate=allocate).memory(shape)
        for allocate in (None, Allocate(size_mb=90), gradients)
    )
    assert measured - rounded > 5 * shape.weights, "bits by need hold the model in float32"
    assert 0 < estimated - rounded < 4 * shape.weights, "but not those that gradients choose"
