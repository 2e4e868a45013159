"""Triton's kernels: in its interpreter, compiled without a card, and on a card.

Triton takes a gigabyte, so it is not part of the development environment: `make gpu-interpreted`
installs it and runs this file.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import packed_products
import pytest
import torch
from packed_products import (
    CASES,
    FLOATS,
    Case,
    measured,
    of_a_model,
    of_floats,
    of_skipped_branches,
)
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

import gateskip
from gateskip.model.families import UnsupportedModel
from gateskip.quantization import gpu_linear
from gateskip.quantization.folders import load_model
from gateskip.quantization.formats import weight_format
from gateskip.quantization.gpu_linear import GpuLinear, pack_for_gpu, pass_unused
from gateskip.quantization.grid import Grid, unpack_bits

ROOT = Path(__file__).resolve().parents[4]
TRITON = find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is missing: make gpu-interpreted")
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LOGITS = 1e-4
"""Bound of the error of logits, as a share of their spread: float32 sums in another order."""


@pytest.fixture(scope="module")
def packed_folder(make_tiny: Callable[..., Path], grid_folder: Callable[..., Path]) -> Path:
    """One layer in 4 bits, embedding and LM head in 6."""
    source = make_tiny("llama", num_hidden_layers=1)
    return grid_folder(source, "int4", embedding=6, calibrate=False)


@pytest.fixture(scope="module")
def float_folder(make_tiny: Callable[..., Path]) -> Path:
    """The same layer in floats."""
    return make_tiny("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def interpreted(packed_folder: Path, float_folder: Path) -> dict[str, Any]:
    """What packed_products.py found in the interpreter."""
    done = subprocess.run(
        [sys.executable, packed_products.__file__, str(packed_folder), str(float_folder)],
        env={**os.environ, "PYTHONPATH": _path(), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _path() -> str:
    """Where a child process finds this project, and Triton where it is beside the environment."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


@needs_triton
def test_products_in_the_interpreter(interpreted: dict[str, Any]) -> None:
    assert [each["case"] for each in interpreted["cases"]] == [str(case) for case in CASES]
    wrong = [
        each
        for each in interpreted["cases"]
        if not (each["error"] <= 1 and each["exact"] and (each["rounded"] or each["cut"]))
        or not each["flag"]
    ]
    assert not wrong, wrong


@needs_triton
def test_a_model_in_the_interpreter(interpreted: dict[str, Any]) -> None:
    """Every linear layer, the embedding and its head; prompts and single tokens."""
    assert interpreted["model"]["replaced"] == 7
    assert interpreted["model"]["error"] < LOGITS


@needs_triton
def test_products_by_floats_in_the_interpreter(interpreted: dict[str, Any]) -> None:
    assert len(interpreted["floats"]) == 2 * len(FLOATS)
    assert max(interpreted["floats"]) <= 1


@needs_triton
@pytest.mark.parametrize("kv_rule", ["project", "copy"])
@pytest.mark.parametrize("weights", ["packed", "floats"])
def test_skipped_branches_in_the_interpreter(
    interpreted: dict[str, Any], weights: str, kv_rule: str
) -> None:
    """A prompt of three tokens, and four that enter both, one, the other and no branch."""
    skipped = interpreted["skipped"][f"{weights} {kv_rule}"]
    assert skipped["entered"] == [5, 5]
    assert skipped["error"] < LOGITS


@needs_triton
@pytest.mark.parametrize("rows", [1, 9])
def test_a_fake_device(rows: int) -> None:
    """Tensors without values, as if on a GPU: a step asks for none of them."""
    from gateskip.kernels.gpu.packed import multiply

    with FakeTensorMode():
        x = torch.empty(rows, 64, dtype=torch.bfloat16, device="cuda")
        codes = torch.empty(17, 32, dtype=torch.uint8, device="cuda")
        scale = torch.empty(17, 2, dtype=torch.bfloat16, device="cuda")
        out = multiply(x, codes, scale, scale, None, 4, 8)
    assert (out.shape, out.dtype, out.device.type) == ((rows, 17), torch.bfloat16, "cuda")


