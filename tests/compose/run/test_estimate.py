"""`gateskip plan --estimate`: time, memory and disk from measured costs, worked by hand."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import scale

from compose.language.schema import Pipeline
from compose.outputs.run_folder import RunFolder
from compose.planning.planner import make_plan
from compose.results.io import load_results
from compose.run.costs import (
    COMPARED,
    SCORED,
    Cost,
    cell_costs,
    cell_passes,
    kind_of_cell,
    step_costs,
    step_passes,
)
from compose.run.estimate import Estimates, estimate, folder_size, seconds_of, speed_seconds
from compose.stages.registry import STAGES, DataSpec, ModelShape
from compose.store import Store, write_json

ROOT = Path(__file__).resolve().parents[3]
SHAPE = ModelShape("llama", 64, 128, 4, 4, 2, 16, 512, tie_embeddings=True)
WEIGHTS = 512 * 64 + 4 * (64 * 16 * (2 * 4 + 2 * 2) + 3 * 64 * 128)
DATA = {
    "train": DataSpec(source="a.txt", limit=10, length=16),
    "calibration": DataSpec(source="a.txt", limit=4, length=32),
}
BY_NEED = {"bits_per_weight": 5, "among": [4, 6], "by": "gradients"}
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "tie_word_embeddings": True,
}


def stage(**parameters: Any) -> Any:
    return STAGES[parameters["use"]].model_validate(parameters)


def cost(passes: float, seconds: float, kind: str = "int8") -> Cost:
    return Cost(kind, passes, WEIGHTS, seconds, 5, 7, "store/x")


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        (None, 1),
        ({"use": "drop-layers", "count": 1}, 1 + 4 * 32),
        ({"use": "int8"}, 1),
        ({"use": "int8", "compensate": True}, 1 + 4 * 32 + 64),
        ({"use": "int4", "allocate": BY_NEED}, 1 + 4 * 32 + 64 + 2 * 3 * 500),
        ({"use": "pack-head"}, None),
        ({"use": "heal", "steps": 3, "batch": 2, "length": 8}, 1 + 4 * 3 * 2 * 8),
        ({"use": "gate", "steps": 3, "batch": 2, "length": 8}, 1 + 4 * 8 + 4 * 3 * 2 * 8),
    ],
)
def test_passes_are_weights_times_tokens(given: dict[str, Any] | None, tokens: int | None) -> None:
    made = None if given is None else stage(**given)
    passes = step_passes(made, SHAPE, DATA)
    assert SHAPE.weights == WEIGHTS
    if tokens is not None:
        accumulate = getattr(made, "accumulate", 1)
        assert accumulate == 1
        assert passes == WEIGHTS * tokens


def test_passes_of_a_cell() -> None:
    quality = {"perplexity": ["a"], "perplexity_tokens": 50, "tasks": ["b"], "limit": 3}
    quality |= {"own_answers": {"prompts": 2, "new_tokens": 5}}
    benchmark = {"quality": quality, "lossless": {"prompts": 2, "new_tokens": 5}}
    assert cell_passes(10, benchmark) == 10 * (1 + 50 + 300 + 10)
    assert cell_passes(10, benchmark, COMPARED) == 10 * (1 + 20)
    assert cell_passes(10, {}) == 10


def test_seconds_follow_a_line_through_what_was_measured() -> None:
    assert seconds_of(10.0, []) == (None, 0)
    assert seconds_of(30.0, [cost(10, 5.0)]) == (15.0, 1)
    assert seconds_of(30.0, [cost(10, 5.0), cost(10, 7.0)]) == (18.0, 2)
    assert seconds_of(30.0, [cost(10, 5.0), cost(20, 8.0)]) == (pytest.approx(11.0), 2)
    falling = [cost(10, 8.0), cost(20, 5.0)]
    assert seconds_of(30.0, falling) == (pytest.approx(13.0), 2), "a line that falls is no cost"


def plan(**changes: Any) -> Any:
    stages = {
        "small": {"use": "int8", "compensate": True},
        "drop": {"use": "drop-layers", "count": 1},
    }
    return make_plan(
        Pipeline.model_validate(
            {
                "schema": 1,
                "name": "x",
                "model": {"source": "smollm2-135m-instruct"},
                "stages": stages,
                "pipelines": {"a": ("small",), "b": ("drop",)},
                "benchmark": {"speed": {"repeats": 3, "min_seconds": 2.0, "batch_sizes": (1, 4)}},
                **changes,
            }
        ),
        SHAPE,
    )


def entry(store: Store, key: str, use: str, parameters: dict[str, Any], seconds: float) -> None:
    """A stored step with the records that estimates read."""
    with store.locked(key), store.write(key, {"wall_s": seconds, "peak_bytes": 123}) as folder:
        (folder / "model").mkdir()
        write_json(folder / "model" / "config.json", CONFIG)
        told = {"name": use, "use": use, "parameters": parameters}
        told["data"] = {"calibration": DATA["calibration"].model_dump()}
        write_json(folder / "model" / "compose.json", {"stages": [told]})


def test_what_is_stored_is_measured_what_is_like_it_is_scaled_the_rest_is_unknown(
    tmp_path: Path,
) -> None:
    made = plan()
    run = RunFolder.of(made, tmp_path)
    source, small, drop = made.steps
    entry(run.store, source.key, "source", {"source": "x"}, 2.0)
    other = stage(use="int6").model_dump(mode="json")
    other.pop("use")
    entry(run.store, "0123456789abcdef", "int6", other, 10.0)
    entry(run.store, "fedcba9876543210", "gone-stage", {}, 10.0)
    assert {cost.kind for cost in step_costs(run.store)} == {"source", "integers"}
    found = estimate(made, run, SHAPE)
    by_name = {each.name: each for each in (*found.steps, *found.cells)}
    assert (by_name["source"].basis, by_name["source"].seconds) == ("measured", 2.0)
    assert by_name["source"].peak_bytes == 123
    scaled = by_name["small"]
    calibration = made.pipeline.data.calibration
    ratio = (1 + calibration.limit * calibration.length + 64) / (1 + 4 * 32 + 64)
    assert (scaled.basis, scaled.from_records) == ("scaled", 1)
    assert scaled.seconds == pytest.approx(10.0 * ratio)
    assert scaled.peak_bytes == small.memory
    assert by_name["drop"].seconds is None and by_name["drop"].basis == "shape"
    assert by_name["drop"].disk_bytes == folder_size(made, drop, drop.stage.reshape(SHAPE))
    assert "drop" in found.unknown and "dense" in found.unknown
    assert found.speed_seconds == speed_seconds(made) == 3 * 2 * 3 * 2.0
    told = found.to_json()
    assert told["seconds"] is None, "drop has no record"
    assert told["known_seconds"] == pytest.approx(2.0 + 10.0 * ratio + 36.0, abs=0.1)
    whole = Estimates((by_name["source"], scaled), (), found.speed_seconds)
    assert whole.to_json()["seconds"] == told["known_seconds"]


def test_without_a_shape_nothing_is_made_up(tmp_path: Path) -> None:
    found = estimate(plan(), RunFolder.of(plan(), tmp_path), None)
    assert all(each.seconds is None and each.disk_bytes is None for each in found.steps)
    assert found.known_seconds == found.speed_seconds
    assert found.seconds is found.peak_bytes is found.disk_bytes is found.scratch_bytes is None


def test_packed_folders_are_smaller() -> None:
    made = plan()
    dense, small, drop = made.steps
    assert folder_size(made, dense, SHAPE) == 4 * WEIGHTS
    assert folder_size(made, small, SHAPE) < 2 * WEIGHTS
    assert folder_size(made, drop, drop.stage.reshape(SHAPE)) < 4 * WEIGHTS


def test_cells_of_one_kind_cost_alike() -> None:
    assert kind_of_cell(None, speculating=False) == SCORED
    assert kind_of_cell(None, speculating=True) == COMPARED
    assert kind_of_cell("llama.cpp:q8_0", speculating=False) == "llama.cpp"
    assert kind_of_cell("llama.cpp:q4_0+imatrix", speculating=False) == "llama.cpp with a text"


def test_another_engine_is_scaled_from_its_own_cells(tmp_path: Path) -> None:
    """By the published run of peers, on a model of twice the weights."""
    published = ROOT / "reports" / "published" / "peers" / "results.json"
    (tmp_path / "peers").mkdir()
    shutil.copy(published, tmp_path / "peers")
    seconds = [
        cell.seconds
        for cell in load_results(published).measured
        if cell.name.startswith("llama.cpp") and not cell.name.endswith("+imatrix")
    ]
    costs = {cost.where: cost for cost in cell_costs(tmp_path)}
    same = [cost for cost in costs.values() if cost.kind == "llama.cpp"]
    assert sorted(cost.seconds for cost in same) == sorted(seconds) and len(same) == 4
    twice, count = seconds_of(2 * same[0].passes, same)
    assert (twice, count) == (pytest.approx(2 * statistics.mean(seconds)), 4)


def test_an_engine_of_another_version_is_left_out(tmp_path: Path) -> None:
    results = json.loads((ROOT / "reports/published/peers/results.json").read_text())
    (tmp_path / "peers").mkdir()
    write_json(tmp_path / "peers" / "results.json", results)
    before = {cost.where for cost in cell_costs(tmp_path)}
    (cell,) = [cell for cell in results["cells"] if cell["name"] == "llama.cpp:q4_0"]
    cell["name"] = "llama.cpp:gone"
    write_json(tmp_path / "peers" / "results.json", results)
    assert before - {cost.where for cost in cell_costs(tmp_path)} == {"peers: llama.cpp:q4_0"}


def test_the_page_has_the_numbers_of_now() -> None:
    page = scale.PAGE.read_text("utf-8")
    assert scale.filled(page) == page, "python tools/scale.py --write"
    assert "1,000 cells on 70B weights" in page


def test_the_command_shows_a_table_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from compose.terminal.commands.pipelines import plan as command

    file = tmp_path / "a.yaml"
    file.write_text(
        "schema: 1\nname: a\nmodel: {source: smollm2-135m-instruct}\n"
        "stages: {small: {use: int8}}\npipelines: {p: [small]}\n"
    )
    command(file, tmp_path, as_json=True, estimate=True)
    told = json.loads(capsys.readouterr().out)
    assert [step["name"] for step in told["steps"]] == ["source", "small"]
    assert told["without_seconds"] == ["source", "small", "dense", "p"]
    assert told["disk_bytes"] > 4 * 134_000_000
    command(file, tmp_path, as_json=False, estimate=True)
    out = capsys.readouterr().out
    assert "time: unknown for all steps and cells" in out
    assert "no earlier record of: source, small, dense, p" in out
    assert out.count("unknown") == 5, "one in each row, and the total"
