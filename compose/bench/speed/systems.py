"""Names of the decode settings of a folder: `plain`, `skip:0.8`, `draft:1+int4`, ..."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from compose.errors import UserError, suggest

BACKENDS = ("reference", "gathered", "native")
"""The backends of `gateskip.runtime.backend`, which imports torch."""
KINDS = ("plain", "skip", "draft", *BACKENDS)
SKIPS: dict[str, dict[str, Any]] = {
    "full-prompt": {"prompt": "full"},
    "full-answer": {"answer": "full"},
    "hold": {"hold": True},
}
"""Settings of a system that skips, by the word that names them."""
DRAFTS = ("auto", "int4", "int3", "int2", "nf4", "int4-head", "learned", "model")
"""Draft models other than the model itself: `Weights` of `gateskip.decoding`."""
UNSAID: dict[str, Any] = {"draft_weights": "own", "lookup": False}
"""The settings of a draft whose name gives only its budget."""
VERIFY, PROMPT = "verify", "prompt"
KV_SUFFIX = "+int8-kv"
FORMS = (
    "use plain, skip:BUDGET or draft:BUDGET, as in skip:0.8, draft:1+int4 or gathered:skip:0.8; "
    "`gateskip bench --help` lists all forms"
)


@dataclass(frozen=True)
class System:
    """One set of decode settings."""

    name: str
    """Its name."""
    settings: dict[str, Any]
    """Arguments of Decoder.generate."""
    backend: str | None = None
    """Its backend, where it is not the one with which the folder is loaded."""


def parse_system(text: str) -> System:
    """`plain`; `skip:BUDGET` with `+full-prompt`, `+full-answer`, `+hold` or `+prompt0.8` (a budget
    for prompts); `draft:BUDGET` with `+auto`, `+int4`, `+int3`, `+int2`, `+nf4`, `+int4-head`,
    `+learned` or `+model` (a draft model that is given apart), `+lookup`, `+LENGTH`, `+prompt0.8`,
    and `+verify0.8` to verify drafts as `skip:0.8` decodes. Each may end in `+int8-kv` (KV cache in
    8 bits) and begin with a backend, as in `gathered:skip:0.8`.

    Raises UserError for any other name.
    """
    if text.endswith(KV_SUFFIX):
        system = parse_system(text.removesuffix(KV_SUFFIX))
        return replace(system, name=text, settings={**system.settings, "kv_cache": "int8"})
    kind, _, rest = text.partition(":")
    if kind not in KINDS:
        raise UserError(f"system {text!r}: {suggest(kind, KINDS)}", fix=FORMS)
    if kind in BACKENDS:
        system = parse_system(rest or "plain")
        if system.backend:
            raise UserError(f"system {text!r} names two backends", fix=FORMS)
        return replace(system, name=text, backend=kind)
    if kind == "plain":
        return System(text, {"mode": "plain"})
    words = rest.split("+")
    try:
        budget = float(words[0])
        if kind == "skip":
            return System(text, {"mode": "skip", "budget": budget, **_skip_settings(words[1:])})
        settings: dict[str, Any] = {"mode": "speculate", "draft_budget": budget, **UNSAID}
        for word in words[1:]:
            if word in DRAFTS:
                settings["draft_weights"] = word
            elif word == "lookup":
                settings["lookup"] = True
            elif word.startswith(PROMPT):
                settings["prompt_budget"] = float(word.removeprefix(PROMPT))
            elif word.startswith(VERIFY):
                settings["verify_budget"] = float(word.removeprefix(VERIFY))
            else:
                settings["draft_length"] = int(word)
    except ValueError as error:
        raise UserError(f"system {text!r}: {error}", fix="as in draft:0.8+nf4+4") from error
    return System(text, settings)


def _skip_settings(words: list[str]) -> dict[str, Any]:
    """The settings that the words after a budget stand for. Raises ValueError for an unknown
    word."""
    settings: dict[str, Any] = {}
    for word in words:
        if word.startswith(PROMPT):
            settings["prompt_budget"] = float(word.removeprefix(PROMPT))
        elif word in SKIPS:
            settings |= SKIPS[word]
        else:
            raise ValueError(f"{word!r}: {suggest(word, SKIPS)}")
    return settings
