"""A YAML file -> `Pipeline`, with every mistake reported at its file, line and column.

The file becomes plain values and a map of their positions (`yaml_values`), pydantic reads the
values strictly (no text for a number), and `mistakes` words its errors anew.
"""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compose.artifacts.gguf.file import is_gguf
from compose.errors import PipelineError, shortened, suggest
from compose.language.mistakes import first_mistake, refusals
from compose.language.positions import Loc, Problem
from compose.language.schema import Pipeline
from compose.language.yaml_values import read_yaml
from compose.stages.text.data_spec import DataSpec

TEXT_SUFFIXES = (".txt", ".jsonl", ".json", ".xz")
MOST_BYTES = 1 << 16
"""Of a pipeline file: twenty times the longest that ships."""
LONGEST_NAME = 255
"""Bytes of a file's name, on every file system in use."""
MOST_PROBLEMS = 1000
"""Mistakes of which the first is looked for; each may cost a comparison with many names."""


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
    resolved, missing = _resolve_paths(pipeline, file.absolute().parent)
    problems = [*islice(pipeline.problems(), MOST_PROBLEMS), *missing]
    if problems:
        raise first_mistake(problems, source_map)
    return resolved.with_source_map(source_map)


def to_json_schema() -> dict[str, Any]:
    """The language as JSON Schema, for editors."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return dialect | Pipeline.model_json_schema(by_alias=True)


def _text_of(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            data = stream.read(MOST_BYTES + 1)
    except FileNotFoundError:
        beside = sorted(path.name for path in file.absolute().parent.glob("*.yaml"))
        hint = suggest(file.name, beside) if beside else None
        raise PipelineError("there is no such file", file=file, fix=hint) from None
    except OSError as error:
        raise PipelineError(f"cannot read it: {error.strerror}", file=file) from None
    if len(data) > MOST_BYTES:
        kib = MOST_BYTES >> 10
        raise PipelineError(f"the file has more than {kib} KiB: no pipeline is as long", file=file)
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
    """Make the paths of inputs absolute, from the YAML file's `folder`; tell which are missing."""
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
        """From the root, without `..`: a path that is part of a key has one spelling."""
        home = os.path.expanduser(path)  # unlike Path's, it keeps `~nobody`
        return Path(os.path.normpath(self._folder / home))

    def file(self, path: str | Path, loc: Loc) -> str:
        """A file that must exist."""
        absolute = self._absolute(path)
        if not os.path.isfile(absolute):  # unlike Path's, it accepts a name that is too long
            fix = "paths are taken from the folder of this YAML file"
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

    def model(self, source: str) -> str:
        """A model source: a GGUF file, a folder when there is one, else an alias or hub id."""
        if is_gguf(source):
            return self.file(source, ("model", "source"))
        absolute = self._absolute(source)
        if os.path.isfile(absolute / "config.json"):
            return str(absolute)
        if _looks_local(source):
            message = f"there is no model (config.json) in {str(absolute)!r}"
            self.missing.append(Problem(("model", "source"), message))
        self._refuse_long(source, ("model", "source"))
        return source

    def _refuse_long(self, source: str, loc: Loc) -> None:
        """Refuse an alias or hub id that no file system could hold as a name."""
        if max(len(os.fsencode(part)) for part in source.split("/")) > LONGEST_NAME:
            message = f"{shortened(source)!r} is longer than the name of any model or data set"
            self.missing.append(Problem(loc, message))


def _looks_local(source: str) -> bool:
    return source.startswith((".", "/", "~"))
