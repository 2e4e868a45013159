"""Kernels that a wheel carries: the choice of the level, damaged files, and the wheel itself."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wheel_process

from gateskip.kernels import abi, build, prebuilt

ROOT = Path(__file__).resolve().parents[3]
SOURCES = build.source_hash(build.source_code())
HASWELL = "fpu sse2 ssse3 sse4_1 sse4_2 avx fma f16c avx2 bmi1 bmi2"
SKYLAKE_SP = f"{HASWELL} avx512f avx512cd avx512bw avx512dq avx512vl"
CASCADE_LAKE = f"{SKYLAKE_SP} avx512_vnni"
ARMV8 = "fp asimd evtstrm aes pmull sha1 sha2 crc32"
PROCESSORS = {
    "Nehalem": ("fpu sse2 ssse3 sse4_1 sse4_2", None),
    "Sandy Bridge": ("fpu sse2 ssse3 sse4_1 sse4_2 avx", None),
    "AVX2 without FMA": (HASWELL.replace(" fma", ""), None),
    "Haswell": (HASWELL, "avx2"),
    "Alder Lake": (f"{HASWELL} avx_vnni", "avx2"),
    "Knights Landing": (f"{HASWELL} avx512f avx512cd avx512er avx512pf", "avx2"),
    "Skylake-SP": (SKYLAKE_SP, "avx512"),
    "Cascade Lake": (CASCADE_LAKE, "avx512-vnni"),
    "Zen 4": (f"{CASCADE_LAKE} avx512_bf16", "avx512-bf16"),
    "Sapphire Rapids": (f"{CASCADE_LAKE} avx512_bf16 amx_bf16 amx_tile", "avx512-bf16"),
    "Cortex-A72": (ARMV8, "arm"),
    "Neoverse N1, Apple M1": (f"{ARMV8} atomics asimdrdm asimddp", "arm-dotprod"),
    "Neoverse V1, Apple M2": (f"{ARMV8} atomics asimdrdm asimddp i8mm bf16", "arm-bf16"),
}
ARM_PROCESSORS = {"arm": "cortex-a72", "arm-dotprod": "neoverse-n1", "arm-bf16": "max"}
"""For each level, a processor that qemu emulates."""
AARCH64 = (183).to_bytes(2, "little")  # an ELF file's e_machine
ARM_TOOLS = ("aarch64-linux-gnu-g++", "qemu-aarch64")
on_x86_linux = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="not x86-64 Linux"
)
needs_arm_tools = pytest.mark.skipif(
    None in map(shutil.which, ARM_TOOLS), reason=f"not installed: {' or '.join(ARM_TOOLS)}"
)
needs_library = pytest.mark.skipif(build.library() is None, reason="no compiled kernels here")


@pytest.fixture
def wheel_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a wheel's libraries, empty, on a processor of level avx2."""
    folder = tmp_path / "prebuilt"
    folder.mkdir()
    monkeypatch.setattr(prebuilt, "FOLDER", folder)
    monkeypatch.setattr(prebuilt, "features_here", lambda: frozenset(HASWELL.split()))
    return folder


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build, "COMPILERS", ())


def put(folder: Path, level: str, library: bytes, sources: str = SOURCES) -> Path:
    file = folder / prebuilt.file_name(level, sources, library)
    file.write_bytes(library)
    return file


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_level_of_a_processor(name: str) -> None:
    flags, level = PROCESSORS[name]
    assert prebuilt.choose(frozenset(flags.split())) == level


@pytest.mark.parametrize("machine", prebuilt.LEVELS)
def test_a_level_needs_each_of_its_features(machine: str) -> None:
    """Its library stops the process with an illegal instruction where one is missing."""
    names = list(prebuilt.LEVELS[machine])
    for level, needed in prebuilt.LEVELS[machine].items():
        for feature in needed:
            lower = prebuilt.choose({*needed} - {feature})
            assert lower is None or names.index(lower) > names.index(level)


