"""The store: an entry is whole or absent, whatever ends its writer; one writer a key."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from compose.store import MANIFEST, Store, new_file, new_folder, read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
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
