"""A YAML file -> `Pipeline`, with every mistake told at its file, line and column.

The file is composed into nodes that know their marks, the nodes become plain values beside a map
of positions, and pydantic reads the values strictly (no text for a number). What it refuses is
said again in words of our own, at the mark of the value or key that is meant.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from compose.errors import PipelineError, suggest
from compose.language.schema import Export, Loc, Pipeline, Problem, SourceMap
from compose.stages.registry import STAGES

TEXT_SUFFIXES = (".txt", ".jsonl", ".json", ".xz")
_TAG = "tag:yaml.org,2002:"
_CONSTRUCTED = {_TAG + kind for kind in ("null", "bool", "int", "float")}
_AS_TEXT = {_TAG + kind for kind in ("str", "timestamp")}


def load_pipeline(path: str | Path) -> Pipeline:
    """Read a pipeline file; its model folder, data and gate files become absolute paths.

    Raises:
        PipelineError: the file cannot be read or does not say something valid. The message tells
            the first mistake in the file at `file:line:column` and how many others there are.
    """
    file = Path(path)
    raw, source_map = _read_yaml(_text_of(file), str(path))
    try:
        pipeline = Pipeline.model_validate(raw, strict=True)
    except ValidationError as error:
        raise _first(_refusals(error, raw), source_map) from None
    resolved, missing = _resolve_paths(pipeline, file.absolute().parent)
    problems = [*pipeline.problems(), *missing]
    if problems:
        raise _first(problems, source_map)
    return resolved.with_source_map(source_map)


def to_json_schema() -> dict[str, Any]:
    """The language as JSON Schema, for editors."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return dialect | Pipeline.model_json_schema(by_alias=True)


# --- YAML -> plain values and their positions ---------------------------------------------------


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = sorted(each.name for each in file.absolute().parent.glob("*.yaml"))
        hint = suggest(file.name, beside) if beside else None
        raise PipelineError("there is no such file", file=file, fix=hint) from None
    except UnicodeDecodeError as error:
        raise PipelineError(f"the file is not UTF-8 text ({error.reason})", file=file) from None
    except OSError as error:
        raise PipelineError(f"cannot read it: {error.strerror}", file=file) from None


def _read_yaml(text: str, file: str) -> tuple[dict[str, Any], SourceMap]:
    """Plain values (lists as tuples) and where they stand.

    Raises:
        PipelineError: not YAML, or not one mapping of text keys without repeats.
    """
    yaml = YAML(typ="safe", pure=True)
    try:
        root = yaml.compose(text)
        reader = _Reader(yaml, file)
        raw = {} if root is None else reader.value(root, ())
    except YAMLError as error:
        raise _not_yaml(error, file) from None
    if root is None:
        fix = "begin with 'schema: 1', 'name: first' and 'model: {source: smollm2-135m-instruct}'"
        raise PipelineError("the file is empty", file=file, line=1, column=1, fix=fix)
    if not isinstance(raw, dict):
        message = f"a pipeline is a mapping of keys, not {_kind(raw)}"
        raise reader.map.locate(PipelineError(message, fix="begin with 'schema: 1'"), ())
    return raw, reader.map


def _not_yaml(error: YAMLError, file: str) -> PipelineError:
    if not isinstance(error, MarkedYAMLError):
        return PipelineError(f"not YAML: {str(error).splitlines()[0]}", file=file)
    mark = error.problem_mark
    while_doing = f" ({error.context})" if error.context else ""
    refused = PipelineError(f"not YAML: {error.problem}{while_doing}", file=file)
    if mark is not None:
        refused.line, refused.column = mark.line + 1, mark.column + 1
    return refused


