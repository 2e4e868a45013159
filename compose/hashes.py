"""Hashes of files, read side by side, and remembered by inode, size and times.

A file whose inode, size, time of change and time of status change are the same as when it was read
has the same content, unless the disk itself lost bits: `again` reads everything. A file that
changed in the last seconds is never remembered: a second change within the clock's tick would not
show (as in git's index).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

Mark = list[int]
"""Device, inode, size, and times of change and of status change in nanoseconds."""

TOO_FRESH_NS = 2_000_000_000
READERS = 4  # hashlib lets go of the interpreter's lock; more than this only waits for the disk


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_hash(path: Path) -> str:
    """`hash_file`, read once a process for as long as inode, size and times stay the same.

    Raises:
        OSError: it cannot be read.
    """
    mark = _mark(path)
    return _hash_of_mark(path, tuple(mark)) if _old(mark) else hash_file(path)


@functools.lru_cache(maxsize=256)
def _hash_of_mark(path: Path, mark: tuple[int, ...]) -> str:
    return hash_file(path)


def hash_files(
    folder: Path, names: Iterable[str], memory: Path | None = None, *, again: bool = False
) -> dict[str, str]:
    """SHA-256 by name of files in a folder.

    `memory` is a file in which hashes are kept for the next call; where it cannot be written,
    nothing is kept. With `again` all files are read.

    Raises:
        OSError: one of them cannot be read.
    """
    names = list(names)
    marks = {name: _mark(folder / name) for name in names}
    stored = {} if memory is None or again else _read(memory)
    valid = {
        name: stored[name][1] for name in names if name in stored and stored[name][0] == marks[name]
    }
    unread = [name for name in names if name not in valid]
    with ThreadPoolExecutor(max_workers=READERS) as pool:
        computed = dict(zip(unread, pool.map(hash_file, (folder / n for n in unread)), strict=True))
    hashes = {name: valid.get(name) or computed[name] for name in names}
    if memory is not None and unread:
        _write(memory, {name: (mark, hashes[name]) for name, mark in marks.items() if _old(mark)})
    return hashes


def _mark(path: Path) -> Mark:
    facts = path.stat()
    times = facts.st_mtime_ns, facts.st_ctime_ns
    return [facts.st_dev, facts.st_ino, facts.st_size, *times]


def _old(mark: Mark) -> bool:
    return time.time_ns() - max(mark[-2:]) > TOO_FRESH_NS


def _read(memory: Path) -> dict[str, tuple[Mark, str]]:
    """The stored hashes; nothing where the file is absent or not whole."""
    try:
        stored = json.loads(memory.read_text(encoding="utf-8"))
        return {str(name): (list(mark), str(sha256)) for name, (mark, sha256) in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _write(memory: Path, stored: dict[str, tuple[Mark, str]]) -> None:
    temporary = memory.with_name(f".{os.getpid()}-{time.monotonic_ns()}-{memory.name}")
    with contextlib.suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps(stored), encoding="utf-8")
            os.replace(temporary, memory)
        finally:
            temporary.unlink(missing_ok=True)
