"""A cell's process measures what its result names: sizes, quality, losslessness, speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compose.assets import default_cache
from compose.bench.cell import CellBench
from compose.bench.job import CellJob
from compose.language.schema import Benchmark
from compose.results.schema import CellResult


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
        CellJob(
            name="cell",
            folder=folder,
            baseline_folder=folder,
            decode=decode,
            benchmark=benchmark,
            seed=0,
            dtype="float32",
            asset_cache=default_cache(),
            reference=scratch / "reference",
            threads=None,
        )
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
    speed = bench.speed(0, 2, 1)
    assert speed["decode_tokens_per_s"] > 0 and speed["peak_bytes"] > 0
    cell = CellResult.model_validate({"name": "cell", "chain": (), "status": "ok", **loaded})
    assert cell.arithmetic is not None
    assert cell.arithmetic.backend == bench.decoder.arithmetic.backend
    assert cell.size is not None and cell.size.disk_bytes == loaded["size"]["disk_bytes"]


def test_speculation_is_checked_with_drafts(
    tiny_llama: Path, benchmark: dict[str, Any], tmp_path: Path
) -> None:
    """A cell that would choose its draft length by itself is forced to draft."""
    decode = {"use": "speculate", "draft_budget": 1.0, "draft_length": "auto", "target": "gated"}
    bench = _bench(tiny_llama, benchmark, tmp_path, decode)
    checked = bench.lossless()
    assert checked["lossless"] and checked["first_divergence"] is None
    assert checked["acceptance_rate"] == 1.0, "a draft at full compute is the model"
    assert checked["checked_draft_length"] == 3
    assert checked["tokens"] == 16
    assert "draft_s" in bench.speed(0, 1, 1)["speculation"]
