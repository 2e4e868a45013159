"""The fuzzer itself, and a hundred of its inputs for each target; `make fuzz` has more."""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).resolve().parents[2] / "tools" / "fuzz.py"
NAMES = ("pipeline", "gates", "gates-meta", "safetensors", "gguf", "results", "texts")


@pytest.fixture(scope="module")
def fuzz() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("fuzz_of_readers", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    before = signal.signal(signal.SIGPROF, module._break_off)
    yield module
    signal.signal(signal.SIGPROF, before)


@pytest.mark.parametrize("name", NAMES)
def test_mutated_files_are_taken_or_refused(fuzz: Any, name: str, tmp_path: Path) -> None:
    target = fuzz.targets()[name]
    given: dict[str, Any] = {"seconds": 3600, "seed": 1, "kept": tmp_path / "kept"}
    good = fuzz.fuzz(target, **given, most=len(target.seeds))
    assert good.taken == len(target.seeds), "what is good must be taken"
    tally = fuzz.fuzz(target, **given, most=120)
    assert tally.findings == 0, [p.read_text() for p in (tmp_path / "kept").glob("*.txt")]
    assert tally.inputs > len(target.seeds)


def test_every_target_is_known(fuzz: Any) -> None:
    assert tuple(fuzz.targets()) == NAMES


def test_the_same_seed_gives_the_same_inputs(fuzz: Any) -> None:
    target = fuzz.targets()["gguf"]

    def first(seed: int) -> list[bytes]:
        return [data for data, _ in zip(fuzz.inputs(target, seed), range(20), strict=False)]

    assert first(3) == first(3) != first(4)


def test_what_a_reader_should_not_do_is_a_finding(fuzz: Any, tmp_path: Path) -> None:
    def breaks(file: Path) -> None:
        raise KeyError("x")

    def sleeps(file: Path) -> None:
        end = fuzz.time.process_time() + 1.2
        while fuzz.time.process_time() < end:
            pass

    for number, read in enumerate((breaks, sleeps)):
        target = fuzz.Target("t", read, "f", [b"good"])
        tally = fuzz.fuzz(target, seconds=10, seed=0, kept=tmp_path / str(number), most=1)
        assert tally.findings == 1
        assert len(list((tmp_path / str(number)).iterdir())) == 2
