"""A YAML file -> `Pipeline`, with every mistake reported at its file, line and column.

`read_yaml` turns the file into plain values and a map of their positions. pydantic reads the values
strictly (a text is never read as a number), and `mistakes` words what it refuses. Only the YAML
that a pipeline needs is accepted: mappings, lists, text, numbers, booleans, null. Their number and
depth are limited, so that no file takes long to read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from compose.artifacts.gguf.file import is_gguf
from compose.contract import DataSpec
from compose.errors import PipelineError, shortened, suggest
from compose.language.mistakes import first_mistake, kind_of, no_variants, refusals
from compose.language.positions import Loc, Mark, Problem, SourceMap
from compose.language.schema import Pipeline
from compose.stages.decode import Speculate
from compose.stages.registry import STAGES

TEXT_SUFFIXES = (".txt", ".jsonl", ".json", ".xz")
MOST_BYTES = 1 << 16
"""Largest pipeline file, in bytes: twenty times the longest that ships."""
LONGEST_NAME = 255
"""Longest file name, in bytes, that every common file system accepts."""
MOST_PROBLEMS = 1000
"""Most mistakes that are compared to find the first one; each may be compared with many names."""


def load_pipeline(path: str | Path) -> Pipeline:
    """Read a pipeline file; its model folder, data and gate files become absolute paths.

    Raises:
        PipelineError: the file cannot be read or is not valid. The message has the first mistake in
            the file, at `file:line:column`, and the number of the others.
    """
    file = Path(path)
    raw, source_map = read_yaml(_text_of(file), str(path))
    try:
        pipeline = Pipeline.model_validate(raw, strict=True)
    except ValidationError as error:
        raise first_mistake(refusals(error, raw), source_map) from None
    source_map = _without_groups(source_map, raw.get("stages", {}))
    resolved, missing = _resolve_paths(pipeline, file.absolute().parent)
    problems = [*islice(pipeline.problems(), MOST_PROBLEMS), *missing]
    named = (pipeline.pipelines, pipeline.matrix is not None, pipeline.search is not None)
    if not problems and not any(named):
        problems = [no_variants(pipeline)]
    if problems:
        raise first_mistake(problems, source_map)
    return resolved.with_source_map(source_map)


def _without_groups(source_map: SourceMap, stages: Mapping[str, Any]) -> SourceMap:
    """The places of a valid file. A parameter in a group of its stage is also found without the
    group, where the stage has it."""
    values, keys = dict(source_map.values), dict(source_map.keys)
    for name, stage in stages.items():
        for group in STAGES[stage["use"]].groups:
            for parameter in stage.get(group, ()):
                inside, beside = ("stages", name, group, parameter), ("stages", name, parameter)
                if inside in values and inside in keys:
                    values[beside], keys[beside] = values[inside], keys[inside]
    return replace(source_map, values=values, keys=keys)


def to_json_schema() -> dict[str, Any]:
    """The language as JSON Schema, for editors."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    variants = {"anyOf": [{"required": [key]} for key in ("pipelines", "matrix", "search")]}
    return dialect | Pipeline.model_json_schema(by_alias=True) | variants


