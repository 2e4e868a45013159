"""A hash over the code and the libraries that measure cells: part of every measured phase's key.

The steps that make weights have keys of their own, with a version a stage: trained weights outlive
a change of the code. A number that was measured does not, since it is published beside others.

A source file counts by what it computes. Python: one hash for each statement of a module, over its
syntax tree without docstrings, annotations and imports. A name stands for what it was imported as,
and a module of this project has no name, so a moved or renamed module leaves every hash as it was.
C++: one hash over the tokens.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Set
from pathlib import Path

from compose.assets.fetch import default_cache
from compose.results.environment import library_versions
from compose.store import read_json, write_json

MEASURING = (
    "gateskip",
    "compose/bench",
    "compose/data",
    "compose/assets/contamination.py",
    "compose/assets/corpora.py",
    "compose/assets/rows.py",
    "compose/assets/table.py",
    "compose/assets/tasks.py",
    "compose/assets/texts.py",
)
"""Files and folders whose content decides what is measured, from the root of the source tree."""

ROOT = Path(__file__).resolve().parents[2]

OURS = "gateskip-compose"
"""This project among the versions: its code counts, not its number."""


PACKAGES = ("gateskip", "compose", "reports")
"""The packages of this project."""

UNREAD = {"annotation", "returns", "type_comment", "type_params", "ctx", "kind"}
"""Fields of a syntax tree that do not change what is computed."""

_CPP = re.compile(
    r"""
    (?P<skipped> //(?:\\\n|[^\n])* | /\*.*?\*/ | \\\n | [ \t\r\f\v]+ )
  | (?P<text> (?:u8|[uUL])?R"(?P<fence>[^()\s\\]*)\(.*?\)(?P=fence)"
            | (?:u8|[uUL])?"(?:\\.|[^"\\\n])*" | (?:u8|[uUL])?'(?:\\.|[^'\\\n])*' )
  | (?P<number> \.?\d(?:[eEpP][+-]|'?\w|\.)* )
  | (?P<name> \w+ )
  | (?P<line> \n )
  | (?P<sign> <<=|>>=|->\*|<=>|\.\.\.|::|->|\+\+|--|<<|>>|&&|\|\||\#\#|[-+*/%&|^=!<>]=|. )
    """,
    re.VERBOSE | re.DOTALL,
)


@functools.cache
def fingerprint() -> str:
    """16 hex digits over the sources in `MEASURING` and the versions of the libraries.

    Computed once a process; nothing is imported for it. Reading the sources takes milliseconds,
    parsing them half a second, so the last answer is kept in the cache beside a hash of the bytes.
    """
    versions = {name: v for name, v in library_versions().items() if name != OURS}
    memory, key = default_cache() / "fingerprint.json", _bytes_hash(ROOT, versions)
    last = read_json(memory)
    if isinstance(last, dict) and last.get("bytes") == key:
        return str(last["fingerprint"])
    answer = fingerprint_of(ROOT, versions)
    with contextlib.suppress(OSError):  # a cache that cannot be written is none
        write_json(memory, {"bytes": key, "fingerprint": answer})
    return answer


def fingerprint_of(root: Path, versions: dict[str, str]) -> str:
    """The fingerprint of the source tree at `root` with these versions (name -> version).

    It changes with what the code computes: not with comments, docstrings, annotations, white space,
    the names of files and modules, or the order of definitions. Two definitions of one name that
    change places are the same to it.
    """
    digest = hashlib.sha256(json.dumps(versions, sort_keys=True).encode())
    modules = project_modules(root)
    for part in sorted(
        part for file in measuring_files(root) for part in code_parts(file, modules)
    ):
        digest.update(part)
    return digest.hexdigest()[:16]


def _bytes_hash(root: Path, versions: dict[str, str]) -> str:
    """A hash over the bytes of the sources and of what makes a fingerprint of them."""
    facts = [versions, sys.version, sorted(project_modules(root))]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for file in (Path(__file__), *measuring_files(root)):
        digest.update(str(file).encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def measuring_files(root: Path) -> Iterator[Path]:
    """Every file of `MEASURING` but compiled ones (a wheel has kernels), in a fixed order."""
    for name in MEASURING:
        place = root / name
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        files = [file for file in files if file.is_file() and file.suffix != ".so"]
        yield from (file for file in files if "__pycache__" not in file.parts)


def code_parts(file: Path, modules: Set[str]) -> list[bytes]:
    """Hashes of a file's parts: of any other kind of file, its content.

    `modules` are the dotted names of this project's modules (`project_modules`).
    """
    content = file.read_bytes()
    if file.suffix == ".py":
        return python_parts(content.decode(), modules)
    if file.suffix in (".cpp", ".h"):
        return [_hash("\0".join(cpp_tokens(content.decode())))]
    return [hashlib.sha256(content).digest()]


def project_modules(root: Path) -> frozenset[str]:
    """Dotted names of every module below `root`, such as gateskip.model.compute."""
    files = (file.relative_to(root) for name in PACKAGES for file in (root / name).rglob("*.py"))
    return frozenset(
        ".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files
    )


def python_parts(text: str, modules: Set[str]) -> list[bytes]:
    """A hash for each statement of a module, in the file's order."""
    tree = ast.parse(text)
    writer = _Writer(_imported(tree, modules), modules)
    return [_hash(writer.written(statement)) for statement in _statements(tree.body)]


def cpp_tokens(text: str) -> Iterator[str]:
    """Tokens of C++ without comments, white space and includes of this project's files.

    A line's end is a token only where it ends a directive (#define, #if).
    """
    line: list[str] = []
    for match in _CPP.finditer(text + "\n"):
        if match["skipped"] is None:
            line.append(match[0])
        if match["line"] is None:
            continue
        if line[0] != "#":
            line.pop()
        if not (line[:2] == ["#", "include"] and line[2].startswith('"')):
            yield from line
        line = []


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _imported(tree: ast.Module, modules: Set[str]) -> dict[str, str | None]:
    """Name in this file -> what was imported under it; None: a module of this project."""
    names: dict[str, str | None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                path = alias.name if alias.asname else alias.name.partition(".")[0]
                names[alias.asname or path] = None if _is_ours(path) else path
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                path = f"{node.module}.{alias.name}"
                ours = None if path in modules else alias.name
                names[alias.asname or alias.name] = ours if node.level or _is_ours(path) else path
    return names


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in PACKAGES


def _statements(body: list[ast.stmt], *, of_class: bool = False) -> Iterator[ast.stmt]:
    """A block's statements, less those that compute nothing: a class's bare `x: int` is a field."""
    for node in body:
        match node:
            case ast.Import() | ast.ImportFrom() | ast.Pass():
                continue
            case ast.Expr(value=ast.Constant(value=str())):
                continue
            case ast.AnnAssign(value=None) if not of_class:
                continue
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                yield from _statements(node.orelse, of_class=of_class)
            case _:
                yield node


class _Writer:
    """Writes syntax trees of one file as text."""

    def __init__(self, names: dict[str, str | None], modules: Set[str]) -> None:
        self.names = names
        self.modules = modules

    def written(self, node: ast.AST) -> str:
        """A node as text in which equal text means equal code."""
        match node:
            case ast.Name():
                return f"Name({self.names.get(node.id, node.id)})"
            case ast.Attribute(value=ast.Name(id=name)) if self.names.get(name, name) is None:
                return f"Name({node.attr})"
            case ast.Constant(value=str(text)) if text in self.modules and "." in text:
                return "Name(None)"  # imported by its path
            case ast.AnnAssign(value=value) if value is not None:
                node = ast.Assign([node.target], value)
        return self._fields(node)

    def _fields(self, node: ast.AST) -> str:
        """A node by its kind and its fields; an empty one is left out."""
        kind, parts = type(node).__name__, []
        for name, value in ast.iter_fields(node):
            if name in UNREAD or (value is None and kind != "Constant"):
                continue
            if isinstance(value, list):
                if value and isinstance(value[0], ast.stmt):
                    value = list(_statements(value, of_class=kind == "ClassDef"))
                if value:
                    parts.append(f"{name}=[{','.join(map(self._value, value))}]")
            else:
                parts.append(f"{name}={self._value(value)}")
        return f"{kind}({';'.join(parts)})"

    def _value(self, value: object) -> str:
        return self.written(value) if isinstance(value, ast.AST) else repr(value)