class _Reader:
    """Turns nodes into values and keeps the position of each."""

    def __init__(self, yaml: YAML, file: str) -> None:
        self._yaml = yaml
        self._open: list[int] = []  # ids of the nodes around the one being read
        self._values: dict[Loc, tuple[int, int]] = {}
        self._keys: dict[Loc, tuple[int, int]] = {}
        self.map = SourceMap(file, self._values, self._keys)

    def value(self, node: Node, loc: Loc) -> Any:
        self._values[loc] = _mark(node)
        if id(node) in self._open:
            raise self._refuse(node, "this alias stands inside its own anchor")
        self._open.append(id(node))
        try:
            if isinstance(node, MappingNode):
                return self._mapping(node, loc)
            if isinstance(node, SequenceNode):
                return tuple(self.value(each, (*loc, i)) for i, each in enumerate(node.value))
            return self._scalar(node)
        finally:
            self._open.pop()

    def _mapping(self, node: MappingNode, loc: Loc) -> dict[str, Any]:
        merged, own = {}, {}
        for key, value in node.value:
            if str(key.tag) == _TAG + "merge":
                merged.update(self._merged(value, loc))
                continue
            name = self._key(key)
            if name in own:
                first = self._keys[(*loc, name)][0]
                raise self._refuse(key, f"the key {name!r} stands here again (first: line {first})")
            self._keys[(*loc, name)] = _mark(key)
            own[name] = self.value(value, (*loc, name))
        return merged | own

    def _merged(self, node: Node, loc: Loc) -> dict[str, Any]:
        """What `<<: *base` brings in; the first of several bases wins."""
        bases = node.value if isinstance(node, SequenceNode) else [node]
        merged: dict[str, Any] = {}
        for base in bases:
            if not isinstance(base, MappingNode):
                raise self._refuse(base, "'<<' takes a mapping")
            merged = self.value(base, loc) | merged
        return merged

    def _key(self, node: Node) -> str:
        if not isinstance(node, ScalarNode) or str(node.tag) == _TAG + "null":
            raise self._refuse(node, "a key is a word")
        return str(node.value)

    def _scalar(self, node: Node) -> Any:
        tag = str(node.tag)
        if tag in _CONSTRUCTED:
            return self._yaml.constructor.construct_object(node)
        if tag in _AS_TEXT:
            return str(node.value)
        raise self._refuse(node, f"the tag {tag!r} means nothing here")

    def _refuse(self, node: Node, message: str) -> PipelineError:
        line, column = _mark(node)
        return PipelineError(message, file=self.map.file, line=line, column=column)


