"""A bounded folder of files that processes share: the oldest go first, damaged ones are removed.

A file is written beside its place and renamed, so that a reader finds all of it or nothing. It
begins with a hash of its name and content. Other files in the folder stay as they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

log = logging.getLogger(__name__)
SUFFIX = ".kv"
OURS = re.compile(r"[0-9a-f]{64}\.kv(-\w+)?")
"""Names of files, and of those being written."""
DIGEST = hashlib.sha256().digest_size
SHARE = 0.1  # of the free disk and of the files themselves that the files may take
UNFINISHED_NS = 3600 * 10**9  # after which a file being written is one of a process that ended


class PrefixFiles:
    """Files in a folder, named by 64 hexadecimal digits; of all processes that use the folder."""

    def __init__(self, folder: Path, max_bytes: int | None = None) -> None:
        """At most `max_bytes`, or a tenth of the free disk. Raises OSError where the folder cannot
        be made."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder, self._max_bytes = folder, max_bytes

    def read(self, name: str, size: int) -> memoryview | None:
        """The content of a file, `size` bytes; None where it is absent or damaged."""
        path = self._path(name)
        try:
            stored = memoryview(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s cannot be read, so it is not used: %s", path, error)
            return None
        content = stored[DIGEST:]
        if len(content) == size and stored[:DIGEST] == _digest(name, content):
            return content
        log.warning("%s is damaged, so it is not used and removed", path)
        with contextlib.suppress(OSError):
            path.unlink()
        return None

    def store(
        self, names: Sequence[str], size: int, content: Callable[[int], bytes | None]
    ) -> None:
        """Write those of some files of `size` bytes that are missing. `content` gives that of a
        number, or None to stop. All of them are then the newest, the first one most of all.

        Raises OSError where a file cannot be written.
        """
        size += DIGEST
        missing = [number for number, name in enumerate(names) if not self._path(name).exists()]
        self._refresh(names)
        if not missing:
            return
        files = self._files()
        limit = self._limit(sum(facts.st_size for facts, _ in files))
        names = names[: limit // size]
        missing = [number for number in missing if number < len(names)]
        _remove_oldest(files, limit - size * len(missing))
        for number in missing:
            made = content(number)
            if made is None:
                break
            self._write(names[number], made)
        self._refresh(names)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}{SUFFIX}"

    def _files(self) -> list[tuple[os.stat_result, Path]]:
        """All files, the oldest first."""
        files = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # another process removed it
                    if OURS.fullmatch(entry.name):
                        files.append((entry.stat(), Path(entry.path)))
        return sorted(files, key=lambda file: file[0].st_mtime_ns)

    def _limit(self, held: int) -> int:
        """Most bytes of all files, which have `held` bytes now."""
        if self._max_bytes is not None:
            return self._max_bytes
        return int(SHARE * (shutil.disk_usage(self._folder).free + held))

    def _refresh(self, names: Sequence[str]) -> None:
        """Make files the newest. Later blocks are of no use without the first ones, so these go
        last."""
        now = time.time_ns()
        for place, name in enumerate(names):
            with contextlib.suppress(FileNotFoundError):
                os.utime(self._path(name), ns=(now - place, now - place))

    def _write(self, name: str, content: bytes) -> None:
        path = self._path(name)
        with tempfile.NamedTemporaryFile(
            dir=self._folder, prefix=f"{path.name}-", delete=False
        ) as new:
            try:
                new.write(_digest(name, content))
                new.write(content)
                new.close()
                os.replace(new.name, path)
            except BaseException:
                Path(new.name).unlink(missing_ok=True)
                raise


def _remove_oldest(files: Sequence[tuple[os.stat_result, Path]], limit: int) -> None:
    """Remove the first of some files until the others have at most `limit` bytes, and those that a
    process left unfinished."""
    held, now = sum(facts.st_size for facts, _ in files), time.time_ns()
    for facts, path in files:
        old = now - facts.st_mtime_ns > UNFINISHED_NS
        if held > limit if path.suffix == SUFFIX else old:
            path.unlink(missing_ok=True)
            held -= facts.st_size


def _digest(name: str, content: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(name.encode())
    digest.update(content)
    return digest.digest()
