"""docs/structure.md lists the files that a measured cell passes, and there are few of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cell_files import MOST, files_passed, on_the_way

PAGE = Path(__file__).resolve().parents[2] / "docs" / "structure.md"


def listed() -> set[str]:
    """The files in the table behind the sentence that names the program."""
    table = (
        PAGE.read_text("utf-8").partition("`python tools/cell_files.py`")[2].partition("\n## ")[0]
    )
    rows = [line for line in table.splitlines() if line.startswith("|")]
    return set(re.findall(r"`(compose/[\w/]+\.py)`", "\n".join(rows)))


def test_few_files_are_listed() -> None:
    assert len(listed()) <= MOST


@pytest.mark.slow
@pytest.mark.real  # texts come from the user's own cache
def test_a_measured_cell_passes_those_that_are_listed() -> None:
    assert set(on_the_way(files_passed())) == listed()
