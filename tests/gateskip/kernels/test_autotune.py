"""Choices by a stopwatch: bfloat16 is multiplied in whichever type is faster, and gives the same
either way; what is made hangs on no such choice."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import gateskip
from compose.artifacts.folder import write_lineage
from compose.contract import DataSpec, StepJob
from compose.stages.gate import Gate
from compose.workers.step import run_step
from gateskip.kernels import autotune
from gateskip.kernels.autotune import bfloat16_is_faster, product
from gateskip.quantization.folders import load_model
from gateskip.quantization.packed_linear import DenseLinear
from gateskip.training.loop import precision


@pytest.fixture(autouse=True)
def measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(autotune, "cache_folder", lambda: tmp_path)
    autotune._answered.cache_clear()
    yield
    autotune._answered.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, able: bool, faster: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able})
    seconds = {torch.bfloat16: 1.0 if faster else 3.0, torch.float32: 2.0}
    monkeypatch.setattr(autotune, "_seconds", seconds.__getitem__)


@pytest.mark.parametrize("able", [False, True])
@pytest.mark.parametrize("faster", [False, True])
def test_half_precision_is_taken_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, able: bool, faster: bool
) -> None:
    pretend(monkeypatch, able, faster)
    assert bfloat16_is_faster() == (able and faster)
    assert precision("auto") == ("bf16" if able and faster else "no")
    assert precision("bf16") == "bf16" and precision("no") == "no"


def test_a_question_is_timed_once_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, True, True)
    assert bfloat16_is_faster()
    autotune._answered.cache_clear()  # as in the next process
    pretend(monkeypatch, True, False)
    assert bfloat16_is_faster(), "the first answer was stored"
    assert list(autotune.choices().values()) == [True]
    autotune.choices_file().unlink()
    autotune._answered.cache_clear()
    assert not bfloat16_is_faster()


def test_without_a_folder_to_write_to_it_is_measured_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(autotune, "cache_folder", lambda: Path("/dev/null/no-folder"))
    assert autotune.measured_once("question", lambda: 3) == 3
    assert autotune.choices() == {}


@pytest.mark.parametrize(
    ("name", "matrix_units", "fast"),
    [("Intel Xeon", False, False), ("Intel Xeon", True, True), ("AMD EPYC", False, True)],
)
def test_capability_alone_decides_where_something_is_made(
    monkeypatch: pytest.MonkeyPatch, name: str, matrix_units: bool, fast: bool
) -> None:
    """Nothing is timed, no stored answer is read, and nothing is stored."""
    pretend(monkeypatch, True, not fast)
    before = bfloat16_is_faster()
    stored = autotune.choices()
    able = {"avx512_bf16": True, "amx_tile": matrix_units, "cpu_name": name}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    with autotune.by_capability():
        assert bfloat16_is_faster() == fast != before
        assert precision("auto") == ("bf16" if fast else "no")
        assert autotune.kernel_times({"a layer": (4, torch.neg, torch.neg)}) == {}
    assert bfloat16_is_faster() == before and autotune.choices() == stored


def test_what_was_chosen_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "_made", {})
    pretend(monkeypatch, True, True)
    bfloat16_is_faster()
    times = {"a": {"ours": 50.0, "own": 10.0}}
    assert autotune.own_are_faster(times)
    (question, answer), kernels = autotune.made().items()
    assert question.startswith("bfloat16 products are faster") and answer is True
    assert kernels == ("packed weights run on", "the library's own kernels")


def test_a_step_makes_the_same_whatever_the_stopwatch_said(
    make_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Gates and their thresholds from text that the bfloat16 model wrote itself, byte for byte."""
    source = tmp_path / "source"
    model = load_model(make_tiny("llama"), "bfloat16")
    model.save_pretrained(source)
    for path in make_tiny("llama").glob("tokenizer*"):
        shutil.copyfile(path, source / path.name)
    write_lineage(source, {"name": "source", "use": "source"}, [])
    gates = Gate(steps=2, length=32, calibration_blocks=2, budgets=(0.8,), shortcut=4)
    text = DataSpec(source="self-written", limit=6, length=32)
    made = []
    for faster in (True, False):
        autotune._answered.cache_clear()
        autotune.choices_file().unlink(missing_ok=True)
        pretend(monkeypatch, True, faster)
        assert bfloat16_is_faster() == faster, "and that is what is stored"
        folder = tmp_path / str(faster)
        job = StepJob(
            key="0" * 16,
            name="gates",
            stage=gates.model_dump(mode="json"),
            model=str(source),
            keep_blocks=False,
            dtype="float32",
            seed=0,
            train=text,
            calibration=text,
            source=source,
            dense=source,
            target=folder / "model",
            check=folder / "check.safetensors",
            work=folder / "work",
            asset_cache=folder / "cache",
            tensorboard=None,
        )
        run_step(job, lambda *_, **__: None)
        files = ("model/gates.safetensors", "model/gateskip.json", "model/model.safetensors")
        written = sorted((folder / "cache" / "own-text").glob("*/*.safetensors"))
        assert len(written) == 2
        made.append([(folder / name).read_bytes() for name in files])
        made[-1] += [path.read_bytes() for path in written]
    assert made[0] == made[1]


@pytest.mark.parametrize("faster", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_is_float64s_but_for_rounding(
    monkeypatch: pytest.MonkeyPatch, faster: bool, kind: torch.dtype, biased: bool
) -> None:
    pretend(monkeypatch, True, faster)
    monkeypatch.setattr(autotune, "ROWS_AT_ONCE", 10)  # three parts, the last one smaller
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*size).to(kind) for size in ((40, 32), (24, 32), (24,)))
    wanted = x.double() @ weight.double().T + (bias.double() if biased else 0)
    found = product(x, weight, bias if biased else None)
    assert found.dtype == kind
    near = {"rtol": 0.01, "atol": 0.02} if kind == torch.bfloat16 else {}
    torch.testing.assert_close(found, wanted.to(kind), **near)


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_layers_take_either_type(
    monkeypatch: pytest.MonkeyPatch, rows: int, kind: torch.dtype
) -> None:
    pretend(monkeypatch, True, False)
    layer = DenseLinear(torch.nn.Linear(32, 24, dtype=torch.bfloat16))
    x = torch.randn(rows, 32).to(kind)
    with torch.inference_mode():
        found = layer(x)
        with layer.fp32_weight():
            again = layer(x)
    wanted = x.double() @ layer.weight.double().T + layer.bias.double()
    for each in (found, again):
        assert each.dtype == kind
        torch.testing.assert_close(each, wanted.to(kind), rtol=0.01, atol=0.01)


def test_a_model_in_bfloat16_prefills_either_way(
    make_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, prompt, last = make_tiny("llama"), [list(range(3, 60))], {}
    for faster in (True, False):
        autotune._answered.cache_clear()
        autotune.choices_file().unlink(missing_ok=True)
        pretend(monkeypatch, True, faster)
        skipping = gateskip.load(folder, dtype="bfloat16").skipping
        wide = any(isinstance(part, DenseLinear) for part in skipping.model.modules())
        assert wide != faster
        cache = skipping.new_cache(1, 80)
        last[faster] = skipping.forward(torch.tensor(prompt), cache, [0])[0, -1].float()
    torch.testing.assert_close(last[True], last[False], rtol=0.05, atol=0.05)