# --- Without Triton -------------------------------------------------------------------------------


def test_other_groups_are_refused() -> None:
    codes, scale = torch.zeros(2, 48, dtype=torch.uint8), torch.ones(2, 1)
    with pytest.raises(ValueError, match="groups of 48 weights have no kernel: use 32, 64, 128"):
        GpuLinear(Grid(codes, scale, None, 4), None)


@pytest.mark.parametrize(("bits", "width"), [(2, 4), (3, 4), (4, 4), (5, 8), (6, 8), (8, 8)])
def test_a_layer_keeps_the_weights(bits: int, width: int) -> None:
    codes = (torch.arange(64) * 5 % (1 << bits)).to(torch.uint8).view(2, 32)
    grid = Grid(codes, torch.tensor([[0.5], [2.0]]), torch.tensor([[-1.0], [-3.0]]), bits)
    layer = GpuLinear(grid, None)
    assert layer.codes.shape == (2, 32 * width // 8)
    assert torch.equal(layer.grid().weight(), grid.weight())
    assert torch.equal(layer.rows(torch.tensor([1])).weight(), grid.weight()[1:])


def test_without_triton_the_extra_is_named(
    packed_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateskip.extras.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"triton.*'gateskip-compose\[gpu\]'"):
        pack_for_gpu(load_model(packed_folder))
    monkeypatch.setattr("gateskip.extras.find_spec", lambda name: name)
    model = load_model(packed_folder)
    before = weight_format(model)
    assert pack_for_gpu(model) == 7
    assert weight_format(model) == before


@pytest.mark.parametrize("kv_rule", ["project", "copy"])
def test_a_branch_that_no_token_enters_is_not_used(
    packed_folder: Path, monkeypatch: pytest.MonkeyPatch, kv_rule: str
) -> None:
    """Products by torch, which are no numbers where no row is used."""
    unread = []

    def multiply(x: Tensor, *parts: Any) -> Tensor:
        codes, scale, minimum, bias, bits, middle, entered = parts
        low = -middle * scale if minimum is None else minimum
        weight = Grid(unpack_bits(codes, bits), scale.float(), low.float(), bits).weight()
        if entered is not None and len(entered) == len(x) and not entered.any():
            unread.append(len(codes))
            weight = torch.full_like(weight, torch.nan)
        return F.linear(x, weight, bias)

    monkeypatch.setattr("gateskip.extras.find_spec", lambda name: name)
    monkeypatch.setattr(gpu_linear, "_kernels", lambda: SimpleNamespace(multiply=multiply))
    skipped = of_skipped_branches(str(packed_folder), "cpu", kv_rule, pack_for_gpu)
    assert skipped["entered"] == [5, 5]
    assert skipped["error"] < LOGITS
    assert len(unread) == UNREAD


UNREAD = 2 * (2 + 3)
"""Products of two tokens each: queries and output of attention, and three of an MLP."""


@pytest.mark.parametrize("kv_rule", ["project", "copy"])
def test_floats_of_a_branch_that_no_token_enters_are_not_used(
    float_folder: Path, monkeypatch: pytest.MonkeyPatch, kv_rule: str
) -> None:
    """The same of a model that was not packed."""
    unread = []

    def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, entered: Tensor) -> Tensor:
        if not entered.any():
            unread.append(len(weight))
            weight = torch.full_like(weight, torch.nan)
        return F.linear(x, weight, bias)

    kernels = SimpleNamespace(FEW_ROWS=8, multiply_used=multiply)
    monkeypatch.setattr(gpu_linear, "_kernels", lambda *_: kernels)
    monkeypatch.setattr(gpu_linear, "find_spec", lambda name: None)
    model = load_model(float_folder)
    assert pass_unused(model) == 0, "without Triton"
    monkeypatch.setattr(gpu_linear, "find_spec", lambda name: name)
    assert pass_unused(model) == 7
    assert weight_format(model) == "float32"
    skipped = of_skipped_branches(str(float_folder), "cpu", kv_rule, pass_unused)
    assert skipped["entered"] == [5, 5]
    assert skipped["error"] < LOGITS
    assert len(unread) == UNREAD


