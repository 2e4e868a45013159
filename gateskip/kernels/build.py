"""Compiles the kernels in src/: once per machine, kept in a cache folder, loaded through ctypes.

A wheel carries compiled kernels (prebuilt.py), which are used where they fit this processor. Where
they do not, and no C++ compiler can compile the sources, everything runs on torch's own kernels:
slower, with the same results up to rounding. `problem` gives the reason.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from gateskip.kernels import abi, prebuilt

FOLDER = Path(__file__).parent / "src"
OPENMP = "-fopenmp"


def flags_for(system: str, machine: str) -> tuple[str, ...]:
    """What compilers are called with, by the names that `platform` gives a system and its
    processors: on Arm, clang takes -mcpu alone."""
    native = "-mcpu=native" if machine in ("aarch64", "arm64") else "-march=native"
    options = ("-O3", native, "-ffp-contract=off", OPENMP, "-fPIC", "-shared", "-std=c++17")
    return options if system == "Darwin" else (*options, "-Wl,-z,now")


FLAGS = flags_for(platform.system(), platform.machine())
COMPILERS = ("g++", "clang++", "c++")
AT_ONCE = 4  # sources: the longest takes a third of the time of all, and each a third of a gigabyte
ERROR_LINES = 6  # of a compiler's, that `problem` shows
_TURNED_OFF = "turned off by GATESKIP_NATIVE=0"


class BuildError(RuntimeError):
    """The kernels could not be compiled; the message has each compiler's own error."""


def compilers() -> list[str]:
    """C++ compilers on this machine, in the order they are tried: $CXX, g++, clang++, c++."""
    names = (os.environ.get("CXX"), *COMPILERS)
    return list(dict.fromkeys(name for name in names if name and shutil.which(name)))


def compiler() -> str | None:
    """The first C++ compiler to build with; None when there is none."""
    return next(iter(compilers()), None)


def cache_folder() -> Path:
    """The folder of compiled kernels: in $GATESKIP_CACHE, or else in ~/.cache."""
    named = os.environ.get("GATESKIP_CACHE")
    return (Path(named) if named else Path.home() / ".cache" / "gateskip-compose") / "native"


def library() -> Any | None:
    """The loaded kernels, built first where needed; None when they are not available: see
    `problem`.

    GATESKIP_NATIVE=0 turns them off.
    """
    return _loaded()[0]


def problem() -> str | None:
    """Why there are no compiled kernels, with the first lines of the compiler's own error; None
    where they are loaded."""
    return _loaded()[1]


@lru_cache(maxsize=1)
def _loaded() -> tuple[Any | None, str | None]:
    """The library, or the reason why there is none; the same for the life of the process."""
    if os.environ.get("GATESKIP_NATIVE") == "0":
        return None, _TURNED_OFF
    try:
        return load(build()), None
    except (OSError, BuildError, abi.AbiMismatch) as error:
        return None, str(error)


def load(file: Path) -> Any:
    """A compiled library whose functions have their argument types.

    Raises OSError when it cannot be loaded, AbiMismatch when it does not match src/api.h.
    """
    import torch  # noqa: F401  its OpenMP library is loaded first, so that kernels share it

    header = abi.read_header()
    loaded = ctypes.CDLL(str(file))
    if not hasattr(loaded, "gateskip_abi_version"):
        raise abi.AbiMismatch(f"{file.name} does not say which ABI it has")
    abi.declare(loaded, header)
    abi.check(loaded, header)
    return loaded


def build() -> Path:
    """The wheel's library for this processor. Where there is none, compile the sources, unless a
    build for them, this compiler and processor is cached.

    Compilers are tried in turn: clang++ may lack OpenMP, or $CXX may be too old. Raises BuildError
    when there is none, or none succeeds, or the cache is open to other users.
    """
    code = source_code()
    try:
        if (library := prebuilt.find(source_hash(code))) is not None:
            return library
        errors = []
    except prebuilt.Unfit as unfit:
        errors = [str(unfit)]
    sources = source_files()
    tools = compilers()
    if not tools:
        errors.append("no C++ compiler found: install g++ or clang, or name one in CXX")
    for tool in tools:
        stamp = hashlib.sha256(code + processor() + " ".join((tool, *FLAGS)).encode())
        target = cache_folder() / f"kernels-{stamp.hexdigest()[:16]}.so"
        require_private(target)
        if target.exists():
            return target
        error = _compile_once(tool, sources, target)
        if error is None:
            return target
        errors.append(f"{tool}: {error}")
    raise BuildError("; ".join(errors))


