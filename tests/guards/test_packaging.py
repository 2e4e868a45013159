"""pyproject.toml says what the packages need and hold: libraries, folders with code, data.

The core is what decoding an export needs. Each other library belongs to an extra, which
compose/extras.py names where the library is missing.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from setuptools import find_namespace_packages

from compose.bench.peers.table import ENGINES
from compose.extras import EXTRAS

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("gateskip", "compose", "reports")

NEEDS: dict[str, tuple[str, ...]] = {
    "gateskip": (),
    "gateskip/kernels/gpu": ("gpu",),
    "gateskip/training": ("compress",),
    "compose": ("compress",),
    "compose/stages/quantize": ("compress", "autoround"),
    "compose/assets": ("compress", "eval"),
    "compose/bench": ("compress", "eval"),
    "compose/processes": ("compress", "ray"),
    "compose/analysis": ("compress", "eval"),
    "compose/serve": ("compress", "serve", "ray"),
    "reports": ("compress", "report"),
}
"""Extras, beside the core, whose libraries a folder and those in it may import: the longest path
that a file is in counts."""

WHERE_PACKED = {"gptqmodel", "bitsandbytes"}
"""Libraries that gateskip imports inside functions, for folders whose weights they packed."""

ELSEWHERE = "compose/bench/peers/scripts/"
"""Scripts that run in environments of other engines, and import nothing of this project."""

IMPORT_NAMES = {
    "lm-eval": "lm_eval",
    "llama-cpp-python": "llama_cpp",
    "ruamel-yaml": "ruamel",
}
"""Top-level import names that differ from their distribution's by more than - and _."""


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _config() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def _extras() -> dict[str, list[str]]:
    """Requirements by extra; the core stands under "core"."""
    project = _config()["project"]
    return {"core": project["dependencies"], **project["optional-dependencies"]}


def _names(requirements: list[str]) -> set[str]:
    return {_canonical(re.split(r"[\s\[<>=!~;]", r, maxsplit=1)[0]) for r in requirements}


def _import_name(distribution: str) -> str:
    """What a distribution is usually imported as, which holds where it is not installed, too."""
    return IMPORT_NAMES.get(distribution, distribution.replace("-", "_"))


def _imports(file: Path) -> Iterator[tuple[str, int, bool]]:
    """(top-level name, line, whether the import runs with the module) of each import in a file."""
    tree = ast.parse(file.read_text("utf-8"))
    lazy = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            modules = [node.module]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            named = node.args[0] if node.args else None
            if isinstance(named, ast.Constant) and isinstance(named.value, str):
                modules = [named.value]
        for module in modules:
            yield module.split(".")[0], node.lineno, id(node) not in lazy


def extras_of(file: str) -> tuple[str, ...]:
    """Extras whose libraries a file, by its path below the root, may import."""
    inside = [place for place in NEEDS if file.startswith(place + "/")]
    return NEEDS[max(inside, key=len)]


def _undeclared(package: str) -> Iterator[str]:
    owners, extras = packages_distributions(), _extras()
    for path in sorted((ROOT / package).rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        if file.startswith(ELSEWHERE):
            continue
        allowed = _names([r for extra in ("core", *extras_of(file)) for r in extras[extra]])
        for name, line, at_once in _imports(path):
            if name in sys.stdlib_module_names or name in PACKAGES:
                continue
            if package == "gateskip" and name in WHERE_PACKED and not at_once:
                continue
            known = {_canonical(each) for each in owners.get(name, ())}
            if not allowed & known and name not in map(_import_name, allowed):
                yield f"{file}:{line}: {name} is in none of core, {', '.join(extras_of(file))}"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_import_is_declared(package: str) -> None:
    undeclared = list(_undeclared(package))
    assert not undeclared, "\n" + "\n".join(undeclared)


def test_a_peer_imports_only_what_its_environment_has() -> None:
    """`serve` is the script beside it; what pip brings along with a library counts as declared."""
    brought = {"llama.cpp": (), "openvino": ("optimum", "transformers"), "onnxruntime": ()}
    for name, engine in ENGINES.items():
        declared = engine.requirements or _extras()["core"]
        allowed = {*map(_import_name, _names(list(declared))), *brought.get(name, ()), "serve"}
        found = {module for module, _, _ in _imports(engine.script_path)}
        assert found <= allowed | set(sys.stdlib_module_names), name


def test_every_place_exists() -> None:
    assert [place for place in NEEDS if not (ROOT / place).is_dir()] == []


def test_missing_libraries_are_named_by_the_extras_of_pyproject() -> None:
    """compose/extras.py has each library of each extra, under the first extra that installs it."""
    extras, seen = _extras(), _names(_extras()["core"])
    for extra, listed in EXTRAS.items():
        own = _names(extras[extra]) - seen
        assert set(map(_import_name, own)) == set(listed), extra
        seen |= own


def test_all_is_every_extra_of_users() -> None:
    (requirement,) = _extras()["all"]
    listed = requirement.partition("[")[2].rstrip("]").split(",")
    assert set(listed) == set(EXTRAS) == set(_extras()) - {"core", "all", "test", "docs", "dev"}


def test_versions_are_ranges_not_pins() -> None:
    every = [each.partition(";")[0] for extra in _extras().values() for each in extra]
    assert [requirement for requirement in every if "==" in requirement] == []


def test_every_folder_with_code_is_a_found_package() -> None:
    folders = {
        p.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for package in PACKAGES
        for p in (ROOT / package).rglob("*.py")
    }
    found = find_namespace_packages(
        str(ROOT), include=_config()["tool"]["setuptools"]["packages"]["find"]["include"]
    )
    assert folders <= set(found)


def test_every_data_file_is_shipped() -> None:
    """Templates, package data and pipelines reach an installation; rendered reports stay here."""
    globs = _config()["tool"]["setuptools"]["package-data"]
    shipped = {p for name, gs in globs.items() for g in gs for p in (ROOT / name).glob(g)}
    data = {
        p
        for package in (*PACKAGES, "pipelines")
        for p in (ROOT / package).rglob("*")
        if p.is_file() and p.suffix not in {".py", ".pyc"}
    }
    published = ROOT / "reports" / "published"
    left = sorted(p for p in data - shipped if published not in p.parents)
    assert not left, [p.relative_to(ROOT).as_posix() for p in left]
