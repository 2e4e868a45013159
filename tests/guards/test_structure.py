"""docs/structure.md is true: every package folder has its line, every path on it exists."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "structure.md"
PACKAGES = ("gateskip", "compose", "reports")
TOP = (*PACKAGES, "pipelines", "tests", "tools", "docs")
QUESTIONS = 10


def _page() -> str:
    return PAGE.read_text("utf-8")


def _section(title: str) -> str:
    """The text below a heading of the second level, up to the next one."""
    return re.split(r"^## ", _page().partition(f"\n## {title}\n")[2], flags=re.MULTILINE)[0]


def listed_folders(text: str) -> set[str]:
    """Folders that begin a row of a table: | `folder/` | ..."""
    return set(re.findall(r"^\| `([\w./-]+)/` \|", text, re.MULTILINE))


def named_paths(text: str) -> set[str]:
    """Paths of the project between backquotes: what begins with a folder at its top."""
    quoted = re.findall(r"`([\w./-]+)`", text)
    return {path for path in quoted if "/" in path and path.split("/")[0] in TOP}


def floors_of(text: str) -> tuple[tuple[str, ...], ...]:
    """The block of floors, from the ground up; on the page the highest stands first."""
    block = re.search(r"^```floors\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return tuple(tuple(line.split()) for line in reversed(block[1].splitlines())) if block else ()


def _package_folders() -> set[str]:
    """Every folder with code, relative to the project."""
    code = [p for name in PACKAGES for p in (ROOT / name).rglob("*.py")]
    return {p.parent.relative_to(ROOT).as_posix() for p in code}


def _floors_of_the_contract() -> list[set[str]]:
    """The layers of pyproject.toml, from the ground up."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]
    (layers,) = [each["layers"] for each in settings["contracts"] if each["id"] == "floors"]
    return [set(layer.split(" | ")) for layer in reversed(layers)]


def test_every_folder_has_its_line() -> None:
    wanted = _package_folders() | {"pipelines", "tests", "tools", "docs"}
    missing = sorted(wanted - listed_folders(_section("Folders")))
    assert not missing, f"docs/structure.md has no line for {', '.join(missing)}"


def test_every_path_exists() -> None:
    wrong = sorted(path for path in named_paths(_page()) if not (ROOT / path).exists())
    assert not wrong, f"docs/structure.md names {', '.join(wrong)}"


def test_the_floors_are_those_of_the_contract() -> None:
    """`gateskip` itself is no layer: it holds layers. It imports none of its users, by contract."""
    shown = [set(floor) for floor in floors_of(_page())]
    assert [floor for floor in shown if floor != {"gateskip"}] == _floors_of_the_contract()


def test_every_module_stands_on_a_floor() -> None:
    names = [name for floor in _floors_of_the_contract() for name in floor]
    files = [p.relative_to(ROOT) for name in PACKAGES for p in (ROOT / name).rglob("*.py")]
    places = [p.parent if p.stem == "__init__" else p.with_suffix("") for p in files]
    modules = {".".join(place.parts) for place in places}
    missing = {m for m in modules if not any(f"{m}.".startswith(f"{name}.") for name in names)}
    assert missing == {"compose", "gateskip"}


def test_every_question_has_one_file() -> None:
    rows = re.findall(r"^\| (.+\?) \| (.+) \|$", _section("Questions"), re.MULTILINE)
    assert len(rows) >= QUESTIONS
    wrong = [q for q, answer in rows if not (ROOT / answer.strip("`")).is_file()]
    assert not wrong, wrong


def test_every_supported_family_is_in_the_table() -> None:
    from gateskip.model.families import FAMILIES

    quoted = set(re.findall(r"`(\w+)`", _section("What works where")))
    assert set(FAMILIES) <= quoted


def test_the_guard_sees() -> None:
    text = "| `a/b/` | x |\n`compose/none.py` and `results.json`\n```floors\nb  c\na\n```\n"
    assert listed_folders(text) == {"a/b"}
    assert named_paths(text) == {"compose/none.py"}
    assert floors_of(text) == (("a",), ("b", "c"))
