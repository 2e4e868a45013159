"""A draft model in a pipeline file, on the command line and in an export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jobs import cell_job
from pydantic import ValidationError
from tiny_models import first_layers
from without_packages import run_without

import gateskip
from compose.artifacts.folder import write_lineage
from compose.bench.cell import CellBench
from compose.bench.generate import answer, continue_probe, decode_settings
from compose.errors import ArtifactError, AssetError, PipelineError, PlanError, StepError
from compose.language.schema import Benchmark
from compose.outputs.export import assemble, decode_default
from compose.outputs.gather import _step_infos
from compose.planning.keys import cell_key
from compose.planning.plan import Plan
from compose.planning.prepare import load_plan
from compose.results.schema import CellResult, Results
from compose.results.speculation import LosslessCheck
from compose.stages.registry import Speculate
from reports.tables.speculation import _draft_model

PIPELINE = """\
schema: 1
name: drafts
model: {source: MODEL, dtype: float32}
stages:
  spec:
    use: speculate
    draft_model: DRAFT
pipelines:
  drafted: [spec]
"""
FIXED: dict[str, Any] = {"draft_length": 3, "lookup": False}


@pytest.fixture(scope="module")
def draft(make_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return first_layers(make_tiny("llama"), tmp_path_factory.mktemp("draft") / "small", 2)


def planned(folder: Path, model: Path | str, draft: Path | str) -> Plan:
    file = folder / "drafts.yaml"
    file.write_text(PIPELINE.replace("MODEL", str(model)).replace("DRAFT", str(draft)))
    return load_plan(file, folder / "cache")


# -- the stage ---------------------------------------------------------------------------------


def test_a_draft_model_that_is_given_drafts() -> None:
    assert Speculate(draft_model="d").draft_weights == "model"
    assert Speculate(draft_model="d", draft_weights="auto").draft_weights == "auto"
    assert Speculate(draft_model="d", verify_budget=0.6).draft_budget == 1


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"draft_weights": "model"}, "needs draft_model"),
        ({"draft_model": "d", "draft_weights": "int4"}, "int4 does not use draft_model"),
        ({"draft_model": "d", "draft_budget": 0.5}, "a draft model skips nothing"),
        ({"draft_weights": "learned", "draft_budget": 0.5}, "a draft network skips nothing"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict[str, Any], refused: str
) -> None:
    with pytest.raises(ValidationError, match=refused):
        Speculate(**settings)


def test_keys_without_a_draft_model_stay_and_with_one_follow_its_pin() -> None:
    before = Speculate(draft_weights="int4")
    assert "draft_model" not in before.model_dump() | before.identity({})["params"]
    assert cell_key("w", before) == "02694ad34c3d0f7c"
    named = Speculate(draft_model="d")
    keys = {cell_key("w", named, None, {"d": pin}) for pin in ("1", "2")} | {cell_key("w", named)}
    assert len(keys) == 3
    assert cell_key("w", named, None, {"d": "1"}) == cell_key(
        "w", Speculate(draft_model="other/name"), None, {"other/name": "1"}
    )


# -- planning ----------------------------------------------------------------------------------


def test_the_path_is_relative_to_the_file_and_the_content_is_part_of_the_key(
    tiny_llama: Path, draft: Path, tmp_path: Path
) -> None:
    shutil.copytree(draft, tmp_path / "beside")
    plan = planned(tmp_path, tiny_llama, "beside")
    decode = plan.cell("drafted").decode
    assert isinstance(decode, Speculate) and decode.draft_model == str(tmp_path / "beside")
    assert plan.cell("drafted").plain == "dense"
    key = plan.cell("drafted").key
    assert planned(tmp_path, tiny_llama, "./beside").cell("drafted").key == key
    shutil.copytree(tmp_path / "beside", tmp_path / "moved", copy_function=shutil.copy2)
    assert planned(tmp_path, tiny_llama, "moved").cell("drafted").key == key
    weights = tmp_path / "beside" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert planned(tmp_path, tiny_llama, "beside").cell("drafted").key != key
    (info,) = _step_infos(plan, plan.cell("drafted")) or ()
    assert info["draft_model"] == "beside", "results name no folder of this machine"


def test_a_folder_without_a_model_is_refused_at_its_line(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"drafts\.yaml:7.*no model \(config\.json\)"):
        planned(tmp_path, tiny_llama, "./nothing")
    with pytest.raises(AssetError, match=r"drafts\.yaml:7.*neither a short name nor a folder"):
        planned(tmp_path, tiny_llama, "smolm2-135m-instruct")


def test_a_search_does_not_vary_it(tiny_llama: Path, draft: Path, tmp_path: Path) -> None:
    file = tmp_path / "search.yaml"
    stage = f"{{use: speculate, draft_model: {draft}}}"
    file.write_text(
        f"schema: 1\nname: s\nmodel: {{source: {tiny_llama}}}\nstages:\n  spec: {stage}\n"
        "search:\n  axes: {decode: [none, spec]}\n  vary:\n    spec:\n"
        f"      draft_model: [{draft}]\n"
    )
    with pytest.raises(PipelineError, match=r"search\.yaml:10.*one stage for each model"):
        load_plan(file, tmp_path / "cache")


def test_another_vocabulary_is_refused_at_its_line(
    tiny_llama: Path, make_tiny: Callable[..., Path], draft: Path, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=r"drafts\.yaml:7.*384 tokens, and the model has 512"):
        planned(tmp_path, tiny_llama, make_tiny("llama", vocab_size=384))
    other = shutil.copytree(draft, tmp_path / "other")
    written = json.loads((other / "tokenizer.json").read_text())
    vocabulary = written["model"]["vocab"]
    names = sorted(vocabulary, key=vocabulary.get)
    vocabulary |= {names[100]: 101, names[101]: 100}
    (other / "tokenizer.json").write_text(json.dumps(written))
    with pytest.raises(PlanError) as caught:
        planned(tmp_path, tiny_llama, other)
    assert f"{names[100]!r} is token 100 of" in str(caught.value)
    assert "token 101 of the draft model" in str(caught.value) and "same tokenizer" in str(
        caught.value
    )


# -- a cell ------------------------------------------------------------------------------------


def bench(folder: Path, draft: Path, scratch: Path, **settings: Any) -> CellBench:
    benchmark = Benchmark().model_dump(mode="json")
    benchmark["lossless"] |= {"prompts": 2, "new_tokens": 8}
    decode = Speculate(draft_model=str(draft), **settings).model_dump(mode="json")
    return CellBench(cell_job(folder, scratch, decode=decode, benchmark=benchmark))


def test_a_cell_is_checked_and_counts_what_its_draft_model_drafted(
    tiny_llama: Path, draft: Path, tmp_path: Path
) -> None:
    measured = bench(tiny_llama, draft, tmp_path)
    check = LosslessCheck.model_validate(measured.lossless())
    assert check.lossless and check.acceptance_rate is not None
    stats = measured.decoder.generate([[5, 2, 9]], 16, "speculate", **measured.settings).stats
    assert stats.draft_weights == "model"
    assert measured.decoder.draft_model in measured.decoder.models(), "its memory counts"


def test_a_cell_with_another_tokenizer_is_refused(
    tiny_llama: Path, make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    other = make_tiny("llama", vocab_size=384)
    with pytest.raises(StepError, match=r"draft_model .*another tokenizer"):
        bench(tiny_llama, other, tmp_path).load()


def test_reports_name_the_draft_model() -> None:
    step = {"name": "spec", "use": "speculate", "draft_weights": "auto", "draft_model": "small"}
    record = {"draft_weights": "model"}
    cell = CellResult.model_validate(
        {"name": "c", "chain": ("spec",), "status": "ok", "steps": (step,), "speculation": record}
    )
    row: Any = SimpleNamespace(cell=cell)
    assert _draft_model(row) == "the draft model small"


# -- the command line --------------------------------------------------------------------------


def test_the_command_line_drafts_by_a_folder(tiny_llama: Path, draft: Path) -> None:
    plain = answer(tiny_llama, "Licensed under", max_new_tokens=12)
    drafted = answer(tiny_llama, "Licensed under", max_new_tokens=12, draft_model=draft)
    assert drafted["text"] == plain["text"]
    assert drafted["stats"]["draft_weights"] == "model"


def test_options_that_contradict_a_draft_model_are_refused(
    tiny_llama: Path, make_tiny: Callable[..., Path], draft: Path, tmp_path: Path
) -> None:
    for option, other in (("--no-speculate", {"speculate": False}), ("--budget", {"budget": 0.5})):
        with pytest.raises(ArtifactError, match=f"{option} and --draft-model"):
            decode_settings(tiny_llama, draft_model=draft, **other)  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match=r"cannot draft for .*another tokenizer"):
        answer(tiny_llama, "Hello", draft_model=make_tiny("llama", vocab_size=384))
    with pytest.raises(ArtifactError):
        answer(tiny_llama, "Hello", draft_model=tmp_path)


# -- an export ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def export(
    make_tiny: Callable[..., Path], draft: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An export of a cell that another model drafts for."""
    folder = tmp_path_factory.mktemp("export")
    source = shutil.copytree(make_tiny("llama"), folder / "source")
    origin = {"name": "source", "use": "source", "origin": "hub:owner/name@abc"}
    write_lineage(source, {**origin, "licence": "apache-2.0", "parameters": {}})
    decode = Speculate(draft_model=str(draft), **FIXED).model_dump(mode="json")
    step = {"name": "spec", **decode, "draft_model": "small"}
    cells = [
        {"name": "dense", "chain": (), "status": "ok"},
        {"name": "drafted", "chain": ("spec",), "status": "ok", "steps": (step,)},
    ]
    results = Results.model_validate({"run": "r", "model": "m", "environment": {}, "cells": cells})
    target = folder / "shipped"
    target.mkdir()
    assemble(target, source, results, results.cell("drafted"), {"weights": "k", "decode": decode})
    return target


