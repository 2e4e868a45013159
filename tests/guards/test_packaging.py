"""pyproject.toml says what the packages need and hold: libraries, folders with code, data."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

from setuptools import find_namespace_packages

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("gateskip", "compose", "reports")


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _config() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def _requirements() -> list[str]:
    project = _config()["project"]
    extras = project["optional-dependencies"].values()
    return [*project["dependencies"], *(requirement for extra in extras for requirement in extra)]


def _imported() -> dict[str, str]:
    """Top-level name -> the first file:line that imports it."""
    names: dict[str, str] = {}
    for path in sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                modules = [node.module]
            else:
                continue
            for module in modules:
                where = f"{path.relative_to(ROOT).as_posix()}:{node.lineno}"
                names.setdefault(module.split(".")[0], where)
    return names


def test_every_import_is_declared() -> None:
    declared = {_canonical(re.split(r"[\s\[<>=!~;]", r, maxsplit=1)[0]) for r in _requirements()}
    owners = packages_distributions()
    undeclared = [
        f"{where}: {name} (of {', '.join(sorted(set(owners.get(name, ['?']))))})"
        for name, where in _imported().items()
        if name not in sys.stdlib_module_names
        and name not in ROOMS
        and not declared & {_canonical(d) for d in (*owners.get(name, ()), name)}
    ]
    assert not undeclared, "\n" + "\n".join(undeclared)


def test_versions_are_ranges_not_pins() -> None:
    assert [r for r in _requirements() if "==" in r] == []


def test_every_folder_with_code_is_a_found_package() -> None:
    folders = {
        p.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for room in ROOMS
        for p in (ROOT / room).rglob("*.py")
    }
    found = find_namespace_packages(
        str(ROOT), include=_config()["tool"]["setuptools"]["packages"]["find"]["include"]
    )
    assert folders <= set(found)


def test_every_data_file_is_shipped() -> None:
    """Templates, package data and pipelines reach an installation; rendered reports stay here."""
    globs = _config()["tool"]["setuptools"]["package-data"]
    shipped = {p for package, gs in globs.items() for g in gs for p in (ROOT / package).glob(g)}
    data = {
        p
        for room in (*ROOMS, "pipelines")
        for p in (ROOT / room).rglob("*")
        if p.is_file() and p.suffix not in {".py", ".pyc"}
    }
    published = ROOT / "reports" / "published"
    left = sorted(p for p in data - shipped if published not in p.parents)
    assert not left, [p.relative_to(ROOT).as_posix() for p in left]
