"""The content of a store: its steps, their sizes, the runs that use them, and what can be
removed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import Timeout

from compose.artifacts.folder import LINEAGE
from compose.store import MANIFEST, Store, file_sizes, read_json

PLANS = ("*/plan.json", "*-search/probes/*/plan.json")
"""Plans of runs, and of the runs that a search is made of (compose/search/probe_runner.py)."""


@dataclass(frozen=True)
class Entry:
    """A stored step, or the scratch files of an unfinished one."""

    key: str
    chain: tuple[str, ...]
    """Names of the stages that made the folder, the source first; empty where unknown."""
    size: int
    """Bytes on disk."""
    made: str
    """Time of creation, as ISO 8601; empty for scratch files."""
    runs: tuple[str, ...]
    """Names of the runs beside the store whose plans use it."""


def store_of(out: Path) -> Store:
    """The store that the runs in the folder `out` share."""
    return Store.beside(out.absolute())


def entries(out: Path) -> list[Entry]:
    """Every entry in the store of the runs in `out`, including damaged ones, by key."""
    store, named = store_of(out), _named(out)
    listed = [_entry(store, key, named.get(key, ())) for key in store.all_keys()]
    for key, folder in store.unfinished().items():
        if not store.path(key).exists():
            size = sum(file_sizes(folder).values())
            listed.append(Entry(key, (), size, "", tuple(named.get(key, ()))))
    return sorted(listed, key=lambda entry: entry.key)


def prunable(out: Path) -> list[Entry]:
    """The entries that no run in `out` uses."""
    return [entry for entry in entries(out) if not entry.runs]


def remove(out: Path, entry: Entry) -> bool:
    """Remove an entry; False where another process uses it."""
    store = store_of(out)
    try:
        with store.locked(entry.key, timeout=0):
            store.remove(entry.key)
    except Timeout:
        return False
    return True


def damaged(out: Path) -> Iterator[tuple[Entry, str | None]]:
    """Read all files of every finished step again; each step with its damage, if any."""
    store = store_of(out)
    for entry in entries(out):
        if store.path(entry.key).exists():
            yield entry, store.damage(entry.key, again=True)


def hashed(out: Path, entry: Entry) -> bool:
    """Whether an entry's content can be checked: entries of older versions have only sizes."""
    return "sha256" in (store_of(out).manifest(entry.key) or {})


def _entry(store: Store, key: str, runs: tuple[str, ...]) -> Entry:
    manifest = read_json(store.path(key) / MANIFEST)
    date = manifest.get("made", "") if isinstance(manifest, dict) else ""
    lineage = read_json(store.model(key) / LINEAGE)
    stages = lineage.get("stages") if isinstance(lineage, dict) else None
    chain = tuple(str(stage.get("name")) for stage in stages or () if isinstance(stage, dict))
    size = sum(file_sizes(store.path(key)).values())
    return Entry(key, chain, size, str(date), tuple(runs))


def _named(out: Path) -> dict[str, tuple[str, ...]]:
    """Step key -> the runs whose plans use it."""
    named: dict[str, dict[str, None]] = {}
    for file in sorted(file for plans in PLANS for file in out.glob(plans)):
        plan = read_json(file)
        steps = plan.get("steps") if isinstance(plan, dict) else None
        for key in (step["key"] for step in steps or ()):
            named.setdefault(key, {})[file.relative_to(out).parts[0]] = None
    return {key: tuple(runs) for key, runs in named.items()}