def test_levels_differ_by_every_feature_that_the_sources_ask_for() -> None:
    """Else a wheel computes otherwise than a local build, whose compiler has all features."""
    sources = build.source_code().decode()
    asked = set(re.findall(r"\b__((?:AVX|AMX|FMA|F16C|SSE|BMI)\w*?)__\b", sources))
    needed = {feature for needs in prebuilt.LEVELS["x86_64"].values() for feature in needs}
    levels = {feature.replace("_", "").upper() for feature in needed}
    units = {flag[2:].replace("-", "_").upper() for flag in prebuilt.MATRIX_UNITS}
    assert {"AVX2", "AVX512BF16", "AMX_TILE"} <= asked <= levels | units
    arm = {"DOTPROD", "MATMUL_INT8", "BF16_VECTOR_ARITHMETIC"}  # asimddp, i8mm and bf16
    assert set(re.findall(r"\b__ARM_(?:FEATURE_)?(\w+?)\b", sources)) == arm


@on_x86_linux
@needs_library
def test_the_level_of_this_processor_is_that_of_a_local_build() -> None:
    library, level = build.library(), prebuilt.choose(prebuilt.features_here())
    assert bool(library.gateskip_has_decoder()) == (level is not None)
    assert bool(library.gateskip_prefill_units()) == (level in ("avx512-vnni", "avx512-bf16"))


def test_the_features_of_an_arm_processor_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor\t: 0\nBogoMIPS\t: 100.00\nFeatures\t: fp asimd asimddp\nCPU part\t: 0xd0c\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    assert prebuilt.features_here() == {"fp", "asimd", "asimddp"}


def test_without_a_wheel_nothing_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prebuilt, "FOLDER", tmp_path / "prebuilt")
    assert prebuilt.find(SOURCES) is None


def test_the_library_of_the_level_is_found(wheel_folder: Path) -> None:
    file = put(wheel_folder, "avx2", b"right")
    put(wheel_folder, "avx512", b"too good")
    put(wheel_folder, "avx2", b"of other sources", sources="0" * 16)
    assert prebuilt.find(SOURCES) == file == build.build()


