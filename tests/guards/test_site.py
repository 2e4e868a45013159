"""The documentation's site: its pages exist, its links hold, its reference has all of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from docs_site import PARTS, commands, filled, rewritten, settings, type_text
from typer.main import get_command

from compose import cli
from compose.stages.registry import STAGES

ROOT = Path(__file__).resolve().parents[2]
PAGES = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}


def test_every_page_is_in_the_navigation() -> None:
    _, _, navigation = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")
    others = {"index.md", "repository/CONTRIBUTING.md", "repository/CHANGELOG.md"}
    assert set(re.findall(r"[\w/-]+\.md", navigation)) == PAGES | others


def test_the_reference_has_each_setting_of_each_stage() -> None:
    text = settings()
    for use, stage in STAGES.items():
        section = re.split(r"^##", text.partition(f"\n### {use}\n")[2], flags=re.MULTILINE)[0]
        rows = set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))
        assert set(stage.model_fields) - {"use"} <= rows, use


def test_the_reference_has_each_command() -> None:
    shown = {name for name, command in get_command(cli.app).commands.items() if not command.hidden}  # type: ignore[attr-defined]
    assert shown <= set(re.findall(r"^### `gateskip ([\w-]+)`$", commands(), re.MULTILINE))


def test_every_mark_of_a_page_is_filled() -> None:
    for page in PAGES:
        text = (ROOT / "docs" / page).read_text("utf-8")
        marks = re.findall(r"<!-- reference: (.+?) -->", text)
        assert set(marks) <= set(PARTS), page
    assert filled("a\n<!-- reference: families -->\nb").count("- `") > 5
    assert filled("at\n<!-- figure: a b c -->2x<!-- end --> of") == "at\n2x of"


@pytest.mark.parametrize(
    ("path", "link", "moved"),
    [
        ("README.md", "[a](docs/verdicts.md#picking)", "[a](verdicts.md#picking)"),
        ("docs/guides/drafts.md", "[a](../verdicts.md)", "[a](../verdicts.md)"),
        ("docs/verdicts.md", "[a](../README.md)", "[a](index.md)"),
        ("docs/verdicts.md", "[a](../CONTRIBUTING.md)", "[a](repository/CONTRIBUTING.md)"),
        ("docs/reference/yaml.md", "[a](../../pipelines)", "a"),
        ("README.md", "[a](docs/none.md)", "[a](docs/none.md)"),
        ("README.md", "```\n[a](docs/verdicts.md)\n```", "```\n[a](docs/verdicts.md)\n```"),
    ],
)
def test_a_link_holds_in_the_site(path: str, link: str, moved: str) -> None:
    assert rewritten(link, path) == moved


def test_types_in_words() -> None:
    assert type_text({"type": "number", "exclusiveMinimum": 0, "maximum": 1}) == (
        "number (more than 0, at most 1)"
    )
    assert type_text({"anyOf": [{"enum": [4, 8]}, {"type": "null"}]}) == "`4`, `8`"
    assert type_text({"$ref": "#/$defs/Speed"}) == "[Speed](#speed)"
