"""`gateskip bench` times every system on the same prompts, and says whose tokens differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import gateskip
from compose.bench.race import race
from compose.bench.roofline import roofline
from compose.bench.systems import parse_system
from compose.bench.tune import tune
from compose.errors import UserError
from gateskip.decoding.decoder import MAX_DRAFT


def test_systems_are_named_in_words() -> None:
    assert parse_system("skip:0.8").settings == {"mode": "skip", "budget": 0.8}
    assert parse_system("draft:1.0+nf4+lookup+4").settings == {
        "mode": "speculate",
        "draft_budget": 1.0,
        "draft_weights": "nf4",
        "lookup": True,
        "draft_length": 4,
    }
    assert parse_system("gathered:skip:0.8").settings == {"mode": "skip", "budget": 0.8}
    assert parse_system("reference").backend == "reference"
    assert parse_system("plain").backend is None
    for wrong in ("dense", "skip:much", "draft:0.5+fast", "native:transformers", "native:native"):
        with pytest.raises(UserError, match="system"):
            parse_system(wrong)


def test_systems_are_counted_alike(tiny_llama: Path, tmp_path: Path) -> None:
    asked = [
        {"category": "one", "prompt": "Redistribution and use"},
        {"category": "two", "prompt": "Subject to the terms"},
        {"category": "two", "prompt": "Licensed under"},
        {"category": "two", "prompt": "left out"},
    ]
    file = tmp_path / "asked.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in asked))
    ways = ["plain", "reference", "gathered", "transformers", "draft:1.0+4"]
    found = race(tiny_llama, ways, [1], [8], 12, 2, prompts=str(file), limit=2)
    assert [(each["system"], each["workload"]) for each in found["measurements"]] == [
        (way, workload) for way in ways for workload in ("one", "two")
    ]
    backends = [
        each["arithmetic"] and each["arithmetic"]["backend"] for each in found["measurements"]
    ]
    assert backends[2:8] == ["reference", "reference", "gathered", "gathered", None, None]
    for each in found["measurements"]:
        assert each["equal_to_first"], "greedy text is greedy text"
        assert len(each["decode_tokens_per_s"]["repeats"]) == 2
        assert each["decode_tokens_per_s"]["min"] > 0
        assert each["skipped_branch_tokens"] == 0.0
    assert found["measurements"][-1]["acceptance_rate"] == 1.0, (
        "a draft at full compute is the model"
    )


def test_what_a_folder_cannot_do_is_named(tiny_llama: Path) -> None:
    with pytest.raises(UserError, match="no gates"):
        race(tiny_llama, ["skip:0.8"], [1], [8], 4, 1)


def test_memory_is_reported_where_nothing_else_runs(tiny_llama: Path) -> None:
    found = race(tiny_llama, ["plain"], [2], [8], 4, 1)
    cache = gateskip.load(tiny_llama).skipping.new_cache(2, 8 + 4 + MAX_DRAFT)
    assert found["cache_bytes"] == cache.nbytes()
    assert isinstance(found["other_bytes"], int)
    assert race(tiny_llama, ["plain", "reference"], [2], [8], 4, 1)["other_bytes"] is None


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
    found = tune(folder, str(file), None, 8, 1)
    tried = {each["system"] for each in found["first"]}
    kinds = ("+int4", "+nf4", "+int4+lookup", "+nf4+lookup", "+lookup", "+int4-head+lookup")
    assert tried == {"plain", *(f"draft:1{kind}" for kind in kinds)}
    assert all(each["equal_to_first"] for each in found["second"]), "drafts change no token"
    assert found["best"] in {each["system"] for each in found["second"]}
    assert gateskip.load(folder).defaults == found["decode"]
    before = (folder / "gateskip.json").read_bytes()
    tune(folder, str(file), 1, 8, 1, write=False)
    assert (folder / "gateskip.json").read_bytes() == before
