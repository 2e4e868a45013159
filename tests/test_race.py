"""`gateskip bench` times every contender on the same prompts, and says whose tokens differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import gateskip
from compose.bench.race import contender, race, roofline
from compose.bench.tune import tune
from compose.errors import UserError
from gateskip.decoding.decoder import MAX_DRAFT


def test_contenders_are_named_in_words() -> None:
    assert contender("skip:0.8").settings == {"mode": "skip", "budget": 0.8}
    assert contender("draft:1.0+nf4+lookup+4").settings == {
        "mode": "speculate",
        "draft_budget": 1.0,
        "draft_weights": "nf4",
        "lookup": True,
        "draft_length": 4,
    }
    assert contender("eager:skip:0.8").settings == {"mode": "skip", "budget": 0.8}
    assert contender("eager").eager and not contender("plain").eager
    for wrong in ("dense", "skip:much", "draft:0.5+fast", "eager:transformers", "eager:eager"):
        with pytest.raises(UserError, match="contender"):
            contender(wrong)


def test_laps_are_counted_alike(tiny_llama: Path, tmp_path: Path) -> None:
    asked = [
        {"category": "one", "prompt": "Redistribution and use"},
        {"category": "two", "prompt": "Subject to the terms"},
        {"category": "two", "prompt": "Licensed under"},
        {"category": "two", "prompt": "left out"},
    ]
    file = tmp_path / "asked.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in asked))
    ways = ["plain", "eager", "transformers", "draft:1.0+4"]
    found = race(tiny_llama, ways, [1], [8], 12, 2, prompts=str(file), limit=2)
    assert [(lap["contender"], lap["course"]) for lap in found["laps"]] == [
        (way, course) for way in ways for course in ("one", "two")
    ]
    for lap in found["laps"]:
        assert lap["equal_to_first"], "greedy text is greedy text"
        assert len(lap["decode_tokens_per_s"]["repeats"]) == 2
        assert lap["decode_tokens_per_s"]["least"] > 0
        assert lap["skipped_branch_tokens"] == 0.0
    assert found["laps"][-1]["acceptance_rate"] == 1.0, "a draft at full compute is the model"


def test_what_a_folder_cannot_do_is_named(tiny_llama: Path) -> None:
    with pytest.raises(UserError, match="no gates"):
        race(tiny_llama, ["skip:0.8"], [1], [8], 4, 1)


def test_memory_is_told_where_nothing_else_runs(tiny_llama: Path) -> None:
    found = race(tiny_llama, ["plain"], [2], [8], 4, 1)
    cache = gateskip.load(tiny_llama).skipping.new_cache(2, 8 + 4 + MAX_DRAFT)
    assert found["cache"] == cache.nbytes()
    assert isinstance(found["beside"], int)
    assert race(tiny_llama, ["plain", "eager"], [2], [8], 4, 1)["beside"] is None


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
    tried = {lap["contender"] for lap in found["first"]}
    kinds = ("+int4", "+nf4", "+int4+lookup", "+nf4+lookup", "+lookup", "+int4-head+lookup")
    assert tried == {"plain", *(f"draft:1{kind}" for kind in kinds)}
    assert all(lap["equal_to_first"] for lap in found["second"]), "drafts change no token"
    assert found["best"] in {lap["contender"] for lap in found["second"]}
    assert gateskip.load(folder).defaults == found["decode"]
    before = (folder / "gateskip.json").read_bytes()
    tune(folder, str(file), 1, 8, 1, write=False)
    assert (folder / "gateskip.json").read_bytes() == before
