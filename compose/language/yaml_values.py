"""YAML text -> plain values, and the line and column of each of them.

The text is composed into nodes with their marks, and each node becomes a plain value; a list
becomes a tuple. Only what a pipeline needs is accepted: mappings, lists, text, numbers, booleans,
null.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from compose.errors import PipelineError
from compose.language.positions import Loc, Mark, SourceMap

_TAG = "tag:yaml.org,2002:"
_CONSTRUCTED = {_TAG + kind for kind in ("null", "bool", "int", "float")}
_AS_TEXT = {_TAG + kind for kind in ("str", "timestamp")}


def read_yaml(text: str, file: str) -> tuple[dict[str, Any], SourceMap]:
    """Plain values (lists as tuples) and their positions.

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
        message = f"a pipeline is a mapping of keys, not {kind_of(raw)}"
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
    """Turns nodes into values and notes the position of each."""

    def __init__(self, yaml: YAML, file: str) -> None:
        self._yaml = yaml
        self._open: list[int] = []  # ids of the nodes around the one being read
        self._values: dict[Loc, Mark] = {}
        self._keys: dict[Loc, Mark] = {}
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


def _mark(node: Node) -> Mark:
    return node.start_mark.line + 1, node.start_mark.column + 1


def kind_of(value: object) -> str:
    """What a value is, as the end of "expected ..., not ..."."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, tuple):
        return "a list" if value else "an empty list"
    return str(value).lower() if isinstance(value, bool) else repr(value)
