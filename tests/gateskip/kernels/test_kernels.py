"""The boundary to the compiled kernels: a handshake, and the compiler's own words."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

from gateskip.kernels import abi, build

OF_WIDE_VECTORS = {
    "gateskip_prefill_products",
    "gateskip_prefill_mlp",
    "gateskip_prefill_mlp_branch",
    "gateskip_prefill_attention_branch",
    "gateskip_pack",
    "gateskip_attend",
}
needs_library = pytest.mark.skipif(build.library() is None, reason="no compiled kernels here")


def test_the_header_is_what_python_has() -> None:
    header = abi.read_header()
    assert set(header.structures) == set(abi.STRUCTURES)
    step = header.functions["gateskip_step"]
    assert step.result is None and step.arguments[-1] is ctypes.c_int32
    assert step.arguments[0] is ctypes.POINTER(abi.Model)
    assert header.functions["gateskip_arena_new"].result is ctypes.c_void_p
    assert header.functions["gateskip_struct_size"].arguments == (ctypes.c_char_p,)


def test_sources_include_only_what_stands_below_them() -> None:
    """api.h says the layers: decode and prefill on linear, that on simd, and no circle of files."""
    below = {"decode": {"linear", "simd"}, "prefill": {"linear", "simd"}, "linear": {"simd"}}
    includes = {
        file: [
            (file.parent / name).resolve()
            for name in re.findall(r'#include "(.+)"', file.read_text("utf-8"))
        ]
        for file in (*build.FOLDER.rglob("*.h"), *build.FOLDER.rglob("*/*.cpp"))
    }
    for file, included in includes.items():
        folders = {name.parent for name in included} - {file.parent, build.FOLDER}
        assert {folder.name for folder in folders} <= below.get(file.parent.name, set()), file
    TopologicalSorter(includes).prepare()


@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler here")
def test_the_program_that_make_sanitize_runs_fits_the_header() -> None:
    """It is compiled by hand alone, and would fall behind unseen."""
    program = Path(__file__).with_name("odd_sizes.cpp")
    command = [str(build.compiler()), "-std=c++17", "-fsyntax-only", f"-I{build.FOLDER}"]
    ended = subprocess.run([*command, str(program)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.skipif(platform.machine() != "x86_64", reason="not x86-64")
@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler here")
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.slow)
        for kind in ("x86-64-v2", "x86-64-v4", "cascadelake")
    ]
    + ["x86-64-v3"],
)
def test_kernels_compile_for_other_processors(kind: str) -> None:
    """Without AVX2, without AVX-512, without its products of bytes, and without bfloat16."""
    sources = map(str, sorted(build.FOLDER.rglob("*.cpp")))
    flags = ["-std=c++17", "-fopenmp", "-fsyntax-only", f"-march={kind}"]
    command = [str(build.compiler()), *flags, *sources]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


@needs_library
def test_a_library_has_every_function_of_the_header() -> None:
    """Less those that need AVX-512 with VNNI, where the processor has none."""
    library = build.library()
    if not library.gateskip_has_decoder():
        pytest.skip("linear layers alone: the processor has neither AVX2 nor NEON")
    absent = {name for name in abi.read_header().functions if not hasattr(library, name)}
    assert absent == (set() if library.gateskip_prefill_units() else OF_WIDE_VECTORS)


@needs_library
@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("float softcap;", "double softcap; int32_t more;", "structure Layer has 872 bytes in the"),
        ("double* spent;", "", "structure Step has 72 bytes in the library, 64 here"),
        ("share them */", "share them */ int64_t more;", "structure Step has 72 bytes in the"),
        ("struct Step {", "struct Other {", "structures of api.h and abi.py differ: Other, Step"),
        ("int32_t window;", "int16_t window;", "api.h: type 'int16_t' has no counterpart"),
        ("ABI_VERSION ", "ABI_VERSION 9", r"the library has ABI version (\d+), api.h 9\1"),
        ("INT8_A8 = 13", "INT8_A8 = 14", "enum MatrixKind of api.h is not Kind"),
        ("GELU = 2", "GELU = 3", "enum Activation of api.h is not Activation"),
        ("MAX_ROWS = 64", "MAX_ROWS = 32", "sizes in api.h are .*32"),
    ],
)
def test_another_header_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str, message: str
) -> None:
    """Structures take their fields from the header beside abi.py, so they cannot differ from it;
    the library and numbers can."""
    text = abi.HEADER.read_text("utf-8")
    assert before in text
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "api.h").write_text(text.replace(before, after))
    (tmp_path / "abi.py").write_bytes(Path(abi.__file__).read_bytes())
    spec = importlib.util.spec_from_file_location("other_abi", tmp_path / "abi.py")
    assert spec is not None and spec.loader is not None
    other = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "other_abi", other)
    with pytest.raises(RuntimeError, match=message):
        spec.loader.exec_module(other)
        other.check(build.library(), other.read_header())


@pytest.mark.parametrize("name", ["span", "windows"])
def test_what_the_header_does_not_name_is_refused(name: str) -> None:
    with pytest.raises(AttributeError, match=name):
        abi.Layer(**{name: 5})
    with pytest.raises(AttributeError, match=name):
        setattr(abi.Layer(), name, 5)


@needs_library
def test_a_library_of_another_struct_size_is_refused_by_name() -> None:
    class Other:
        """A library that was built from another header."""

        def __getattr__(self, name: str) -> Any:
            return getattr(build.library(), name)

        def gateskip_struct_size(self, name: bytes) -> int:
            return 7 if name == b"Draft" else build.library().gateskip_struct_size(name)

    with pytest.raises(abi.AbiMismatch, match="structure Draft has 7 bytes in the library"):
        abi.check(Other(), abi.read_header())


@needs_library
def test_a_stale_library_in_the_cache_is_not_used(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "build", lambda: Path(ctypes.util.find_library("m") or "libm.so.6"))
    assert build.library() is None
    assert "does not say which ABI it has" in str(build.problem())


def compiler(folder: Path, name: str, script: str) -> str:
    tool = folder / name
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    return str(tool)


def test_a_compilers_own_error_is_kept(
    fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = compiler(tmp_path, "broken++", "echo 'api.h:7: no such thing' >&2; exit 1")
    monkeypatch.setenv("CXX", broken)
    monkeypatch.setattr(build, "COMPILERS", ())
    assert build.library() is None
    assert build.problem() == f"{broken}: api.h:7: no such thing"


def test_the_next_compiler_is_tried(
    fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A clang++ without OpenMP, say."""
    broken = compiler(tmp_path, "clang++", "echo \"'omp.h' file not found\" >&2; exit 1")
    good = compiler(tmp_path, "good++", 'while [ "$1" != -o ]; do shift; done; echo x > "$2"')
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("GATESKIP_CACHE", str(tmp_path))  # conftest shares that of all tests
    monkeypatch.setattr(build, "COMPILERS", (broken, good))
    assert build.compilers() == [broken, good]
    assert build.build().read_text() == "x\n"
    monkeypatch.setattr(build, "COMPILERS", (broken,))
    with pytest.raises(build.BuildError, match=r"clang\+\+: 'omp.h' file not found"):
        build.build()


