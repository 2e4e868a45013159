"""Thresholds calibrated on what the model writes while it skips."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compose.contract import DataSpec
from compose.stages.gate import Gate
from compose.stages.prompts import prompts_to_answer
from gateskip.calibration.thresholds import Sample, calibrate_everywhere, kept_by
from gateskip.calibration.warm_start import warm_start
from gateskip.checkpoint import load_gates
from gateskip.quantization.folders import load_model
from gateskip.training.written_calibration import Written, calibrate_written, write_at

BUDGETS = (0.8, 0.6)


def test_the_last_token_of_an_answer_enters_nothing() -> None:
    written = Written.of([[5, 6, 7], [8]], [[9, 10, 11], [12]])
    assert written.ids.tolist() == [[5, 6, 7, 9, 10], [8, 0, 0, 0, 0]]
    assert written.phases["prompt"].tolist() == [[True] * 3 + [False] * 2, [True] + [False] * 4]
    assert written.phases["answer"].tolist() == [[False] * 3 + [True] * 2, [False] * 5]


def test_only_what_counts_is_counted(make_tiny: Callable[..., Path]) -> None:
    """Rows with padding keep what the same rows keep alone; the first token never counts."""
    model = load_model(make_tiny("llama"), "float32")
    blocks = torch.randint(3, 512, (2, 24), generator=torch.Generator().manual_seed(2))
    gates, _ = warm_start(model, blocks)
    thresholds = gates.requires_grad_(False).bias.tolist()
    places = torch.arange(24).expand(2, -1)
    halves = [Sample(blocks, places < 12), Sample(blocks, places >= 12)]
    first, second = (kept_by(model, gates, [each], thresholds) for each in halves)
    whole = kept_by(model, gates, blocks, thresholds)
    assert whole == pytest.approx((11 * first + 12 * second) / 23, abs=1e-5)
    padded = Sample(torch.nn.functional.pad(blocks, (0, 5)), torch.ones(2, 29, dtype=torch.bool))
    padded.counted[:, 24:] = False
    alone = kept_by(model, gates, [Sample.whole(blocks), padded], thresholds)
    assert alone == pytest.approx(whole, abs=0.01)


def test_what_is_written_keeps_the_budget(make_tiny: Callable[..., Path]) -> None:
    """Thresholds of other text miss the budget on answers; those of answers keep it."""
    model = load_model(make_tiny("llama"), "float32")
    blocks = torch.randint(3, 512, (4, 32), generator=torch.Generator().manual_seed(2))
    gates, _ = warm_start(model, blocks)
    gates.requires_grad_(False)
    text = calibrate_everywhere(model, gates, blocks, BUDGETS)
    prompts = [row[:5] for row in blocks.tolist()] * 3
    found = calibrate_written(model, gates, text, prompts, BUDGETS, new_tokens=24)

    def missed(thresholds: Any) -> float:
        fresh = write_at(model, gates, thresholds, prompts, 24, (), "project", 99)
        shares = (
            kept_by(model, gates, [own.sample("answer")], thresholds.thresholds[budget])
            for budget, own in fresh.items()
        )
        return max(abs(s - b) for s, b in zip(shares, fresh, strict=True))

    assert missed(found) < 0.03 and missed(found) < missed(text)
    assert set(found.phases[0.8]) == {"prompt", "answer"}
    assert found.phases[0.8]["answer"] == pytest.approx(0.8, abs=0.03)
    with pytest.raises(ValueError, match="end at once"):
        calibrate_written(model, gates, text, prompts, BUDGETS, new_tokens=1)


def test_the_stage_calibrates_on_answers(
    tiny_llama: Path, licence_text: Path, make_job: Callable[..., Any], tmp_path: Path
) -> None:
    """The shares of both phases stand in the record and in the folder; `text` tells neither."""
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(4)))
    text = DataSpec(source=str(licence_text), limit=8, length=32)
    train = DataSpec(mix={str(licence_text): 1.0, str(asked): 1.0}, limit=8, length=32)
    target = tmp_path / "gated"
    target.mkdir()
    stage = Gate(
        steps=0,
        length=32,
        shortcut=4,
        budgets=BUDGETS,
        calibration_blocks=4,
        calibrate_on="both",
        written_prompts=4,
        written_tokens=12,
    )
    job = make_job(tiny_llama, target, train=text, calibration=text)
    job_with_prompts = make_job(tiny_llama, target, train=train, calibration=text)
    model, blocks = load_model(tiny_llama, "float32"), torch.ones(4, 32, dtype=torch.long)
    prompts, stops = prompts_to_answer(job_with_prompts, model, blocks, 3)
    assert len(prompts) == 3 and all(len(ids) <= 32 for ids in prompts) and len(stops) == 1
    own, _ = prompts_to_answer(job, model, blocks, 2)
    assert len(own) == 2 and own[0] != own[1], "the model asks itself"
    record = stage.run(job_with_prompts)
    assert set(record["kept_phases"]["0.8"]) == {"prompt", "answer"}
    file = load_gates(target)
    assert file is not None
    assert {str(b): shares for b, shares in file.phases.items()} == record["kept_phases"]
    assert file.budgets.phases == file.phases
