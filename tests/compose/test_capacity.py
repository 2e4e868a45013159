"""Limits of a control group, as containers have them, in files of both versions."""

import os
from pathlib import Path

import psutil
import pytest

from compose import capacity
from compose.memory import oom_kills

VERSION_2 = {
    "job/cpu.max": "250000 100000",
    "job/memory.max": "4000000000",
    "job/memory.current": "3000000000",
    "job/memory.stat": "anon 2000000000\nactive_file 600000000\ninactive_file 400000000",
    "job/memory.events": "low 0\nhigh 7\nmax 9\noom 3\noom_kill 2",
    "cpu.max": "max 100000",
}
VERSION_1 = {
    "cpu/job/cpu.cfs_quota_us": "250000",
    "cpu/job/cpu.cfs_period_us": "100000",
    "cpu/cpu.cfs_quota_us": "-1",
    "cpu/cpu.cfs_period_us": "100000",
    "memory/job/memory.limit_in_bytes": "4000000000",
    "memory/job/memory.usage_in_bytes": "3000000000",
    "memory/job/memory.stat": "cache 1000000000\nactive_file 600000000\ninactive_file 400000000",
    "memory/job/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2",
    "memory/memory.limit_in_bytes": "9223372036854771712",
    "memory/memory.usage_in_bytes": "5000000000",
}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight cores, 64 GB of memory of which 60 are available, no control group."""
    memory = type("Memory", (), {"available": 60_000_000_000, "total": 64_000_000_000})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(capacity, "usable_cores", lambda: list(range(8)))
    monkeypatch.setattr(capacity, "GROUPS", tmp_path)
    monkeypatch.setattr(capacity, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


def limited(machine: Path, membership: str, files: dict[str, str]) -> None:
    (machine / "membership").write_text(membership)
    for name, text in files.items():
        (machine / name).parent.mkdir(parents=True, exist_ok=True)
        (machine / name).write_text(text + "\n")


@pytest.mark.parametrize(
    "membership, files",
    [
        pytest.param("0::/job\n", VERSION_2, id="version-2"),
        pytest.param("0::/job/child\n", VERSION_2, id="limit-of-a-parent"),
        pytest.param("4:memory:/job\n1:cpu,cpuacct:/job\n0::/\n", VERSION_1, id="version-1"),
    ],
)
def test_limits_of_a_control_group(
    machine: Path, membership: str, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two and a half processors keep two threads busy. Cached files do not count as used."""
    limited(machine, membership, files)
    assert capacity.core_count() == 2
    assert capacity.total_memory() == 4_000_000_000
    assert capacity.free_memory() == 2_000_000_000
    assert oom_kills() == 2
    capacity.limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    capacity.limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "5", "the user's setting stays"


def test_a_container_sees_its_own_group_as_the_root(machine: Path) -> None:
    files = {name.removeprefix("job/"): text for name, text in VERSION_2.items() if "/" in name}
    limited(machine, "0::/docker/5c1e\n", files)
    assert (capacity.core_count(), capacity.total_memory()) == (2, 4_000_000_000)


def test_less_than_one_processor_is_one_thread(machine: Path) -> None:
    limited(machine, "0::/\n", {"cpu.max": "50000 100000"})
    assert capacity.core_count() == 1


@pytest.mark.parametrize("text", ["max 100000", "", "0 0", "nonsense"])
def test_without_a_limit_the_machine_counts(machine: Path, text: str) -> None:
    limited(machine, "0::/\n", {"cpu.max": text, "memory.max": "max", "memory.current": "1"})
    assert capacity.core_count() == 8
    assert capacity.free_memory() == 60_000_000_000
    capacity.limit_threads()
    assert "OMP_NUM_THREADS" not in os.environ