@pytest.mark.parametrize(
    ("system", "machine", "native", "linked"),
    [
        ("Linux", "x86_64", "-march=native", True),
        ("Linux", "aarch64", "-mcpu=native", True),
        ("Darwin", "x86_64", "-march=native", False),
        ("Darwin", "arm64", "-mcpu=native", False),
    ],
)
def test_flags_fit_the_machine(system: str, machine: str, native: str, linked: bool) -> None:
    flags = build.flags_for(system, machine)
    assert native in flags and ("-Wl,-z,now" in flags) == linked
    assert len([flag for flag in flags if flag.endswith("=native")]) == 1


@pytest.mark.parametrize(("system", "compiles"), [("Darwin", True), ("Linux", False)])
def test_on_macos_a_compiler_may_lack_openmp(
    system: str, compiles: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lacks = 'for word; do [ "$word" = -fopenmp ] && { echo "no OpenMP" >&2; exit 1; }; done; '
    tool = compiler(
        tmp_path, "clang++", lacks + 'while [ "$1" != -o ]; do shift; done; echo > "$2"'
    )
    monkeypatch.setattr(build.platform, "system", lambda: system)
    error = build.compile_kernels(tool, [tmp_path / "any.cpp"], tmp_path / "kernels" / "kernels.so")
    assert error == (None if compiles else "no OpenMP")


def test_no_compiler_and_kernels_turned_off_are_said(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build, "COMPILERS", ())
    assert "no C++ compiler found" in str(build.problem())
    build._loaded.cache_clear()
    monkeypatch.setenv("GATESKIP_NATIVE", "0")
    assert "GATESKIP_NATIVE" in str(build.problem())


@pytest.mark.parametrize(
    ("folder_mode", "file_mode", "refused"),
    [
        (0o700, 0o755, None),
        (0o755, 0o755, None),
        (0o775, 0o755, "native can be written to by other users"),
        (0o757, 0o755, "native can be written to by other users"),
        (0o700, 0o775, "kernels.so can be written to by other users"),
        (0o700, 0o757, "kernels.so can be written to by other users"),
    ],
)
def test_a_cache_that_others_write_to_is_refused(
    folder_mode: int, file_mode: int, refused: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "native" / "kernels.so"
    file.parent.mkdir()
    file.write_bytes(b"")
    file.chmod(file_mode)
    file.parent.chmod(folder_mode)
    if refused is None:
        build.require_private(file)
        return
    with pytest.raises(build.BuildError, match=refused):
        build.require_private(file)


def test_another_users_cache_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    if tmp_path.stat().st_uid == 0:
        build.require_private(tmp_path / "kernels.so")  # root's own may be used by all
        return
    with pytest.raises(build.BuildError, match="belongs to another user"):
        build.require_private(tmp_path / "kernels.so")


def test_a_refused_cache_is_the_problem_that_is_told(
    fresh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATESKIP_CACHE", str(tmp_path))
    monkeypatch.delenv("GATESKIP_NATIVE", raising=False)
    (tmp_path / "native").mkdir()
    (tmp_path / "native").chmod(0o777)
    assert build.library() is None
    if build.compilers():
        assert "not taken from it" in (build.problem() or "")


def test_processes_that_start_side_by_side_compile_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = compiler(
        tmp_path, "g++", 'echo >> calls; while [ "$1" != -o ]; do shift; done; echo > "$2"'
    )
    monkeypatch.setenv("CXX", tool)
    monkeypatch.setenv("GATESKIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(4) as processes:
        libraries = [processes.submit(build.build) for _ in range(4)]
    assert len({library.result() for library in libraries}) == 1
    assert len((tmp_path / "calls").read_text().splitlines()) == len(build.source_files()) + 1


def test_the_error_of_one_source_is_told(tmp_path: Path) -> None:
    tool = compiler(
        tmp_path,
        "g++",
        'for word; do [ "$word" = b.cpp ] && { echo "b is bad" >&2; exit 1; }; done; :',
    )
    sources = [Path(f"{name}.cpp") for name in "abc"]
    assert build.compile_kernels(tool, sources, tmp_path / "kernels" / "kernels.so") == "b is bad"
    assert list((tmp_path / "kernels").iterdir()) == []


def test_a_new_cache_is_private(tmp_path: Path) -> None:
    import os
    import stat

    if not build.compilers():
        pytest.skip("no compiler")
    before = os.umask(0)
    try:
        target = tmp_path / "native" / "kernels.so"
        source = tmp_path / "empty.cpp"
        source.write_text('extern "C" int one() { return 1; }\n')
        assert build.compile_kernels(build.compilers()[0], [source], target) is None
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(target.stat().st_mode) == 0o755
    build.require_private(target)
