"""The kernels on emulated Arm processors: checked against plain loops, and compared with x86."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dumped_model import dump

import gateskip
from compose.artifacts.folder import copy_companions
from compose.stages.registry import STAGES, StageJob
from gateskip.kernels import build

ROOT = Path(__file__).parents[3]
PLAIN, SIGNED, ALL = "armv8-a", "armv8.2-a+dotprod", "armv8.2-a+dotprod+i8mm+bf16"
TOOLS = ("make", "aarch64-linux-gnu-g++", "qemu-aarch64")
missing = [tool for tool in TOOLS if shutil.which(tool) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}"),
]
CPUS = {PLAIN: "cortex-a72", ALL: "max"}
OPTIONS = ("-std=c++17", "-O2", "-ffp-contract=off", "-fopenmp", f"-I{build.FOLDER}")
OF_BF16_PRODUCTS = {"logits", "probabilities"}
"""Kernels that multiply bfloat16 weights on their way, and give numbers."""
OF_CHOICES = {"step", "decode", "argmax", "network", "speculate"}
"""Kernels that multiply them, and choose tokens or branches, or give what follows from these."""


@pytest.fixture(scope="module")
def arm() -> dict[str, list[tuple[Any, ...]]]:
    """What the kernels gave on each kind of Arm processor."""
    ended = subprocess.run(["make", "arm"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    counts = re.findall(r"(\d+) kernel cases, \d+ checks, 0 failed", ended.stdout)
    print(f"kernel cases on each kind of Arm processor: {', '.join(counts)}")
    assert len(counts) == 3 and min(map(int, counts)) > 1000
    return {
        kind: outputs(ROOT / "build" / "arm" / f"{kind}.outputs") for kind in (PLAIN, SIGNED, ALL)
    }


@pytest.fixture(scope="module")
def x86(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """The same of an x86 processor with AVX2, and no more."""
    if platform.machine() != "x86_64":
        pytest.skip("not x86-64")
    return outputs_of(["-march=x86-64-v3"], tmp_path_factory.mktemp("x86"))


def outputs_of(flags: list[str], folder: Path) -> list[tuple[Any, ...]]:
    program, file = folder / "odd_sizes", folder / "outputs"
    compile_with(str(build.compiler()), flags, Path(__file__).with_name("odd_sizes.cpp"), program)
    subprocess.run([str(program), str(file)], check=True, capture_output=True)
    return outputs(file)


def compile_with(compiler: str, flags: list[str], main: Path, program: Path) -> None:
    """A program of the kernels and a file with `main`."""
    sources = map(str, (main, *build.FOLDER.rglob("*.cpp")))
    command = [compiler, *OPTIONS, *flags, *sources, "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True)


def outputs(file: Path) -> list[tuple[Any, ...]]:
    """Kernel, sizes and numbers of each case, bfloat16 as uint16."""
    types = {"f4": np.float32, "i4": np.int32, "bf": np.uint16, "u1": np.uint8}
    content, cases, place = file.read_bytes(), [], 0
    while place < len(content):
        end = content.index(b"\n", place)
        *kernel, a, b, c, kind, count = content[place:end].decode().split()
        numbers = np.frombuffer(content, types[kind], int(count), end + 1)
        place = end + 1 + numbers.nbytes
        cases.append((" ".join(kernel), (int(a), int(b), int(c)), numbers))
    return cases


def different(
    some: list[tuple[Any, ...]], others: list[tuple[Any, ...]]
) -> dict[str, tuple[int, float]]:
    """Kernel -> how many of its cases differ in a bit, and the largest distance, of its size."""
    found: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    assert [case[:2] for case in some] == [case[:2] for case in others]
    for (kernel, _, one), (_, _, other) in zip(some, others, strict=True):
        if one.tobytes() == other.tobytes():
            continue
        a, b = (as_floats(numbers) for numbers in (one, other))
        count, distance = found[kernel]
        size = float(np.linalg.norm(b)) or 1.0
        found[kernel] = count + 1, max(distance, float(np.linalg.norm(a - b)) / size)
    return dict(found)


def as_floats(numbers: Any) -> Any:
    if numbers.dtype == np.uint16:
        return (numbers.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return numbers.astype(np.float64)


@pytest.mark.parametrize("kind", [PLAIN, SIGNED])
def test_arm_gives_the_bits_of_avx2(
    kind: str, arm: dict[str, list[tuple[Any, ...]]], x86: list[tuple[Any, ...]]
) -> None:
    assert different(arm[kind], x86) == {}


def test_only_products_of_bfloat16_differ_where_arm_has_them(
    arm: dict[str, list[tuple[Any, ...]]], x86: list[tuple[Any, ...]]
) -> None:
    """Activations are rounded to bfloat16, which AVX2 leaves in float32."""
    found = different(arm[ALL], x86)
    assert set(found) <= OF_BF16_PRODUCTS | OF_CHOICES | {"bfloat16"}
    distances = {kernel: found[kernel][1] for kernel in OF_BF16_PRODUCTS}
    print(f"distances of what multiplies bfloat16, of its size: {distances}")
    assert max(distances.values()) < 0.03


def test_products_of_bfloat16_are_those_of_avx512(
    arm: dict[str, list[tuple[Any, ...]]], tmp_path: Path
) -> None:
    if "avx512_bf16" not in build.processor().decode().split():
        pytest.skip("the processor has no AVX-512 BF16")
    x86 = outputs_of(["-march=cooperlake"], tmp_path)
    products = [[case for case in cases if case[0] == "bfloat16"] for cases in (arm[ALL], x86)]
    assert different(*products) == {} and products[0]


# -- a real model, decoded without Python ----------------------------------------------------------

PROMPT = "The capital of France is"
TOKENS = 8


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Commands that decode a dumped model: on x86 with AVX2, and on two kinds of Arm processors."""
    if platform.machine() != "x86_64":
        pytest.skip("not x86-64")
    folder, main = (
        tmp_path_factory.mktemp("decoders"),
        Path(__file__).with_name("arm") / "decode.cpp",
    )
    compile_with(str(build.compiler()), ["-march=x86-64-v3"], main, folder / "x86")
    for kind in CPUS:
        flags = [f"-march={kind}", "-static"]
        compile_with("aarch64-linux-gnu-g++", flags, main, folder / kind)
    emulated = {
        kind: ["qemu-aarch64", "-cpu", cpu, str(folder / kind)] for kind, cpu in CPUS.items()
    }
    return {"x86": [str(folder / "x86")], **emulated}