def _compile_once(tool: str, sources: list[Path], target: Path) -> str | None:
    """Compile unless another process just did: processes that start side by side compile once."""
    from filelock import FileLock  # not where setup.py compiles a wheel

    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with FileLock(target.with_suffix(".lock")):
        return None if target.exists() else compile_kernels(tool, sources, target)


def source_files() -> list[Path]:
    """The C++ files to compile. Raises BuildError where this copy of gateskip has none."""
    files = sorted(FOLDER.rglob("*.cpp"))
    if not files:
        raise BuildError("the kernels' sources are not part of this copy of gateskip")
    return files


def source_code() -> bytes:
    """All that is compiled, headers too. Raises BuildError as `source_files`."""
    return b"".join(path.read_bytes() for path in (*source_files(), *sorted(FOLDER.rglob("*.h"))))


def source_hash(code: bytes) -> str:
    """What names the sources of a wheel's library."""
    return hashlib.sha256(code).hexdigest()[:16]


def require_private(file: Path) -> None:
    """Refuse a cached library that another user could have written: it would run with our rights.

    The file and its folder must belong to this user or root, and nobody else may write to either.
    Raises BuildError, with the place and the fix.
    """
    if not hasattr(os, "geteuid"):
        return  # Windows keeps a user's own folders private
    for place in (file.parent, file):
        try:
            facts = place.stat()
        except FileNotFoundError:
            continue
        foreign = facts.st_uid not in (os.geteuid(), 0)
        if foreign or stat.S_IMODE(facts.st_mode) & 0o022:
            why = "belongs to another user" if foreign else "can be written to by other users"
            raise BuildError(
                f"{place} {why}, so compiled kernels are not taken from it: remove it (it is made "
                "again, for you alone), or name another folder in GATESKIP_CACHE"
            )


def compile_kernels(
    tool: str, sources: list[Path], target: Path, flags: Sequence[str] = FLAGS
) -> str | None:
    """Compile sources with a compiler into one library, several at once; None, or the compiler's
    error."""
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        compiled = Path(folder) / "kernels.so"
        error = _compile_and_link(tool, sources, compiled, flags)
        if error is not None and platform.system() == "Darwin":
            # Apple's clang has no OpenMP: one thread.
            without = [flag for flag in flags if flag != OPENMP]
            error = _compile_and_link(tool, sources, compiled, without)
        if error is not None:
            return error
        compiled.chmod(0o755)  # whatever the umask: others may not write to it
        # Atomic: nobody reads half a file.
        compiled.replace(target)
    return None


def _compile_and_link(
    tool: str, sources: list[Path], target: Path, flags: Sequence[str]
) -> str | None:
    """The first error of a source, or of the linker; None where there is none."""
    objects = [target.with_name(f"{number}.o") for number in range(len(sources))]
    commands = [
        [tool, *flags, "-c", str(source), "-o", str(compiled)]
        for source, compiled in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as threads:
        errors = [error for error in threads.map(_call, commands) if error is not None]
    return errors[0] if errors else _call([tool, *flags, *map(str, objects), "-o", str(target)])


def _call(command: list[str]) -> str | None:
    """The first lines of a compiler's error; None where it succeeds."""
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if not ended.returncode:
        return None
    lines = ended.stderr.strip().splitlines()[:ERROR_LINES]
    return "\n".join(lines) or f"exit status {ended.returncode}"


def processor() -> bytes:
    """The properties of the processor on which FLAGS depend, so that a cache on a shared home fits
    each machine."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor().encode()
    names = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    first = text.split("\n\n", 1)[0]
    return "\n".join(line for line in first.splitlines() if line.startswith(names)).encode()
