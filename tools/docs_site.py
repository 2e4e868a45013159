"""What the site of the documentation has beyond docs/: a hook of mkdocs, which `make docs` runs.

README.md is its first page. Files of the repository that a page links to come along, and links to
folders become text. A line `<!-- reference: NAME -->` becomes the text that `PARTS` makes from the
code.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=[#)])|(?<=src=\")([^\"]+)|(?<=srcset=\")([^\"]+)")
TO_FOLDER = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s:]+)\)")
COMMENT = re.compile(r"<!-- .*? -->")
MARK = re.compile(r"^<!-- reference: (\w+) -->$", re.MULTILINE)
ALONG = "repository"
"""Folder of the site that holds files from outside docs/."""


def place_of(path: str) -> str:
    """Where a file of the repository lies in the site."""
    if path == "README.md":
        return "index.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{ALONG}/{path}"


def path_of(place: str) -> str:
    """The file of the repository that lies there in the site."""
    if place == "index.md":
        return "README.md"
    inside = place.startswith(f"{ALONG}/")
    return place.removeprefix(f"{ALONG}/") if inside else f"docs/{place}"


def _target(path: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def rewritten(text: str, path: str) -> str:
    """A page's Markdown with links that hold in the site; `path` is that of its file."""

    def moved(match: re.Match[str]) -> str:
        link = match[0]
        target = _target(path, link)
        if re.match(r"[a-z]+:", link) or not (ROOT / target).is_file():
            return link
        return posixpath.relpath(place_of(target), posixpath.dirname(place_of(path)) or ".")

    def unlinked(match: re.Match[str]) -> str:
        return match[1] if (ROOT / _target(path, match[2])).is_dir() else match[0]

    parts = FENCE.split(text)
    parts[::2] = [LINK.sub(moved, TO_FOLDER.sub(unlinked, part)) for part in parts[::2]]
    return "".join(parts)


def linked(text: str, path: str) -> Iterator[str]:
    """Files of the repository outside docs/ that a page links to."""
    for match in LINK.finditer(FENCE.sub("", text)):
        target = _target(path, match[0])
        if not target.startswith(("docs/", "..")) and (ROOT / target).is_file():
            yield target


def come_along() -> set[str]:
    """README and all files outside docs/ that it, a page of docs/ or one of these links to."""
    waiting = [page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").rglob("*.md")]
    waiting.append("README.md")
    found = {"README.md"}
    while waiting:
        path = waiting.pop()
        for target in set(linked((ROOT / path).read_text("utf-8"), path)) - found:
            found.add(target)
            waiting += [target] if target.endswith(".md") else []
    return found


def commands() -> str:
    """Each command with its arguments and options."""
    import click
    from typer.cli import get_docs_for_click
    from typer.main import get_command

    from compose.cli import app

    command = get_command(app)
    context = click.Context(command, info_name="gateskip")
    text = get_docs_for_click(obj=command, ctx=context, indent=1, name="gateskip")
    return text[text.index("\n### ") :]


def settings() -> str:
    """Sections of a pipeline file, then stages: setting, type, default, description."""
    from compose.language.parse import to_json_schema
    from compose.stages.registry import CLASSES

    schema = to_json_schema()
    kinds = schema["$defs"]
    stages = {stage.__name__: stage.model_fields["use"].default for stage in CLASSES}
    text = ["## The whole file", _table(schema)]
    for name, kind in kinds.items():
        if name not in stages and kind.get("properties"):
            text += [f"## {name}", kind.get("description", ""), _table(kind)]
    text.append("## Stages")
    for name, use in stages.items():
        text += [f"### {use}", kinds[name].get("description", ""), _table(kinds[name])]
    return "\n\n".join(filter(None, text))


def _table(kind: Mapping[str, Any]) -> str:
    rows = ["| setting | type | default | description |", "|---|---|---|---|"]
    for name, entry in kind["properties"].items():
        if name == "use":
            continue
        text = " ".join(entry.get("description", "").split())
        cells = (
            f"`{name}`",
            type_text(entry),
            _default(entry, name in kind.get("required", ())),
            text,
        )
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def _default(entry: Mapping[str, Any], required: bool) -> str:
    if required:
        return "required"
    value = entry.get("default")
    if value is None or isinstance(value, dict):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def type_text(entry: Mapping[str, Any]) -> str:
    """The type of a setting in words, from its JSON Schema."""
    if "discriminator" in entry:
        return "[stage](#stages)"
    if "$ref" in entry:
        name = entry["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in entry:
        return f"`{entry['const']}`"
    if "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry["enum"])
    for several in ("anyOf", "oneOf", "allOf"):
        if several in entry:
            words = dict.fromkeys(map(type_text, entry[several]))
            return " or ".join(word for word in words if word != "null")
    kind = entry.get("type", "anything")
    if kind == "array":
        return f"list of {type_text(entry['items'])}" if entry.get("items") else "list"
    if kind == "object":
        inner = entry.get("additionalProperties")
        return f"name: {type_text(inner)}" if isinstance(inner, dict) and inner else "group"
    return kind + _range(entry)


def _range(entry: Mapping[str, Any]) -> str:
    signs = {
        "minimum": "at least",
        "exclusiveMinimum": "more than",
        "maximum": "at most",
        "exclusiveMaximum": "less than",
    }
    bounds = [f"{word} {entry[key]:g}" for key, word in signs.items() if key in entry]
    return f" ({', '.join(bounds)})" if bounds else ""


def families() -> str:
    """Model types, each with what is particular to it."""
    from gateskip.model.families import FAMILIES

    return "\n".join(f"- `{name}`" for name in sorted(FAMILIES))


PARTS = {"commands": commands, "settings": settings, "families": families}
"""Name in a mark -> the text that stands there."""


def filled(text: str) -> str:
    """A page's Markdown with what its marks ask for. Comments, such as the markers of tables and
    figures, are left out: one that begins a line would end a paragraph."""
    return COMMENT.sub("", MARK.sub(lambda match: PARTS[match[1]](), text))


def on_files(files: Any, config: Any) -> Any:
    """Add README and the files that come along."""
    from mkdocs.structure.files import File

    for path in sorted(come_along()):
        files.append(File.generated(config, place_of(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links that hold in the site, and what is made from the code."""
    return filled(rewritten(markdown, path_of(page.file.src_uri)))
