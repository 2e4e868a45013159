"""The variants of a stage: the same stage with other values of some parameters.

A search varies parameters (`search.vary`). Each combination of values becomes a stage, named after
the varied parameters: `narrow` with `ratio: [0.1, 0.2]` gives `narrow-ratio0.1` and
`narrow-ratio0.2`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from compose.errors import suggest
from compose.language.positions import Loc, Problem
from compose.stages.base import Stage

Values = Mapping[str, Sequence[Any]]
"""Parameter of a stage -> the values that it may take."""


def variants(name: str, stage: Stage, values: Values) -> dict[str, Stage]:
    """Name -> stage, for every combination of values; the stage itself where nothing varies.

    Raises:
        ValidationError: a stage does not take a combination.
    """
    stages: dict[str, Stage] = {}
    for combination in itertools.product(*values.values()):
        chosen = dict(zip(values, combination, strict=True))
        stages[variant_name(name, chosen)] = with_values(stage, chosen)
    return stages


def with_values(stage: Stage, changes: Mapping[str, Any]) -> Stage:
    """The stage with other values. Raises ValidationError where the stage does not take them."""
    written = {"use": stage.use, **stage.model_dump(exclude_unset=True)}
    return type(stage).model_validate({**written, **changes}, strict=True)


def variant_name(name: str, changes: Mapping[str, Any]) -> str:
    """The name of a variant, in the characters that names may have.

    >>> variant_name("narrow", {"ratio": 0.1})
    'narrow-ratio0.1'
    >>> variant_name("draft", {"draft_weights": "int4-head", "lookup": True})
    'draft-draft_weights-int4-head-lookup-true'
    """
    return "-".join([name, *(f"{parameter}{_text(value)}" for parameter, value in changes.items())])


def _text(value: object) -> str:
    """A value as the end of a name: numbers as they are, text behind a dash, others by a hash."""
    if isinstance(value, bool):
        return f"-{str(value).lower()}"
    if isinstance(value, int | float):
        return str(value).replace("+", "")
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_.-]+", value):
        return f"-{value}"
    text = json.dumps(value, sort_keys=True, default=str)
    return f"-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def vary_problems(
    vary: Mapping[str, Values], stages: Mapping[str, Stage], loc: Loc
) -> Iterator[Problem]:
    """Problems of `vary`, which is at `loc` in the file: names that refer to nothing, and values
    that a stage does not take."""
    for name, values in vary.items():
        if name not in stages:
            message = f"no stage is named {name!r}: {suggest(name, stages)}"
            yield Problem((*loc, name), message, at_key=True)
            continue
        parameters = [field for field in type(stages[name]).model_fields if field != "use"]
        wrong = False
        for parameter, choices in values.items():
            place = (*loc, name, parameter)
            if parameter not in parameters:
                wrong = True
                message = f"{stages[name].use} has no parameter {parameter!r}"
                yield Problem(place, f"{message}: {suggest(parameter, parameters)}", at_key=True)
            elif parameter in stages[name].files():
                wrong = True
                message = f"{parameter} names a file: write one stage for each file"
                yield Problem(place, message, at_key=True)
            elif parameter == "draft_model":
                wrong = True
                message = "draft_model names a model: write one stage for each model"
                yield Problem(place, message, at_key=True)
            elif not choices:
                wrong = True
                yield Problem(place, f"{parameter} lists no value")
            else:
                for index, value in enumerate(choices):
                    if value in choices[:index]:
                        wrong = True
                        yield Problem((*place, index), f"{value!r} is listed twice")
        if not wrong:
            yield from _refused(name, stages[name], values, (*loc, name))


def _refused(name: str, stage: Stage, values: Values, loc: Loc) -> Iterator[Problem]:
    """The first combination of values that the stage does not take."""
    for combination in itertools.product(*values.values()):
        chosen = dict(zip(values, combination, strict=True))
        try:
            with_values(stage, chosen)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            reason = str(first["msg"]).removeprefix("Value error, ")
            yield Problem(loc, f"{stage.use} does not take {_shown(chosen)}: {reason}")
            return


def _shown(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{parameter}: {value}" for parameter, value in changes.items())
