"""Passages followed by quotes from them: training text for copying from the context.

Each row is a passage of prose, then some of its sentences, each with a beginning that leads to the
rest. A model that skips branches soon loses the ability to find an earlier place again, and plain
prose rarely trains it. The passages are those of calibration-text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from compose.assets.corpora import calibration_rows

ROWS = 4000
PASSAGE = 700  # characters
SENTENCE = (8, 40)  # words, least and most
BEGUN = 5  # words of a sentence that are given
PER_PASSAGE = 4  # sentences of a passage, at most

Form = Callable[[Sequence[str]], str]


def quote_rows(folder: Path) -> list[str]:
    """Rows out of calibration-text's folder."""
    return quoted(calibration_rows(folder))


def quoted(texts: Iterable[str]) -> list[str]:
    """ROWS rows out of texts, or as many as these give; always the same of the same texts."""
    draws = random.Random(20_261_127)
    rows: list[str] = []
    for passage in _passages(texts):
        sentences = [part for part in re.split(r"(?<=[.!?]) ", passage) if _fits(part)]
        if len(rows) == ROWS:
            break
        if len(sentences) < 2:
            continue
        picks = draws.sample(sentences, min(PER_PASSAGE, len(sentences)))
        form = FORMS[len(rows) % len(FORMS)]
        rows.append("\n\n".join((passage, "\n".join(form(sentence.split()) for sentence in picks))))
    return rows


def _passages(texts: Iterable[str]) -> Iterable[str]:
    """Whole sentences of each text's beginning, PASSAGE characters at most."""
    for text in texts:
        flat = " ".join(text.split())
        cut = max(flat.rfind(end, 0, PASSAGE) for end in (". ", "! ", "? "))
        if cut > PASSAGE // 3:
            yield flat[: cut + 1]


def _fits(sentence: str) -> bool:
    least, most = SENTENCE
    return least <= len(sentence.split()) <= most


def _goes_on(words: Sequence[str]) -> str:
    return f'After "{" ".join(words[:BEGUN])}" it says: {" ".join(words[BEGUN:])}'


def _find(words: Sequence[str]) -> str:
    return f"Find: {' '.join(words[:BEGUN])}\nFound: {' '.join(words)}"


def _missing(words: Sequence[str]) -> str:
    left = len(words) // 2
    around = (*words[max(0, left - BEGUN) : left], "____", *words[left + 1 : left + 4])
    return f"{' '.join(around)}: {words[left]}"


FORMS: tuple[Form, ...] = (_goes_on, _find, _missing)
"""Forms of a question for a sentence [words], with the answer."""
