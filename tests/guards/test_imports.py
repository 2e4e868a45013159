"""Who may import whom: the floors of docs/structure.md, checked on the syntax tree of every file.

A folder imports only folders on lower floors, whether at the top of a file, inside a function, or
for types alone. No two modules import each other, not even by way of others.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("gateskip", "compose", "reports")

FLOORS: tuple[tuple[str, ...], ...] = (
    # the engine
    ("gateskip.extras", "gateskip.errors"),
    ("gateskip.kernels",),
    ("gateskip.model",),
    ("gateskip.gates",),
    ("gateskip.quantization",),
    ("gateskip.runtime",),
    ("gateskip.calibration",),
    ("gateskip.decoding",),
    ("gateskip.training",),
    ("gateskip.checkpoint",),
    ("gateskip",),
    # the pipeline around it
    ("compose.errors",),
    ("compose.hashes", "compose.numbers"),
    ("compose.table",),
    ("compose.store", "compose.units", "compose.memory", "compose.extras"),
    ("compose.results", "compose.artifacts", "compose.mirror"),
    ("compose.analysis",),
    ("reports", "compose.assets"),
    ("compose.stages", "compose.bench"),
    ("compose.language",),
    ("compose.planning",),
    ("compose.processes",),
    ("compose.outputs",),
    ("compose.run",),
    ("compose.search",),
    ("compose.terminal", "compose.workers"),
    ("compose.cli",),
    ("compose.__main__",),
)
"""From the ground up. Folders of one floor do not know each other."""

ISOLATED = ("gateskip", "reports")
"""Packages that must not know all that lies below them: reports are drawn from results alone."""

ALLOWED = {
    "gateskip": ("gateskip",),
    "reports": (
        "reports",
        "compose.analysis",
        "compose.results",
        "compose.errors",
        "compose.numbers",
        "compose.store",
        "compose.table",
        "compose.units",
    ),
}


def _inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _dotted(file: str) -> str:
    path = Path(file)
    return ".".join((path.parent if path.name == "__init__.py" else path.with_suffix("")).parts)


def place_of(module: str) -> tuple[int, str] | None:
    """Floor and folder of a module: the longest name of `FLOORS` that it is inside of."""
    named = [(name, floor) for floor, names in enumerate(FLOORS) for name in names]
    found = [(name, floor) for name, floor in named if _inside(module, name)]
    if not found:
        return None
    name, floor = max(found, key=lambda each: len(each[0]))
    return floor, name


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
    """Sentences, one for each import in `file` (a path below the root) that the floors refuse."""
    own = place_of(_dotted(file))
    if own is None:
        return []
    return [
        f"{file}:{line}: {own[1]} imports {name}, which is {why}"
        for line, name in imported(source, file, modules)
        if (why := _refusal(_dotted(file), own, name)) is not None
    ]


def _refusal(module: str, own: tuple[int, str], target: str) -> str | None:
    other = place_of(target)
    if other is None or other == own:
        return None
    package = module.partition(".")[0]
    if package in ISOLATED and not any(_inside(target, each) for each in ALLOWED[package]):
        return f"outside of what {package} may know"
    return None if other[0] < own[0] else f"on floor {other[0]}, not below floor {own[0]}"


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Strongly connected modules of an import graph (Tarjan 1972), those of more than one."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for other in sorted(graph.get(module, ())):
            if other not in order:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], order[other])
        if low[module] == order[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in sorted(graph):
        if module not in order:
            visit(module)
    return found


def _files() -> list[str]:
    return sorted(
        p.relative_to(ROOT).as_posix() for r in PACKAGES for p in (ROOT / r).rglob("*.py")
    )


def _graph() -> dict[str, set[str]]:
    files = _files()
    modules = frozenset(map(_dotted, files))
    return {
        _dotted(file): {
            name
            for _, name in imported((ROOT / file).read_text("utf-8"), file, modules)
            if name in modules and name != _dotted(file)
        }
        for file in files
    }


def test_every_import_goes_down() -> None:
    files = _files()
    assert files, "no file was found: the guard would pass on nothing"
    modules = frozenset(map(_dotted, files))
    found = [
        bad for file in files for bad in violations(file, (ROOT / file).read_text("utf-8"), modules)
    ]
    assert not found, "\n" + "\n".join(found)


def test_no_modules_import_each_other() -> None:
    assert circles(_graph()) == []


def test_every_folder_stands_on_a_floor() -> None:
    missing = [m for m in map(_dotted, _files()) if place_of(m) is None and m != "compose"]
    assert not missing, missing


@pytest.mark.parametrize(
    ("file", "source", "refused"),
    [
        ("gateskip/runtime/skipping.py", "from compose.errors import UserError", True),
        ("gateskip/runtime/skipping.py", "from gateskip.gates.base import Gates", False),
        ("gateskip/gates/base.py", "def f():\n    import gateskip.runtime.skipping", True),
        ("gateskip/gates/base.py", "from . import kinds", False),
        ("compose/planning/plan.py", "import gateskip", False),
        ("compose/planning/plan.py", "from compose.run.runner import run", True),
        ("compose/bench/cell.py", "from compose.stages.registry import STAGES", True),
        ("compose/stages/gate.py", "from gateskip.training import recipe", False),
        ("reports/load.py", "from compose.results.schema import Results", False),
        ("reports/load.py", "from compose.artifacts.folder import lineage", True),
        ("reports/load.py", "import gateskip", True),
        ("compose/run/runner.py", "from ..cli import main", True),
        ("compose/run/runner.py", "from compose.terminal.live.progress import Board", True),
        (
            "compose/workers/main.py",
            "import importlib\nimportlib.import_module('compose.cli')",
            True,
        ),
    ],
)
def test_the_guard_sees(file: str, source: str, refused: bool) -> None:
    modules = frozenset({"compose.cli", "gateskip.gates.kinds", "gateskip.training.recipe"})
    assert bool(violations(file, source, modules)) is refused


def test_circles_are_found_through_others() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}
    assert circles(graph) == [["a", "b", "c"]]
