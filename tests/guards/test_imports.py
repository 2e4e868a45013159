"""Who may import whom: `lint-imports` holds the contracts of pyproject.toml; here is what it sees.

The contracts are the floors of docs/structure.md, no circles, an engine that knows nothing of what
is around it, and reports that know results alone. Imports inside functions and for types count.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("gateskip", "compose", "reports")

PLANTED = (
    ("gateskip/runtime/skipping.py", "from compose.errors import UserError", "compose.errors"),
    ("gateskip/__init__.py", "from compose.errors import UserError", "compose.errors"),
    (
        "gateskip/gates/base.py",
        "def f():\n    import gateskip.runtime.skipping",
        "gateskip.runtime.skipping",
    ),
    ("compose/planning/plan.py", "from compose.run.runner import run", "compose.run.runner"),
    ("compose/bench/cell.py", "from compose.stages import registry", "compose.stages.registry"),
    ("reports/load.py", "from compose.artifacts.folder import x", "compose.artifacts.folder"),
    ("reports/load.py", "import gateskip", "gateskip"),
    ("compose/run/runner.py", "from ..cli import main", "compose.cli"),
    (
        "compose/run/runner.py",
        "if TYPE_CHECKING:\n    from compose.terminal.show import shown",
        "compose.terminal.show",
    ),
    ("compose/run/runner.py", "def g():\n    from reports.render import render", "reports.render"),
)
"""File, an import that is refused there, and the module that it names."""


def lint(folder: Path) -> Any:
    """What `lint-imports` says of the packages in a folder."""
    main = "from importlinter.cli import lint_imports_command as main; main()"
    return subprocess.run(
        [sys.executable, "-c", main, "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "400"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    """Every import between the packages."""
    return grimp.build_graph(*PACKAGES, cache_dir=None)


def test_the_contracts_are_kept() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout


def test_no_module_imports_a_package_that_it_is_inside_of(graph: grimp.ImportGraph) -> None:
    """A circle through an `__init__.py`, which the contract on circles does not see."""
    inside = [(p, m) for p in graph.modules for m in graph.find_descendants(p)]
    assert [(m, p) for p, m in inside if graph.direct_import_exists(importer=m, imported=p)] == []


def test_planted_imports_are_refused(tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=_all_but_code)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for file, source, _ in PLANTED:
        with (tmp_path / file).open("a") as written:
            written.write(f"\n{source}\n")
    with (tmp_path / "compose/results/record.py").open("a") as written:
        written.write("\nfrom compose.results import schema\n")
    done = lint(tmp_path)
    assert done.returncode == 1
    for file, source, target in PLANTED:
        module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        assert f" {module} -> {target} (l." in done.stdout, source
    assert "No cycles are allowed in compose.results." in done.stdout


def _all_but_code(folder: str, names: list[str]) -> set[str]:
    files = {n for n in names if not n.endswith(".py") and not (Path(folder) / n).is_dir()}
    return files | {"published"}
