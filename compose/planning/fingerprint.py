"""A hash over the code and the libraries that measure cells: part of every measured phase's key.

The steps that make weights have keys of their own, with a version a stage: trained weights outlive
a change of the code. A number that was measured does not, since it is published beside others.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from compose.results.environment import library_versions

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


@functools.cache
def fingerprint() -> str:
    """16 hex digits over the sources in `MEASURING` and the versions of the libraries.

    Computed once a process, in milliseconds; nothing is imported for it.
    """
    return fingerprint_of(ROOT, library_versions())


def fingerprint_of(root: Path, versions: dict[str, str]) -> str:
    """The fingerprint of the source tree at `root` with these versions (name -> version)."""
    digest = hashlib.sha256(json.dumps(versions, sort_keys=True).encode())
    for file in _sources(root):
        digest.update(file.relative_to(root).as_posix().encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _sources(root: Path) -> Iterator[Path]:
    """Every file of `MEASURING` but compiled ones, in a fixed order."""
    for name in MEASURING:
        place = root / name
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        yield from (f for f in files if f.is_file() and "__pycache__" not in f.parts)
