"""Finished steps at a URL, for machines that share no folder: anything that fsspec opens.

URL/KEY/manifest.json   written last; it names the folder of the files
URL/KEY/DIGEST/FILE     files of the entry whose manifest has this digest

An entry is fetched before its step would be made, and sent once it is stored. Fetched files are
compared with the hashes in their manifest, as those of a stored step are; a manifest cannot name a
place outside its folder. Two machines that send one step write to folders of their own, and the
last manifest counts.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from compose.errors import StepError, UserError, shortened
from compose.store import MANIFEST, Store, is_sound

MOST_MANIFEST_BYTES = 1 << 24
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Mirror:
    """A store's copy behind a file system of fsspec."""

    def __init__(self, files: Any, root: str) -> None:
        self._files, self._root = files, root.rstrip("/")

    @classmethod
    def at(cls, url: str) -> Mirror:
        """The mirror at a URL such as s3://bucket/steps, memory://steps or a folder.

        Raises:
            UserError: the URL has a password in it, or no library here opens such URLs.
        """
        import fsspec

        if "@" in urlsplit(url).netloc:
            raise UserError(
                "the mirror's URL holds a user or a password, and results record the command line",
                fix="give them as the protocol's library takes them: its environment variables or "
                "configuration",
            )
        try:
            files, root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise UserError(
                f"no library here opens the mirror: {error}", fix="pip install that library"
            ) from error
        except ValueError as error:
            raise UserError(f"{shortened(url)!r} is no URL of a mirror: {error}") from error
        return cls(files, root)

    def fetch(self, key: str, store: Store) -> bool:
        """Put the mirror's entry into the store; False where the mirror has none.

        Hold `store.locked(key)` around it.

        Raises:
            StepError: the mirror cannot be read, or its entry is damaged; the store is as it was.
        """
        with _reached("read"):
            manifest = self._manifest(key)
            if manifest is None:
                return False
            with store.receive(key, manifest) as folder:
                for name in manifest["files"]:
                    target = folder / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    source = posixpath.join(self._root, key, manifest["digest"], name)
                    self._files.get_file(source, str(target))
        return True

    def send(self, key: str, store: Store) -> bool:
        """Copy the store's entry to the mirror; False where the mirror has one.

        Raises:
            StepError: the mirror cannot be written.
        """
        manifest = store.manifest(key)
        if manifest is None or "digest" not in manifest:  # of an older version: no hashes
            return False
        with _reached("written"):
            if self._manifest(key) is not None:
                return False
            folder = posixpath.join(self._root, key, manifest["digest"])
            for name in manifest["files"]:
                self._put(store.path(key) / name, posixpath.join(folder, name))
            self._put(store.path(key) / MANIFEST, posixpath.join(self._root, key, MANIFEST))
        return True

    def _put(self, file: Path, target: str) -> None:
        self._files.makedirs(posixpath.dirname(target), exist_ok=True)
        self._files.put_file(str(file), target)

    def _manifest(self, key: str) -> dict[str, Any] | None:
        """The mirror's manifest of a step; None where there is none, or none to be trusted."""
        place = posixpath.join(self._root, key, MANIFEST)
        if not self._files.exists(place):
            return None
        if self._files.size(place) > MOST_MANIFEST_BYTES:
            return None
        try:
            manifest = json.loads(self._files.cat_file(place))
        except (ValueError, RecursionError):
            return None
        return manifest if _is_plain(manifest, key) else None


def _is_plain(manifest: Any, key: str) -> bool:
    """Whether a manifest is whole, and names files below its own folder alone."""
    if not isinstance(manifest, dict) or manifest.get("key") != key or not is_sound(manifest):
        return False
    files, hashes = manifest.get("files"), manifest.get("sha256")
    if not isinstance(files, dict) or not isinstance(hashes, dict) or files.keys() != hashes.keys():
        return False
    named = all(_is_below(name) and _DIGEST.fullmatch(str(hashes[name])) for name in files)
    return named and _DIGEST.fullmatch(str(manifest["digest"])) is not None


def _is_below(name: str) -> bool:
    path = PurePosixPath(name)
    plain = name == path.as_posix() and not path.is_absolute() and "\\" not in name
    return plain and name not in (".", MANIFEST) and ".." not in path.parts and "\0" not in name


@contextmanager
def _reached(what: str) -> Iterator[None]:
    """Turn any exception of the protocol's library into a StepError: each has its own
    exceptions."""
    try:
        yield
    except (StepError, UserError):
        raise
    except Exception as error:
        why = shortened(f"{type(error).__name__}: {error}")
        raise StepError(f"the mirror cannot be {what}: {why}") from error