def test_formats_without_kernels_are_refused(packed_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(UnsupportedModel, match="gptq weights are decoded on a CPU, not on cuda"):
        load_model(tmp_path, device=torch.device("cuda"))
    with pytest.raises(UnsupportedModel, match="gateskip weights are decoded on a CPU, not on mps"):
        load_model(packed_folder, device=torch.device("mps"))


# --- Compiled without a card ----------------------------------------------------------------------

POINTERS = {"x": "*bf16", "codes": "*u8", "scale": "*bf16", "minimum": "*bf16", "bias": "*bf16"}
POINTERS |= {"weight": "*bf16", "entered": "*u8"}


def _registers_and_spills(ptx: str, folder: Path) -> tuple[int, int]:
    """What ptxas says of a kernel: registers of a thread, and bytes that it spills."""
    import triton

    (folder / "kernel.ptx").write_text(ptx)
    arch = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert arch is not None
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    for tool in sorted(tools.glob("ptxas*")):  # a wheel may have an older and a newer one
        command = [tool, "-v", "--gpu-name", arch[1], "-o", folder / "cubin", folder / "kernel.ptx"]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
        used, spilled = (
            re.search(pattern, said) for pattern in (r"Used (\d+) reg", r"(\d+) bytes spill stores")
        )
        if used is not None and spilled is not None:
            return int(used[1]), int(spilled[1])
    raise AssertionError(said)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("rows", [0, 1, 8], ids=["unpack", "1 row", "8 rows"])
def test_compiled_without_a_card(
    rows: int,
    bits: int,
    arch: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """PTX and a cubin; no register spills, and lanes load several codes at once. Weights of 16 bits
    are floats."""
    if (rows, bits) == (0, 16):
        pytest.skip("floats are not unpacked")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gateskip.kernels.gpu import floats, packed

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    fixed = {"BITS": bits, "GROUP": 32, "MIDDLE": 1 << (bits - 1)}
    if bits == 16:
        kernel, warps = floats.multiply_kernel, packed.WARPS
        fixed = {"ROWS": rows, "OUTPUTS": packed.OUTPUTS, "INPUTS": packed.INPUTS}
    elif rows:
        kernel, warps = packed.multiply_kernel, packed.WARPS
        fixed |= {"ROWS": rows, "OUTPUTS": packed.OUTPUTS, "GROUPS": packed.INPUTS // 32}
    else:
        kernel, warps = packed.unpack_kernel, packed.UNPACKING_WARPS
        fixed |= {"OUTPUTS": packed.UNPACKED_OUTPUTS, "GROUPS": packed.UNPACKED_INPUTS // 32}
    types = {**POINTERS, "out": "*bf16", **dict.fromkeys(("n", "k", "groups"), "i32")}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if name in types
    }
    source = ASTSource(kernel, signature, fixed, aligned)
    options = {"num_warps": warps, **packed.FUSED}
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm
    registers, spilled = _registers_and_spills(made["ptx"], tmp_path)
    record_property("registers", registers)
    print(f"{kernel.fn.__name__} {bits} bits {rows} rows sm_{arch}: {registers} registers")
    assert made["cubin"].startswith(b"\x7fELF")
    assert spilled == 0
    assert "ld.global.v" in made["ptx"]


# --- On a card ------------------------------------------------------------------------------------


@needs_triton
@needs_card
@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_on_a_card(case: Case) -> None:
    found = measured(case, "cuda")
    assert found["error"] <= 1
    assert found["exact"] and found["rounded"] and found["flag"]


@needs_triton
@needs_card
@pytest.mark.gpu
def test_products_by_floats_on_a_card() -> None:
    assert max(of_floats("cuda")) <= 1


@needs_triton
@needs_card
@pytest.mark.gpu
def test_a_model_on_a_card(packed_folder: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    assert of_a_model(str(packed_folder), "cuda")["error"] < LOGITS
    tokens = [
        gateskip.load(packed_folder, "float32", backend, device="cuda").generate([[5, 9, 2]], 8)
        for backend in ("gathered", "reference")
    ]
    assert tokens[0].tokens == tokens[1].tokens
