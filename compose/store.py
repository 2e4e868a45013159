"""A locked store of finished steps: a folder for each key, complete or absent.

root/KEY/manifest.json   written last; without it the entry does not exist
root/KEY/model/          the model folder of the step
root/.temp/.KEY-*        an entry being written; renamed into place, or removed after a kill
root/.work/KEY           scratch of an unfinished step; survives a kill
root/.locks/KEY.lock     one writer a key, over all processes of the machine
root/.hashes/KEY.json    hashes that were read, by inode, size and time; may be removed at any time

The manifest has the size and the SHA-256 of every file, and a digest of itself. `damage` compares.
`new_file` and `new_folder` put a single file or folder in place in the same way.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from compose.errors import StepError, UserError
from compose.hashes import hash_files

MANIFEST = "manifest.json"
MODEL = "model"
TEMPORARY = ".temp"
_UNFINISHED = re.compile(r"\.\d+-\d+-.+")
"""Names that `new_file` and `compose.hashes` write to: process, thread or time, and the name."""


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write to; the file there replaces `path` in one move when the block succeeds.

    A reader finds the old file or the new one, also after a kill. Folders are made as needed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{threading.get_ident()}-{path.name}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, within: Path | None = None) -> Iterator[Path]:
    """An empty folder to fill; it replaces the folder `path` when the block succeeds.

    It is made in `within`, else beside `path`. A block that raises leaves `path` as it was. All
    files are on the disk before the folder has its name.
    """
    within = within or path.parent
    within.mkdir(parents=True, exist_ok=True)
    temporary = within / f".{path.name}-{secrets.token_hex(4)}"
    replaced = temporary.with_name(f"{temporary.name}-old")
    temporary.mkdir()
    try:
        yield temporary
        sync_all(temporary)
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, replaced)  # quicker than removing: hardly a moment with neither
        try:
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(FileNotFoundError):
                os.replace(replaced, path)
            raise
        sync(path.parent)
    finally:
        for left in (temporary, replaced):
            shutil.rmtree(left, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Remove the files that `new_file` and `new_folder` left below a folder when their process was
    killed.

    Hold a lock that keeps every other process from writing there.
    """
    if not folder.is_dir():
        return
    for path in list(folder.rglob(".*")):
        if _UNFINISHED.fullmatch(path.name):
            _remove(path)


def remove_unfinished_of(path: Path) -> None:
    """Remove the folders that a killed `new_folder(path)` left beside `path`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}-*"):
        if re.fullmatch(r"-[0-9a-f]{8}(-old)?", left.name[len(path.name) + 1 :]):
            _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have a file's content, or a folder's names, on the disk before going on."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sync_all(folder: Path) -> None:
    """`sync` of every file and folder below `folder`, and of itself last."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file() or path.is_dir():
            sync(path)
    sync(folder)


def private_folder(path: Path) -> None:
    """Make a folder that only this user gets into, or close one of ours that is there."""
    path.mkdir(parents=True, exist_ok=True)
    if path.stat().st_uid == os.geteuid():
        path.chmod(0o700)


