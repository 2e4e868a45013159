"""The compiled kernels of native.cpp, attention.cpp and engine.cpp: built once a machine.

They are called through ctypes, on a CPU. Where no C++ compiler is at hand everything runs on
torch's own kernels instead: slower, with the same results up to rounding.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "src"
SOURCES = tuple(FOLDER / f"{name}.cpp" for name in ("native", "attention", "engine"))
TILE, BLOCK = 16, 32  # rows and columns of packed weights that lie together, as in kernels.h
FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fopenmp",
    "-fPIC",
    "-shared",
    "-std=c++17",
    "-Wl,-z,now",
)


def compiler() -> str | None:
    """The C++ compiler to build with: $CXX, else g++, else c++; None when there is none."""
    return next((c for c in (os.environ.get("CXX"), "g++", "c++") if c and shutil.which(c)), None)


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    named = os.environ.get("GATESKIP_CACHE")
    return (Path(named) if named else Path.home() / ".cache" / "gateskip-compose") / "native"


@lru_cache(maxsize=1)
def library() -> Any | None:
    """The loaded kernels, built first where needed; None when they cannot be had.

    GATESKIP_NATIVE=0 turns them off.
    """
    if os.environ.get("GATESKIP_NATIVE") == "0":
        return None
    try:
        return ctypes.CDLL(str(build()))
    except (OSError, RuntimeError, subprocess.CalledProcessError):
        return None


def build() -> Path:
    """Compile the sources unless a build for them, this compiler and processor is cached.

    Raises RuntimeError without a compiler, CalledProcessError when compiling fails.
    """
    tool = compiler()
    if tool is None:
        raise RuntimeError("no C++ compiler found: install g++, or name one in CXX")
    code = b"".join(path.read_bytes() for path in (*SOURCES, FOLDER / "kernels.h"))
    stamp = hashlib.sha256(code + processor() + " ".join((tool, *FLAGS)).encode())
    target = cache_folder() / f"kernels-{stamp.hexdigest()[:16]}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / "kernels.so"
        command = [tool, *FLAGS, *map(str, SOURCES), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True)
        made.replace(target)  # atomic: processes that build side by side end with one whole file
    return target


def processor() -> bytes:
    """What -march=native depends on, so that a cache on a shared home fits each machine."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        import platform

        return platform.processor().encode()
    lines = [line for line in text.splitlines() if line.startswith(("model name", "flags"))]
    return "\n".join(lines[:2]).encode()


def dense(weight: Tensor, x: Tensor) -> Tensor:
    """x [m, k] @ weight [n, k].T, both float32 and contiguous."""
    out = torch.empty(x.shape[0], weight.shape[0])
    library().gateskip_dense(  # type: ignore[union-attr]
        _at(weight),
        weight.shape[0],
        weight.shape[1],
        _at(x),
        x.shape[0],
        _at(out),
        torch.get_num_threads(),
    )
    return out


def packed(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    book: Tensor | None,
    bits: int,
    n: int,
    x: Tensor,
) -> Tensor:
    """x [m, k] @ w.T for w [n, k] of 4 or 8 bits, which is laid out as PackedLinear has it."""
    k, groups = x.shape[1], scale.shape[1]
    out, scratch = torch.empty(x.shape[0], n), torch.empty(x.shape[0], groups)
    library().gateskip_packed(  # type: ignore[union-attr]
        *map(_at, (codes, scale, offset, book)),
        *(bits, n, k, k // groups),
        _at(x),
        x.shape[0],
        _at(out),
        _at(scratch),
        torch.get_num_threads(),
    )
    return out


def unpack(
    codes: Tensor, scale: Tensor, offset: Tensor | None, book: Tensor | None, bits: int, n: int
) -> Tensor:
    """The float32 weights [n, k] that packed weights of 4 or 8 bits stand for."""
    k = 8 // bits * codes[0].numel() // TILE
    out = torch.empty(n, k)
    library().gateskip_unpack(  # type: ignore[union-attr]
        *map(_at, (codes, scale, offset, book)),
        *(bits, n, k, k // scale.shape[1]),
        _at(out),
        torch.get_num_threads(),
    )
    return out


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
