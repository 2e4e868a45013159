"""The store: an entry is whole or absent, whatever ends its writer; one writer a key."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from compose import hashes
from compose.store import (
    MANIFEST,
    Store,
    new_file,
    new_folder,
    private_folder,
    read_json,
    write_json,
)

ROOT = Path(__file__).resolve().parents[2]
KEY = "0123456789abcdef"


def fill(store: Store, key: str = KEY, text: str = "weights") -> None:
    with store.locked(key), store.write(key) as folder:
        (folder / "model").mkdir()
        (folder / "model" / "a.bin").write_text(text)


def test_an_entry_is_there_with_its_manifest_once_it_is_written(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert not store.has(KEY)
    with store.locked(KEY), store.write(KEY, {"wall_s": 1.5}) as folder:
        (folder / "model").mkdir()
        (folder / "model" / "a.bin").write_text("weights")
        assert not store.has(KEY), "an entry must not be seen before it is whole"
    manifest = store.manifest(KEY)
    assert manifest is not None
    assert manifest["files"] == {"model/a.bin": 7}
    assert manifest["record"] == {"wall_s": 1.5}
    assert (store.model(KEY) / "a.bin").read_text() == "weights"
    assert os.stat(store.path(KEY)).st_mode & 0o055, "others on this machine may read it"


def test_a_failed_writer_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(RuntimeError), store.locked(KEY), store.write(KEY) as folder:
        (folder / "a.bin").write_text("half")
        raise RuntimeError
    assert not store.has(KEY)
    assert list((tmp_path / ".temp").iterdir()) == []


def test_work_survives_a_failure_and_goes_with_success(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (store.work(KEY) / "checkpoint").write_text("step 100")
    with pytest.raises(RuntimeError), store.locked(KEY), store.write(KEY):
        raise RuntimeError
    assert (store.work(KEY) / "checkpoint").read_text() == "step 100"
    fill(store)
    assert not (tmp_path / ".work" / KEY).exists()


@pytest.mark.parametrize("harm", ["truncate", "remove", "manifest"])
def test_a_damaged_entry_counts_as_absent_and_is_replaced(tmp_path: Path, harm: str) -> None:
    store = Store(tmp_path)
    fill(store)
    if harm == "truncate":
        (store.model(KEY) / "a.bin").write_text("")
    elif harm == "remove":
        (store.model(KEY) / "a.bin").unlink()
    else:
        (store.path(KEY) / MANIFEST).write_text('{"key": "0123')
    assert not store.has(KEY)
    fill(store, text="new")
    assert store.has(KEY)
    assert (store.model(KEY) / "a.bin").read_text() == "new"


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    store, order = Store(tmp_path), []

    def write(name: str) -> None:
        with Store(tmp_path).locked(KEY):
            order.append(f"{name} in")
            time.sleep(0.05)
            order.append(f"{name} out")

    threads = [threading.Thread(target=write, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [each.split()[1] for each in order] == ["in", "out"] * 4
    with store.locked(KEY), pytest.raises(TimeoutError), Store(tmp_path).locked(KEY, timeout=0.05):
        pass
    with store.locked("f" * 16, timeout=0.05):
        pass  # another key is another lock


WRITER = """
import sys, time
from pathlib import Path
from compose.store import Store
store = Store(Path(sys.argv[1]))
with store.locked("0123456789abcdef"), store.write("0123456789abcdef") as folder:
    (folder / "half.bin").write_text("half")
    (store.work("0123456789abcdef") / "checkpoint").write_text("step 100")
    print("writing", flush=True)
    time.sleep(600)
