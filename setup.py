"""Compiles kernels into a wheel for Linux where GATESKIP_PREBUILT=1: `make wheels`.

GATESKIP_PREBUILT can name the levels of processors to compile for instead (avx2,avx512): see
gateskip/kernels/prebuilt.py. The wheel is for this machine, or for the one of
_PYTHON_HOST_PLATFORM, as tools for cross-compiling call it (linux-aarch64), with its g++ in CXX.
All other builds hold no compiled code. They compile their kernels when these are first used.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PREBUILT = os.environ.get("GATESKIP_PREBUILT", "")


class KernelDistribution(Distribution):
    """A distribution that pip installs on one kind of machine only."""

    def has_ext_modules(self) -> bool:
        """Whether it holds compiled code."""
        return True


class KernelWheel(bdist_wheel):
    """One wheel for all versions of Python: the kernels are plain C behind ctypes."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform."""
        return "py3", "none", super().get_tag()[2]


class BuildKernels(build_py):
    """Copies the packages and compiles one library for each level of processors."""

    def run(self) -> None:
        """Fill the folder that becomes the wheel; an editable installation has none."""
        super().run()
        if not self.editable_mode:
            compile_levels(Path(self.build_lib) / "gateskip" / "kernels" / "prebuilt")


def compile_levels(folder: Path) -> None:
    """Compile the sources for each level into a folder that holds nothing else afterwards."""
    sys.path.insert(0, str(ROOT))
    from gateskip.kernels import build, prebuilt

    shutil.rmtree(folder, ignore_errors=True)
    sources = build.source_hash(build.source_code())
    machine = machine_of_wheel()
    flags = [flag for flag in build.flags_for("Linux", machine) if not flag.endswith("=native")]
    for level in chosen_levels(list(prebuilt.LEVELS[machine])):
        new = folder / "new.so"
        chosen = [*flags, *prebuilt.compiler_flags(machine, level), "-Wl,-s"]
        error = build.compile_kernels(compiler(), build.source_files(), new, chosen)
        if error is not None:
            raise SystemExit(f"{compiler()} cannot compile the kernels for {level}: {error}")
        new.rename(folder / prebuilt.file_name(level, sources, new.read_bytes()))


def chosen_levels(levels: list[str]) -> list[str]:
    """Those that GATESKIP_PREBUILT names; 1 names all. Raises SystemExit for others."""
    named = PREBUILT.split(",")
    if unknown := sorted({*named} - {*levels, "1"}):
        raise SystemExit(f"GATESKIP_PREBUILT={PREBUILT}: no level {unknown[0]}; {levels} or 1")
    return levels if "1" in named else [level for level in levels if level in named]


def machine_of_wheel() -> str:
    """The processors of the wheel's platform, as in linux-x86_64. Raises SystemExit for others."""
    system, _, machine = sysconfig.get_platform().partition("-")
    if system != "linux" or machine not in ("x86_64", "aarch64"):
        raise SystemExit("GATESKIP_PREBUILT=1 needs Linux on x86-64 or 64-bit Arm")
    return machine


def compiler() -> str:
    """GCC, because the kernels share GCC's OpenMP library, libgomp, with torch."""
    return os.environ.get("CXX", "g++")


def require_compiler(machine: str) -> None:
    """Raise SystemExit where the compiler is missing, is not GCC, or is for other processors."""
    if shutil.which(compiler()):
        about = subprocess.run([compiler(), "-v"], capture_output=True, text=True).stderr
        if f"Target: {machine}" in about and "gcc version" in about:
            return
    raise SystemExit(f"GATESKIP_PREBUILT=1 needs a g++ for {machine}: name it in CXX")


def options() -> dict[str, object]:
    """What a wheel with compiled kernels adds to pyproject.toml."""
    if not PREBUILT:
        return {}
    require_compiler(machine_of_wheel())
    commands = {"build_py": BuildKernels, "bdist_wheel": KernelWheel}
    return {"distclass": KernelDistribution, "cmdclass": commands}


setup(**options())
