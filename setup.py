"""Compiles kernels into a wheel for Linux on x86-64 where GATESKIP_PREBUILT=1: `make wheels`.

All other builds hold no compiled code. They compile their kernels when these are first used.
"""

import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


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
    for level in prebuilt.LEVELS:
        flags = [flag for flag in build.FLAGS if flag != "-march=native"]
        new = folder / "new.so"
        # GCC, because the kernels share GCC's OpenMP library, libgomp, with torch
        error = build.compile_kernels(
            "g++", build.source_files(), new, [*flags, *prebuilt.compiler_flags(level), "-Wl,-s"]
        )
        if error is not None:
            raise SystemExit(f"g++ cannot compile the kernels for {level}: {error}")
        new.rename(folder / prebuilt.file_name(level, sources, new.read_bytes()))


def options() -> dict[str, object]:
    """What a wheel with compiled kernels adds to pyproject.toml."""
    if os.environ.get("GATESKIP_PREBUILT") != "1":
        return {}
    if (sys.platform, platform.machine()) != ("linux", "x86_64") or not shutil.which("g++"):
        raise SystemExit("GATESKIP_PREBUILT=1 needs Linux on x86-64 and g++")
    commands = {"build_py": BuildKernels, "bdist_wheel": KernelWheel}
    return {"distclass": KernelDistribution, "cmdclass": commands}


setup(**options())