def write_json(path: Path, value: Any) -> None:
    """Write JSON through `new_file`. ValueError where a number is not finite."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def require_writable(path: Path) -> None:
    """Refuse a file that `new_file` could not put in place, before its content is made.

    Raises:
        UserError: it is a folder, or its folder may not be written to.
    """
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written", fix="name a file in a folder of yours")


def write_text(path: Path, text: str) -> None:
    """Write text, in UTF-8, through `new_file`."""
    with new_file(path) as file:
        file.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """The value in a JSON file, or None when it is absent or not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def file_sizes(folder: Path) -> dict[str, int]:
    """Relative path -> bytes for every file under `folder`, sorted by path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(files)}


class Store:
    """Finished steps by key. Safe for several processes; an entry is never changed once there."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def beside(cls, out: Path) -> Store:
        """The store that the runs in the folder `out` share."""
        return cls(out / "store")

    def path(self, key: str) -> Path:
        """The entry's folder, whether or not it exists."""
        return self.root / key

    def model(self, key: str) -> Path:
        """The model folder in the entry."""
        return self.root / key / MODEL

    def all_keys(self) -> list[str]:
        """The keys of all entries, damaged ones among them."""
        if not self.root.is_dir():
            return []
        folders = (path for path in self.root.iterdir() if path.is_dir() and not path.is_symlink())
        return sorted(path.name for path in folders if not path.name.startswith("."))

    def manifest(self, key: str) -> dict[str, Any] | None:
        """The manifest of a whole entry: every file it lists is there with its size; else None."""
        manifest, wrong = self._read(key)
        return manifest if wrong is None else None

    def has(self, key: str) -> bool:
        """Whether the entry is there, with every file in its size; contents are not read."""
        return self.manifest(key) is not None

    def damage(self, key: str, *, again: bool = False) -> str | None:
        """The damage of an entry that is there; None for a whole one, or where there is none.

        Files are hashed once and remembered by inode, size and time; with `again` all are read.
        """
        if not self.path(key).exists():
            return None
        manifest, wrong = self._read(key)
        if manifest is None or wrong is not None:
            return wrong
        stored: Mapping[str, str] = manifest.get("sha256", {})
        added = [name for name in file_sizes(self.path(key)) if _is_foreign(name, manifest)]
        if added:
            return f"{added[0]} was not stored with it{_more(added)}"
        memory = self.root / ".hashes" / f"{key}.json"
        try:
            hashes = hash_files(self.path(key), stored, memory, again=again)
        except OSError as error:
            return f"{error.filename} cannot be read: {error.strerror}"
        changed = [name for name in stored if hashes[name] != stored[name]]
        if changed and not again:  # the remembered hashes may themselves be damaged
            hashes = hash_files(self.path(key), stored, memory, again=True)
            changed = [name for name in stored if hashes[name] != stored[name]]
        if changed:
            return f"{changed[0]} is not what was stored{_more(changed)}"
        return None

    def _read(self, key: str) -> tuple[dict[str, Any] | None, str | None]:
        """An entry's manifest, and the damage of it or of its files' names and sizes."""
        file = self.path(key) / MANIFEST
        manifest = read_json(file)
        if not isinstance(manifest, dict) or manifest.get("key") != key:
            return None, f"its {MANIFEST} cannot be read{_closed(file)}"
        hashed = "digest" in manifest or "sha256" in manifest  # not in an older store
        if hashed and manifest.get("digest") != _digest(manifest):
            return None, f"its {MANIFEST} is not what was stored"
        sizes = manifest.get("files")
        if not isinstance(sizes, dict):
            return None, f"its {MANIFEST} lists no files"
        for name, size in sizes.items():
            try:
                on_disk = (self.path(key) / name).stat().st_size
            except OSError:
                return manifest, f"{name} is missing"
            if on_disk != size:
                return manifest, f"{name} has {on_disk} bytes, not {size}"
        return manifest, None

    @contextmanager
    def locked(self, key: str, timeout: float = -1) -> Iterator[None]:
        """Hold the key alone, and remove the unfinished files of a killed writer.

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
            sizes = file_sizes(folder)
            manifest = {
                "key": key,
                "made": datetime.now(UTC).isoformat(timespec="seconds"),
                "files": sizes,
                "sha256": hash_files(folder, sizes),
                "record": record or {},
            }
            write_json(folder / MANIFEST, manifest | {"digest": _digest(manifest)})
        shutil.rmtree(self._work(key), ignore_errors=True)

    @contextmanager
    def receive(self, key: str, manifest: Mapping[str, Any]) -> Iterator[Path]:
        """A new folder for an entry that was made elsewhere, to be filled with its files; moved
        into place where they match its manifest. Hold `locked(key)` around it.

        Raises:
            StepError: a file is missing or is another one; the store is as it was.
        """
        with new_folder(self.path(key), within=self.root / TEMPORARY) as folder:
            yield folder
            stored = manifest["sha256"]
            hashes = hash_files(folder, file_sizes(folder))
            wrong = sorted(name for name in stored if hashes.get(name) != stored[name])
            if wrong or hashes.keys() != stored.keys():
                name = wrong[0] if wrong else min(hashes.keys() - stored.keys())
                raise StepError(f"{name} of {key} is not what its manifest says")
            write_json(folder / MANIFEST, dict(manifest))
        shutil.rmtree(self._work(key), ignore_errors=True)

    def remove(self, key: str) -> None:
        """Remove an entry, and the scratch of its step. Hold `locked(key)` around it.

        It loses its name first: a kill in between leaves no half entry.
        """
        going = self.root / TEMPORARY / f".{key}-removed"
        going.parent.mkdir(parents=True, exist_ok=True)
        if self.path(key).exists():
            os.replace(self.path(key), going)
        for left in (going, self._work(key)):
            shutil.rmtree(left, ignore_errors=True)
        (self.root / ".hashes" / f"{key}.json").unlink(missing_ok=True)

    def work(self, key: str) -> Path:
        """Scratch for the key's step. It survives a kill and is removed once the entry is there."""
        folder = self._work(key)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def sweep(self) -> None:
        """Remove the unfinished files of killed processes, except the scratch of unfinished steps.

        Entries that another process is writing stay.
        """
        temporary = self.root / TEMPORARY
        left = temporary.iterdir() if temporary.is_dir() else ()
        done = [key for key in self.unfinished() if self.path(key).exists()]
        for key in {*(path.name[1:].partition("-")[0] for path in left), *done}:
            with contextlib.suppress(Timeout), self.locked(key, timeout=0):  # it sweeps the rest
                if self.has(key):
                    shutil.rmtree(self._work(key), ignore_errors=True)
        for path in (self.root / ".hashes").glob(".*"):
            process = path.name[1:].partition("-")[0]
            if process.isdigit() and not psutil.pid_exists(int(process)):
                path.unlink(missing_ok=True)

    def unfinished(self) -> dict[str, Path]:
        """Key -> scratch of steps that were begun and never stored."""
        folder = self.root / ".work"
        return {path.name: path for path in sorted(folder.iterdir())} if folder.is_dir() else {}

    def _work(self, key: str) -> Path:
        return self.root / ".work" / key


def _closed(file: Path) -> str:
    """Why a file cannot be opened, where that is a matter of rights; they differ by umask."""
    try:
        file.open("rb").close()
    except PermissionError as error:
        return f": {error.strerror}"
    except OSError:
        return ""
    return ""


def is_sound(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest is as it was written."""
    return manifest.get("digest") == _digest(manifest)


def _digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 over a manifest's content but its digest, as JSON gives it back."""
    content = json.loads(json.dumps({k: v for k, v in manifest.items() if k != "digest"}))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_foreign(name: str, manifest: Mapping[str, Any]) -> bool:
    """Whether a file came to an entry later; file managers and networks leave hidden ones."""
    hidden = name.rpartition("/")[2].startswith(".")
    return not hidden and name != MANIFEST and name not in manifest["files"]


def _more(names: list[str]) -> str:
    return f", nor {len(names) - 1} more" if len(names) > 1 else ""
