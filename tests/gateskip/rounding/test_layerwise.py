"""Layers rounded one after another, each in memory for its turn alone."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY_FAMILIES, stored_as

from compose.artifacts.packed_folder import stored_dtype
from gateskip.model.families import backbone
from gateskip.quantization.folders import load_model
from gateskip.rounding import layerwise, recording
from gateskip.rounding.compensate import Rounding
from gateskip.rounding.layer_files import Rounded
from gateskip.rounding.layerwise import round_layers

BLOCKS = torch.randint(3, 512, (4, 24), generator=torch.Generator().manual_seed(5))


def rounded(folder: Path, dtype: torch.dtype, compensate: bool, let_go: bool) -> dict[str, Rounded]:
    model = load_model(folder, dtype)
    done = round_layers(model, BLOCKS, lambda name: Rounding(4), compensate, let_go=let_go)
    found = dict(done)
    layers = {each.device.type for each in backbone(model).layers.parameters()}
    assert layers == {"meta" if let_go else "cpu"}
    return found


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_model_that_is_let_go_is_rounded_as_one_in_float32(
    family: str, make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """To the bit: embeddings that are scaled, masks and rotary tables are those of float32."""
    folder = stored_as(make_tiny(family), "bfloat16", tmp_path / "small")
    assert stored_dtype(folder) == torch.bfloat16
    whole = rounded(folder, torch.float32, True, let_go=False)
    streamed = rounded(folder, torch.bfloat16, True, let_go=True)
    assert list(whole) == list(streamed) and len(whole) >= 4 * 4
    for name, each in whole.items():
        grid, other = each.grid, streamed[name].grid
        assert torch.equal(grid.codes, other.codes) and torch.equal(grid.scale, other.scale)
        assert grid.minimum is not None and torch.equal(grid.minimum, other.minimum)
        assert each.error == streamed[name].error


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_no_linear_module_runs_twice_on_a_batch(
    family: str, make_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the result is that of passes that start anew, to the bit."""
    monkeypatch.setattr(layerwise, "BATCH", 2)
    calls: Counter[Any] = Counter()
    inner = torch.nn.Linear.forward

    def counted(self: Any, x: Any) -> Any:
        calls[self] += 1
        return inner(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", counted)
    recorded = rounded(make_tiny(family), torch.float32, True, let_go=False)
    assert set(calls.values()) == {3}  # of two batches, and one to see which modules read the same
    monkeypatch.setattr(recording.Recording, "of", lambda *_: contextlib.nullcontext())
    calls.clear()
    anew = rounded(make_tiny(family), torch.float32, True, let_go=False)
    assert max(calls.values()) > 5
    for name, each in recorded.items():
        assert torch.equal(each.grid.codes, anew[name].grid.codes)
        assert torch.equal(each.grid.scale, anew[name].grid.scale)


def test_a_module_that_runs_twice_in_a_pass_has_two_outputs() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(self.inner(x) + 1)

    layer, x = Twice(), torch.randn(2, 4)
    passes = recording.Recording(layer)
    expected = layer(x)
    for _ in range(2):
        with passes.of(0):
            assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x), expected)


def test_a_model_that_is_kept_has_the_rounded_weights(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, "float32")
    done = dict(round_layers(model, BLOCKS, lambda name: Rounding(4), False))
    for name, each in done.items():
        assert torch.equal(model.get_submodule(name).weight, each.grid.weight())
    assert model(BLOCKS).logits.isfinite().all()


def test_the_stored_type_is_what_all_tensors_have(tiny_llama: Path, tmp_path: Path) -> None:
    assert stored_dtype(tiny_llama) == torch.float32
    assert stored_dtype(stored_as(tiny_llama, "float16", tmp_path / "half")) == torch.float16
    model = load_model(tiny_llama, "float32").bfloat16()
    model.model.norm.float()
    model.save_pretrained(tmp_path / "mixed")
    assert stored_dtype(tmp_path / "mixed") == torch.float32
