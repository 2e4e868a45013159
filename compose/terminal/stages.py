"""`gateskip stages`: the stages of pipeline files and their settings, from the schema."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from compose.errors import UserError, suggest
from compose.stages.registry import STAGES

WIDTH = 100
BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}
TYPES = {"boolean": "true or false", "string": "text", "null": "null"}
Schema = Mapping[str, Any]


def first_sentence(text: str | None) -> str:
    """The first sentence of a docstring, on one line.

    >>> first_sentence("The share to keep, such as 0.8. The rest\\n    is skipped.")
    'The share to keep, such as 0.8.'
    """
    sentence, _, rest = " ".join((text or "").split()).partition(". ")
    return f"{sentence}." if rest else sentence


def stage_list() -> str:
    """A line for each stage, and the commands that tell more."""
    width = max(map(len, STAGES))
    lines = [
        f"{use:<{width}}  {first_sentence(inspect.getdoc(stage))}" for use, stage in STAGES.items()
    ]
    return "\n".join(
        [
            *lines,
            "",
            "`gateskip stages STAGE` explains the settings of a stage.",
            "`gateskip stages --rules` prints which stages may follow each stage.",
        ]
    )


def stage_text(use: str) -> str:
    """A stage and its settings: name, type, default and one sentence each.

    Raises:
        UserError: there is no such stage.
    """
    if use not in STAGES:
        raise UserError(f"there is no stage {use!r}", fix=suggest(use, STAGES))
    stage = STAGES[use]
    schema = stage.model_json_schema()
    inside = {name: key for key, group in stage.groups.items() for name in group.model_fields}
    lines = [f"{use}: {first_sentence(inspect.getdoc(stage))}"]
    for name, entry in schema["properties"].items():
        if name != "use" and name not in stage.groups:
            group = f"{inside[name]}." if name in inside else ""
            required = name in schema.get("required", ())
            lines += _setting(f"{group}{name}", entry, schema, required=required)
    if inside:
        lines += ["", "A pipeline file may omit a setting's group: the word before the first dot."]
    return "\n".join(lines)


def _setting(name: str, entry: Schema, schema: Schema, *, required: bool) -> Iterator[str]:
    """The lines of a setting, and of the settings inside it."""
    default = ", required" if required else ""
    if "default" in entry:
        default = f", default {_value(entry['default'])}"
    yield ""
    yield _wrapped(f"{name}: {type_text(entry, schema)}{default}", "  ", "    ")
    yield _wrapped(first_sentence(entry.get("description")), "      ", "      ")
    for part in (entry, *entry.get("anyOf", ())):
        if "$ref" in part:
            inner = _resolved(part, schema)
            for key, inside in inner.get("properties", {}).items():
                needed = key in inner.get("required", ())
                yield from _setting(f"{name}.{key}", inside, schema, required=needed)


def type_text(entry: Schema, schema: Schema) -> str:
    """The type of a setting in words.

    >>> type_text({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]}, {})
    'integer, at least 1, or null'
    >>> type_text({"type": "array", "items": {"enum": [2, 4]}}, {})
    'list of 2 or 4'
    """
    if "anyOf" in entry:
        return ", or ".join(type_text(part, schema) for part in entry["anyOf"])
    if "enum" in entry or "const" in entry:
        return _either([_value(choice) for choice in entry.get("enum", [entry.get("const")])])
    if "$ref" in entry:
        inner = _resolved(entry, schema)
        return "settings" if "properties" in inner else type_text(inner, schema)
    kind: str = entry.get("type", "any value")
    if kind == "array":
        return f"list of {type_text(entry.get('items', {}), schema)}"
    if kind == "object":
        return f"mapping of names to {type_text(entry.get('additionalProperties', {}), schema)}"
    bounds = [f"{words} {entry[key]:g}" for key, words in BOUNDS.items() if key in entry]
    return ", ".join([TYPES.get(kind, kind), *bounds])


def _resolved(entry: Schema, schema: Schema) -> Schema:
    """What a reference of a schema leads to."""
    definition: Schema = schema["$defs"][entry["$ref"].rpartition("/")[2]]
    return definition


def _either(choices: list[str]) -> str:
    *first, last = choices
    return f"{', '.join(first)} or {last}" if first else last


def _value(value: Any) -> str:
    """A value as a pipeline file has it."""
    return value if isinstance(value, str) else json.dumps(value)


def _wrapped(text: str, first: str, others: str) -> str:
    """A text in lines; the first begins with one indentation, the others with another."""
    return textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=others)
