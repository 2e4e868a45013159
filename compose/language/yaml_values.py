"""YAML text -> plain values, and the line and column of each of them.

The text is composed into nodes with their marks, and each node becomes a plain value; a list
becomes a tuple. Only mappings, lists, text, numbers, booleans and null are accepted, with limits on
their number and depth, so that a hostile file cannot take all memory or time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from compose.errors import PipelineError, shortened
from compose.language.positions import Loc, Mark, SourceMap

MOST_VALUES = 5_000
"""Values in a file, each counted again wherever an alias repeats it."""
MOST_NESTED = 64
"""How deep lists and mappings may stand inside each other."""

_TAG = "tag:yaml.org,2002:"
_CONSTRUCTED = {_TAG + kind for kind in ("null", "bool", "int", "float")}
_COLLECTIONS = {_TAG + kind for kind in ("map", "seq")}
_AS_TEXT = {_TAG + kind for kind in ("str", "timestamp")}
_NO_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters, which escapes such as "\\0" can write, and halves of surrogate pairs."""


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
            message = f"the file holds more than {MOST_VALUES} values"
            raise PipelineError(message, file=file, line=line)
        if isinstance(event, CollectionStartEvent):
            depth += 1
            if depth > MOST_NESTED:
                mark = event.start_mark
                raise PipelineError(
                    f"more than {MOST_NESTED} lists or mappings stand inside each other here",
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
            raise self._refuse(node, "this alias stands inside its own anchor")
        self._count += 1
        if self._count > MOST_VALUES or len(self._open) > MOST_NESTED:
            raise self._refuse(
                node,
                f"with its aliases written out, the file holds more than {MOST_VALUES} values or "
                f"{MOST_NESTED} levels here",
            )
        self._open.append(id(node))
        try:
            if isinstance(node, ScalarNode):
                return self._scalar(node)
            if str(node.tag) not in _COLLECTIONS:
                raise self._refuse(
                    node, f"the tag {shortened(repr(str(node.tag)))} means nothing here"
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
                raise self._refuse(key, f"the key {shown} stands here again (first: line {first})")
            self._keys[(*loc, name)] = _mark(key)
            stated[name] = self.value(value, (*loc, name))
        return merged | stated

    def _merged(self, node: Node, loc: Loc) -> dict[str, Any]:
        """The keys of `<<: *base`; the first of several bases wins."""
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
        return self._text(node)

    def _scalar(self, node: Node) -> Any:
        tag = str(node.tag)
        if tag in _CONSTRUCTED:
            try:
                return self._yaml.constructor.construct_object(node)
            except (ValueError, KeyError, TypeError, IndexError, OverflowError):
                kind, shown = tag.removeprefix(_TAG), shortened(repr(node.value))
                raise self._refuse(node, f"{shown} is no {kind} that can be read") from None
        if tag in _AS_TEXT:
            return self._text(node)
        raise self._refuse(node, f"the tag {shortened(repr(tag))} means nothing here")

    def _text(self, node: Node) -> str:
        text = str(node.value)
        if (match := _NO_TEXT.search(text)) is not None:
            raise self._refuse(node, f"this text holds the character U+{ord(match[0]):04X}")
        return text

    def _refuse(self, node: Node, message: str) -> PipelineError:
        line, column = _mark(node)
        return PipelineError(message, file=self.map.file, line=line, column=column)


def _mark(node: Node) -> Mark:
    return node.start_mark.line + 1, node.start_mark.column + 1


def kind_of(value: object) -> str:
    """The kind of a value, as the end of "expected ..., not ..."."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, tuple):
        return "a list" if value else "an empty list"
    return str(value).lower() if isinstance(value, bool) else shortened(repr(value))
