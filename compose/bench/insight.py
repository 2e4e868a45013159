"""`gateskip insight`: the tokens of a text, and the share of compute of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gateskip
from compose.errors import ArtifactError
from gateskip.calibration.insight import inspect_text, summarize

DEFAULT_BUDGET = 0.8


def insight(folder: Path, text: str, budget: float | None = None) -> dict[str, Any]:
    """Run a text under a folder's gates.

    Returns `tokens`, a list of text, kind and share of compute; `budget`; and the `summary` by
    branch, kind and position.

    Raises:
        ArtifactError: the folder has no gates, or the budget was not calibrated.
    """
    decoder = gateskip.load(folder)
    skipping, tokenizer = decoder.skipping, decoder.tokenizer
    if skipping.gates is None:
        raise ArtifactError(
            f"{folder} has no gates", fix="name the folder of a chain with a gate stage"
        )
    chosen = budget or decoder.defaults.get("budget") or DEFAULT_BUDGET
    try:
        thresholds = decoder.thresholds(chosen)
    except ValueError as error:
        raise ArtifactError(str(error), fix="choose another --budget") from error
    ids = tokenizer(text).input_ids
    if not ids:
        raise ArtifactError("the text is empty", fix="give a text with --text")
    thresholds = thresholds or [float("-inf")] * len(skipping.branches)
    seen = inspect_text(
        skipping.model, skipping.gates, tokenizer, ids, thresholds, skipping.kv_rule
    )
    tokens = [
        {"text": tokenizer.decode([token]), "kind": kind, "compute": round(share, 4)}
        for token, kind, share in zip(ids, seen.kinds, seen.compute.tolist(), strict=True)
    ]
    return {"budget": chosen, "tokens": tokens, "summary": summarize([seen])}
