"""`device: cuda`: part of keys, passed to workers, refused by name where it has no path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from compose.cli import app
from compose.contract import CellJob, from_json, to_json
from compose.errors import ArtifactError
from compose.language.schema import Pipeline
from compose.outputs.run_folder import RunFolder
from compose.planning.bench_plan import bench_plan
from compose.planning.plan import Plan, cell_needs, step_needs
from compose.planning.planner import make_plan
from compose.run import preflight
from compose.run.preflight import look
from compose.run.state import Settings
from compose.store import Store

STAGES = {
    "narrow": {"use": "prune-width", "ratio": 0.1},
    "heal": {"use": "heal", "steps": 1},
    "int4": {"use": "int4"},
    "gptq": {"use": "gptq"},
    "head": {"use": "pack-head"},
    "copy": {"use": "speculate", "draft_weights": "int4"},
}
PLAIN = {"quality": {"perplexity": None, "own_answers": None}, "speed": {"prompts": "prompts"}}


def plan_on(device: str | None, benchmark: Any = None, **pipelines: list[str]) -> Plan:
    model = {"source": "smollm2-135m-instruct"} | ({} if device is None else {"device": device})
    used = {name: STAGES[name] for chain in pipelines.values() for name in chain}
    given = {"schema": 1, "name": "small", "model": model, "stages": used}
    given |= {"pipelines": pipelines, "benchmark": {**PLAIN, **(benchmark or {})}}
    return make_plan(Pipeline.model_validate(given))


def missing(folder: Path, plan: Plan) -> str:
    ready = look(
        plan, RunFolder.of(plan, folder), Settings(folder, folder / "cache"), [*plan.cells]
    )
    return "\n".join(map(str, ready.missing))


def test_the_device_is_part_of_keys_unless_it_is_the_cpu() -> None:
    chain = ["narrow", "heal"]
    usual, cpu, cuda = (plan_on(device, small=chain) for device in (None, "cpu", "cuda"))
    assert [step.key for step in usual.steps] == [step.key for step in cpu.steps]
    assert [cell.key for cell in usual.cells] == [cell.key for cell in cpu.cells]
    assert usual.steps[0].key == cuda.steps[0].key  # the stored source is the same
    assert {step.key for step in usual.steps[1:]}.isdisjoint(step.key for step in cuda.steps[1:])
    assert {cell.key for cell in usual.cells}.isdisjoint(cell.key for cell in cuda.cells)


def test_workers_on_a_cluster_get_a_gpu_for_a_device(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for device, gpu in (("cpu", False), ("cuda", True)):
        plan = plan_on(device, small=["narrow", "heal"])
        healed = next(step for step in plan.steps if step.name == "heal")
        assert step_needs(plan, healed).gpu is gpu
        assert cell_needs(plan, plan.cells[0], store).gpu is gpu


def test_a_machine_without_cuda_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "_has_cuda", lambda: False)
    told = missing(tmp_path, plan_on("cuda"))
    assert "device: cuda: torch finds no CUDA device on this machine" in told
    assert "fix: set device: cpu in the model section, or install" in told
    assert missing(tmp_path, plan_on("cpu")) == ""
    monkeypatch.setattr(preflight, "_has_cuda", lambda: True)
    assert missing(tmp_path, plan_on("cuda", small=["narrow", "heal"])) == ""


@pytest.mark.parametrize(
    ("benchmark", "pipelines", "why"),
    [
        ({}, {"small": ["gptq"]}, "small has no path on cuda: gptq weights are decoded on a CPU"),
        ({}, {"small": ["head"]}, "small has no path on cuda: an LM head that is packed by itself"),
        ({}, {"fast": ["copy"]}, "fast has no path on cuda: draft_weights: int4 needs"),
        ({"against": ["transformers"]}, {}, "transformers has no path on cuda: other engines"),
    ],
)
def test_what_has_no_path_on_a_device_is_refused_by_name(
    benchmark: Any,
    pipelines: dict[str, list[str]],
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preflight, "_has_cuda", lambda: True)
    assert why in missing(tmp_path, plan_on("cuda", benchmark, **pipelines))


def test_integers_need_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_has_cuda", lambda: True)
    plan = plan_on("cuda", small=["int4"])
    monkeypatch.setattr("compose.extras.find_spec", lambda name: None)
    told = missing(tmp_path, plan)
    assert "triton is not installed" in told and "'gateskip-compose[gpu]'" in told
    monkeypatch.setattr("compose.extras.find_spec", lambda name: name)
    assert missing(tmp_path, plan) == ""


def test_a_backend_of_the_cpu_is_refused_by_name(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "_has_cuda", lambda: True)
    benchmark: dict[str, Any] = {**PLAIN}
    plan = bench_plan("b", [tiny_llama], ["native:plain", "plain"], [], benchmark, "cuda")
    told = missing(tmp_path, plan)
    assert "native:plain has no path on cuda: the native backend runs on a CPU" in told
    assert told.count("no path") == 1
    cpu = bench_plan("b", [tiny_llama], ["native:plain", "plain"], [], benchmark)
    assert {cell.key for cell in plan.cells}.isdisjoint(cell.key for cell in cpu.cells)


def test_training_runs_where_a_step_says() -> None:
    from gateskip.training.loop import training_device, training_on

    with training_on("cuda"):
        assert training_device().type == "cuda"
        with training_on("cpu"):
            assert training_device().type == "cpu"


def test_a_job_names_its_device(tmp_path: Path) -> None:
    from jobs import cell_job

    job = cell_job(tmp_path, tmp_path, device="cuda")
    again = from_json("cell", to_json(job))
    assert isinstance(again, CellJob) and again.device == "cuda"


def test_the_command_line_refuses_an_unknown_device(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["generate", str(tmp_path), "Hi", "--device", "tpu"])
    assert done.exit_code == 2 and "--device tpu: no such device" in done.output


def test_a_folder_on_a_device_that_is_not_here(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from compose.bench.generate import open_decoder

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArtifactError, match="torch finds no CUDA device on this machine"):
        open_decoder(tiny_llama, device="cuda")
