"""13-gram contamination: scored texts that share thirteen words in a row with a training text.

The test is the one of GPT-3 (arXiv 2005.14165, appendix C): texts are lower-cased and cut into
words, and a scored text is contaminated when any run of thirteen of its words stands in a training
text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compose.assets.tasks import load_task
from compose.assets.texts import load_texts

RUN = 13
_WORD = re.compile(r"\w+")


def contamination(
    training: Iterable[tuple[str, int | None]],
    texts: Mapping[str, Sequence[str]],
    tasks: Iterable[str],
    limit: int | None,
    cache: Path,
) -> dict[str, dict[str, int]]:
    """For every scored text and task: its `rows`, and how many are `contaminated`.

    Args:
        training: source and row limit of every training text.
        texts: name of each text that is scored -> its rows.
        tasks: names of tasks, of which the first `limit` questions are scored.

    Raises:
        AssetError: a text or task is not available.
    """
    seen: set[int] = set()
    for source, rows in training:
        for row in load_texts(source, rows, cache).rows:
            seen.update(runs(row))
    questions = {name: list(_questions(load_task(name, cache).path, limit)) for name in tasks}
    scored: dict[str, Sequence[str]] = {**texts, **questions}
    return {
        name: {"rows": len(rows), "contaminated": sum(_is_contaminated(row, seen) for row in rows)}
        for name, rows in scored.items()
    }


def runs(text: str, length: int = RUN) -> Iterator[int]:
    """A hash of each run of `length` words."""
    words = _WORD.findall(text.lower())
    for start in range(len(words) - length + 1):
        yield hash(tuple(words[start : start + length]))


def _is_contaminated(text: str, seen: set[int]) -> bool:
    return any(run in seen for run in runs(text))


def _questions(path: Path, limit: int | None) -> Iterator[str]:
    """Everything that is text in each row, question and answers."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if limit is not None and number >= limit:
                return
            yield " ".join(_leaves(json.loads(line)))


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)
