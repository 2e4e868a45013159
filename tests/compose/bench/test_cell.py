"""A cell's process measures what its result names: sizes, quality, losslessness, speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jobs import cell_job
from transformers import AutoTokenizer

from compose.assets import default_cache, token_blocks
from compose.bench.cell import CellBench
from compose.bench.speed.workloads import TurnText, add_turns, categories, rows_of, running_text
from compose.language.schema import Benchmark
from compose.results.schema import CellResult
from compose.results.speculation import LosslessCheck
from gateskip.decoding.config import MAX_DRAFT
from gateskip.decoding.draft_length import DraftLengthController

OWN: dict[str, Any] = {"draft_weights": "own", "draft_budget": 1.0, "lookup": False}


@pytest.fixture
def benchmark() -> dict[str, Any]:
    """Settings small enough for a model of four layers."""
    settings = Benchmark().model_dump(mode="json")
    settings["quality"] |= {"perplexity": ["heldout-text"], "perplexity_tokens": 512, "tasks": []}
    settings["lossless"] |= {"prompts": 2, "new_tokens": 8}
    settings["speed"] |= {"prompt_tokens": 16, "new_tokens": 8}
    return settings


def _bench(
    folder: Path, benchmark: dict[str, Any], scratch: Path, decode: dict[str, Any] | None
) -> CellBench:
    return CellBench(
        cell_job(folder, scratch, decode=decode, benchmark=benchmark, asset_cache=default_cache())
    )


def test_each_phase_is_a_part_of_the_result(
    tiny_llama: Path, benchmark: dict[str, Any], tmp_path: Path
) -> None:
    bench = _bench(tiny_llama, benchmark, tmp_path, None)
    loaded = bench.load()
    assert loaded["size"]["disk_bytes"] > 0 and loaded["size"]["resident_bytes"] > 0
    assert loaded["scoring_arithmetic"]["weights"] == "float32"
    quality = bench.quality(tmp_path / "reference")
    assert quality["perplexity"]["tokens"] == 511
    assert quality["compute"] == {"saved_gross": 0.0, "saved_net": 0.0, "saved_model": 0.0}
    warmed, turn = bench.warm(TurnText(2, 16, "", 0), 1), bench.speed(TurnText(2, 16, "", 0))
    assert turn["prompt_tokens"] == 2 * 16
    assert turn["tokens"] == 2 * (8 - 1), "the first token of each row comes out of prefill"
    assert turn["decode_s"] > 0 and turn["peak_bytes"] > 0 and turn["threads"] == 1
    assert turn["digest"] == warmed["digest"], "greedy text is greedy text"
    assert turn["digest"] != bench.speed(TurnText(2, 16, "", 1))["digest"], "another round's text"
    assert turn["cache_bytes"] == bench.decoder.skipping.new_cache(2, 16 + 8 + MAX_DRAFT).nbytes()
    assert add_turns([turn, turn])["decode_tokens_per_s"] == turn["tokens"] / turn["decode_s"]
    cell = CellResult.model_validate({"name": "cell", "chain": (), "status": "ok", **loaded})
    assert cell.arithmetic is not None
    assert cell.arithmetic.backend == bench.decoder.arithmetic.backend
    assert cell.size is not None and cell.size.disk_bytes == loaded["size"]["disk_bytes"]


def test_speculation_is_checked_with_drafts(
    tiny_llama: Path, benchmark: dict[str, Any], tmp_path: Path
) -> None:
    """A cell that would choose its draft length by itself is forced to draft."""
    decode = {"use": "speculate", "draft_length": "auto", "target": "gated", **OWN}
    bench = _bench(tiny_llama, benchmark, tmp_path, decode)
    checked = bench.lossless()
    assert checked["lossless"] and checked["first_divergence"] is None
    assert checked["acceptance_rate"] == 1.0, "a draft at full compute is the model"
    assert len(checked["drafts_by_prompt"]) == 2
    assert all(drafted == accepted > 0 for drafted, accepted in checked["drafts_by_prompt"])
    assert checked["forced_draft_length"] == 3
    assert set(checked["forced_draft_length_histogram"]) <= {1, 2, 3}, "every pass drafts"
    assert 0 in checked["own_draft_length_histogram"], "the cell times a plain step first"
    assert checked["tokens"] == 2 * 16, "forced and own draft lengths, two prompts of 8 tokens"
    LosslessCheck.model_validate(checked)
    bench.warm(TurnText(1, 16, "", 0), 1)
    timed = bench.speed(TurnText(1, 16, "", 1))["speculation"]
    assert timed["passes"] == sum(timed["draft_length_histogram"].values())
    assert timed["drafted"] == sum(
        int(n) * times for n, times in timed["draft_length_histogram"].items()
    )


def test_what_the_check_forces_is_not_what_was_timed(
    tiny_llama: Path, benchmark: dict[str, Any], tmp_path: Path
) -> None:
    """Timed turns count the cell's own draft lengths, the check those that it forces."""
    decode = {"use": "speculate", "draft_length": "auto", "target": "gated", **OWN}
    bench = _bench(tiny_llama, benchmark, tmp_path, decode)
    plain_alone = DraftLengthController()
    plain_alone.draft_length = lambda: 0  # type: ignore[method-assign]
    bench.decoder._controller = lambda *kind: plain_alone  # type: ignore[method-assign]
    checked = bench.lossless()
    bench.warm(TurnText(1, 16, "", 0), 1)
    timed = bench.speed(TurnText(1, 16, "", 1))["speculation"]
    assert checked["acceptance_rate"] == 1.0
    assert timed["drafted"] == 0 and timed["draft_length_histogram"] == {"0": 7}
    assert checked["own_draft_length_histogram"] == {0: 14}


def test_prompts_of_a_category_end_as_answers_do(
    tiny_llama: Path, benchmark: dict[str, Any], tmp_path: Path
) -> None:
    asked = [
        {"category": "one", "prompt": "Redistribution and use"},
        {"category": "two", "prompt": "Subject to the terms"},
        {"category": "two", "prompt": "Licensed under"},
        {"category": "two", "prompt": "for the next round"},
    ]
    file = tmp_path / "asked.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in asked))
    benchmark["speed"] |= {"prompts": str(file), "prompts_per_category": 2}
    bench = _bench(tiny_llama, benchmark, tmp_path, None)
    one, two = (bench.warm(TurnText(1, 0, name, 0), 1) for name in ("one", "two"))
    assert one["tokens"] <= 7 and two["tokens"] <= 14
    assert two["prompt_tokens"] > one["prompt_tokens"]
    assert categories(str(file), None) == ["one", "two"]
    tokenizer, speed = bench.decoder.tokenizer, benchmark["speed"]
    first, second = (rows_of(tokenizer, TurnText(1, 0, "two", i), speed, None) for i in (0, 1))
    assert len(first) == len(second) == 2 and second[1] == first[0] != second[0] not in first


def test_rounds_read_other_text_until_it_begins_again(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    text = [" ".join(map(str, range(60)))]
    ids = token_blocks(text, tokenizer, 8).tolist()[:5]
    text = [tokenizer.decode([token for row in ids for token in row])]
    monkeypatch.setattr("compose.bench.speed.workloads.load_texts", lambda *of: text)
    ids = token_blocks(text, tokenizer, 8).tolist()
    assert len(ids) == 5
    found = [running_text(tokenizer, 2, 8, None, number) for number in range(3)]
    assert found == [ids[:2], ids[2:4], [ids[4], ids[0]]]
