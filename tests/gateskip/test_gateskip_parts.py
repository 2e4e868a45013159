"""Budgets, warm start, native kernels and packed linear layers, on tiny models."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gateskip
from gateskip.calibration.allocation import allocate_shares, global_thresholds, quantiles
from gateskip.calibration.fit_shortcuts import fit_shortcuts
from gateskip.calibration.settings import ALLOCATIONS
from gateskip.calibration.thresholds import calibrate
from gateskip.calibration.warm_start import measure, sensitivities, warm_start
from gateskip.gates.learned import ScalarGates
from gateskip.kernels import build as native
from gateskip.kernels.autotune import own_are_faster
from gateskip.model.compute import branch_costs
from gateskip.model.reference import masked_forward
from gateskip.quantization.folders import load_model
from gateskip.quantization.packed_linear import (
    DenseLinear,
    PackedLinear,
    accelerate_linears,
    streaming,
)

needs_native = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    return load_model(tiny_llama, "float32")


@pytest.fixture(scope="module")
def blocks() -> torch.Tensor:
    return torch.randint(3, 512, (8, 64), generator=torch.Generator().manual_seed(4))


class TestBudget:
    @pytest.mark.parametrize("allocation", ALLOCATIONS)
    @pytest.mark.parametrize("rule", ["project", "copy"])
    def test_a_budget_keeps_its_share(
        self, model: Any, blocks: torch.Tensor, allocation: str, rule: str
    ) -> None:
        gates, sensitivity = warm_start(model, blocks, kv_rule=rule)
        gates.requires_grad_(False)
        found = calibrate(model, gates, blocks, (0.9, 0.6), allocation, rule, sensitivity)
        assert [c.budget for c in found] == [0.9, 0.6]
        for calibration in found:
            assert calibration.kept == pytest.approx(calibration.budget, abs=0.03)

    def test_global_keeps_the_dearest_tokens(self, model: Any) -> None:
        costs = torch.tensor([c.at(32) for c in branch_costs(model)])
        logits = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
        cut = global_thresholds(logits, 0.7, costs, torch.ones(len(costs), dtype=torch.bool))
        assert len(set(cut.tolist())) == 1
        kept = (logits >= cut[:, None]).float().mean(1)
        assert float((kept * costs).sum() / costs.sum()) == pytest.approx(0.7, abs=0.01)

    def test_copy_never_skips_the_first_attention(self, model: Any) -> None:
        costs = torch.tensor([c.at(32) for c in branch_costs(model)])
        free = torch.arange(8) > 0
        assert global_thresholds(torch.randn(8, 50), 0.5, costs, free)[0] == -math.inf

    @given(
        st.lists(st.floats(0.01, 10), min_size=4, max_size=4),
        st.floats(0.05, 0.99),
    )
    @settings(max_examples=50, deadline=None)
    def test_allocation_meets_the_budget(self, rises: list[float], budget: float) -> None:
        costs = torch.tensor([1.0, 3.0, 1.0, 3.0])
        shares = allocate_shares(torch.tensor(rises), costs, budget)
        assert float((shares * costs).sum() / costs.sum()) == pytest.approx(budget, abs=1e-3)
        assert bool(((shares >= 0) & (shares <= 1)).all())

    def test_harmless_branches_go_first(self) -> None:
        shares = allocate_shares(torch.tensor([5.0, 0.1]), torch.ones(2), 0.7)
        assert shares[1] < shares[0]

    @given(st.floats(0, 1))
    @settings(max_examples=30, deadline=None)
    def test_quantiles_keep_a_share(self, share: float) -> None:
        logits = torch.arange(100.0).repeat(2, 1)
        cut = quantiles(logits, torch.tensor([share, 1.0]))
        kept = (logits >= cut[:, None]).float().mean(1)
        assert float(kept[0]) == pytest.approx(share, abs=0.0051)
        assert kept[1] == 1


class TestWarmStart:
    def test_gates_predict_what_branches_add(self, model: Any, blocks: torch.Tensor) -> None:
        gates, sensitivity = warm_start(model, blocks)
        seen = measure(model, blocks[:1], torch.Generator().manual_seed(0))
        found = []
        for branch in range(gates.branches):
            predicted = gates.logit(branch, seen.inputs[branch])
            pair = torch.stack((predicted.detach(), seen.norms[branch].log()))
            found.append(float(torch.corrcoef(pair)[0, 1]))
        assert sum(found) / len(found) > 0.3, found
        assert all(value > 0 for value in sensitivity)

    def test_it_is_deterministic_and_leaves_the_model_alone(
        self, model: Any, blocks: torch.Tensor
    ) -> None:
        before = [p.clone() for p in model.parameters()]
        first, second = (warm_start(model, blocks[:2])[0] for _ in range(2))
        assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert all(p.requires_grad for p in model.parameters())

    def test_scores_are_the_slopes_of_the_masks(self, model: Any, blocks: torch.Tensor) -> None:
        """Against a finite difference of the same likelihood."""
        block, branch, token, step = blocks[:1, :12], 3, 7, 1e-2
        found = measure(model, block, torch.Generator().manual_seed(0))
        gates = ScalarGates(8, model.config.hidden_size)

        def likelihood(value: float) -> float:
            def rule(at: Any, z: torch.Tensor) -> torch.Tensor:
                mask = torch.ones_like(z)
                if at.index == branch:
                    mask[0, token] = value
                return mask

            with torch.inference_mode():
                hidden = masked_forward(model, block, gates, rule)
                log_p = model.lm_head(hidden)[0].log_softmax(-1)
                plain = model.lm_head(masked_forward(model, block))[0].softmax(-1)
            drawn = torch.multinomial(plain, 1, generator=torch.Generator().manual_seed(0))
            return float(log_p.gather(1, drawn).double().sum())

        gradient = (likelihood(1 + step) - likelihood(1 - step)) / (2 * step)
        assert float(found.scores[branch, token]) == pytest.approx(
            gradient**2 / 2, rel=0.1, abs=1e-4
        )

    def test_sensitivities_find_the_branch_that_matters(
        self, tiny_llama: Path, blocks: torch.Tensor
    ) -> None:
        model = load_model(tiny_llama, "float32")
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(1e-3)
        values = sensitivities(model, blocks[:3])
        assert min(range(8), key=values.__getitem__) == 3


def test_a_measured_block_keeps_no_graph(tiny_llama: Path, blocks: torch.Tensor) -> None:
    """Or sums over blocks would hold all text that was ever seen."""
    model = load_model(tiny_llama, "float32")
    shortcuts = fit_shortcuts(model, blocks[:2], 4)
    assert all(parameter.requires_grad for parameter in shortcuts.parameters())
    found = measure(model, blocks[:1], torch.Generator().manual_seed(0), shortcuts=shortcuts)
    held = [*found.inputs, found.norms, found.scores]
    assert not any(tensor.requires_grad for tensor in held)


def packed_layer(kind: str, n: int = 24, k: int = 128) -> tuple[PackedLinear, torch.Tensor]:
    """A packed layer and the float32 weights it stands for."""
    generator = torch.Generator().manual_seed(0)
    bits = 8 if "bytes" in kind else 4
    codes = torch.randint(0, 2**bits, (n, k), generator=generator)
    scale = (torch.rand(n, k // 64, generator=generator) + 0.1) / 2 ** (bits - 4)
    offset = torch.randn(n, k // 64, generator=generator) if "asymmetric" in kind else None
    book = torch.randn(16, generator=generator) if kind == "codebook" else None
    values = book[codes] if book is not None else (codes - 2 ** (bits - 1)).float()
    weight = values.view(n, -1, 64) * scale[:, :, None]
    if offset is not None:
        weight = weight + offset[:, :, None]
    return PackedLinear(codes, scale, offset, book, None, bits), weight.view(n, k)


PACKED = ("symmetric", "asymmetric", "codebook", "bytes", "asymmetric bytes")


@needs_native
class TestNative:
    @pytest.mark.parametrize("kind", PACKED)
    @pytest.mark.parametrize("rows", [1, 3, 4, 9, 16, 40])
    def test_packed_equals_its_weights(self, kind: str, rows: int) -> None:
        layer, weight = packed_layer(kind)
        x = torch.randn(2, rows, 128, generator=torch.Generator().manual_seed(1))
        for phase in (nullcontext, streaming):
            with torch.inference_mode(), phase():
                torch.testing.assert_close(layer(x), x @ weight.T, atol=3e-4, rtol=1e-4)

    @pytest.mark.parametrize("shape", [(24, 128), (7, 96), (5, 43)])
    def test_dense_equals_torch(self, shape: tuple[int, int]) -> None:
        linear = nn.Linear(shape[1], shape[0])
        x = torch.randn(6, shape[1])
        for phase in (nullcontext, streaming):
            with torch.inference_mode(), phase():
                torch.testing.assert_close(DenseLinear(linear)(x), linear(x), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("kind", ["dense", *PACKED])
    def test_a_row_does_not_depend_on_its_neighbours(self, kind: str) -> None:
        layer = DenseLinear(nn.Linear(128, 24)) if kind == "dense" else packed_layer(kind)[0]
        x = torch.randn(16, 128)
        with torch.inference_mode(), streaming():
            together = layer(x)
            for row in range(16):
                assert torch.equal(together[row], layer(x[row : row + 1])[0])

    def test_gradients_flow_through_both(self) -> None:
        linear = nn.Linear(128, 24)
        x = torch.randn(4, 128, requires_grad=True)
        DenseLinear(linear)(x).sum().backward()
        assert linear.weight.grad is not None and x.grad is not None
        layer, weight = packed_layer("codebook")
        x = torch.randn(4, 128, requires_grad=True)
        layer(x).sum().backward()
        torch.testing.assert_close(x.grad, weight.sum(0).expand(4, -1))

    def test_a_model_keeps_its_logits(self, tiny_qwen2: Path) -> None:
        ids = torch.arange(3, 15).unsqueeze(0)
        model = load_model(tiny_qwen2, "float32")
        with torch.inference_mode():
            before = model(ids).logits
            assert accelerate_linears(model)["DenseLinear"] == 4 * 7 + 1
            torch.testing.assert_close(model(ids).logits, before, atol=1e-4, rtol=0)


def test_without_native_kernels_nothing_is_replaced(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    assert accelerate_linears(load_model(tiny_llama, "float32")) == {}


def test_kernels_are_chosen_for_the_whole_model_by_what_they_take() -> None:
    assert not own_are_faster({})
    even = {"a": {"ours": 10.0, "own": 9.0}, "b": {"ours": 20.0, "own": 14.0}}
    assert not own_are_faster(even), "noise does not choose"
    assert own_are_faster(even | {"c": {"ours": 50.0, "own": 10.0}})


@needs_native
def test_a_model_whose_own_kernels_are_faster_decodes_by_them(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {"Linear4bit": {"ours": 9.0, "own": 1.0}}
    monkeypatch.setattr("gateskip.kernels.autotune.kernel_times", lambda pairs: times)
    decoder = gateskip.load(tiny_llama)
    assert decoder.skipping.engine is None and decoder.kernels == {}
    assert decoder.kernel_times == times and "own kernels" in str(decoder.fallback)
    assert len(decoder.generate([[5, 6, 7]], 4).tokens[0]) == 4
