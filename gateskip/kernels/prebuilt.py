"""Compiled kernels that a wheel carries: one library for each level of processors. `make wheels`.

A library is compiled with the features of its level and no others, so it runs on every processor
that has them. The C++ sources choose their arithmetic by these features alone, so a level gives the
bits of a local build on the same processor; tests/gateskip/kernels/test_wheels.py compares them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Set
from pathlib import Path

FOLDER = Path(__file__).parent / "prebuilt"
_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl")
LEVELS = {
    "x86_64": {
        "avx512-bf16": (*_AVX512, "avx512_vnni", "avx512_bf16"),
        "avx512-vnni": (*_AVX512, "avx512_vnni"),
        "avx512": _AVX512,
        "avx2": _AVX2,
    },
    "aarch64": {
        "arm-bf16": ("asimd", "asimddp", "i8mm", "bf16"),
        "arm-dotprod": ("asimd", "asimddp"),
        "arm": ("asimd",),
    },
}
"""For each kind of machine, the features of a processor that each level needs, as Linux names them;
the best level first."""
MATRIX_UNITS = ("-mamx-tile", "-mamx-bf16")
"""Flags of the best level of x86 alone, which needs no matrix units (AMX): the kernels ask the
system for them when they run."""
_ARM_FLAGS = {"asimd": "armv8-a", "asimddp": "dotprod"}  # where GCC's names differ from Linux's


class Unfit(RuntimeError):
    """The wheel's libraries cannot be used here; the message says why."""


def compiler_flags(machine: str, level: str) -> tuple[str, ...]:
    """What the compiler needs in place of -march=native or -mcpu=native."""
    features = LEVELS[machine][level]
    if machine == "aarch64":
        return ("-march=" + "+".join(_ARM_FLAGS.get(feature, feature) for feature in features),)
    best = next(iter(LEVELS[machine]))
    flags = (f"-m{feature.replace('_', '')}" for feature in features)
    return ("-march=x86-64", *flags, *(MATRIX_UNITS if level == best else ()))


def choose(features: Set[str]) -> str | None:
    """The best level for a processor with these features; None where there is none."""
    levels = (level for names in LEVELS.values() for level in names.items())
    return next((name for name, needed in levels if features >= set(needed)), None)


def features_here() -> frozenset[str]:
    """The features of this processor that Linux lets programs use; none on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
    return frozenset(lines[0].partition(":")[2].split()) if lines else frozenset()


def file_name(level: str, sources: str, library: bytes) -> str:
    """The name of a library, made from these sources (their hash), with a hash of its bytes."""
    return f"kernels-{level}-{sources}-{_short_hash(library)}.so"


def find(sources: str) -> Path | None:
    """The library of the best level for this processor; None where this copy carries none.

    `sources` is the hash of the sources that the library must be made from. Raises Unfit.
    """
    if not FOLDER.is_dir():
        return None
    level = choose(features_here())
    if level is None:
        raise Unfit(
            "the wheel's kernels need a processor with AVX2, FMA and F16C, or of 64-bit Arm"
        )
    file = next(FOLDER.glob(f"kernels-{level}-{sources}-*.so"), None)
    if file is None:
        raise Unfit(f"the wheel's kernels for {level} are missing: install the wheel again")
    library = file.read_bytes()
    if file.name != file_name(level, sources, library):
        raise Unfit(f"{file.name} is damaged: install the wheel again")
    return file


def _short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
