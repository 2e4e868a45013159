"""No op mixes devices where the model is not on the CPU, shown without a card.

Tensors of torch's device `meta` have a shape, a type and a device, and no content; here they stand
for those of a CUDA device. torch's FakeTensorMode would say `cuda`, but a build of torch without
CUDA can neither index such tensors nor differentiate them. Layers that only a CPU can compute are
refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compose.stages.prune.branches import entered_shares
from compose.stages.prune.hidden import norm_factors
from compose.stages.prune.importance import importance_scores
from compose.stages.prune.layers import block_influence
from compose.stages.prune.refit import close_gaps, input_grams, refitted
from compose.stages.registry import ModelShape, PruneHeads
from gateskip.calibration.budgets import CalibratedBudgets
from gateskip.calibration.fit_shortcuts import fit_shortcuts
from gateskip.calibration.insight import inspect_text
from gateskip.calibration.settings import ALLOCATIONS
from gateskip.calibration.thresholds import calibrate
from gateskip.calibration.warm_start import warm_start
from gateskip.gates.base import Gates
from gateskip.gates.kinds import GATE_KINDS, make_gates
from gateskip.gates.shortcuts import Shortcuts
from gateskip.model.families import backbone, device_of, head
from gateskip.model.reference import masked_forward
from gateskip.quantization.packed_linear import PackedLinear
from gateskip.training.budget_price import BudgetPrice
from gateskip.training.loop import refuse_cpu_layers
from gateskip.training.masks import TrainMask
from gateskip.training.objectives import (
    SPARSITY,
    distill_loss,
    hidden_loss,
    in_chunks,
    next_token_loss,
)
from gateskip.training.scales import ScaledLinear

CARD = "meta"  # stands for cuda
aten = torch.ops.aten
NUMBERS = (aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default)
INDEXED = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
FAMILIES = ("llama", "mistral", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "gpt_neox")
BRANCHES, HIDDEN = 8, 64
IDS = list(range(5, 37))
JOB: Any = SimpleNamespace(progress=lambda done, total, phase, **_: None)


class OneDevice(TorchDispatchMode):
    """Within this context an op raises when its tensors lie on two devices, as CUDA's ops do.

    Tensors of no dimension and the indices of a look-up may lie on the CPU. Where a number, or a
    copy on the CPU, is asked of a tensor without content, it is 1; a mask is true all over.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten.equal.default:
            return args[0].device == args[1].device
        if func in NUMBERS and args[0].is_meta:
            kind = args[0].dtype
            return 1.0 if kind.is_floating_point else kind is torch.bool or 1
        if func is aten.nonzero.default and args[0].is_meta:
            return args[0].new_zeros((args[0].numel(), args[0].ndim), dtype=torch.long)
        if func is aten._to_copy.default and args[0].is_meta:
            device = torch.device(kwargs.get("device") or CARD)
            if device.type == "cpu":
                return torch.ones_like(args[0], dtype=kwargs.get("dtype"), device=device)
        if func in INDEXED:
            args = (args[0], [_all_of(each) for each in args[1]], *args[2:])
        elif func not in (aten._to_copy.default, aten.copy_.default):
            devices = {each.device for each in tree_leaves((args, kwargs)) if _counts(each)}
            if len(devices) > 1:
                raise RuntimeError(f"{func} was given tensors of {len(devices)} devices")
        return func(*args, **kwargs)


