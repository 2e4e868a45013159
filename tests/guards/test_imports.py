"""Who may import whom: the rooms of the design, checked on the syntax tree of every file.

The rule is one table. A file that needs an import the table refuses is in the wrong room, or the
design has changed and the table with it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("gateskip", "compose", "reports")


@dataclass(frozen=True)
class Rule:
    """Files that match `files` may import a module matching `target` only if `allowed` lists it."""

    files: str
    target: str
    allowed: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()  # files that the rule does not bind
    why: str = ""

    def binds(self, file: str) -> bool:
        return fnmatch(file, self.files) and not any(fnmatch(file, free) for free in self.unless)

    def refuses(self, module: str) -> bool:
        return _inside(module, self.target) and not any(_inside(module, a) for a in self.allowed)


RULES = (
    Rule("gateskip/*", "compose", why="gateskip knows torch and transformers, nothing of ours"),
    Rule("gateskip/*", "reports", why="gateskip knows torch and transformers, nothing of ours"),
    Rule(
        "compose/*",
        "gateskip",
        allowed=("gateskip.folders",),
        unless=(
            "compose/stages/gate.py",
            "compose/stages/heal.py",
            "compose/stages/head.py",
            "compose/stages/kept_gates.py",
            "compose/stages/own_text.py",
            "compose/stages/prune_branches.py",
            "compose/stages/refit.py",
            "compose/stages/decode.py",
            "compose/bench/*",
        ),
        why="only stages that train, fit, ask or write and the benchmark drive the engine",
    ),
    Rule("reports/*", "gateskip", why="a report is drawn from results alone"),
    Rule(
        "reports/*",
        "compose",
        allowed=("compose.result", "compose.errors"),
        why="a report is drawn from results alone",
    ),
    Rule("compose/stages/*", "reports", why="a stage makes a model folder and draws nothing"),
    Rule("compose/bench/*", "reports", why="a benchmark measures and draws nothing"),
    Rule("*", "compose.cli", why="the command line is a door, not a library"),
)


def _inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _dotted(file: str) -> str:
    path = Path(file)
    return ".".join((path.parent if path.name == "__init__.py" else path.with_suffix("")).parts)


def imported(source: str, file: str, modules: frozenset[str]) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute module name) for each import in `source`, lazy ones included.

    `modules` are the names that exist: `from a import b` is an import of a.b where that is one.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                folder = Path(file).parts[:-1]
                up = folder[: len(folder) - node.level + 1]
                base = ".".join([*up, base] if base else up)
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield node.lineno, name if name in modules else base
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else None
            called = node.func.id if isinstance(node.func, ast.Name) else called
            first = node.args[0]
            if (
                called in {"import_module", "__import__"}
                and isinstance(first, ast.Constant)
                and isinstance(first.value, str)
            ):
                yield node.lineno, first.value


def violations(file: str, source: str, modules: frozenset[str]) -> list[str]:
    """Sentences, one for each import in `file` (a path below the root) that the table refuses."""
    return [
        f"{file}:{line}: imports {name}, but {rule.why}"
        for line, name in imported(source, file, modules)
        for rule in RULES
        if rule.binds(file) and rule.refuses(name)
    ]


def _files() -> list[str]:
    return sorted(p.relative_to(ROOT).as_posix() for r in ROOMS for p in (ROOT / r).rglob("*.py"))


def test_every_import_stays_in_its_room() -> None:
    files = _files()
    assert files, "no file was found: the guard would pass on nothing"
    modules = frozenset(map(_dotted, files))
    found = [
        bad for file in files for bad in violations(file, (ROOT / file).read_text("utf-8"), modules)
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("file", "source", "refused"),
    [
        ("gateskip/skip.py", "from compose.errors import UserError", True),
        ("gateskip/skip.py", "from gateskip.gates import attach\nimport torch", False),
        ("gateskip/skip.py", "from . import gates", False),
        ("compose/plan.py", "def f():\n    import gateskip.decode", True),
        ("compose/plan.py", "import importlib\nimportlib.import_module('gateskip')", True),
        ("compose/bench/cell.py", "import gateskip", False),
        ("compose/stages/gate.py", "from gateskip import train", False),
        ("reports/load.py", "from compose.result import Results", False),
        ("reports/load.py", "from compose import result, errors", False),
        ("reports/load.py", "from compose import plan", True),
        ("reports/load.py", "import gateskip", True),
        ("compose/runner.py", "from .cli import main", True),
        ("compose/runner.py", "from . import cli", True),
        ("compose/stages/prune.py", "from ..cli import main", True),
        ("compose/stages/prune.py", "from .base import Stage", False),
    ],
)
def test_the_guard_sees(file: str, source: str, refused: bool) -> None:
    modules = frozenset({"compose.cli", "compose.plan", "compose.result", "compose.errors"})
    assert bool(violations(file, source, modules)) is refused
