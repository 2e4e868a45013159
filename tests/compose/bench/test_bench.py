"""`gateskip bench`: folders, ways of decoding and other engines, measured as cells of a plan."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jobs import cell_job

from compose.assets import default_cache
from compose.bench.cell import CellBench
from compose.bench.peer_cell import PeerBench, stop_ids
from compose.bench.speed.measure import roofline
from compose.bench.speed.systems import BACKENDS, parse_system
from compose.bench.speed.tune import tune
from compose.bench.speed.workloads import TurnText
from compose.contract import CellJob
from compose.errors import PlanError, UserError
from compose.language.schema import Benchmark, Pipeline
from compose.planning.bench_plan import bench_plan, decode_stage, default_name
from compose.planning.plan import Plan
from compose.planning.planner import make_plan
from compose.results.io import load_results
from compose.stages.registry import Plain, Speculate
from gateskip.runtime.backend import BACKENDS as RUNNABLE

SETTINGS: dict[str, Any] = {"speed": {"repeats": 1}}


def test_systems_are_named_in_words() -> None:
    assert parse_system("skip:0.8").settings == {"mode": "skip", "budget": 0.8}
    held = {"mode": "skip", "budget": 0.8, "prompt": "full", "hold": True}
    assert parse_system("skip:0.8+full-prompt+hold").settings == held
    read = parse_system("skip:1+prompt0.8").settings
    assert read == {"mode": "skip", "budget": 1.0, "prompt_budget": 0.8}
    assert parse_system("draft:1+int4+prompt0.8").settings["prompt_budget"] == 0.8
    assert parse_system("draft:1.0+nf4+lookup+4").settings == {
        "mode": "speculate",
        "draft_budget": 1.0,
        "draft_weights": "nf4",
        "lookup": True,
        "draft_length": 4,
    }
    own = {"draft_weights": "own", "lookup": False}
    assert parse_system("draft:0.5").settings == {"mode": "speculate", "draft_budget": 0.5, **own}
    assert parse_system("gathered:skip:0.8").settings == {"mode": "skip", "budget": 0.8}
    assert parse_system("plain+int8-kv").settings == {"mode": "plain", "kv_cache": "int8"}
    kept = decode_stage(parse_system("native:draft:1+int4+int8-kv"))
    assert isinstance(kept, Speculate) and kept.kv_cache == "int8"
    assert decode_stage(parse_system("plain")) is None
    assert decode_stage(parse_system("plain+int8-kv")) == Plain()
    assert parse_system("reference").backend == "reference"
    assert parse_system("plain").backend is None
    assert BACKENDS == RUNNABLE
    assert parse_system("draft:1+model").settings["draft_weights"] == "model"
    for wrong in (
        "dense",
        "skip:much",
        "skip:0.8+fast",
        "draft:0.5+fast",
        "native:transformers",
        "native:native",
    ):
        with pytest.raises(UserError, match="system"):
            parse_system(wrong)
    with pytest.raises(UserError, match=r"skip:1\.5"):
        decode_stage(parse_system("skip:1.5"))


def test_folders_and_systems_become_cells(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    one, two = make_tiny("llama"), make_tiny("qwen2")
    ways = ["plain", "draft:1+4", "gathered:draft:1+4", "transformers"]
    plan = bench_plan("b", [one], ways, ["llama.cpp:q4_0"], SETTINGS)
    names = [cell.name for cell in plan.cells]
    assert names == [*ways[:3], "transformers", "llama.cpp:q4_0"]
    plain, draft, other, *peers = plan.cells
    assert (draft.plain, other.plain) == ("plain", None), "plain is compared in its own backend"
    assert draft.decode is not None and draft.decode.use == "speculate"
    assert (other.backend, plain.backend) == ("gathered", "auto")
    assert [cell.peer for cell in peers] == ["transformers", "llama.cpp:q4_0"]
    assert len({cell.key for cell in plan.cells}) == len(plan.cells)
    assert {cell.folder for cell in plan.cells} == {str(one)}
    assert plan.pipeline.benchmark.baseline == "plain"
    ways = ["plain", "skip:0.8", "skip:0.7", "draft:0.8+int4+verify0.8"]
    assert bench_plan("b", [one], ways, [], SETTINGS).cells[3].plain == "skip:0.8"
    both = bench_plan("b", [one, two], ["plain"], [], SETTINGS)
    assert [cell.name for cell in both.cells] == [f"{one.name}:plain", f"{two.name}:plain"]
    copy = tmp_path / "copy"
    shutil.copytree(one, copy)
    key = bench_plan("b", [copy], [], [], SETTINGS).cells[0].key
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert bench_plan("b", [copy], [], [], SETTINGS).cells[0].key != key, "another folder"


def test_a_second_model_drafts(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    model, draft = make_tiny("llama"), tmp_path / "draft"
    shutil.copytree(model, draft)
    plan = bench_plan("b", [model], [], [], SETTINGS, draft_model=draft)
    assert [cell.name for cell in plan.cells] == ["plain", "draft:1+model+lookup"]
    stage = plan.cells[1].decode
    assert isinstance(stage, Speculate)
    assert (stage.draft_weights, stage.draft_model) == ("model", str(draft))
    ways = ["plain", "draft:1+auto", "draft:1+int4"]
    weighed = [
        cell.decode
        for cell in bench_plan("b", [model], ways, [], SETTINGS, draft_model=draft).cells
    ]
    assert [getattr(stage, "draft_model", None) for stage in weighed] == [None, str(draft), None]
    (draft / "config.json").write_text((draft / "config.json").read_text() + " ")
    other = bench_plan("b", [model], [], [], SETTINGS, draft_model=draft)
    assert other.cells[0].key == plan.cells[0].key
    assert other.cells[1].key != plan.cells[1].key, "another draft model"
    with pytest.raises(UserError, match=r"no way of decoding uses it.*\n?.*draft:1\+model"):
        bench_plan("b", [model], ["plain"], [], SETTINGS, draft_model=draft)
    with pytest.raises(UserError, match="needs draft_model"):
        bench_plan("b", [model], ["plain", "draft:1+model"], [], SETTINGS)


def test_what_cannot_be_compared_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="named twice"):
        bench_plan("b", [tiny_llama], ["plain", "plain"], [], SETTINGS)
    with pytest.raises(UserError, match="early-exit"):
        bench_plan("b", [tiny_llama], [], ["transformers:early-exit-2"], SETTINGS)
    with pytest.raises(UserError, match="no folder"):
        bench_plan("b", [tmp_path / "absent"], [], [], SETTINGS)
    with pytest.raises(UserError, match="'draft:1' decodes in a way of its own") as caught:
        bench_plan("b", [tiny_llama], ["draft:1", "plain"], [], SETTINGS)
    assert caught.value.fix == "name plain first, or leave out --quality"
    unscored = SETTINGS | {"quality": {"perplexity": None, "own_answers": None}}
    assert bench_plan("b", [tiny_llama], ["draft:1"], [], unscored).cells[0].name == "draft:1"


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("a/b", {}, "--name: 'a/b' is not a name"),
        ("b", {"speed": {"batch_sizes": [1, 1]}}, "--batch: 1 is listed twice"),
        ("b", {"speed": {"contexts": [64, 64]}}, "--prompt-tokens: 64 is listed twice"),
        ("b", {"quality": {"tasks": ["piqa", "piqa"]}}, "--task: 'piqa' is listed twice"),
    ],
)
def test_options_that_a_pipeline_would_not_take_are_refused(
    tiny_llama: Path, name: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        bench_plan(name, [tiny_llama], [], [], SETTINGS | settings)
    assert str(caught.value).startswith(message)


def test_code_of_a_model_runs_only_with_its_option(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from compose.cli import app
    from compose.terminal.live import run_shown

    planned: list[Plan] = []

    def run(plan: Plan, *_: Any, **__: Any) -> SimpleNamespace:
        planned.append(plan)
        return SimpleNamespace(exit_code=0)

    monkeypatch.setattr(run_shown, "run_shown", run)
    words = ["bench", str(tiny_llama), "--quality", "--task", "humaneval", "--out", str(tmp_path)]
    refused = CliRunner().invoke(app, words)
    assert not planned and refused.exit_code == 2
    assert "--task: the task humaneval runs code" in refused.output
    assert "--allow-code" in refused.output
    done = CliRunner().invoke(app, [*words, "--allow-code"])
    assert done.exit_code == 0, done.output
    assert planned[0].pipeline.benchmark.quality.tasks == ("humaneval",)
    assert planned[0].pipeline.benchmark.quality.allow_code


def test_a_folder_of_any_name_names_a_run(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "My Model (ß)"))
    name = default_name(folder)
    assert name == "bench-My-Model-"
    assert bench_plan(name, [folder], [], [], SETTINGS).pipeline.name == name


def test_peers_are_cells_of_a_pipeline() -> None:
    raw: dict[str, Any] = {
        "name": "p",
        "model": {"source": "smollm2-135m-instruct"},
        "stages": {"nf4": {"use": "bnb", "format": "nf4"}},
        "pipelines": {"packed": ("nf4",)},
        "benchmark": {"against": ["llama.cpp:q4_k_m", "transformers"]},
    }
    plan = make_plan(Pipeline.model_validate(raw))
    peers = [cell for cell in plan.cells if cell.peer is not None]
    assert [cell.name for cell in peers] == ["llama.cpp:q4_k_m", "transformers"]
    assert {cell.weights for cell in peers} == {plan.steps[0].key}, "on the untouched model"
    assert all(cell.chain == () and cell.decode is None for cell in peers)
    with pytest.raises(PlanError, match="q4_k_m"):
        wrong = {**raw, "benchmark": {"against": "llama.cpp:q4_k_n"}}
        make_plan(Pipeline.model_validate(wrong))
    with pytest.raises(PlanError, match="timed greedily"):
        wrong = {**raw, "benchmark": {"against": "transformers", "speed": {"sampling": {}}}}
        make_plan(Pipeline.model_validate(wrong))
    with pytest.raises(PlanError, match="another engine"):
        wrong = {**raw, "benchmark": {"against": "transformers", "baseline": "transformers"}}
        make_plan(Pipeline.model_validate(wrong))


@pytest.fixture
def jobs(make_tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., CellJob]:
    """`jobs(name)`: a job on a tiny model, a few tokens a turn."""
    folder = make_tiny("llama", max_position_embeddings=1024)
    settings = Benchmark().model_dump(mode="json")
    settings["quality"] |= {"perplexity": ["heldout-text"], "perplexity_tokens": 512}
    settings["quality"] |= {"tasks": ["arithmetic"], "limit": 2}
    settings["quality"]["own_answers"] |= {"prompts": 2, "new_tokens": 8}
    settings["speed"] |= {"prompt_tokens": 16, "new_tokens": 8}

    def make(name: str) -> CellJob:
        return cell_job(
            folder, tmp_path, name=name, benchmark=settings, asset_cache=default_cache(), threads=1
        )

    return make


@pytest.mark.slow
def test_another_engine_is_scored_and_timed_as_ours(jobs: Callable[..., CellJob]) -> None:
    """transformers computes what we compute, so every number that is not a time must agree."""
    ours, theirs = CellBench(jobs("dense")), PeerBench(jobs("peer"), "transformers")
    dense = ours.quality(ours.job.reference)
    loaded = theirs.load()
    assert loaded["peer"]["engine"] == "transformers" and loaded["peer"]["threads"] == 1
    assert loaded["size"]["disk_bytes"] > 0
    scored = theirs.quality(theirs.job.reference)
    assert scored["perplexity"]["value"] == pytest.approx(dense["perplexity"]["value"], rel=1e-4)
    assert scored["perplexity"]["tokens"] == dense["perplexity"]["tokens"]
    assert scored["kl_to_baseline"] == pytest.approx(0.0, abs=1e-4)
    assert scored["greedy_agreement"] > 0.99
    assert scored["own_answers"]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert scored["own_answers"]["prefixes"] == dense["own_answers"]["prefixes"], "the same answers"
    ours_wrote, theirs_wrote = dense["tasks"]["arithmetic"], scored["tasks"]["arithmetic"]
    assert theirs_wrote["questions"] == ours_wrote["questions"], "so outcomes pair"
    assert theirs_wrote["outcomes"] == ours_wrote["outcomes"] and theirs_wrote["n"] == 2
    text = TurnText(2, 16, "", 0)
    own, other = ours.warm(text, 1), theirs.warm(text, 1)
    for name in ("prompt_tokens", "tokens", "digest", "threads"):
        assert own[name] == other[name], name
    again = theirs.speed(text)
    assert again["decode_s"] > 0 and again["prefill_s"] > 0 and again["digest"] == own["digest"]
    theirs.close()


def test_answers_end_where_the_folder_says(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    stated = json.loads((tiny_llama / "generation_config.json").read_text())["eos_token_id"]
    assert stop_ids(tiny_llama, tokenizer) == sorted({stated, tokenizer.eos_token_id})


def test_the_machine_is_measured() -> None:
    found = roofline()
    assert set(found) == {
        "memory_gb_per_s",
        "gemm_float32_gflop_per_s",
        "gemm_bfloat16_gflop_per_s",
    }
    assert all(value > 0 for value in found.values())


def test_tuning_makes_the_fastest_draft_the_folders_way(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    file = tmp_path / "asked.jsonl"
    rows = [{"category": str(i % 2), "prompt": f"Licence {i}"} for i in range(4)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    found = tune(folder, str(file), None, 8, 2)
    tried = {each["system"] for each in found["first"]}
    copies = ("+int4", "+int3", "+nf4")
    kinds = ("+lookup", "+int4-head+lookup", *copies, *(f"{copy}+lookup" for copy in copies))
    assert tried == {"plain", *(f"draft:1{kind}" for kind in kinds)}
    assert all(each["equal_to_first"] for each in found["second"]), "drafts change no token"
    assert found["best"] in {each["system"] for each in found["second"]}
    if found["best"] == "plain":  # two repeats show no draft to be faster
        assert found["speedup"] == 1.0 and found["speedup_ci95"] is None
    else:
        assert found["speedup_ci95"][0] > 1
    import gateskip

    assert gateskip.load(folder).defaults == found["decode"]
    before = (folder / "gateskip.json").read_bytes()
    tune(folder, str(file), 1, 8, 1, write=False)
    assert (folder / "gateskip.json").read_bytes() == before


@pytest.mark.slow
def test_the_command_measures_all_in_one_table(
    make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from compose.cli import app

    folder = make_tiny("llama", max_position_embeddings=1024)
    arguments = ["bench", folder, "--system", "plain", "--system", "draft:1+4"]
    arguments += ["--system", "gathered:plain", "--system", "skip:0.8", "--against", "transformers"]
    arguments += ["--quality", "--text", "heldout-text", "--tokens", 512, "--questions", 2]
    arguments += ["--prompt-tokens", 16, "--context", 32, "--batch", 1, "--batch", 2]
    arguments += ["--new-tokens", 8, "--repeats", 2, "--min-seconds", 0, "--threads", 1]
    arguments += ["--out", tmp_path, "--name", "small"]
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert "Traceback" not in done.output
    results = load_results(tmp_path / "small" / "results.json")
    status = {cell.name: cell.status for cell in results.cells}
    assert status == {
        **dict.fromkeys(["plain", "draft:1+4", "gathered:plain", "transformers"], "ok"),
        "skip:0.8": "failed",
    }
    assert done.exit_code == 1, "a cell failed"
    assert "no gates" in (results.cell("skip:0.8").reason or "")
    assert (tmp_path / "small" / "report.html").is_file()
    peer = results.cell("transformers")
    assert peer.speed is not None and peer.speed.decode_ratio is not None
    assert peer.speed.by_batch is not None and set(peer.speed.by_batch) == {2}
    assert peer.speed.by_context is not None and set(peer.speed.by_context) == {32}
    assert peer.quality is not None and peer.quality.kl_to_baseline == pytest.approx(0, abs=1e-3)
    assert peer.peer is not None and peer.peer.engine == "transformers"
    draft = results.cell("draft:1+4")
    assert draft.lossless_check is not None and draft.lossless_check.lossless
    assert draft.speculation is not None and draft.speculation.acceptance_rate == 1.0
    gathered = results.cell("gathered:plain")
    assert gathered.arithmetic is not None and gathered.arithmetic.backend == "gathered"
    assert gathered.quality is not None and gathered.quality.kl_to_baseline is not None
    assert "GB/s" in done.output and "transformers" in done.output


@pytest.mark.slow
def test_folders_take_turns_in_one_process_and_sample(
    make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from compose.cli import app

    folder = make_tiny("llama", max_position_embeddings=1024)
    arguments = ["bench", folder, "--system", "plain", "--system", "draft:1+4", "--one-process"]
    arguments += ["--temperature", 0.7, "--top-p", 0.9, "--prompt-tokens", 16, "--new-tokens", 8]
    arguments += ["--repeats", 3, "--min-seconds", 0.1, "--threads", 1, "--out", tmp_path]
    done = CliRunner().invoke(app, list(map(str, [*arguments, "--name", "small"])))
    assert done.exit_code == 0, done.output
    results = load_results(tmp_path / "small" / "results.json")
    assert results.benchmark["speed"]["sampling"]["top_p"] == 0.9
    for name in ("plain", "draft:1+4"):
        cell = results.cell(name)
        assert cell.speed is not None and len(cell.speed.decode_tokens_per_s.repeats) == 3
        assert cell.speed.equal_to_baseline is None, "samples differ"
        assert cell.size is not None and cell.size.peak_bytes is None
    logs = {file.name for file in (tmp_path / "small" / "logs").glob("speed-*")}
    assert logs == {"speed-together.log"}
    refused = CliRunner().invoke(app, list(map(str, [*arguments, "--against", "transformers"])))
    assert refused.exit_code == 2 and "timed greedily" in refused.output
