"""Every `gateskip` command that README and the guides show is one that the command line takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from compose import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OLD = ("experiments", "experiments.md")
"""Pages that keep the commands of their day."""

SHELL = re.compile(r"^```(?:sh|bash|console|shell)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
GENERATED = re.compile(r"<!-- (?:table|figure): .*?<!-- end -->", re.DOTALL)


def in_blocks(text: str) -> list[str]:
    """Whole commands: lines of shell blocks that begin with `gateskip`, without their comments."""
    lines = "".join(SHELL.findall(text)).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("gateskip ")]


def in_sentences(text: str) -> list[str]:
    """Commands between backquotes, which may leave arguments out."""
    prose = GENERATED.sub("", FENCE.sub("", text))
    return [" ".join(part.split()) for part in re.findall(r"`(gateskip [^`]+)`", prose)]


def refusal(line: str, *, whole: bool) -> str | None:
    """Why the command line does not take this line; None where it does."""
    command: Any = get_command(cli.app)
    words = shlex.split(line, comments=True)[1:]
    context = command.make_context("gateskip", [], resilient_parsing=True)
    while hasattr(command, "commands"):
        if not words or words[0].startswith("-"):
            return None if not words or known(command, words) else f"no such option: {line}"
        name, *words = words
        if name not in command.commands:
            return f"no such command: {line}"
        command = command.commands[name]
        context = type(context)(command, parent=context, info_name=name)
    if not known(command, words):
        return f"no such option: {line}"
    if whole:
        _, _, missing = parsed(command, context, words)
        return f"{missing}: {line}" if missing else None
    return None


def known(command: Any, words: list[str]) -> bool:
    """Whether each option among the words is one of the command's."""
    options = {"--help"}
    for parameter in command.params:
        options |= {*parameter.opts, *parameter.secondary_opts}
    return {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)} <= options


def parsed(command: Any, context: Any, words: list[str]) -> tuple[Any, Any, str | None]:
    """What the parser makes of the words: values, words that are left, and its refusal."""
    try:
        values, left, _ = command.make_parser(context).parse_args(list(words))
    except Exception as error:
        return None, None, str(error)
    required = [p.name for p in command.params if p.required and values.get(p.name) in (None, ())]
    if left:
        return values, left, f"too many words {left}"
    return values, left, f"needs {', '.join(required)}" if required else None


def named(commands: list[tuple[str, str, bool]]) -> list[Any]:
    """The commands as cases of a test, by page and number."""
    return [pytest.param(*one, id=f"{one[0]}-{number}") for number, one in enumerate(commands)]


def shown() -> list[tuple[str, str, bool]]:
    """(page, line, whether it is whole) of every command."""
    found = []
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        if any(part in OLD for part in page.relative_to(ROOT).parts):
            continue
        text = page.read_text("utf-8")
        found += [(name, line, True) for line in in_blocks(text)]
        found += [(name, line, False) for line in in_sentences(text)]
    return found


@pytest.mark.parametrize(("page", "line", "whole"), named(shown()))
def test_a_shown_command_is_taken(page: str, line: str, whole: bool) -> None:
    refused = refusal(line, whole=whole)
    assert refused is None, f"{page}: {refused}"


def test_there_are_commands_in_readme_and_in_each_guide() -> None:
    pages = {page for page, _, whole in shown() if whole}
    guides = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs/guides").glob("*.md")}
    assert {"README.md", *guides} - {"docs/guides/transformers.md"} <= pages


@pytest.mark.parametrize(
    ("line", "whole", "why"),
    [
        ("gateskip run file.yaml --wurkers 2", True, "no such option"),
        ("gateskip run --wurkers", False, "no such option"),
        ("gateskip rum file.yaml", True, "no such command"),
        ("gateskip run", True, "needs file"),
        ("gateskip run a.yaml b.yaml", True, "too many words"),
        ("gateskip pick runs/a --min-retained", True, "requires an argument"),
    ],
)
def test_the_guard_sees(line: str, whole: bool, why: str) -> None:
    assert why in (refusal(line, whole=whole) or "")


@pytest.mark.parametrize("line", ["gateskip run", "gateskip cache verify", "gateskip --help"])
def test_the_guard_lets_pass(line: str) -> None:
    assert refusal(line, whole=False) is None