"""


def test_a_killed_writer_loses_its_lock_and_its_half_entry_is_swept(tmp_path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert writer.stdout is not None
    assert writer.stdout.readline().strip() == "writing"
    store = Store(tmp_path)
    with pytest.raises(TimeoutError), store.locked(KEY, timeout=0.05):
        pass
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert not store.has(KEY)
    assert len(list((tmp_path / ".temp").iterdir())) == 1
    with store.locked(KEY, timeout=5):
        assert list((tmp_path / ".temp").iterdir()) == []
        assert (store.work(KEY) / "checkpoint").read_text() == "step 100"
    fill(store)
    assert store.has(KEY)


def test_json_is_whole_or_old(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "a.json"
    write_json(file, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(file, {"a": float("nan")})
    assert read_json(file) == {"a": 1}
    assert [path.name for path in file.parent.iterdir()] == ["a.json"]
    file.write_text(json.dumps({"a": 1})[:-1])
    assert read_json(file) is None
    assert read_json(tmp_path / "absent.json") is None


def test_a_file_and_a_folder_replace_the_old_one_or_leave_it(tmp_path: Path) -> None:
    file, folder = tmp_path / "a.txt", tmp_path / "b"
    with new_file(file) as new:
        new.write_text("old")
    with new_folder(folder) as new:
        (new / "c.txt").write_text("old")
    assert os.stat(folder).st_mode & 0o055, "others on this machine may read it"
    with pytest.raises(RuntimeError), new_file(file) as new:
        new.write_text("half")
        raise RuntimeError
    with pytest.raises(RuntimeError), new_folder(folder) as new:
        (new / "c.txt").write_text("half")
        raise RuntimeError
    assert file.read_text() == (folder / "c.txt").read_text() == "old"
    with new_folder(folder) as new:
        (new / "d.txt").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b"]
    assert [path.name for path in folder.iterdir()] == ["d.txt"]


# --- Damage ---------------------------------------------------------------------------------------


def flip(path: Path, at: int = -1, *, keep_times: bool = False) -> None:
    """Turn one bit of a file round; with `keep_times` nothing else tells of it."""
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    if keep_times:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def age(store: Store, seconds: float = 10) -> None:
    """Let all files of the entry seem to be older: fresh ones are never remembered."""
    for path in store.path(KEY).rglob("*"):
        if path.is_file():
            stamp = time.time() - seconds
            os.utime(path, (stamp, stamp))


def test_the_manifest_has_sizes_and_hashes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store)
    manifest = store.manifest(KEY)
    assert manifest is not None
    assert manifest["sha256"] == {"model/a.bin": hashlib.sha256(b"weights").hexdigest()}
    assert store.damage(KEY) is None
    assert store.damage("f" * 16) is None, "what is not there is not damaged"


@pytest.mark.parametrize("remembered", [False, True])
def test_a_flipped_byte_is_noticed(tmp_path: Path, remembered: bool) -> None:
    store = Store(tmp_path)
    fill(store)
    if remembered:
        age(store)
        assert store.damage(KEY) is None
    flip(store.model(KEY) / "a.bin")
    assert store.has(KEY), "sizes alone do not show it"
    assert store.damage(KEY) == "model/a.bin is not what was stored"
    fill(store, text="new")
    assert store.damage(KEY) is None


def test_every_byte_of_the_manifest_counts(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.locked(KEY), store.write(KEY, {"wall_s": 1.5}) as folder:
        (folder / "a.bin").write_text("weights")
    path = store.path(KEY) / MANIFEST
    whole = path.read_bytes()
    for at, byte in enumerate(whole):
        if chr(byte).isspace():
            continue  # between the values, where JSON does not care
        path.write_bytes(whole)
        flip(path, at)
        assert store.damage(KEY) is not None, f"byte {at}: {chr(byte)!r}"
    path.write_bytes(whole)
    assert store.damage(KEY) is None


def test_a_file_that_came_later_is_damage_and_a_hidden_one_is_not(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store)
    (store.model(KEY) / ".DS_Store").write_text("x")
    assert store.damage(KEY) is None
    (store.model(KEY) / "adapter_config.json").write_text("{}")
    assert store.damage(KEY) == "model/adapter_config.json was not stored with it"


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda entry: (entry / "model" / "a.bin").unlink(), "model/a.bin is missing"),
        (lambda entry: (entry / "model" / "a.bin").write_text("x"), "has 1 bytes, not 7"),
        (lambda entry: (entry / MANIFEST).unlink(), "its manifest.json cannot be read"),
        (lambda entry: (entry / MANIFEST).write_text("[]"), "its manifest.json cannot be read"),
    ],
)
def test_damage_is_said(tmp_path: Path, harm: Any, message: str) -> None:
    store = Store(tmp_path)
    fill(store)
    harm(store.path(KEY))
    assert message in (store.damage(KEY) or "")
    assert not store.has(KEY)


def test_what_was_read_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, read = Store(tmp_path), []
    whole = hashes.hash_file

    def counted(path: Path) -> str:
        read.append(path.name)
        return whole(path)

    monkeypatch.setattr(hashes, "hash_file", counted)
    fill(store)
    assert store.damage(KEY) is None
    assert read == ["a.bin"] * 2, "a file of this second could change within the clock's tick"
    monkeypatch.setattr(hashes, "TOO_FRESH_NS", -(10**12))  # as if long ago
    assert store.damage(KEY) is None and store.damage(KEY) is None
    assert read == ["a.bin"] * 3
    assert store.damage(KEY, again=True) is None
    assert read == ["a.bin"] * 4
    (tmp_path / ".hashes" / f"{KEY}.json").write_text("{")
    assert store.damage(KEY) is None
    assert read == ["a.bin"] * 5


def test_bits_that_a_disk_lost_show_when_everything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times of the file are kept, and that of its status is taken for kept, as on a bad disk."""
    monkeypatch.setattr(hashes, "TOO_FRESH_NS", -(10**12))
    whole = hashes._mark
    monkeypatch.setattr(hashes, "_mark", lambda path: [*whole(path)[:-1], 0])
    store = Store(tmp_path)
    fill(store)
    assert store.damage(KEY) is None
    flip(store.model(KEY) / "a.bin", keep_times=True)
    assert store.damage(KEY) is None
    assert store.damage(KEY, again=True) == "model/a.bin is not what was stored"


