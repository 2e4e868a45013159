"""A locked store of finished steps: a folder for each key, complete or absent.

root/KEY/manifest.json   written last; without it the entry does not exist
root/KEY/model/          the model folder of the step
root/.temp/.KEY-*        an entry being written; renamed into place, or removed after a kill
root/.work/KEY           scratch of an unfinished step; survives a kill
root/.locks/KEY.lock     one writer a key, over all processes of the machine

`new_file` and `new_folder` put a single file or folder in place in the same way.
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
TEMPORARY = ".temp"


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write to; the file there replaces `path` in one move when the block ends well.

    A reader finds the old file or the new one, also after a kill. Folders are made as needed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{threading.get_ident()}-{path.name}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, within: Path | None = None) -> Iterator[Path]:
    """An empty folder to fill; it replaces the folder `path` when the block ends well.

    It is made in `within`, else beside `path`. A block that raises leaves `path` as it was.
    """
    within = within or path.parent
    within.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=within, prefix=f".{path.name}-"))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes it private
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON through `new_file`. ValueError where a number is not finite."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text, in UTF-8, through `new_file`."""
    with new_file(path) as file:
        file.write_text(text, encoding="utf-8")


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
        """Hold the key alone, and remove what a killed writer of it left behind.

        The lock goes with the process that held it. `timeout` is in seconds, -1 waits forever.

        Raises:
            TimeoutError: another process still held the key.
        """
        locks = self.root / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / f"{key}.lock", timeout=timeout):
            for left in (self.root / TEMPORARY).glob(f".{key}-*"):
                shutil.rmtree(left, ignore_errors=True)
            yield

    @contextmanager
    def write(self, key: str, record: dict[str, Any] | None = None) -> Iterator[Path]:
        """A new folder for the entry; moved into place with its manifest when the block ends well.

        Hold `locked(key)` around it. `record` may be filled inside the block; it becomes the
        manifest's `record`. A broken entry under the same key is replaced.
        """
        with new_folder(self.path(key), within=self.root / TEMPORARY) as folder:
            yield folder
            manifest = {
                "key": key,
                "made": datetime.now(UTC).isoformat(timespec="seconds"),
                "files": file_sizes(folder),
                "record": record or {},
            }
            write_json(folder / MANIFEST, manifest)
        shutil.rmtree(self._work(key), ignore_errors=True)

    def work(self, key: str) -> Path:
        """Scratch for the key's step. It survives a kill and is removed once the entry is there."""
        folder = self._work(key)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _work(self, key: str) -> Path:
        return self.root / ".work" / key
