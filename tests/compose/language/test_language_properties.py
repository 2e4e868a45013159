"""Properties of the pipeline language on made-up files: taken, or refused at a place in it."""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from compose.errors import PipelineError, PlanError, UserError
from compose.language.parse import load_pipeline, read_yaml
from compose.language.schema import Pipeline
from compose.planning.planner import make_plan

WORDS = {"-Infinity": "-.inf", "Infinity": ".inf", "NaN": ".nan"}
QUOTED_OR_WORD = re.compile(r'"(?:\\.|[^"\\])*"|-?Infinity|NaN')

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])

EXAMPLE: dict[str, Any] = {
    "schema": 1,
    "name": "example",
    "seed": 3,
    "more_seeds": [4, 5],
    "model": {"source": "owner/name", "dtype": "bfloat16"},
    "data": {"train": {"source": "calibration-text", "limit": 20, "length": 64}},
    "stages": {
        "drop": {"use": "drop-layers", "count": 1},
        "gates": {"use": "gate", "steps": 3, "budget": 0.8, "budgets": [0.9, 0.8]},
        "nf4": {"use": "bnb", "format": "nf4"},
        "skip": {"use": "skip", "budget": 0.8},
    },
    "pipelines": {"all": ["drop", "gates", "nf4", "skip"]},
    "matrix": {
        "gate": ["none", "gates"],
        "decode": ["none", "skip"],
        "exclude": [{"gate": "none"}],
    },
    "benchmark": {
        "threads": 2,
        "speed": {"repeats": 2, "batch_sizes": [1, 8], "min_seconds": 0.5},
        "quality": {"perplexity": ["wikitext2"], "tasks": ["arithmetic"], "limit": 9},
    },
    "export": {"all": {"to": "exports/all"}},
}

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text(max_size=12)
    | st.sampled_from(
        ["none", "dense", "default", "heal", "gate", "all", "../x", "/", "owner/name"]
    )
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def written(value: Any) -> str:
    """A value as YAML in JSON's notation, one value a line; numbers that JSON lacks as YAML's."""
    text = json.dumps(value, indent=1, ensure_ascii=True)
    return QUOTED_OR_WORD.sub(lambda match: WORDS.get(match[0], match[0]), text)


def read(text: str) -> Pipeline:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "p.yaml"
        file.write_text(text, encoding="utf-8", newline="")
        return load_pipeline(file)


def taken_or_refused(text: str) -> Pipeline | UserError:
    """The pipeline, or the error, which must be something to read, at a line of the file."""
    try:
        pipeline = read(text)
        make_plan(pipeline)
    except (PipelineError, PlanError) as error:
        assert error.exit_code == 2
        assert error.line is not None and 1 <= error.line <= text.count("\n") + text.count("\r") + 2
        assert error.column is None or error.column >= 1
        message = str(error)
        message.encode("utf-8")
        assert "\x1b" not in message and "\0" not in message
        assert len(message) < 20_000
        return error
    return pipeline


@QUICK
@given(st.text(max_size=300))
def test_any_text(text: str) -> None:
    taken_or_refused(text)


@QUICK
@given(st.lists(st.sampled_from(
    ["a: ", "- ", "[", "]", "{", "}", ",", "&x ", "*x", "<<: ", "? ", "\n", "\n  ", "|\n", "'", '"',
     "#", "!!int ", "1", ".nan", "name: x", "model: ", "stages: ", "use: heal", "~", "---\n", "%"],
), max_size=40))  # fmt: skip
def test_any_tokens(tokens: list[str]) -> None:
    taken_or_refused("".join(tokens))


@QUICK
@given(st.dictionaries(st.sampled_from(sorted(EXAMPLE)) | st.text(max_size=8), values, max_size=8))
def test_any_values_of_known_keys(mapping: dict[str, Any]) -> None:
    taken_or_refused(written(mapping))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a nested one."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def with_value(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(EXAMPLE)
    inner: Any = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


@QUICK
@given(st.sampled_from(sorted(places(EXAMPLE), key=str)), values)
def test_a_changed_value_is_taken_or_refused(path: tuple[Any, ...], value: Any) -> None:
    taken_or_refused(written(with_value(path, value)))


@pytest.mark.parametrize("path", [p for p in places(EXAMPLE) if p != ("schema",)])
def test_a_wrong_kind_is_refused_at_its_own_line(path: tuple[Any, ...]) -> None:
    """A mapping of an unknown key fits nowhere; the error points into the changed value."""
    text = written(with_value(path, {"?": {"?": 1}}))
    error = taken_or_refused(text)
    assert isinstance(error, PipelineError)
    raw, source_map = read_yaml(text, "p.yaml")
    assert raw
    first, last = source_map.values[path][0], source_map.values[(*path, "?", "?")][0]
    assert error.line is not None and first - 1 <= error.line <= last


def test_the_example_is_taken() -> None:
    pipeline = taken_or_refused(written(EXAMPLE))
    assert isinstance(pipeline, Pipeline)
    assert len(make_plan(pipeline).cells) > 4


@QUICK
@given(st.randoms(use_true_random=False))
def test_the_order_of_keys_and_remarks_change_nothing(draw: Any) -> None:
    def shuffled(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        axes = "decode" in value  # their order is that of chains
        keys = list(value) if axes else draw.sample(list(value), len(value))
        return {key: shuffled(value[key]) for key in keys}

    lines = written(shuffled(EXAMPLE)).splitlines()
    text = "\n".join(
        f"{line}  # {draw.randrange(99)}" if draw.random() < 0.3 else line for line in lines
    )
    cells = {cell.key for cell in make_plan(read(text)).cells}
    assert cells == {cell.key for cell in make_plan(read(written(EXAMPLE))).cells}


@QUICK
@given(values)
@example(["Infinity", "NaN", 'a "-Infinity" in quotes', float("-inf")])
def test_values_survive_yaml(value: Any) -> None:
    """What is read is what was written; a list becomes a tuple."""
    try:
        raw, source_map = read_yaml(written({"a": value}), "p.yaml")
    except PipelineError as error:
        assert "contains the character" in error.message or "not YAML" in error.message
        return
    assert source_map.values[("a",)][0] >= 1
    assert same(raw["a"], value)


def same(found: Any, value: Any) -> bool:
    if isinstance(value, float):
        return bool(found == value or (found != found and value != value) or float(found) == value)
    if isinstance(value, list):
        return len(found) == len(value) and all(map(same, found, value))
    if isinstance(value, dict):
        return found.keys() == value.keys() and all(same(found[k], value[k]) for k in value)
    return bool(found == value) and type(found) is type(value)