def _mark(node: Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


# --- what pydantic refuses, in our words --------------------------------------------------------


def _first(problems: Iterable[Problem], source_map: SourceMap) -> PipelineError:
    """The problem that stands first in the file, and a count of the others."""
    located = [
        source_map.locate(PipelineError(each.message, fix=each.fix), each.loc, at_key=each.at_key)
        for each in problems
    ]
    located.sort(key=lambda error: (error.line or 0, error.column or 0))
    first, others = located[0], located[1:]
    if others:
        lines = [str(line) for line in sorted({error.line or 0 for error in others})]
        where = f"on line{'s' if len(lines) > 1 else ''} {', '.join(lines)}"
        first.message += f"\n  and {_counted(len(others), 'more problem')}, {where}"
    return first


def _refusals(error: ValidationError, raw: Mapping[str, Any]) -> Iterator[Problem]:
    """One problem a place: what the branches of a union expected is said in one sentence.

    A key that is missing beside an unknown one is most likely that one misspelt: told once.
    """
    details = error.errors(include_url=False)
    misspelt = {detail["loc"][:-1] for detail in details if detail["type"] == "extra_forbidden"}
    details = [
        each for each in details if each["type"] != "missing" or each["loc"][:-1] not in misspelt
    ]

    def place(detail: ErrorDetails) -> Loc:
        loc = _in_file(detail["loc"], raw)
        return (*loc, detail["loc"][-1]) if detail["type"] == "missing" else loc

    for loc, group in groupby(sorted(details, key=lambda each: str(place(each))), key=place):
        yield _refusal(loc, list(group), raw)


def _in_file(loc: Loc, raw: Any) -> Loc:
    """pydantic's place without the parts that only name a branch of a union."""
    found: list[str | int] = []
    for part in loc:
        if isinstance(raw, dict) and part in raw:
            raw = raw[str(part)]
        elif isinstance(raw, tuple) and isinstance(part, int) and part < len(raw):
            raw = raw[part]
        else:
            continue
        found.append(part)
    return tuple(found)


def _refusal(loc: Loc, details: list[ErrorDetails], raw: Mapping[str, Any]) -> Problem:
    detail = details[0]
    kind, value = detail["type"], detail["input"]
    parent = _dotted(loc[:-1])
    if kind == "extra_forbidden":
        hint = suggest(str(loc[-1]), _known_keys(loc[:-1], raw))
        where = f" in {parent}" if parent else ""
        return Problem(loc, f"unknown key {str(loc[-1])!r}{where}: {hint}", at_key=True)
    if kind == "missing":
        where = f"{parent} lacks" if parent else "the file lacks"
        return Problem(loc, f"{where} the key {str(loc[-1])!r}")
    if kind == "union_tag_not_found":
        return Problem(loc, f"{_dotted(loc)} lacks the key 'use': known: {', '.join(STAGES)}")
    if kind == "union_tag_invalid":
        named = str(value.get("use")) if isinstance(value, Mapping) else str(value)
        return Problem((*loc, "use"), f"unknown stage {named!r}: {suggest(named, STAGES)}")
    if kind == "value_error":
        at_key = detail["loc"][-1] == "[key]"
        return Problem(loc, f"{_dotted(loc)}: {detail['ctx']['error']}", at_key=at_key)
    wanted = " or ".join(dict.fromkeys(_expected(each) for each in details))
    return Problem(loc, f"{_dotted(loc)}: expected {wanted}, not {_kind(value)}")


def _expected(detail: ErrorDetails) -> str:
    """What one of pydantic's refusals wanted, as the end of "expected ..."."""
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
        model = STAGES[raw["stages"][loc[1]]["use"]]
    elif loc[:1] == ("export",):
        model = Export
    else:
        for part in loc:
            annotation = model.model_fields[str(part)].annotation
            assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
            model = annotation
    return [info.alias or name for name, info in model.model_fields.items()]


def _dotted(loc: Loc) -> str:
    """`("matrix", "prune", 2)` -> `matrix.prune[2]`."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _kind(value: object) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, tuple):
        return "a list" if value else "an empty list"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# --- files that a pipeline names ----------------------------------------------------------------


def _resolve_paths(pipeline: Pipeline, folder: Path) -> tuple[Pipeline, list[Problem]]:
    """Make the paths of inputs absolute, from the YAML file's `folder`; tell which are missing."""
    paths = _Paths(folder)
    data, benchmark = pipeline.data, pipeline.benchmark
    splits = {
        split: spec.model_copy(update={"source": paths.text(spec.source, ("data", split))})
        for split, spec in (("train", data.train), ("calibration", data.calibration))
    }
    asked = benchmark.quality.perplexity
    sets = tuple(paths.text(each, ("benchmark", "quality", "perplexity")) for each in asked)
    prompts = paths.text(benchmark.lossless.source, ("benchmark", "lossless"))
    parts = {
        "quality": benchmark.quality.model_copy(update={"perplexity": sets}),
        "lossless": benchmark.lossless.model_copy(update={"source": prompts}),
    }
    model = paths.model(pipeline.model.source)
    stages = {}
    for name, stage in pipeline.stages.items():
        files = stage.files().items()
        named = {key: paths.file(path, ("stages", name, key)) for key, path in files}
        stages[name] = stage.model_copy(update=named)
    changes = {
        "model": pipeline.model.model_copy(update={"source": model}),
        "data": data.model_copy(update=splits),
        "stages": stages,
        "benchmark": benchmark.model_copy(update=parts),
    }
    return pipeline.model_copy(update=changes), paths.missing


class _Paths:
    """Makes paths absolute from one folder, and remembers those that lead nowhere."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.missing: list[Problem] = []

    def _absolute(self, path: str | Path) -> Path:
        return self._folder / Path(path).expanduser()

    def file(self, path: str | Path, loc: Loc) -> str:
        """A file that must exist."""
        absolute = self._absolute(path)
        if not absolute.is_file():
            fix = "paths are taken from the folder of this YAML file"
            self.missing.append(Problem(loc, f"there is no file {str(absolute)!r}", fix))
        return str(absolute)

    def text(self, source: str, loc: Loc) -> str:
        """A data source: a path when it ends like a file of text, else an alias or hub id."""
        if not source.endswith(TEXT_SUFFIXES) and not _looks_local(source):
            return source
        return self.file(source, (*loc, "source"))

    def model(self, source: str) -> str:
        """A model source: a folder when there is one, else an alias or hub id."""
        absolute = self._absolute(source)
        if (absolute / "config.json").is_file():
            return str(absolute)
        if _looks_local(source):
            message = f"there is no model (config.json) in {str(absolute)!r}"
            self.missing.append(Problem(("model", "source"), message))
        return source


def _looks_local(source: str) -> bool:
    return source.startswith((".", "/", "~"))
