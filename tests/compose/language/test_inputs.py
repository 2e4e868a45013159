"""A text or a task that does not exist is refused before anything is made, at its line."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from compose.assets.names import lm_eval_names, require_task_name, require_text_name
from compose.cli import app
from compose.errors import AssetError

FILE = """\
schema: 1
name: small
model: {{source: smollm2-135m-instruct}}
data:
  train: {{source: {train}}}
benchmark:
  quality:
    perplexity: {perplexity}
    tasks: {tasks}
  lossless: {{source: {lossless}}}
matrix: default
"""
GOOD = {
    "train": "calibration-text",
    "perplexity": "[wikitext2, heldout-text]",
    "tasks": "[arc_easy, arithmetic]",
    "lossless": "prompts",
}


def _file(folder: Path, **changes: str) -> Path:
    file = folder / "small.yaml"
    file.write_text(FILE.format(**(GOOD | changes)))
    return file


@pytest.mark.parametrize("command", ["validate", "plan"])
@pytest.mark.parametrize(
    ("changes", "line", "meant"),
    [
        ({"tasks": "[arc_easy, arc_eezy]"}, 9, "arc_easy"),
        ({"perplexity": "wikitext"}, 8, "wikitext2"),
        ({"perplexity": "[wikitext2, held-out-text]"}, 8, "heldout-text"),
        ({"lossless": "prompt"}, 10, "prompts"),
        ({"train": "calibration-txt"}, 5, "calibration-text"),
    ],
)
def test_what_does_not_exist_is_refused_at_its_line(
    command: str, changes: dict[str, str], line: int, meant: str, tmp_path: Path
) -> None:
    file = _file(tmp_path, **changes)
    done = CliRunner().invoke(app, [command, str(file)])
    assert done.exit_code == 2, done.output
    assert f"{file}:{line}:" in done.output and f"did you mean '{meant}'" in done.output


def test_what_exists_or_may_exist_passes(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("a text\n")
    file = _file(tmp_path, perplexity="[own.txt, owner/name]", tasks="[arc_easy, mmlu, gsm8k]")
    done = CliRunner().invoke(app, ["validate", str(file)])
    assert done.exit_code == 0, done.output


def test_names_of_lm_eval_are_known_without_it() -> None:
    assert {"arc_easy", "mmlu", "ai2_arc", "gsm8k", "hellaswag"} <= lm_eval_names()
    assert "arc_eezy" not in lm_eval_names()
    for name in ("mmlu", "squad", "arithmetic"):
        require_task_name(name)


def test_only_stages_read_what_the_model_writes() -> None:
    with pytest.raises(AssetError, match="written by the model"):
        require_text_name("self-written")
