"""Before the first step: everything that is missing comes in one list, and nothing is computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scripted_runs import Script, go
from scripted_runs import pipeline as small
from typer.testing import CliRunner

import compose.extras
from compose.assets import MODELS, TASKS, fetch
from compose.bench.peers.environment import environment_folder
from compose.bench.peers.table import ENGINES
from compose.cli import app
from compose.contract import FetchJob
from compose.errors import UserError
from compose.language.schema import Pipeline
from compose.outputs.run_folder import RunFolder
from compose.planning.planner import make_plan
from compose.run import preflight, room
from compose.run.preflight import Readiness, look
from compose.run.state import Settings
from compose.stages.base import ModelShape
from compose.workers.fetch import fetch as fetched

PLAIN: dict[str, Any] = {
    "quality": {"perplexity": None, "own_answers": None},
    "speed": {"prompts": "prompts"},
}
"""A benchmark that reads nothing that is not in the package."""


def found(folder: Path, *, local: bool = True, benchmark: Any = None, **fields: Any) -> Readiness:
    """What a pipeline of the dense model alone lacks, and what of `fields` it has."""
    benchmark = {**PLAIN, **(benchmark or {})}
    model = {"model": {"source": "smollm2-135m-instruct"}}
    given = {"schema": 1, "name": "small", **model, "benchmark": benchmark, **fields}
    plan = make_plan(Pipeline.model_validate(given))
    settings = Settings(folder, folder / "cache")
    return look(plan, RunFolder.of(plan, folder), settings, list(plan.cells), local=local)


def said(ready: Readiness) -> str:
    return "\n".join(map(str, ready.missing))


def quality(**fields: Any) -> dict[str, Any]:
    return {"quality": {"perplexity": None, "own_answers": None, **fields}}


def test_a_text_of_the_hub_without_a_hub(tmp_path: Path) -> None:
    ready = found(tmp_path, benchmark=quality(perplexity="wikitext2"))
    assert "data 'wikitext2' is not available here" in said(ready)
    assert "fix: go online once" in said(ready)
    assert ready.to_fetch.texts == ()


def test_one_of_several_texts_is_enough(tmp_path: Path) -> None:
    several = ("wikitext2", "heldout-text")
    ready = found(tmp_path, benchmark=quality(perplexity=several))
    assert ready.missing == ()
    assert ready.to_fetch.texts == (several,)
    ready = found(tmp_path, benchmark=quality(perplexity=("nobody/nothing", "prompts")))
    assert ready.missing == () and ready.to_fetch.texts == ()


def test_a_text_that_stages_read(tmp_path: Path) -> None:
    stages = {"int4": {"use": "int4"}, "gates": {"use": "gate"}}
    data = {"calibration": {"source": "nobody/nothing"}, "train": {"mix": {"sums": 1, "quotes": 1}}}
    chains = {"small": ("int4",), "gated": ("gates",)}
    ready = found(tmp_path, stages=stages, data=data, pipelines=chains)
    assert said(ready).count("data 'nobody/nothing' is not available") == 1
    assert ready.to_fetch.texts == (("quotes",),)
    unread = found(tmp_path, stages=stages, data=data)
    assert unread.missing == (), "no chain has these stages"


def test_a_draft_model(tmp_path: Path) -> None:
    named = {
        "here": {"use": "speculate", "draft_model": "smollm2-135m-instruct"},
        "nowhere": {"use": "speculate", "draft_model": "nobody/nothing"},
    }
    ready = found(tmp_path, stages=named, pipelines={"a": ("here",)})
    assert ready.missing == () and "draft model smollm2-135m-instruct" in ready.fetched()
    ready = found(tmp_path, stages=named, pipelines={"a": ("nowhere",)})
    assert "'nobody/nothing' is not available" in said(ready) and ready.to_fetch.draft_models == ()
    assert found(tmp_path, stages=named).to_fetch.draft_models == (), "no chain has these stages"


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "whole"}\n{"text": ')
    ready = found(tmp_path, benchmark=quality(perplexity=str(file)))
    assert "rows.jsonl:2: not JSON" in said(ready)


def test_a_task_is_fetched_and_lm_eval_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = quality(tasks=("arc_easy",))
    ready = found(tmp_path, benchmark=tasks)
    assert ready.to_fetch.tasks == ("arc_easy", "arithmetic")
    assert ready.missing == ()
    find = compose.extras.find_spec
    monkeypatch.setattr(
        compose.extras, "find_spec", lambda name: None if name == "lm_eval" else find(name)
    )
    assert said(found(tmp_path, benchmark=tasks)) == (
        "the library lm_eval is not installed\n  fix: pip install 'gateskip-compose[eval]'"
    )


def test_a_task_that_is_here_is_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("GATESKIP_DATA", str(tmp_path / "data"))
    for name in ("arc_easy", "arithmetic"):
        (tmp_path / "data" / f"{TASKS[name].local}.jsonl").write_text("{}\n")
    assert found(tmp_path, benchmark=quality(tasks=("arc_easy",))).to_fetch.tasks == ()


def test_a_model_of_the_hub_without_a_hub(tmp_path: Path) -> None:
    ready = found(tmp_path, model={"source": "nobody/nothing"})
    assert "model 'nobody/nothing' is not available here" in said(ready)
    alias = found(tmp_path)
    assert alias.missing == () and alias.to_fetch.model == "smollm2-135m-instruct"


def test_a_library_of_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = compose.extras.find_spec
    gone = ("gptqmodel", "auto_round", "optimum")
    monkeypatch.setattr(
        compose.extras, "find_spec", lambda name: None if name in gone else find(name)
    )
    stages = {
        "gptq": {"use": "gptq", "bits": 4, "group_size": 64},
        "rounded": {"use": "autoround"},
    }
    chains = {"a": ("gptq",), "b": ("rounded",)}
    data = {"calibration": {"source": "prompts"}}
    lines = said(found(tmp_path, stages=stages, pipelines=chains, data=data)).splitlines()
    assert lines == [
        "the libraries gptqmodel, optimum are not installed",
        "  fix: pip install 'gateskip-compose[compress]'",
        "the library auto_round is not installed",
        "  fix: pip install 'gateskip-compose[autoround]'",
    ]


def test_another_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    against = {"against": ("llama.cpp:q4_0", "llama.cpp:q8_0", "transformers", "openvino:int4")}
    monkeypatch.setattr(preflight, "compilers", lambda: ["g++"])
    ready = found(tmp_path, benchmark=against)
    assert ready.missing == ()
    assert ready.to_fetch.peers == ("llama.cpp:q4_0", "llama.cpp:q8_0", "openvino:int4")
    assert ready.fetched()[-2:] == [
        "llama.cpp (compiled, some minutes)",
        "openvino (installed, some minutes)",
    ]
    monkeypatch.setattr(preflight, "compilers", list)
    assert "llama.cpp is compiled on this machine, which has no C++ compiler" in said(
        found(tmp_path, benchmark=against)
    )
    for name in ("llama.cpp", "openvino"):
        folder = environment_folder(ENGINES[name], tmp_path / "cache")
        folder.mkdir(parents=True)
        (folder / fetch.RECORD).write_text("{}")
    ready = found(tmp_path, benchmark=against)
    assert ready.missing == () and ready.to_fetch.peers == ()


def test_a_file_of_another_engine(tmp_path: Path) -> None:
    ready = found(tmp_path, benchmark={"against": (f"llama.cpp:{tmp_path}/no.gguf",)})
    assert f"there is no file {tmp_path}/no.gguf" in said(ready)


DROPPED: dict[str, Any] = {
    "stages": {"drop": {"use": "drop-layers", "count": 1}},
    "pipelines": {"cut": ("drop",)},
    "data": {"calibration": {"source": "prompts"}},
}


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 100_000_000})
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: usage)
    ready = found(tmp_path, **DROPPED)  # 130 million weights in float32
    assert "the steps write about 523.8 MB" in said(ready)
    assert "where 100.0 MB are free" in said(ready) and "gateskip cache prune" in said(ready)
    usage.free = 500_000_000
    assert found(tmp_path, **DROPPED).missing == (), "an estimate has a margin"


def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = type("Free", (), {"available": 400_000_000, "free": 100_000_000})
    monkeypatch.setattr(room, "free_memory", lambda: free.available)
    monkeypatch.setattr(room.psutil, "swap_memory", lambda: free)
    shape = ModelShape.from_config(MODELS["smollm2-135m-instruct"].config)
    plan = make_plan(small(**DROPPED, matrix=None), shape)
    settings = Settings(tmp_path, tmp_path / "cache")
    folder = RunFolder.of(plan, tmp_path)

    def told(*, local: bool) -> str:
        steps = list(plan.steps)
        lacking = room.missing_room(plan, folder, settings, steps, list(plan.cells), local=local)
        return "\n".join(map(str, lacking))

    assert told(local=True).startswith(
        "step drop needs about 1.2 GB of memory, and 500.0 MB are free"
    )
    assert "end other programs" in told(local=True)
    assert told(local=False) == "", "other machines have a memory of their own"


def test_everything_comes_in_one_list(tmp_path: Path) -> None:
    """What a worker could not fetch stands beside what was missing before; nothing is computed."""
    script = Script()
    script.lacking = [("task 'arc_easy' is not available here", "go online once")]
    plan = make_plan(
        small(
            data={"calibration": {"source": "nobody/nothing"}},
            benchmark={"quality": {"tasks": ("arc_easy",)}},
        )
    )
    with pytest.raises(UserError) as caught:
        go(tmp_path, script, plan)
    assert caught.value.exit_code == 2
    lines = str(caught.value).splitlines()
    assert lines[0] == "the run cannot start, 2 things are missing:"
    assert lines[1].startswith("  data 'nobody/nothing' is not available here")
    assert lines[2].startswith("    fix: go online once")
    assert lines[3:] == ["  task 'arc_easy' is not available here", "    fix: go online once"]
    assert script.log == [], "neither a step nor a cell has begun"
    assert script.live == 0 and not (tmp_path / "small" / "plan.json").exists()


def test_a_run_that_is_refused_loses_nothing(tmp_path: Path) -> None:
    go(tmp_path, Script())
    script = Script()
    script.lacking = [("text heldout-text", "go online once")]
    with pytest.raises(UserError, match="the run cannot start: text heldout-text"):
        go(tmp_path, script, again=True)
    again = Script()
    go(tmp_path, again)
    assert again.log == []


def test_a_finished_run_needs_nothing(tmp_path: Path) -> None:
    go(tmp_path, Script())
    script = Script()
    script.lacking = [("the model", "go online once")]
    assert go(tmp_path, script).worked is False


def test_what_a_worker_fetches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is tried; an environment only where nothing else is missing."""
    built: list[str] = []
    monkeypatch.setattr("compose.workers.fetch.python_of", lambda engine, *_: built.append(engine))
    file = tmp_path / "some.txt"
    file.write_text("text")
    job = FetchJob(
        cache=tmp_path / "cache",
        model="nobody/nothing",
        keep_blocks=False,
        texts=(("nobody/other", str(file)), ("nobody/third",)),
        tasks=(),
        peers=("llama.cpp:q4_0", "llama.cpp:q8_0"),
    )
    told: list[str] = []
    lacking = fetched(job, lambda done, total, phase, **_: told.append(phase))
    assert [what.partition(" is not")[0] for what, _ in lacking] == [
        "data 'nobody/third'",
        "model 'nobody/nothing'",
    ]
    assert all(fix is not None and "go online once" in fix for _, fix in lacking)
    assert told == ["text nobody/other", "text nobody/third", "model nobody/nothing"]
    assert built == []
    whole = FetchJob(job.cache, None, False, job.texts[:1], (), job.peers)
    assert fetched(whole, lambda *_, **__: None) == []
    assert built == [ENGINES["llama.cpp"]], "once an engine"


