"""The cores and the memory that this process may use. Imports no torch.

A container that is limited to 2 CPUs still sees all cores of its machine, and all of its memory.
The limits stand in the files of its control group (Linux, versions 1 and 2).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
THREADS = "OMP_NUM_THREADS"


def usable_cores() -> list[int]:
    """The cores that this process may run on, by their numbers."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def core_count() -> int:
    """As many cores as this process may keep busy: at least one, and no more than its control
    group's share of time. More threads than that wait for each other."""
    cores = len(usable_cores())
    return max(1, min(cores, int(_cpu_quota() or cores)))


def limit_threads() -> None:
    """Where a control group gives less time than there are cores, let torch, which is not imported
    yet, and child processes use only as many threads. A setting of the user stays."""
    if (cores := core_count()) < len(usable_cores()):
        os.environ.setdefault(THREADS, str(cores))


def free_memory() -> int:
    """Bytes that this process and others beside it can still take."""
    left = (limit - used for limit, used in _memory_limits())
    return max(0, min([int(psutil.virtual_memory().available), *left]))


def total_memory() -> int:
    """Bytes of this machine's memory, or of the part that the control group may hold."""
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _memory_limits())])


def _cpu_quota() -> float | None:
    """Seconds of processor time for each second, by the tightest limit; None without a limit."""
    quotas = []
    for folder in control_groups("cpu"):
        words = _words(folder / "cpu.max")
        words = words or _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
        with contextlib.suppress(ValueError, IndexError, ZeroDivisionError):  # "max", or no limit
            quotas.append(float(words[0]) / float(words[1]))
    return min((quota for quota in quotas if quota > 0), default=None)


def _memory_limits() -> Iterator[tuple[int, int]]:
    """Limits in bytes, each with what counts against it and cannot be given back."""
    for folder in control_groups("memory"):
        for limit, used in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            with contextlib.suppress(ValueError, IndexError):
                most, held = (int(_words(folder / file)[0]) for file in (limit, used))
                yield most, held - _cached_files(folder)


def _cached_files(folder: Path) -> int:
    """Bytes of files that are in memory because they were read."""
    counts = counters(folder / "memory.stat")
    return counts.get("active_file", 0) + counts.get("inactive_file", 0)


def control_groups(controller: str) -> Iterator[Path]:
    """Folders of this process's control group and of those above it. A container usually sees only
    its own, as the root."""
    for line in _lines(MEMBERSHIP):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = GROUPS / controller if controllers else GROUPS
        folder = root / path.strip("/")
        yield from (place for place in (folder, *folder.parents) if place.is_relative_to(root))


def counters(file: Path) -> dict[str, int]:
    """Name -> number, of a file of the system with one on each line; empty where there is none."""
    words = _words(file)
    pairs = zip(words[::2], words[1::2], strict=False)
    return {name: int(number) for name, number in pairs if number.isdigit()}


def _lines(file: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return file.read_text(encoding="ascii").splitlines()
    return []


def _words(file: Path) -> list[str]:
    return " ".join(_lines(file)).split()
