"""`gateskip compress`: what is chosen, what the card says, and the whole way on the real model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from compose.errors import UserError
from compose.recipes.card import card_of, side_by_side
from compose.recipes.compress import Compressed, choose, run_name, source_of
from compose.recipes.recipe import Request
from compose.results.schema import Results
from compose.terminal.compress import print_card

ROOT = Path(__file__).resolve().parents[3]


def variant(name: str, decode: float, megabytes: float, kl: float, **more: Any) -> dict[str, Any]:
    """A made-up variant; no number in it was measured."""
    quality = {
        "kl_to_baseline": kl,
        "kl_ci95": [0.9 * kl, 1.1 * kl],
        "own_answers": {
            "texts": [f"Paris,\nsays {name}."],
            "questions": more.pop("questions", None),
        },
    }
    return {
        "name": name,
        "chain": [] if name == "dense" else [name],
        "status": "ok",
        "size": {"disk_bytes": int(megabytes * 1e6), "resident_bytes": int(megabytes * 1e6)},
        "speed": {
            "decode_tokens_per_s": {"median": decode},
            "decode_ratio": {"value": decode / 50, "low": decode / 55, "high": decode / 45, "n": 5},
        },
        "quality": quality,
    } | more


@pytest.fixture
def results() -> Results:
    cells = [
        variant("dense", 50.0, 270, 0.0, questions=["Capital of France?"]),
        variant("int8", 120.0, 140, 0.003),
        variant("int4", 200.0, 94, 0.08),
        variant("int3", 180.0, 78, 0.3),
    ]
    return Results.model_validate({"run": "compress-x", "model": "m", "cells": cells})


def request(**wishes: Any) -> Request:
    return Request(model="m", to=Path("exports/x"), **wishes)


@pytest.mark.parametrize(
    ("wishes", "winner"),
    [
        ({}, "int8"),  # the KL of int4 shows a loss of more than 5 %
        ({"at_most_kl": 0.085}, "int8"),  # 0.08 and its interval's upper end 0.088
        ({"at_most_kl": 0.5}, "int4"),
        ({"bits": 4}, "int4"),
        ({"at_most_mb": 80, "at_most_kl": 0.5}, "int3"),
    ],
)
def test_the_fastest_within_the_bounds_is_exported(
    results: Results, wishes: dict[str, Any], winner: str
) -> None:
    assert choose(results, request(**wishes)).name == winner


def test_the_model_as_it_is_is_no_answer(results: Results) -> None:
    with pytest.raises(UserError, match="the nearest is 'int8'"):
        choose(results, request(at_most_kl=0.001))


def test_without_bounds_a_shown_loss_is_not_exported(results: Results) -> None:
    only = results.model_copy(update={"cells": (results.cells[0], results.cells[3])})
    with pytest.raises(UserError, match="Nothing is recommended for speed, because"):
        choose(only, request())
    assert choose(only, request(bits=3)).name == "int3"


def test_the_card_has_numbers_answers_and_next_commands(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("exports/my x")
    folder.mkdir(parents=True)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    done = Compressed(folder, "int4", results, Path("runs/compress-x"), gguf=Path("exports/x.gguf"))
    card = card_of(done)
    lines = {
        entries[0].text: [entry.text for entry in entries[1:]] for _, entries in card.numbers.rows
    }
    assert lines["decode tokens/s"][2] == "4.00x"
    assert lines["bytes on disk"][:2] == ["270.0 MB", "94.0 MB"]
    assert card.answers == side_by_side(results, results.cell("int4"))
    commands = [command for command, _ in card.next]
    assert "gateskip chat 'exports/my x'" in commands
    assert "gateskip serve 'exports/my x'" in commands
    assert "llama-cli -m exports/x.gguf" in commands
    stream = StringIO()
    console = Console(width=120, file=stream)
    print_card(console, card)
    text = stream.getvalue()
    assert "before: Paris, says dense." in text
    assert "after:  Paris, says int4." in text
    (folder / "chat_template.jinja").unlink()
    commands = [command for command, _ in card_of(done).next]
    assert "gateskip chat 'exports/my x'" not in commands, "chat refuses a model without a template"
    assert "gateskip generate 'exports/my x' \"Once upon a time\"" in commands


def test_names_and_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_tiny: Any) -> None:
    assert run_name(Path("exports/my model")) == "compress-my-model"
    wish = Request(model="m", to=Path("a/b"), gguf=True)
    assert (wish.gguf_file, wish.vllm_folder) == (Path("a/b.gguf"), None)
    monkeypatch.chdir(make_tiny("llama").parent)
    assert source_of(make_tiny("llama").name) == str(make_tiny("llama"))
    assert source_of("owner/name") == "owner/name"


BRIEF = """
import sys
from compose.recipes import recipe
recipe.QUESTIONS, recipe.PROMPTS = 8, 2
recipe.SPEED |= {"new_tokens": 16, "repeats": 2, "min_seconds": 0}
from compose.cli import app
app(sys.argv[1:])
"""
"""`gateskip` with few questions, timed briefly."""


def gateskip(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    return subprocess.run(
        [sys.executable, "-c", BRIEF, *words],
        cwd=folder,
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "--to", "x"], "nowhere"),
        (["smollm2-135m-instruct", "--to", "used"], "is not replaced"),
        (["smollm2-135m-instruct", "--to", "x", "--bits", "5"], "take 8, 4 or 3"),
        (["smollm2-135m-instruct", "--to", "x", "--quick", "--best"], "exclude each other"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(
    words: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "letter.txt").write_text("mine")
    done = gateskip("compress", *words, folder=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert (tmp_path / "used" / "letter.txt").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.real
def test_the_real_model_in_one_command(smollm2: Path, tmp_path: Path) -> None:
    words = ("compress", str(smollm2), "--to", "small", "--bits", "8", "--quick", "--no-drafts")
    words = (*words, "--gguf", "--compressed-tensors")
    done = gateskip(*words, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    sizes = [
        sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        for folder in (smollm2, tmp_path / "small")
    ]
    assert sizes[1] < 0.6 * sizes[0], sizes
    assert (tmp_path / "small.gguf").stat().st_size < 200e6
    config = json.loads((tmp_path / "small-compressed-tensors" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert "before: " in done.stdout and "gateskip chat small" in done.stdout
    again = gateskip(*words, folder=tmp_path)
    assert again.returncode == 0, "a second call does nothing twice"
    answer = gateskip("generate", "small", "What is the capital of France?", folder=tmp_path)
    assert "Paris" in answer.stdout