def test_an_export_carries_its_draft_model(export: Path, draft: Path, tiny_llama: Path) -> None:
    settings = json.loads((export / "gateskip.json").read_text())["decode"]
    assert settings["draft_weights"] == "model" and "draft_model" not in settings
    held = {path.name for path in (export / "draft_model").iterdir()}
    assert held == {path.name for path in draft.iterdir()}
    assert "`draft_model` contains the draft model, `small`" in (export / "README.md").read_text()
    decoder = gateskip.load(export)
    made = decoder.generate([[5, 2, 9]], 16, **decoder.defaults)
    assert made.stats.draft_weights == "model" and made.stats.drafted
    assert made.tokens == gateskip.load(tiny_llama).generate([[5, 2, 9]], 16).tokens
    assert answer(export, "Licensed under", max_new_tokens=8)["stats"]["drafted"]


def test_its_tokens_are_those_of_the_folder_that_it_was_made_of(
    export: Path, tiny_llama: Path, draft: Path
) -> None:
    decode = Speculate(draft_model=str(draft), **FIXED).model_dump(mode="json")
    settings = decode_default(decode) | {"draft_model": str(draft)}
    assert continue_probe(export, 16) == continue_probe(tiny_llama, 16, settings)


SCRIPT = """
import torch
from transformers import AutoModelForCausalLM
folder, ids = json.loads(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
ids = torch.tensor([ids])
text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16,
                      do_sample=False, eos_token_id=None, pad_token_id=0)
print(json.dumps([text[0, ids.shape[1]:].tolist(), model._gateskip.draft_model is not None]))
"""


@pytest.mark.slow
def test_transformers_drafts_with_the_code_of_the_export(
    export: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    ids = [5, 9, 200, 31]
    ours = ("gateskip", "compose", "reports")
    done = run_without(ours, SCRIPT, [str(export), ids], tmp_path)
    assert "without drafts" not in done.stderr
    tokens, drafts = json.loads(done.stdout.splitlines()[-1])
    assert drafts
    own = gateskip.load(tiny_llama, torch.float32, "gathered")
    assert tokens == own.generate([ids], 16).tokens[0]
