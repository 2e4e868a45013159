"""The notebook of the documentation runs from its first cell to its last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compose.recipes.recipe import SPEED

ROOT = Path(__file__).resolve().parents[2]
MODEL = '"smollm2-135m-instruct"'


def code_cells(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_the_notebook_runs(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a tiny model in place of the one that it names, with few questions, timed briefly."""
    monkeypatch.setattr("compose.recipes.recipe.QUESTIONS", 4)
    monkeypatch.setattr("compose.recipes.recipe.PROMPTS", 2)
    monkeypatch.setitem(SPEED, "repeats", 2)
    monkeypatch.setitem(SPEED, "min_seconds", 0.1)
    monkeypatch.chdir(tmp_path)
    first, *others = code_cells(ROOT / "docs/notebooks/compress.ipynb")
    assert MODEL in first
    names: dict[str, Any] = {}
    for number, code in enumerate([first.replace(MODEL, repr(str(tiny_llama))), *others]):
        exec(compile(code, f"cell {number}", "exec"), names)
    assert (tmp_path / "notebook-export/config.json").is_file()
    assert isinstance(names["text"], str)
