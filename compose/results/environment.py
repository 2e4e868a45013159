"""The machine and the libraries that a result was measured with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from compose.capacity import THREADS, core_count, total_memory
from gateskip.runtime.huge_pages import setting as huge_pages

LIBRARIES = (
    "gateskip-compose",
    "torch",
    "transformers",
    "accelerate",
    "tokenizers",
    "safetensors",
    "bitsandbytes",
    "gptqmodel",
    "auto-round",
    "optimum",
    "torch-pruning",
    "lm-eval",
    "datasets",
    "numpy",
)
"""Distributions whose version can change a result."""

CPU_FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "bf16",
    "i8mm",
    "sve",
)
"""Instruction sets that decide which kernels run, as the kernel names them."""


def capture_environment(threads: int | None = None) -> dict[str, Any]:
    """Processor, memory, threads, library versions, commit and date; torch is not imported for it.

    `threads` is the benchmark's setting; without it, the number that torch would use is recorded.
    Nothing that names the user, the host or a folder is in it.
    """
    torch = sys.modules.get("torch")
    if threads is None and torch is not None:
        threads = int(torch.get_num_threads())
    facts = {
        "processor": _processor(),
        "cpu_features": _cpu_features(),
        "cores": psutil.cpu_count(logical=False),
        "threads": threads or _thread_count(),
        "memory_bytes": total_memory(),
        "accelerator": _accelerator(torch),
        "platform": platform.platform(terse=True),
        "huge_pages": huge_pages(),
        "python": platform.python_version(),
        "versions": library_versions(),
        "git_commit": git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return {key: value for key, value in facts.items() if value not in (None, [], {})}


def _processor() -> str | None:
    return _cpuinfo("model name") or platform.processor() or platform.machine() or None


def _cpu_features() -> list[str]:
    flags = (_cpuinfo("flags") or _cpuinfo("Features") or "").split()
    return [feature for feature in CPU_FEATURES if feature in flags]


def _cpuinfo(key: str) -> str | None:
    """The first value of a key in the kernel's description of the processor, where there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == key), None)


def _thread_count() -> int:
    setting = os.environ.get(THREADS, "")
    return int(setting) if setting.isdigit() else core_count()


def _accelerator(torch: ModuleType | None) -> str | None:
    if torch is None or not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_name())


def library_versions() -> dict[str, str]:
    """Distribution -> installed version, for those of `LIBRARIES` that are installed."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


SOURCES = ("gateskip", "compose", "reports", "pyproject.toml", "setup.py")
"""The code that a run executes. A log or a results folder beside it changes no result."""


def git_commit() -> str | None:
    """The commit of the source tree, `-dirty` with changes in `SOURCES`; None for an installed
    copy."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        commit = git("rev-parse", "HEAD")
        return f"{commit}-dirty" if git("status", "--porcelain", "--", *SOURCES) else commit
    except (OSError, subprocess.SubprocessError):
        return None