def _counts(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _all_of(index: Tensor | None) -> Tensor | None:
    """A mask without content as the positions of all its entries."""
    if index is None or index.dtype is not torch.bool or not index.is_meta:
        return index
    return index.new_zeros(index.numel(), dtype=torch.long)


@pytest.fixture(autouse=True)
def _no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has no mixed precision for tensors without content."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)


@pytest.fixture
def model_of(make_tiny: Callable[..., Path]) -> Callable[..., Any]:
    """`model_of("llama")`: a tiny model on the card; to be called inside of `OneDevice`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(family: str = "llama") -> Any:
        config = AutoConfig.from_pretrained(make_tiny(family))
        with torch.device(CARD):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        assert {p.device.type for p in model.parameters()} == {CARD}
        return model.eval()

    for family in FAMILIES:  # real ones are saved first
        make_tiny(family)
    return make


def text(rows: int = 2) -> Tensor:
    """Token ids [rows, 32] on the CPU, where text waits."""
    return torch.tensor([IDS] * rows, device="cpu")


def gates_of(kind: str = "scalar", model: Any = None) -> Gates:
    """Gates with shortcuts on the card."""
    gates = make_gates(kind, BRANCHES, HIDDEN)
    gates.shortcuts = Shortcuts(BRANCHES, HIDDEN, 4)
    gates.to(CARD)
    if model is not None:
        gates.attach(model)
    return gates


def test_the_guard_sees() -> None:
    with OneDevice(), pytest.raises(RuntimeError, match="device"):
        torch.zeros(2, device=CARD) + torch.zeros(2, device="cpu")


@pytest.mark.parametrize("kv_rule", ["project", "copy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_reference_pass(family: str, kv_rule: str, model_of: Callable[..., Any]) -> None:
    with OneDevice():
        model = model_of(family)
        gates = gates_of(model=model)
        enters = lambda branch, z: (z >= 0.0).to(z.dtype)  # noqa: E731
        hidden = masked_forward(model, text(), gates, enters, kv_rule)
        assert device_of(model).type == head(model, hidden).device.type == CARD


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_gate_kinds(kind: str, model_of: Callable[..., Any]) -> None:
    """They decide and start where the model is, and thresholds are calibrated there."""
    with OneDevice():
        model = model_of()
        gates = gates_of(kind, model)
        gates, sensitivity = warm_start(model, text(), gates=gates)
        (row,) = calibrate(model, gates.requires_grad_(False), text(), (0.8,), rounds=1)
        assert len(row.thresholds) == len(sensitivity) == BRANCHES
        assert {p.device.type for p in gates.parameters()} == {CARD}


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.1, 0.9)])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_calibration(
    allocation: Any, bounds: tuple[float, float], model_of: Callable[..., Any]
) -> None:
    with OneDevice():
        model = model_of()
        gates = gates_of(model=model).requires_grad_(False)
        found = calibrate(
            *(model, gates, text(), (0.8, 0.6), allocation, "copy", [1.0] * BRANCHES, *bounds),
            closed=frozenset({2}),
            gone=frozenset({3}),
            rounds=2,
        )
        assert len(found) == 2


def test_shortcuts_and_insight(model_of: Callable[..., Any]) -> None:
    with OneDevice():
        model = model_of()
        fitted = fit_shortcuts(model, text(), 4)
        assert {p.device.type for p in fitted.parameters()} == {CARD}
        tokenizer: Any = SimpleNamespace(all_special_ids=[], decode=lambda ids: "word")
        seen = inspect_text(model, gates_of(model=model), tokenizer, IDS, [0.0] * BRANCHES)
        assert seen.compute.device.type == CARD


@pytest.mark.parametrize("form", ["straight-through", "soft", "hard"])
def test_losses_of_a_gate_fine_tune(form: str, model_of: Callable[..., Any]) -> None:
    with OneDevice():
        model, block = model_of(), text().to(CARD)
        gates = gates_of(model=model)
        costs = torch.ones(BRANCHES, device=CARD)
        rule = TrainMask(costs, torch.zeros(BRANCHES, device=CARD), form, prices=costs)
        values: list[Tensor] = []
        hidden = masked_forward(model, block, gates, rule, watch=values.append)
        dense = masked_forward(model, block).detach()

        def loss_of(part: Tensor, rows: slice) -> Tensor:
            logits = head(model, part)
            target = head(model, dense.flatten(0, 1)[rows]).detach()
            return distill_loss(logits, target, 2.0) + next_token_loss(
                logits, block.flatten()[rows]
            )

        loss = in_chunks(hidden.flatten(0, 1), loss_of) + hidden_loss(hidden, dense)
        for pull in SPARSITY.values():
            loss = loss + pull(torch.stack(values), 0.8)
        price = BudgetPrice([p for p in gates.parameters() if p.requires_grad])
        price.add_cost(rule)
        loss.backward()
        price.add_loss(rule)
        price.apply(SimpleNamespace(reduce=lambda tensor, how: tensor))
        assert gates.weight.grad is not None and gates.weight.grad.device.type == CARD


def test_scales_of_packed_weights() -> None:
    with OneDevice(), torch.device(CARD):
        groups = torch.arange(64) // 32
        layer = ScaledLinear(torch.ones(16, 64), torch.ones(16, 2), groups, "scales", None)
        layer(torch.ones(3, 64)).sum().backward()
        assert layer.gain.grad is not None and layer.gain.grad.device.type == CARD


@pytest.mark.parametrize("importance", ["activation", "taylor", "magnitude"])
def test_importance(importance: Any, model_of: Callable[..., Any]) -> None:
    with OneDevice():
        model, blocks = model_of(), text().to(CARD)
        readers = [layer.mlp.down_proj for layer in backbone(model).layers]
        scores = importance_scores(importance, model, readers, blocks, JOB, None, group=2)
        assert {each.device.type for each in scores} == {CARD}


def test_refit(model_of: Callable[..., Any]) -> None:
    with OneDevice():
        model, blocks = model_of(), text().to(CARD)
        readers = [layer.mlp.down_proj for layer in backbone(model).layers]
        gram = input_grams(model, readers, blocks, JOB)[0]
        kept = torch.arange(100, device=CARD)
        assert refitted(readers[0].weight.detach(), kept, gram, 64).device.type == CARD
        assert close_gaps(model, {2}, blocks, JOB) == 1


def test_what_pruning_measures(
    model_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with OneDevice():
        model, blocks = model_of(), text().to(CARD)
        assert len(block_influence(model, blocks, JOB)) == 4
        assert len(norm_factors(model, torch.arange(32, device=CARD), blocks, JOB)) == 9
        shape = ModelShape.from_config(model.config.to_dict())
        stage = PruneHeads(count=2)
        heads = stage._left(torch.ones(shape.num_kv_heads, 2, device=CARD))
        assert heads.device.type == CARD
        file = SimpleNamespace(
            gates=make_gates("scalar", BRANCHES, HIDDEN),
            budgets=CalibratedBudgets({0.8: [0.0] * BRANCHES}),
            kv_rule="project",
        )
        monkeypatch.setattr("gateskip.checkpoint.load_gates", lambda folder: file)
        job: Any = SimpleNamespace(source=Path(), progress=JOB.progress)
        assert len(entered_shares(job, model, blocks, 0.8)) == BRANCHES


def test_layers_for_a_cpu_alone_are_refused_by_name() -> None:
    codes, scale = torch.zeros(16, 32, dtype=torch.uint8), torch.ones(16, 1)
    model = nn.Sequential(nn.Linear(32, 32), PackedLinear(codes, scale, None, None, None))
    refuse_cpu_layers(model, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"1 \(PackedLinear\) is packed for kernels of a CPU"):
        refuse_cpu_layers(model, torch.device("cuda"))
    gptq = nn.Linear(2, 2)
    gptq.qweight, gptq.g_idx = torch.zeros(1), torch.zeros(1)
    with pytest.raises(ValueError, match="train before quantizing"):
        refuse_cpu_layers(nn.ModuleDict({"up_proj": gptq}), torch.device("cuda"))
