"""The number that a written answer to a word problem ends with; `gsm8k_chat.yaml` names it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_STATED = re.compile(r"answer is|####|\\boxed", re.IGNORECASE)


def final_number(text: str) -> float | None:
    """The number after the last "answer is", "####" or "\\boxed"; else the last number.

    >>> final_number("He has 3 + 4 = 7. The answer is $1,007.50 for 2 days.")
    1007.5
    >>> final_number("So he has 12 apples and 5 pears")
    5.0
    """
    *before, last = _STATED.split(text)
    stated = _NUMBER.findall(last)[:1] if before else []
    found = stated or _NUMBER.findall(text)[-1:]
    return float(found[0].replace(",", "")) if found else None


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the one answer in `results` ends with the number of the row's `answer`."""
    return {"exact_match": float(final_number(results[0]) == final_number(doc["answer"]))}
