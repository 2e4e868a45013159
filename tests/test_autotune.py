"""bfloat16 is multiplied in whichever type is faster, and gives the same either way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import gateskip
from gateskip.kernels import autotune
from gateskip.kernels.autotune import bfloat16_is_faster, product
from gateskip.quantization.packed_linear import DenseLinear
from gateskip.training.loop import precision


@pytest.fixture(autouse=True)
def measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(autotune, "cache_folder", lambda: tmp_path)
    bfloat16_is_faster.cache_clear()
    yield
    bfloat16_is_faster.cache_clear()


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
    bfloat16_is_faster.cache_clear()  # as in the next process
    pretend(monkeypatch, True, False)
    assert bfloat16_is_faster(), "the first answer was stored"
    assert list(autotune.choices().values()) == [True]
    autotune.choices_file().unlink()
    bfloat16_is_faster.cache_clear()
    assert not bfloat16_is_faster()


def test_without_a_folder_to_write_to_it_is_measured_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(autotune, "cache_folder", lambda: Path("/dev/null/no-folder"))
    assert autotune.measured_once("question", lambda: 3) == 3
    assert autotune.choices() == {}


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
        bfloat16_is_faster.cache_clear()
        autotune.choices_file().unlink(missing_ok=True)
        pretend(monkeypatch, True, faster)
        skipping = gateskip.load(folder, dtype="bfloat16").skipping
        wide = any(isinstance(part, DenseLinear) for part in skipping.model.modules())
        assert wide != faster
        cache = skipping.new_cache(1, 80)
        last[faster] = skipping.forward(torch.tensor(prompt), cache, [0])[0, -1].float()
    torch.testing.assert_close(last[True], last[False], rtol=0.05, atol=0.05)
