"""Models that compute in float32 with their weights as they are stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import TINY_FAMILIES, stored_as

from gateskip.calibration.fit_shortcuts import fit_shortcuts
from gateskip.calibration.warm_start import warm_start
from gateskip.model.families import find_branches
from gateskip.quantization.as_stored import compute_in_float32, heads_in_float32
from gateskip.quantization.folders import load_model
from gateskip.quantization.packed_linear import DenseLinear
from gateskip.training.gate_finetune import train_gates
from gateskip.training.recipe import TrainConfig

BLOCKS = torch.randint(3, 512, (4, 24), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_gates_are_those_of_the_model_in_float32(
    family: str, dtype: str, make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """To the bit: shortcuts, what is measured with gradients, and trained gates."""
    folder = stored_as(make_tiny(family), dtype, tmp_path / "small")
    whole = load_model(folder, "float32").requires_grad_(False)
    model = compute_in_float32(load_model(folder, getattr(torch, dtype)))
    linears = [part for part in model.modules() if isinstance(part, DenseLinear)]
    assert len(linears) >= 4 * 4 + 1
    assert {part.weight.dtype for part in linears} == {getattr(torch, dtype)}
    assert torch.equal(model(BLOCKS).logits, whole(BLOCKS).logits)
    made = []
    for each in (whole, model):
        gates, scores = warm_start(each, BLOCKS[:2])
        gates.shortcuts = fit_shortcuts(each, BLOCKS, 4)
        config = TrainConfig(steps=3, batch=2, backbone="frozen", precision="no")
        curve = train_gates(each, gates, BLOCKS, config)
        losses = [{k: v for k, v in row.items() if "second" not in k} for row in curve]
        made.append((dict(gates.state_dict()), scores, losses))
    (state, scores, curve), (other, own, same) = made
    assert scores == own and curve == same and len(scores) == len(find_branches(model))
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)


def test_weights_are_not_kept_in_float32_for_the_backward_pass(
    make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = stored_as(make_tiny("llama"), "bfloat16", tmp_path / "small")
    model = compute_in_float32(load_model(folder, torch.bfloat16))
    weights = {each.shape for each in model.parameters() if each.ndim == 2}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    embedded = model.get_input_embeddings()(BLOCKS[:1]).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(inputs_embeds=embedded).logits.sum()
    loss.backward()
    assert embedded.grad is not None and embedded.grad.isfinite().all()
    assert not [each for each in kept if each.dtype == torch.float32 and each.shape in weights]
    assert [each for each in kept if each.dtype == torch.bfloat16 and each.shape in weights]


@pytest.mark.parametrize("autocast", [False, True])
def test_a_head_is_widened_once_for_logits_that_come_in_parts(
    autocast: bool, make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Not where autocast would narrow it again."""
    folder = stored_as(make_tiny("llama"), "bfloat16", tmp_path / "small")
    model = compute_in_float32(load_model(folder, torch.bfloat16))
    head, states = model.get_output_embeddings(), torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = head(states)
        with heads_in_float32(model, model):
            assert (head._fp32_weight is None) is autocast
            assert torch.equal(head(states), before)
        assert head._fp32_weight is None
    assert before.dtype == (torch.bfloat16 if autocast else torch.float32)


def test_a_model_in_float32_stays_as_it_is(tiny_llama: Path) -> None:
    model = compute_in_float32(load_model(tiny_llama, "float32"))
    assert not [part for part in model.modules() if isinstance(part, DenseLinear)]
    assert isinstance(model.get_input_embeddings(), torch.nn.Embedding)
