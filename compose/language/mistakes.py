"""Turns mistakes in a pipeline file into problems in plain words, each at its key or value: what
pydantic refuses, and a file that names no variant to make."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby, islice
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from compose.errors import PipelineError, RuleBroken, shortened, suggest
from compose.language.positions import Loc, Problem, SourceMap
from compose.language.schema import Chain, Export, Pipeline
from compose.stages.registry import STAGES

MOST_SUGGESTED = 5
"""Most stages for which a fix suggests a line."""


def first_mistake(problems: Iterable[Problem], source_map: SourceMap) -> PipelineError:
    """The first problem in the file as an error, which also counts the others."""
    located = [
        source_map.locate(
            PipelineError(problem.message, fix=problem.fix), problem.loc, at_key=problem.at_key
        )
        for problem in problems
    ]
    located.sort(key=lambda error: (error.line or 0, error.column or 0))
    first, others = located[0], located[1:]
    if others:
        lines = [str(line) for line in sorted({error.line or 0 for error in others})]
        where = f"on line{'s' if len(lines) > 1 else ''} {', '.join(lines)}"
        first.message += f"\n  and {_counted(len(others), 'more problem')}, {where}"
    return first


def refusals(error: ValidationError, raw: Mapping[str, Any]) -> Iterator[Problem]:
    """One problem per place; the alternatives of a union are joined into one sentence.

    A missing key beside an unknown key is most likely misspelt, so only the unknown key is
    reported. Where a number or a mapping is allowed and the file has a mapping, only the mistakes
    inside it are reported.
    """
    details = error.errors(include_url=False)
    misspelt = {detail["loc"][:-1] for detail in details if detail["type"] == "extra_forbidden"}
    details = [detail for detail in details if not _only_counts_the_good(detail)]
    details = [
        detail
        for detail in details
        if detail["type"] != "missing" or detail["loc"][:-1] not in misspelt
    ]

    def place(detail: ErrorDetails) -> Loc:
        within = detail.get("ctx", {}).get("within", ())
        loc = _in_file((*detail["loc"], *within), raw)
        return (*loc, detail["loc"][-1]) if detail["type"] == "missing" else loc

    inside = {place(detail)[:-1] for detail in details}
    details = [
        detail
        for detail in details
        if not isinstance(detail["input"], dict) or place(detail) not in inside
    ]
    for loc, group in groupby(sorted(details, key=lambda detail: str(place(detail))), key=place):
        yield _refusal(loc, list(group), raw)


def no_variants(pipeline: Pipeline) -> Problem:
    """The problem of a file without `pipelines`, `matrix` and `search`, with the lines to add."""
    default = "`matrix: default` (gates, 8 or 4 bits and ways of decoding, in every combination)"
    if not pipeline.stages:
        message = "the file names a model but no variant of it"
        fix = f"add the line {default}, or name `stages` and `pipelines`"
        return Problem(("model",), message, fix=fix, at_key=True)
    message = "the file names stages but no variant that uses them"
    lines = [f"\n      {chain[-1]}: [{', '.join(chain)}]" for chain in _short_chains(pipeline)]
    if lines:
        rows = "".join(lines)
        fix = f"add these lines, one for each variant:\n    pipelines:{rows}\n  or add {default}"
    else:
        fix = f"name chains of stages under `pipelines`, or add {default}"
    return Problem(("stages",), message, fix=fix, at_key=True)


def _short_chains(pipeline: Pipeline) -> Iterator[Chain]:
    """The shortest chain that ends in a stage, for each of the first stages that have one."""
    for name in islice(pipeline.stages, MOST_SUGGESTED):
        chains: list[Chain] = [(name,), *((other, name) for other in pipeline.stages)]
        if chain := next((c for c in chains if _is_allowed(pipeline, c)), None):
            yield chain


def _is_allowed(pipeline: Pipeline, chain: Chain) -> bool:
    """Whether a chain keeps all order rules that can be checked without the model."""
    stages = [pipeline.stages[name] for name in chain]
    try:
        for index, stage in enumerate(stages):
            stage.check(None, tuple(stages[:index]))
    except RuleBroken:
        return False
    return True


def _only_counts_the_good(detail: ErrorDetails) -> bool:
    """Whether a list is called too short only because some of its items are wrong."""
    minimum = detail.get("ctx", {}).get("min_length", 0)
    return detail["type"] == "too_short" and len(detail["input"]) >= minimum


def _in_file(loc: Loc, raw: Any) -> Loc:
    """pydantic's place without the parts that only name a branch of a union, and with the group in
    which the file writes a stage's parameter."""
    place: list[str | int] = []
    for number, part in enumerate(loc):
        if number == 2 and loc[0] == "stages" and isinstance(raw, dict) and part == raw.get("use"):
            continue  # it names the branch, and may be the name of a group, too
        if len(place) == 2 and (group := _group_of(str(part), raw)) is not None:
            place.append(group)
            raw = raw[group]
        if isinstance(raw, dict) and part in raw:
            raw = raw[str(part)]
        elif isinstance(raw, tuple) and isinstance(part, int) and part < len(raw):
            raw = raw[part]
        else:
            continue
        place.append(part)
    return tuple(place)


