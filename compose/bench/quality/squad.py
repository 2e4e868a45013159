"""Token F1 and exact match of a written answer, by the rules of SQuAD v1.1 (arXiv 1606.05250).

Both texts are lower-cased and lose their punctuation and articles. F1 compares their words as bags;
the best score over the reference answers counts. The task file `squad.yaml` names these functions.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text: str) -> list[str]:
    """The words of an answer that count.

    >>> words("The Grotto, at Lourdes.")
    ['grotto', 'at', 'lourdes']
    """
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def f1(answer: str, reference: str) -> float:
    """Harmonic mean of the shares of words that two answers have in common, 0 to 1.

    >>> round(f1("in the wax comb", "wax combs"), 3)  # one of three and one of two
    0.4
    """
    ours, theirs = words(answer), words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Scores of the one answer in `results`, the best over the row's `answers`."""
    answers: list[str] = doc["answers"]["text"]
    return {
        "f1": max(f1(results[0], answer) for answer in answers),
        "exact_match": float(any(words(results[0]) == words(answer) for answer in answers)),
    }