def _text_of(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            data = stream.read(MOST_BYTES + 1)
    except FileNotFoundError:
        folder = file.absolute().parent
        beside = sorted(path.name for path in folder.glob("[!.]*.yaml"))
        hint = suggest(file.name, beside) if beside else None
        raise PipelineError("there is no such file", file=file, fix=hint) from None
    except OSError as error:
        raise PipelineError(f"cannot read it: {error.strerror}", file=file) from None
    if len(data) > MOST_BYTES:
        kib = MOST_BYTES >> 10
        raise PipelineError(f"the file is larger than {kib} KiB, the limit", file=file)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PipelineError(
            f"the file is not UTF-8 text ({error.reason})",
            fix="save it as UTF-8",
            file=file,
            line=line,
        ) from None


def _resolve_paths(pipeline: Pipeline, folder: Path) -> tuple[Pipeline, list[Problem]]:
    """Make the paths of inputs absolute, from the YAML file's `folder`, and report those that do
    not exist."""
    paths = _Paths(folder)
    data, benchmark = pipeline.data, pipeline.benchmark
    splits = {
        split: paths.texts(spec, ("data", split))
        for split, spec in (("train", data.train), ("calibration", data.calibration))
    }
    place = ("benchmark", "quality", "perplexity")
    sets = tuple(paths.text(data_set, place) for data_set in benchmark.quality.perplexity)
    prompts = paths.text(benchmark.lossless.source, ("benchmark", "lossless"))
    quality: dict[str, Any] = {"perplexity": sets}
    if (answers := benchmark.quality.own_answers) is not None:
        source = paths.text(answers.source, ("benchmark", "quality", "own_answers"))
        quality["own_answers"] = answers.model_copy(update={"source": source})
    parts: dict[str, Any] = {
        "quality": benchmark.quality.model_copy(update=quality),
        "lossless": benchmark.lossless.model_copy(update={"source": prompts}),
    }
    if (timed := benchmark.speed.prompts) is not None:
        source = paths.text(timed, ("benchmark", "speed"), "prompts")
        parts["speed"] = benchmark.speed.model_copy(update={"prompts": source})
    model = paths.model(pipeline.model.source, ("model", "source"))
    stages = {}
    for name, stage in pipeline.stages.items():
        files = stage.files().items()
        named = {key: paths.file(path, ("stages", name, key)) for key, path in files}
        if isinstance(stage, Speculate) and stage.draft_model is not None:
            loc = ("stages", name, "draft_model")
            named["draft_model"] = paths.model(stage.draft_model, loc)
        stages[name] = stage.model_copy(update=named)
    changes = {
        "model": pipeline.model.model_copy(update={"source": model}),
        "data": data.model_copy(update=splits),
        "stages": stages,
        "benchmark": benchmark.model_copy(update=parts),
    }
    return pipeline.model_copy(update=changes), paths.missing


class _Paths:
    """Makes paths absolute from one folder, and remembers those that do not exist."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.missing: list[Problem] = []

    def _absolute(self, path: str | Path) -> Path:
        """The absolute path without `..`, so that a path in a key has one spelling."""
        home = os.path.expanduser(path)  # unlike Path's, it keeps `~nobody`
        return Path(os.path.normpath(self._folder / home))

    def file(self, path: str | Path, loc: Loc) -> str:
        """A file that must exist."""
        absolute = self._absolute(path)
        if not os.path.isfile(absolute):  # unlike Path's, it accepts a name that is too long
            fix = "paths are relative to the folder of this YAML file"
            self.missing.append(Problem(loc, f"there is no file {str(absolute)!r}", fix))
        return str(absolute)

    def text(self, source: str, loc: Loc, key: str = "source") -> str:
        """A data source, `key` in the mapping at `loc`: a path when it ends like a file of text,
        else an alias or hub id."""
        if not source.endswith(TEXT_SUFFIXES) and not _looks_local(source):
            self._refuse_long(source, (*loc, key))
            return source
        return self.file(source, (*loc, key))

    def texts(self, spec: DataSpec, loc: Loc) -> DataSpec:
        """The sources of a split."""
        named = {source: self.text(source, loc) for source in spec.weights}
        changes: dict[str, Any] = {"answered": tuple(named[name] for name in spec.answered)}
        if spec.mix:
            changes["mix"] = {named[source]: weight for source, weight in spec.mix.items()}
        else:
            changes["source"] = named[spec.source]
        return spec.model_copy(update=changes)

    def model(self, source: str, loc: Loc) -> str:
        """A model source: a GGUF file, a folder when there is one, else an alias or hub id."""
        if is_gguf(source):
            return self.file(source, loc)
        absolute = self._absolute(source)
        if os.path.isfile(absolute / "config.json"):
            return str(absolute)
        if _looks_local(source):
            message = f"there is no model (config.json) in {str(absolute)!r}"
            self.missing.append(Problem(loc, message))
        self._refuse_long(source, loc)
        return source

    def _refuse_long(self, source: str, loc: Loc) -> None:
        """Refuse an alias or hub id that is too long for a file name."""
        if max(len(os.fsencode(part)) for part in source.split("/")) > LONGEST_NAME:
            message = f"{shortened(source)!r} is too long for the name of a model or data set"
            self.missing.append(Problem(loc, message))


def _looks_local(source: str) -> bool:
    return source.startswith((".", "/", "~"))


MOST_VALUES = 5_000
"""Most values in a file. A value counts again wherever a YAML alias repeats it."""
MOST_NESTED = 64
"""Deepest nesting of lists and mappings."""

_TAG = "tag:yaml.org,2002:"
_CONSTRUCTED = {_TAG + kind for kind in ("null", "bool", "int", "float")}
_COLLECTIONS = {_TAG + kind for kind in ("map", "seq")}
_AS_TEXT = {_TAG + kind for kind in ("str", "timestamp")}
_NO_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Characters that a text may not contain: control characters, which escapes such as "\0" can write,
and lone surrogates."""


def read_yaml(text: str, file: str) -> tuple[dict[str, Any], SourceMap]:
    """Plain values (lists as tuples) and their positions.

    Raises:
        PipelineError: not YAML, not one mapping of text keys without repeats, or larger than a
            pipeline is.
    """
    yaml = YAML(typ="safe", pure=True)
    try:
        _refuse_size(text, file)
        root = yaml.compose(text)
        reader = _Reader(yaml, file)
        raw = {} if root is None else reader.value(root, ())
    except YAMLError as error:
        raise _not_yaml(error, text, file) from None
    if root is None:
        fix = "begin with 'schema: 1', 'name: first' and 'model: {source: smollm2-135m-instruct}'"
        raise PipelineError("the file is empty", file=file, line=1, column=1, fix=fix)
    if not isinstance(raw, dict):
        message = f"a pipeline is a mapping of keys, not {kind_of(raw)}"
        raise reader.map.locate(PipelineError(message, fix="begin with 'schema: 1'"), ())
    return raw, reader.map


def _refuse_size(text: str, file: str) -> None:
    """Refuse too many values, or too deep ones, by the parser's events.

    Composing takes longer, and recurses as deep as the values are nested.
    """
    depth = 0
    for count, event in enumerate(YAML(typ="safe", pure=True).parse(text)):
        if count > 2 * MOST_VALUES:  # keys and ends are events, too
            line = event.start_mark.line + 1
            message = f"the file has more than {MOST_VALUES} values"
            raise PipelineError(message, file=file, line=line)
        if isinstance(event, CollectionStartEvent):
            depth += 1
            if depth > MOST_NESTED:
                mark = event.start_mark
                raise PipelineError(
                    f"lists and mappings are nested more than {MOST_NESTED} deep here",
                    file=file,
                    line=mark.line + 1,
                    column=mark.column + 1,
                )
        elif isinstance(event, CollectionEndEvent):
            depth -= 1


def _not_yaml(error: YAMLError, text: str, file: str) -> PipelineError:
    if isinstance(error, ReaderError):
        before = text[: error.position]
        line, column = before.count("\n") + 1, error.position - before.rfind("\n")
        why = f"unacceptable character U+{error.character:04X}"
        return PipelineError(f"not YAML: {why}", file=file, line=line, column=column)
    if not isinstance(error, MarkedYAMLError):
        return PipelineError(f"not YAML: {shortened(str(error).splitlines()[0])}", file=file)
    mark = error.problem_mark
    while_doing = f" ({error.context})" if error.context else ""
    refused = PipelineError(f"not YAML: {shortened(f'{error.problem}{while_doing}')}", file=file)
    if mark is not None:
        refused.line, refused.column = mark.line + 1, mark.column + 1
    return refused


class _Reader:
    """Turns nodes into values and notes the position of each."""

    def __init__(self, yaml: YAML, file: str) -> None:
        self._yaml = yaml
        self._count = 0
        self._open: list[int] = []  # ids of the nodes around the one being read
        self._values: dict[Loc, Mark] = {}
        self._keys: dict[Loc, Mark] = {}
        self.map = SourceMap(file, self._values, self._keys)

    def value(self, node: Node, loc: Loc) -> Any:
        self._values[loc] = _mark(node)
        if id(node) in self._open:
            raise self._refuse(node, "this alias refers to a value that contains it")
        self._count += 1
        if self._count > MOST_VALUES or len(self._open) > MOST_NESTED:
            raise self._refuse(
                node,
                f"with its aliases written out, the file has more than {MOST_VALUES} values or "
                f"{MOST_NESTED} levels here",
            )
        self._open.append(id(node))
        try:
            if isinstance(node, ScalarNode):
                return self._scalar(node)
            if str(node.tag) not in _COLLECTIONS:
                raise self._refuse(
                    node, f"the tag {shortened(repr(str(node.tag)))} is not supported"
                )
            if isinstance(node, MappingNode):
                return self._mapping(node, loc)
            return tuple(self.value(item, (*loc, i)) for i, item in enumerate(node.value))
        finally:
            self._open.pop()

    def _mapping(self, node: MappingNode, loc: Loc) -> dict[str, Any]:
        merged, stated = {}, {}
        for key, value in node.value:
            if str(key.tag) == _TAG + "merge":
                merged.update(self._merged(value, loc))
                continue
            name = self._key(key)
            if name in stated:
                first, shown = self._keys[(*loc, name)][0], shortened(repr(name))
                raise self._refuse(key, f"the key {shown} is given twice (first on line {first})")
            self._keys[(*loc, name)] = _mark(key)
            stated[name] = self.value(value, (*loc, name))
        return merged | stated

    def _merged(self, node: Node, loc: Loc) -> dict[str, Any]:
        """The keys that `<<: *base` brings in; the first of several bases wins."""
        bases = node.value if isinstance(node, SequenceNode) else [node]
        merged: dict[str, Any] = {}
        for base in bases:
            if not isinstance(base, MappingNode):
                raise self._refuse(base, "'<<' needs a mapping")
            merged = self.value(base, loc) | merged
        return merged

    def _key(self, node: Node) -> str:
        if not isinstance(node, ScalarNode) or str(node.tag) == _TAG + "null":
            raise self._refuse(node, "a key must be text")
        return self._text(node)

    def _scalar(self, node: Node) -> Any:
        tag = str(node.tag)
        if tag in _CONSTRUCTED:
            try:
                return self._yaml.constructor.construct_object(node)
            except (ValueError, KeyError, TypeError, IndexError, OverflowError):
                kind, shown = tag.removeprefix(_TAG), shortened(repr(node.value))
                raise self._refuse(node, f"{shown} cannot be read as {kind}") from None
        if tag in _AS_TEXT:
            return self._text(node)
        raise self._refuse(node, f"the tag {shortened(repr(tag))} is not supported")

    def _text(self, node: Node) -> str:
        text = str(node.value)
        if (match := _NO_TEXT.search(text)) is not None:
            raise self._refuse(node, f"this text contains the character U+{ord(match[0]):04X}")
        return text

    def _refuse(self, node: Node, message: str) -> PipelineError:
        line, column = _mark(node)
        return PipelineError(message, file=self.map.file, line=line, column=column)


def _mark(node: Node) -> Mark:
    return node.start_mark.line + 1, node.start_mark.column + 1
