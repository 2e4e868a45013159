"""Whether a text or a task of this name exists, as far as the name alone shows it.

A pipeline file is checked with these before anything is made. A data set of the hub is not known
here; its name only has to look like one. The tasks of lm-eval are known where lm-eval is installed.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from pathlib import Path

from compose.assets.fetch import local_copy
from compose.assets.table import SELF_WRITTEN, TASKS, TEXTS
from compose.errors import AssetError, suggest

TEXT_FILES = (".txt", ".jsonl", ".json")
_NAMED = re.compile(r"^\s*(?:-|task:|group:|tag:|- task:|- group:)\s*[\"']?([\w.:+-]+)[\"']?\s*$")
"""A line of lm-eval's task files that names a task, a group, or one item of a list of tags."""


def require_text_name(source: str) -> None:
    """Refuse a name that no text can have.

    Raises:
        AssetError: it is neither an alias, a file, nor a hub id; or the text that the model writes
            itself, which only stages read.
    """
    if source == SELF_WRITTEN:
        raise AssetError(
            f"data {source!r} is written by the model that a stage works on",
            fix="name it under data.train or data.calibration, or take another text here",
        )
    if source in TEXTS or text_file(source) is not None or is_hub_name(source):
        return
    names = [name for name in TEXTS if name != SELF_WRITTEN]
    raise AssetError(
        f"data {source!r} is neither a short name nor a file: {suggest(source, names)}",
        fix="take a short name, a path, or a hub data set with its owner (owner/name)",
    )


def text_file(source: str) -> Path | None:
    """The file of this machine that a text is read from, if it is one.

    That is a path, or a file in the folder of local copies: under the stem `source`, or under the
    one that an alias has there.
    """
    if (alias := TEXTS.get(source)) is not None:
        return None if alias.local is None else local_copy(alias.local)
    path = os.path.expanduser(source)  # unlike Path's, it keeps `~nobody`
    if os.path.isfile(path):  # unlike Path's, it accepts a name that is too long
        return Path(path)
    return local_copy(source) if "/" not in source else None


def task_file(name: str) -> Path | None:
    """The file in the folder of local copies that a task's questions are read from, if any."""
    alias = TASKS.get(name)
    return None if alias is None else local_copy(alias.local)


def is_hub_name(source: str) -> bool:
    """Whether it looks like a hub data set: one owner, one name."""
    if source.endswith(TEXT_FILES) or source.startswith((".", "/", "~")):
        return False
    return source.count("/") == 1


def require_task_name(name: str) -> None:
    """Refuse a task that neither this package nor the installed lm-eval has.

    Raises:
        AssetError: there is no such task.
    """
    if name in TASKS or name in lm_eval_names():
        return
    raise AssetError(
        f"there is no task {name!r}: {suggest(name, TASKS)}",
        fix="`lm-eval ls tasks` lists all others"
        if lm_eval_names()
        else 'tasks of lm-eval need `pip install "gateskip-compose[eval]"`',
    )


@functools.cache
def lm_eval_names() -> frozenset[str]:
    """Every task, group and tag that the files of lm-eval name; none where it is not installed.

    lm-eval itself is not imported, and its own index, which takes many seconds, is not built: the
    files are searched for lines that name something.
    """
    spec = importlib.util.find_spec("lm_eval")
    places = [] if spec is None else spec.submodule_search_locations or []
    names: set[str] = set()
    for place in places:
        for file in (Path(place) / "tasks").rglob("*.yaml"):
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                if match := _NAMED.match(line):
                    names.add(match[1])
    return frozenset(names)
