"""A hash over the code and the libraries that measure cells: part of every measured phase's key.

The steps that make weights have keys of their own, with a version a stage: trained weights outlive
a change of the code. A number that was measured does not, since it is published beside others.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from compose.assets.fetch import default_cache
from compose.planning import code_parts as parser
from compose.planning.code_parts import code_parts, project_modules
from compose.results.environment import library_versions
from compose.store import read_json, write_json

MEASURING = (
    "gateskip",
    "compose/bench",
    "compose/data",
    "compose/assets/contamination.py",
    "compose/assets/corpora.py",
    "compose/assets/rows.py",
    "compose/assets/table.py",
    "compose/assets/tasks.py",
    "compose/assets/texts.py",
)
"""Files and folders whose content decides what is measured, from the root of the source tree."""

ROOT = Path(__file__).resolve().parents[2]

OURS = "gateskip-compose"
"""This project among the versions: its code counts, not its number."""


@functools.cache
def fingerprint() -> str:
    """16 hex digits over the sources in `MEASURING` and the versions of the libraries.

    Computed once a process; nothing is imported for it. Reading the sources takes milliseconds,
    parsing them half a second, so the last answer is kept in the cache beside a hash of the bytes.
    """
    versions = {name: v for name, v in library_versions().items() if name != OURS}
    memory, key = default_cache() / "fingerprint.json", _bytes_hash(ROOT, versions)
    last = read_json(memory)
    if isinstance(last, dict) and last.get("bytes") == key:
        return str(last["fingerprint"])
    answer = fingerprint_of(ROOT, versions)
    with contextlib.suppress(OSError):  # a cache that cannot be written is none
        write_json(memory, {"bytes": key, "fingerprint": answer})
    return answer


def fingerprint_of(root: Path, versions: dict[str, str]) -> str:
    """The fingerprint of the source tree at `root` with these versions (name -> version).

    It changes with what the code computes: not with comments, docstrings, annotations, white space,
    the names of files and modules, or the order of definitions. Two definitions of one name that
    change places are the same to it.
    """
    digest = hashlib.sha256(json.dumps(versions, sort_keys=True).encode())
    modules = project_modules(root)
    for part in sorted(
        part for file in measuring_files(root) for part in code_parts(file, modules)
    ):
        digest.update(part)
    return digest.hexdigest()[:16]


def _bytes_hash(root: Path, versions: dict[str, str]) -> str:
    """A hash over the bytes of the sources and of what makes a fingerprint of them."""
    facts = [versions, sys.version, sorted(project_modules(root))]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for file in (Path(__file__), Path(parser.__file__), *measuring_files(root)):
        digest.update(str(file).encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def measuring_files(root: Path) -> Iterator[Path]:
    """Every file of `MEASURING` but compiled ones, in a fixed order."""
    for name in MEASURING:
        place = root / name
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        yield from (f for f in files if f.is_file() and "__pycache__" not in f.parts)
