"""How far equal runs lie apart: measured, stored for the machine, and part of every interval."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from compose import store
from compose.analysis.spread import (
    Spread,
    measured_spread,
    spread_in,
    store_spread,
    stored_spread,
    widened,
)
from compose.results.parts import Estimate
from compose.results.schema import Results

HERE = {"processor": "a processor", "cores": 2, "threads": 2, "git_commit": "abc"}


def run(decode: float, prefill: float) -> Results:
    def ratio(value: float) -> dict[str, Any]:
        return {"value": value, "low": value, "high": value, "n": 5}

    speed = {"decode_ratio": ratio(decode), "prefill_ratio": ratio(prefill)}
    cells = [
        {"name": "dense", "chain": [], "status": "ok", "speed": {}},
        {"name": "cell", "chain": [], "status": "ok", "speed": speed},
    ]
    return Results.model_validate({"run": "test", "cells": cells})


def test_the_spread_is_that_of_logarithms() -> None:
    runs = [run(2 * math.exp(0.1 * step), 1.0) for step in (-2, -1, 0, 1, 2)]
    spread = measured_spread(runs)
    assert spread.runs == 5
    assert spread.decode == pytest.approx(0.1 * math.sqrt(2.5))
    assert spread.of("decode, batch 8") == spread.decode and spread.of("prefill") == 0
    with pytest.raises(ValueError, match="4 runs say little"):
        measured_spread(runs[:4])


def test_an_interval_is_never_narrower_than_equal_runs_allow() -> None:
    narrow = Estimate(value=1.1, low=1.09, high=1.11, n=5, different=True)
    wide = Estimate(value=1.1, low=0.8, high=1.5, n=5, different=False)
    spread = Spread(runs=21, decode=0.06, prefill=0.2)
    found = widened(narrow, "decode", spread)
    assert found.low == pytest.approx(1.1 * math.exp(-2.085963 * 0.06), rel=1e-6)
    assert found.value == 1.1 and found.different is False
    assert widened(wide, "decode", spread) == wide
    assert widened(narrow, "decode", None) == narrow


def test_it_is_stored_for_one_machine(tmp_path: Path) -> None:
    spread = Spread(runs=21, decode=0.06, prefill=0.2)
    assert stored_spread(tmp_path, HERE) is None
    store_spread(tmp_path, spread, HERE)
    found = stored_spread(tmp_path, HERE)
    assert found is not None and spread_in({"between_runs": found}) == spread
    assert stored_spread(tmp_path, HERE | {"threads": 4}) is None
    (tmp_path / "between-runs.json").write_text("{")
    assert stored_spread(tmp_path, HERE) is None


def test_a_write_that_is_cut_short_leaves_what_was_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Spread(runs=21, decode=0.06, prefill=0.2)
    store_spread(tmp_path, first, HERE)

    def full(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(store.os, "replace", full)
    with pytest.raises(OSError, match="full"):
        store_spread(tmp_path, Spread(runs=5, decode=0.1, prefill=0.1), HERE)
    assert spread_in({"between_runs": stored_spread(tmp_path, HERE)}) == first
    assert [path.name for path in tmp_path.iterdir()] == ["between-runs.json"]
