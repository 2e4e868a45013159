"""What is scored must not stand in what stages learn from: 13-gram contamination."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compose.assets.contamination import RUN, contamination, runs

WORDS = [f"word{i}" for i in range(40)]


def write(path: Path, rows: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(path)


def test_a_run_of_thirteen_words_is_found(tmp_path: Path) -> None:
    training = write(tmp_path / "train.jsonl", [" ".join(WORDS)])
    contaminated = "Before, " + ", ".join(word.upper() for word in WORDS[5:18]) + "! after"
    clean = " ".join([*WORDS[5:17], "other", *WORDS[17:29]])
    scored = {"scored": [contaminated, clean]}
    found = contamination([(training, None)], scored, [], None, tmp_path)
    assert found == {"scored": {"rows": 2, "contaminated": 1}}


def test_only_the_rows_that_are_learned_from_count(tmp_path: Path) -> None:
    training = write(tmp_path / "train.jsonl", ["nothing here", " ".join(WORDS)])
    scored = {"scored": [" ".join(WORDS)]}
    for rows, count in ((1, 0), (2, 1)):
        found = contamination([(training, rows)], scored, [], None, tmp_path)
        assert found["scored"]["contaminated"] == count


@pytest.mark.parametrize(("words", "count"), [(RUN - 1, 0), (RUN, 1), (RUN + 3, 4)])
def test_every_place_has_its_run(words: int, count: int) -> None:
    assert len(list(runs(" ".join(WORDS[:words])))) == count