def written_here(backend: Any, prompt: list[int]) -> list[int]:
    """What follows a prompt that the decoder's kernels read, as the program does: prefill has other
    kernels, which round elsewhere."""
    cache, tokens, written = backend.new_cache(1, 64), prompt, list[int]()
    for _ in range(TOKENS):
        first = len(prompt) + len(written) - len(tokens)
        slots = range(first, first + len(tokens))
        best, _ = backend.engine.argmax(tokens, cache, [0] * len(tokens), slots, None)
        tokens = best[-1:]
        written += tokens
    return written


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
def test_a_real_model_writes_the_tokens_of_x86(
    weights: str,
    decoders: dict[str, list[str]],
    smollm2: Path,
    make_job: Callable[..., StageJob],
    tmp_path: Path,
) -> None:
    folder, file = smollm2, tmp_path / "model"
    if weights != "bfloat16":
        folder = tmp_path / weights
        folder.mkdir()
        stage = STAGES[weights].model_validate({"use": weights, "calibrate": False})
        stage.run(make_job(smollm2, folder, dtype="bfloat16"))
        copy_companions(smollm2, folder)
    decoder = gateskip.load(folder, dtype="bfloat16", backend="native")
    prompt = decoder.tokenizer(PROMPT).input_ids
    wanted = written_here(decoder.skipping.backend, prompt)
    dump(decoder.skipping.backend, 64, file)
    tokens, logits = {}, {}
    for name, command in decoders.items():
        words = [*command, str(file), str(TOKENS), *map(str, prompt)]
        ended = subprocess.run(words, check=True, capture_output=True, text=True)
        tokens[name] = [int(line) for line in ended.stdout.splitlines()]
        logits[name] = np.fromfile(f"{file}.logits", np.float32).reshape(TOKENS, -1)
    assert tokens == dict.fromkeys(decoders, wanted)
    assert logits[PLAIN].tobytes() == logits["x86"].tobytes()
    off = np.linalg.norm(logits[ALL] - logits["x86"], axis=1) / np.linalg.norm(
        logits["x86"], axis=1
    )
    print(f"{weights}: logits with bfloat16 products {off.max():.2g} of their size from AVX2's")
    assert off.max() < 0.02
    if weights != "bfloat16":
        assert off.max() == 0, "no weight is bfloat16"
