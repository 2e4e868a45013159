"""A locked store of finished steps: a folder for each key, complete or absent.

root/KEY/manifest.json   written last; without it the entry does not exist
root/KEY/model/          what the step made
root/.temp/KEY-*         an entry being written; renamed into place, or swept when it was left
root/.work/KEY           scratch of an unfinished step; survives a kill
root/.locks/KEY.lock     one writer a key, over all processes of the machine
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

MANIFEST = "manifest.json"
MODEL = "model"


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader, or a kill, never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.with_name(f".{path.name}-{os.getpid()}-{threading.get_ident()}")
    try:
        with name.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, ensure_ascii=False, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        name.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    """The value in a JSON file, or None when it is absent or not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def file_sizes(folder: Path) -> dict[str, int]:
    """Relative path -> bytes for every file under `folder`, sorted by path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(files)}


class Store:
    """Finished steps by key. Safe for several processes; an entry is never changed once there."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, key: str) -> Path:
        """The entry's folder, whether or not it exists."""
        return self.root / key

    def model(self, key: str) -> Path:
        """The model folder in the entry."""
        return self.root / key / MODEL

    def manifest(self, key: str) -> dict[str, Any] | None:
        """The manifest of a whole entry: every file it lists is there with its size; else None."""
        manifest = read_json(self.path(key) / MANIFEST)
        if not isinstance(manifest, dict) or manifest.get("key") != key:
            return None
        try:
            sizes = {name: (self.path(key) / name).stat().st_size for name in manifest["files"]}
        except (OSError, KeyError, TypeError):
            return None
        return manifest if sizes == manifest["files"] else None

    def has(self, key: str) -> bool:
        """Whether the entry is there and whole."""
        return self.manifest(key) is not None

    @contextmanager
    def locked(self, key: str, timeout: float = -1) -> Iterator[None]:
        """Hold the key alone, and sweep what a killed writer of it left behind.

        The lock goes with the process that held it. `timeout` is in seconds, -1 waits forever.

        Raises:
            TimeoutError: another process still held the key.
        """
        locks = self.root / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / f"{key}.lock", timeout=timeout):
            for left in (self.root / ".temp").glob(f"{key}-*"):
                shutil.rmtree(left, ignore_errors=True)
            yield

    @contextmanager
    def write(self, key: str, record: dict[str, Any] | None = None) -> Iterator[Path]:
        """A new folder for the entry; put in place, with its manifest, when the block ends well.

        Hold `locked(key)` around it. `record` may be filled inside the block; it becomes the
        manifest's `record`. A broken entry under the same key is replaced.
        """
        temporary = self.root / ".temp"
        temporary.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=temporary, prefix=f"{key}-"))
        try:
            yield folder
            manifest = {
                "key": key,
                "made": datetime.now(UTC).isoformat(timespec="seconds"),
                "files": file_sizes(folder),
                "record": record or {},
            }
            write_json(folder / MANIFEST, manifest)
            folder.chmod(0o755)  # mkdtemp makes it private
            shutil.rmtree(self.path(key), ignore_errors=True)
            os.replace(folder, self.path(key))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(self._work(key), ignore_errors=True)

    def work(self, key: str) -> Path:
        """Scratch for the key's step. It survives a kill and is removed once the entry is there."""
        folder = self._work(key)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _work(self, key: str) -> Path:
        return self.root / ".work" / key