FILE = """\
schema: 1
name: tiny
model: {{source: {model}}}
stages: {{drop: {{use: drop-layers, count: 1}}}}
pipelines: {{cut: [drop]}}
data: {{calibration: {{source: nobody/nothing}}}}
benchmark:
  quality: {{perplexity: nobody/other, own_answers: null}}
  speed: {{prompts: prompts}}
"""


@pytest.fixture
def file(tiny_llama: Path, tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(FILE.format(model=tiny_llama))
    return file


def test_the_command_ends_with_2_before_the_first_step(file: Path, tmp_path: Path) -> None:
    """As a process does it, with real workers where there were any."""
    done = CliRunner().invoke(app, ["run", str(file), "--out", str(tmp_path / "runs")])
    assert done.exit_code == 2, done.output
    assert "error: the run cannot start, 2 things are missing:" in done.output
    assert "data 'nobody/nothing' is not available" in done.output
    assert "data 'nobody/other' is not available" in done.output
    assert not (tmp_path / "runs" / "store").exists()


def test_a_plan_shows_what_is_missing(file: Path, tmp_path: Path) -> None:
    arguments = ["plan", str(file), "--out", str(tmp_path / "runs")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "the run cannot start, 2 things are missing:" in done.output
    state = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert [lacking["what"].partition(" is not")[0] for lacking in state["missing"]] == [
        "data 'nobody/nothing'",
        "data 'nobody/other'",
    ]
    assert state["to_fetch"] == []


def test_a_search_ends_before_its_first_chain(file: Path, tmp_path: Path) -> None:
    """Also where the text is read by the last rung alone."""
    arguments = [
        "search",
        str(file),
        "--minimize",
        "size_mb",
        "--at-most-kl",
        "1",
        "--out",
        str(tmp_path / "runs"),
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2, done.output
    assert "the run cannot start, 2 things are missing:" in done.output
    assert not (tmp_path / "runs" / "tiny-search").exists()


def test_a_bench_ends_before_it_loads(tiny_llama: Path, tmp_path: Path) -> None:
    arguments = ["bench", str(tiny_llama), "--quality", "--text", "nobody/nothing"]
    arguments += ["--prompts", "prompts", "--out", str(tmp_path / "runs")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2, done.output
    assert "the run cannot start: data 'nobody/nothing' is not available here" in done.output
