"""The memory that this process holds, and its peak. Imports no torch."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from pathlib import Path

import psutil

from compose.capacity import control_groups, counters


def reset_peak() -> None:
    """Reset the peak to the memory held now, where the system can (Linux)."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def resident_bytes() -> int:
    """The memory that this process holds now, in bytes."""
    return int(psutil.Process(os.getpid()).memory_info().rss)


def peak_of_children() -> int | None:
    """The most memory that one process started by this one has held; None where none runs or the
    system does not tell (Linux does)."""
    peaks = [_high_water(child.pid) for child in psutil.Process(os.getpid()).children()]
    return max((peak for peak in peaks if peak is not None), default=None)


def most_held_by(process: int) -> int | None:
    """The most memory that a process, or one that it started itself, has held; None where it is
    gone. On systems that do not tell (Linux does), the memory that it holds now."""
    with contextlib.suppress(OSError):
        started = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii")
        peaks = [_high_water(pid) for pid in (str(process), *started.split())]
        return max((peak for peak in peaks if peak is not None), default=None)
    with contextlib.suppress(psutil.Error):
        return int(psutil.Process(process).memory_info().rss)
    return None


def _high_water(process: int | str) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def peak_bytes() -> int:
    """The most memory this process has held since `reset_peak`, in bytes."""
    if (high_water := _high_water("self")) is not None:
        return high_water
    info = psutil.Process(os.getpid()).memory_info()
    peak = getattr(info, "peak_wset", None)  # Windows
    if peak is not None:
        return int(peak)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def oom_kills() -> int:
    """Processes that the kernel has ended for want of memory since it began to count: in this
    control group where that is told, else on this machine. 0 where nothing is told."""
    files = [
        group / name
        for group in control_groups("memory")
        for name in ("memory.events", "memory.oom_control")
    ]
    for file in (*files, Path("/proc/vmstat")):
        if (kills := counters(file).get("oom_kill")) is not None:
            return kills
    return 0