def test_an_entry_of_an_older_version_is_taken_by_its_sizes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store)
    manifest = read_json(store.path(KEY) / MANIFEST)
    write_json(
        store.path(KEY) / MANIFEST, {k: v for k, v in manifest.items() if k in ("key", "files")}
    )
    assert store.has(KEY)
    assert store.damage(KEY) is None


def test_a_removed_entry_is_gone_with_its_scratch(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store)
    assert store.damage(KEY) is None
    (store.work(KEY) / "checkpoint").write_text("step 100")
    assert store.all_keys() == [KEY] and list(store.unfinished()) == [KEY]
    with store.locked(KEY):
        store.remove(KEY)
    assert store.all_keys() == [] and store.unfinished() == {}
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert left == [f"{KEY}.lock"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o077, 0o700), (0o002, 0o775)])
def test_the_umask_decides_who_reads_an_entry(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        store = Store(tmp_path / "store")
        fill(store)
    finally:
        os.umask(before)
    assert store.path(KEY).stat().st_mode & 0o777 == mode
    lock = tmp_path / "store" / ".locks" / f"{KEY}.lock"
    assert lock.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_folder_that_cannot_take_its_name_leaves_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "b"
    with new_folder(folder) as new:
        (new / "c.txt").write_text("old")
    with pytest.raises(OSError), new_folder(folder) as new:
        (new / "c.txt").write_text("new")
        new.rename(new.with_name("gone"))
    assert (folder / "c.txt").read_text() == "old"


def test_a_private_folder_is_closed(tmp_path: Path) -> None:
    folder = tmp_path / "jobs"
    folder.mkdir()
    folder.chmod(0o777)
    private_folder(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


GROUP, ONE, TWO = 60_000, 60_001, 60_002


def as_user(user: int, umask: int, work: Callable[[], None]) -> str:
    """Do work as another user of one group, in a fork; what it raised, or nothing."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reads)
        try:
            os.setgroups([])
            os.setgid(GROUP)
            os.setuid(user)
            os.umask(umask)
            work()
        except BaseException as error:
            os.write(writes, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as told:
        text = told.read()
    os.waitpid(child, 0)
    return text


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that belongs to a group of two users."""
    if os.geteuid() != 0:
        pytest.skip("only root can become two users")
    with tempfile.TemporaryDirectory(prefix="gateskip-shared-") as name:
        folder = Path(name)
        os.chown(folder, 0, GROUP)
        folder.chmod(0o2770)
        yield folder


def put(store: Store, key: str) -> None:
    with store.locked(key, timeout=5), store.write(key) as folder:
        (folder / "model").mkdir()
        (folder / "model" / "model.safetensors").write_text("weights")


def test_two_users_of_a_group_share_a_store(shared: Path) -> None:
    store = Store(shared / "store")

    def goes_on() -> None:
        assert store.has("a") and store.damage("a") is None, "what the other made is used"
        put(store, "b")
        with store.locked("a", timeout=5):
            store.remove("a")
        store.sweep()
        put(store, "a")

    assert as_user(ONE, 0o002, lambda: put(store, "a")) == ""
    assert as_user(TWO, 0o002, goes_on) == ""
    assert as_user(ONE, 0o002, goes_on) == "", "and back"
    assert store.all_keys() == ["a", "b"]


def test_a_user_whose_umask_lets_the_group_read_alone_is_read(shared: Path) -> None:
    store = Store(shared / "store")

    def reads() -> None:
        assert store.has("a") and store.damage("a") is None
        assert store.damage("a", again=True) is None

    assert as_user(ONE, 0o027, lambda: put(store, "a")) == ""
    assert as_user(TWO, 0o002, reads) == ""
    assert as_user(TWO, 0o002, lambda: put(store, "b")).startswith("PermissionError")


def test_an_entry_that_its_umask_closed_is_said_to_be_closed(shared: Path) -> None:
    store = Store(shared / "store")

    def sees() -> None:
        assert not store.has("a")
        assert store.damage("a") == "its manifest.json cannot be read: Permission denied"

    assert as_user(ONE, 0o077, lambda: put(store, "a")) == ""
    store.root.chmod(0o2770)  # the folder is shared, its entries are not
    assert as_user(TWO, 0o002, sees) == ""