def test_libraries_that_do_not_fit_are_refused(
    wheel_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(wheel_folder, "avx512", b"too good")
    put(wheel_folder, "avx2", b"of other sources", sources="0" * 16)
    with pytest.raises(prebuilt.Unfit, match="the wheel's kernels for avx2 are missing"):
        prebuilt.find(SOURCES)
    monkeypatch.setattr(prebuilt, "features_here", frozenset)
    with pytest.raises(prebuilt.Unfit, match="need a processor with AVX2, FMA and F16C"):
        prebuilt.find(SOURCES)


@pytest.mark.parametrize("content", [b"", b"righ", b"wrong", b"right\0"])
def test_a_damaged_library_is_the_problem_that_is_told(
    fresh: None, wheel_folder: Path, no_compiler: None, content: bytes
) -> None:
    """A library that is cut short would stop the process when it is loaded."""
    file = put(wheel_folder, "avx2", b"right")
    file.write_bytes(content)
    assert build.library() is None
    told = f"{file.name} is damaged: install the wheel again; no C++ compiler found"
    assert told in str(build.problem())


@needs_library
def test_a_library_that_does_not_load_is_the_problem_that_is_told(
    fresh: None, wheel_folder: Path, no_compiler: None
) -> None:
    file = put(wheel_folder, "avx2", b"no library")
    assert build.library() is None
    assert str(file) in str(build.problem())


@needs_library
def test_with_a_compiler_a_missing_library_is_compiled(fresh: None, wheel_folder: Path) -> None:
    assert build.compilers()
    assert build.library() is not None
    assert build.build().parent == build.cache_folder()


@needs_library
def test_a_fitting_library_needs_no_compiler(
    fresh: None,
    wheel_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    file = put(wheel_folder, "avx2", build.build().read_bytes())
    request.getfixturevalue("no_compiler")
    assert build.build() == file
    assert build.library().gateskip_abi_version() > 0
    build._loaded.cache_clear()
    monkeypatch.setenv("GATESKIP_NATIVE", "0")
    assert build.library() is None
    assert build.problem() == "turned off by GATESKIP_NATIVE=0"


# -- the wheel itself, which takes minutes to make --------------------------------------------


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`wheels()` is a wheel of this source tree, `wheels(GATESKIP_PREBUILT="1", ...)` one with
    kernels, as `make wheels` repairs it."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("gateskip", "compose", "reports", "pipelines"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)

    def make(**variables: str) -> Path:
        made, repaired = (tmp_path_factory.mktemp(name) for name in ("made", "repaired"))
        options = ("--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(made))
        run("-m", "pip", "wheel", *options, str(tree), **variables)
        (wheel,) = made.iterdir()
        if not variables:
            return wheel
        options = ("--exclude", "libgomp.so.1", "--wheel-dir", str(repaired))
        run("-m", "auditwheel", "repair", *options, str(wheel))
        (wheel,) = repaired.iterdir()
        return wheel

    return make


@pytest.fixture(scope="module")
def levels() -> list[str]:
    """The lowest level and the one of this processor: each takes most of a minute to compile."""
    here = prebuilt.choose(prebuilt.features_here())
    return [name for name in prebuilt.LEVELS["x86_64"] if name in ("avx2", here)]


@pytest.fixture(scope="module")
def wheel(wheels: Callable[..., Path], levels: list[str]) -> Path:
    return wheels(GATESKIP_PREBUILT=",".join(levels))


@pytest.fixture(scope="module")
def arm_wheel(wheels: Callable[..., Path]) -> Path:
    """The wheel for 64-bit Arm, cross-compiled."""
    variables = {"CXX": ARM_TOOLS[0], "_PYTHON_HOST_PLATFORM": "linux-aarch64"}
    return wheels(GATESKIP_PREBUILT="1", **variables)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with this wheel and, below it, the libraries of this one."""
    folder = tmp_path_factory.mktemp("installed")
    run("-m", "venv", "--without-pip", str(folder))
    python = folder / "bin" / "python"
    run("-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(*command: str, **variables: str) -> None:
    """Run this Python with other programs of its environment on the PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, **variables}
    ended = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def decode(python: Path, job: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    ended = subprocess.run(
        [python, wheel_process.__file__],
        input=json.dumps(job),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    answer: dict[str, Any] = json.loads(ended.stdout)
    return answer


@pytest.mark.slow
@on_x86_linux
def test_tags_say_what_a_wheel_holds(
    wheel: Path, levels: list[str], wheels: Callable[..., Path]
) -> None:
    pure = wheels()
    assert pure.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(pure).namelist() if name.endswith(".so")]
    assert re.search(r"-py3-none-manylinux_2_\d+_x86_64", wheel.name)
    libraries = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    start = f"gateskip/kernels/prebuilt/kernels-{{}}-{SOURCES}-"
    assert len(libraries) == len(levels), "auditwheel has added none"
    for level in levels:
        assert [name for name in libraries if name.startswith(start.format(level))], level
    assert set(zipfile.ZipFile(wheel).namelist()) >= {
        name for name in zipfile.ZipFile(pure).namelist() if "dist-info" not in name
    }


@pytest.mark.slow
@on_x86_linux
@needs_library
@pytest.mark.parametrize(("torch_first", "threads"), [(True, 1), (False, 2)])
def test_a_wheel_decodes_without_a_compiler(
    installed: Path,
    smollm2: Path,
    tiny_llama: Path,
    grid_folder: Callable[..., Path],
    tmp_path: Path,
    torch_first: bool,
    threads: int,
) -> None:
    """The tokens are those of a local build; torch and the kernels share one OpenMP library."""
    job = {
        "models": [str(smollm2), str(tiny_llama), str(grid_folder(tiny_llama, "int4"))],
        "prompt": [1, 5, 9, 200, 31],
        "threads": threads,
        "torch_first": torch_first,
    }
    plain = {"PATH": str(installed.parent), "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    wheels = decode(installed, job, plain)
    assert wheels["compilers"] == []
    assert Path(wheels["library"]).parent.name == "prebuilt"
    assert len(wheels["openmp"]) == 1 and wheels["threads"] == threads
    local = decode(Path(sys.executable), job, {**os.environ, "PYTHONPATH": str(ROOT)})
    assert Path(local["library"]).parent.name == "native"
    assert len(local["openmp"]) == 1 and local["threads"] == threads
    assert wheels["tokens"] == local["tokens"]
    assert len({token for rows in wheels["tokens"] for row in rows for token in row}) > 10


@pytest.mark.slow
@on_x86_linux
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
@pytest.mark.parametrize("processor", ["haswell", "native"])
def test_a_level_gives_the_bits_of_a_local_build(
    wheel: Path, tmp_path: Path, processor: str
) -> None:
    """All kernels over odd sizes, in the lowest level and in this processor's; a build for another
    processor stands for a build on it."""
    here = prebuilt.choose(prebuilt.features_here())
    if here is None:
        pytest.skip("no level fits this processor")
    level = here if processor == "native" else "avx2"
    for name in ("local", "wheel"):
        (tmp_path / name).mkdir()
    local = tmp_path / "local" / "kernels.so"
    if processor == "native" and build.compiler() == "g++":
        shutil.copy(build.build(), local)
    else:
        flags = [flag.replace("=native", f"={processor}") for flag in build.FLAGS]
        assert build.compile_kernels("g++", build.source_files(), local, flags) is None
    (tmp_path / "wheel" / "kernels.so").write_bytes(library_in(wheel, level))
    program = link("g++", local, tmp_path / "odd_sizes")
    outputs = [
        subprocess.run(
            [program],
            env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path / name)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for name in ("local", "wheel")
    ]
    assert re.fullmatch(OUTPUT, outputs[0])
    assert outputs[0] == outputs[1]


OUTPUT = r"\d+ kernel cases, \d+ checks, 0 failed, outputs [0-9a-f]{16}\n"


def library_in(wheel: Path, level: str) -> bytes:
    files = zipfile.ZipFile(wheel)
    (name,) = [name for name in files.namelist() if f"kernels-{level}-{SOURCES}-" in name]
    return files.read(name)


def link(compiler: str, library: Path, program: Path) -> Path:
    """A program that checks all kernels of a library over odd sizes."""
    source = Path(__file__).with_name("odd_sizes.cpp")
    command = [compiler, "-std=c++17", "-O1", f"-I{build.FOLDER}", str(source), "-o", str(program)]
    subprocess.run([*command, f"-L{library.parent}", f"-l:{library.name}"], check=True)
    return program


@pytest.mark.slow
@needs_arm_tools
def test_the_wheel_for_arm_loads_on_its_processors(arm_wheel: Path, tmp_path: Path) -> None:
    """Emulated; test_arm.py runs all kernels of builds for these levels."""
    assert re.search(r"-py3-none-manylinux_2_\d+_aarch64", arm_wheel.name)
    libraries = [name for name in zipfile.ZipFile(arm_wheel).namelist() if name.endswith(".so")]
    assert len(libraries) == len(prebuilt.LEVELS["aarch64"]), "auditwheel has added none"
    program, source = tmp_path / "load", Path(__file__).with_name("arm") / "load.cpp"
    command = [ARM_TOOLS[0], "-std=c++17", f"-I{build.FOLDER}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    version = abi.read_header().version
    for level in prebuilt.LEVELS["aarch64"]:
        library = tmp_path / f"{level}.so"
        library.write_bytes(library_in(arm_wheel, level))
        assert library.read_bytes()[18:20] == AARCH64
        emulator = [ARM_TOOLS[1], "-cpu", ARM_PROCESSORS[level], "-L", "/usr/aarch64-linux-gnu"]
        ended = subprocess.run([*emulator, program, library], capture_output=True, text=True)
        assert ended.stdout == f"{version} 1 385 -385\n", level
