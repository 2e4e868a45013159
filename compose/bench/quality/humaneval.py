"""Whether a written function passes its tests; `humaneval.yaml` names `process_results`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compose.bench.quality.sandbox import passes


def program_of(doc: Mapping[str, Any], answer: str) -> str:
    """The row's signature and docstring, the body that the model wrote, and the row's tests."""
    start = doc["prompt"].rstrip()
    body = answer if answer.startswith("\n") else f"\n{answer}"
    return f"{start}{body}\n{doc['test']}\ncheck({doc['entry_point']})\n"


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the one answer in `results` passes the tests of the row."""
    return {"pass@1": float(passes(program_of(doc, results[0])))}