def _group_of(parameter: str, raw: Any) -> str | None:
    """The group in which a stage, `raw`, has a parameter; None where it is outside all groups."""
    stage = STAGES.get(str(raw.get("use"))) if isinstance(raw, dict) else None
    if stage is None or parameter in raw:
        return None
    groups = {key: raw[key] for key in stage.groups if isinstance(raw.get(key), dict)}
    return next((key for key, inside in groups.items() if parameter in inside), None)


def _refusal(loc: Loc, details: list[ErrorDetails], raw: Mapping[str, Any]) -> Problem:
    detail = details[0]
    kind, value = detail["type"], detail["input"]
    parent = _dotted(loc[:-1])
    if kind == "extra_forbidden":
        hint = suggest(str(loc[-1]), _known_keys(loc[:-1], raw))
        where = f" in {parent}" if parent else ""
        return Problem(loc, f"unknown key {shortened(repr(loc[-1]))}{where}: {hint}", at_key=True)
    if kind == "missing":
        where = f"{parent} lacks" if parent else "the file lacks"
        return Problem(loc, f"{where} the key {str(loc[-1])!r}")
    if kind == "union_tag_not_found":
        return Problem(
            loc, f"{_dotted(loc)} lacks the key 'use'; known stages: {', '.join(STAGES)}"
        )
    if kind == "union_tag_invalid":
        named = str(value.get("use")) if isinstance(value, Mapping) else str(value)
        return Problem(
            (*loc, "use"), f"unknown stage {shortened(repr(named))}: {suggest(named, STAGES)}"
        )
    if kind == "grouped":
        return Problem(loc, f"{_dotted(loc)}: {detail['msg']}", at_key=True)
    if kind == "value_error":
        at_key = detail["loc"][-1] == "[key]"
        return Problem(
            loc, f"{_dotted(loc)}: {shortened(str(detail['ctx']['error']), 300)}", at_key=at_key
        )
    expected = " or ".join(dict.fromkeys(_expected(branch) for branch in details))
    return Problem(loc, f"{_dotted(loc)}: expected {expected}, not {kind_of(value)}")


def _expected(detail: ErrorDetails) -> str:
    """The end of "expected ..." for a pydantic error."""
    limits: dict[str, Any] = detail.get("ctx", {})
    types = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "string_type": "text",
        "string_too_short": "text that is not empty",
        "tuple_type": "a list",
        "too_short": f"a list of at least {limits.get('min_length')}",
        "dict_type": "a mapping",
        "model_type": "a mapping",
        "model_attributes_type": "a mapping",
        "literal_error": str(limits.get("expected")),
        "greater_than": f"a number above {limits.get('gt')}",
        "greater_than_equal": f"a number of at least {limits.get('ge')}",
        "less_than": f"a number below {limits.get('lt')}",
        "less_than_equal": f"a number of at most {limits.get('le')}",
    }
    return types.get(detail["type"], detail["msg"])


def _known_keys(loc: Loc, raw: Mapping[str, Any]) -> list[str]:
    """The keys that may stand in the mapping at `loc`."""
    model: type[BaseModel] = Pipeline
    if loc[:1] == ("stages",):
        model, loc = STAGES[raw["stages"][loc[1]]["use"]], loc[2:]
    elif loc[:1] == ("export",):
        model, loc = Export, ()
    for part in loc:
        groups = getattr(model, "groups", {})
        if part in groups:
            model = groups[part]
            continue
        annotation = model.model_fields[str(part)].annotation
        kinds = get_args(annotation) or (annotation,)  # a section may be null
        model = next(k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
    return [info.alias or name for name, info in model.model_fields.items()]


def _dotted(loc: Loc) -> str:
    """`("matrix", "prune", 2)` -> `matrix.prune[2]`."""
    text = ""
    for part in loc:
        part = part if isinstance(part, int) else shortened(part, 60)
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def kind_of(value: object) -> str:
    """A value's kind in words, as the end of "expected ..., not ..."."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, tuple):
        return "a list" if value else "an empty list"
    return str(value).lower() if isinstance(value, bool) else shortened(repr(value))
