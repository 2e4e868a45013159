"""Every gate kind: what it computes, how it starts, and that physical skipping obeys it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from gateskip.calibration.insight import inspect_text, summarize, token_kinds
from gateskip.calibration.thresholds import calibrate
from gateskip.checkpoint import GateFile, load_gates, read_gates, save_gates
from gateskip.gates.base import Gates
from gateskip.gates.kinds import GATE_KINDS, make_gates
from gateskip.model.families import find_branches
from gateskip.model.reference import masked_forward
from gateskip.quantization.folders import load_model
from gateskip.runtime.skipping import SkippingModel

KINDS = tuple(GATE_KINDS)
LEARNED = ("scalar", "vector", "low-rank", "shared", "mlp")
H = 64


def spread(gates: Gates, model: Any) -> list[float]:
    """Make gates differ between tokens; thresholds at which about half of them skip."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in gates.named_parameters():
            parameter.mul_(0 if name == "bias" else 20)
    seen: dict[int, torch.Tensor] = {}

    def rule(branch: Any, z: torch.Tensor) -> torch.Tensor:
        seen[branch.index] = z
        return torch.ones_like(z)

    with torch.inference_mode():
        masked_forward(model, ids(), gates, rule)
    middle = [seen[i].flatten().sort().values[39:41] for i in range(gates.branches)]
    return [float(pair.mean()) for pair in middle]  # between two tokens, so rounding decides none


def ids(rows: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(3, 512, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", LEARNED)
def test_new_gates_are_open(kind: str) -> None:
    gates = make_gates(kind, 6, H)
    x = torch.randn(3, 5, H)
    assert gates.logit(2, x).shape == (3, 5)
    assert gates.gate(2, x).shape[-1] in (1, H)
    assert float(gates.gate(2, x).detach().mean()) > 0.98
    assert gates.macs() > 0


@pytest.mark.parametrize("kind", LEARNED)
def test_every_kind_starts_as_the_linear_read_out(kind: str) -> None:
    torch.manual_seed(0)
    weight, bias, mean = torch.randn(6, H) * 0.1, torch.randn(6), torch.zeros(6, H)
    if kind == "shared":
        weight = weight[:2].repeat(3, 1)  # what one gate a kind of branch can hold
    gates = make_gates(kind, 6, H)
    gates.start(weight, bias, mean)
    x = torch.randn(50, H)
    for branch in range(6):
        wanted = x @ weight[branch] + bias[branch]
        found = gates.logit(branch, x).detach()
        assert float(torch.corrcoef(torch.stack((wanted, found)))[0, 1]) > 0.99
        assert float((wanted - found).abs().mean()) < 0.2


@pytest.mark.parametrize("kind", LEARNED)
def test_rows_are_the_gates_of_some_branches(kind: str) -> None:
    gates = make_gates(kind, 6, H, scales=True)
    chosen = gates.rows([0, 1, 4, 5])
    x = torch.randn(7, H)
    for new, old in enumerate([0, 1, 4, 5]):
        assert torch.equal(chosen.logit(new, x), gates.logit(old, x))
    assert chosen.branches == 4 and chosen.scales


@pytest.mark.parametrize("kind", KINDS)
def test_gates_survive_a_folder(kind: str, tmp_path: Path) -> None:
    gates = make_gates(kind, 6, H, {"rank": 3} if kind in ("low-rank", "mlp") else None)
    save_gates(tmp_path, GateFile(gates, "copy", {0.8: [0.0] * 6}))
    found = load_gates(tmp_path)
    assert found is not None and found.gates.sizes() == gates.sizes()
    assert all(
        torch.equal(a, b) for a, b in zip(found.gates.parameters(), gates.parameters(), strict=True)
    )
    other = "scalar" if kind != "scalar" else "mlp"
    with pytest.raises(ValueError, match=f"holds no {other} gates"):
        read_gates(tmp_path / "gates.safetensors", other)


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="'matrix': one of scalar"):
        make_gates("matrix", 2, H)
    with pytest.raises(ValueError, match="needs scales"):
        make_gates("scalar", 2, H, place="before")


@pytest.mark.parametrize("rule", ["project", "copy"])
@pytest.mark.parametrize(
    ("kind", "scales", "place"),
    [(kind, False, "after") for kind in LEARNED]
    + [("vector", True, "after"), ("scalar", True, "after"), ("scalar", True, "before")],
)
def test_physical_equals_masked(
    tiny_llama: Path, kind: str, scales: bool, place: Any, rule: str
) -> None:
    """Logits within 1e-4, in prefill and in decoding, for every kind of gate."""
    model = load_model(tiny_llama, "float32")
    count = len(find_branches(model))
    gates = make_gates(kind, count, H, None, scales, place).requires_grad_(False)
    levels = spread(gates, model)
    if rule == "copy":
        levels[0] = -torch.inf
    with torch.inference_mode():
        wanted = masked_forward(
            model, ids(), gates, lambda b, z: (z >= levels[b.index]).float(), rule
        )
    physical = SkippingModel(model, gates, rule)
    cache = physical.new_cache(2, 40)
    first = physical.forward(ids()[:, :30], cache, [0, 0], levels)
    torch.testing.assert_close(first, wanted[:, :30], atol=1e-4, rtol=0)
    alone = physical.new_cache(1, 40)
    steps = [physical.forward(ids()[:1, i : i + 1], alone, [i], levels) for i in range(40)]
    torch.testing.assert_close(torch.cat(steps, 1), wanted[:1], atol=1e-4, rtol=0)
    assert any(0.1 < share < 0.9 for share in physical.usage.shares())


@pytest.mark.parametrize("kind", ["random", "static", "router", "exit"])
def test_rivals_skip_in_the_same_harness(tiny_llama: Path, kind: str) -> None:
    """Calibrated to a budget, physical and masked agree, and about the budget is kept."""
    model = load_model(tiny_llama, "float32")
    count = len(find_branches(model))
    torch.manual_seed(1)
    gates = make_gates(kind, count, H).requires_grad_(False)
    gates.attach(model)
    gates.start(torch.randn(count, H) * 0.1, torch.randn(count), torch.zeros(count, H))
    found = calibrate(model, gates, ids(4, 64), (0.7,))[0]
    assert abs(found.kept - 0.7) < (0.15 if kind in ("static", "exit") else 0.05)
    levels = found.thresholds
    with torch.inference_mode():
        wanted = masked_forward(model, ids(), gates, lambda b, z: (z >= levels[b.index]).float())
    physical = SkippingModel(model, gates)
    got = physical.forward(ids(), physical.new_cache(2, 40), [0, 0], levels)
    near = ((got - wanted).abs().amax(-1) < 1e-4).float().mean()
    assert float(near) > 0.9, "a coin's rounding may turn a few tokens"
    assert sum(physical.usage.kept) < 0.95 * count * 80


def test_early_exit_really_leaves(tiny_llama: Path) -> None:
    """Once a token has left it enters no later branch."""
    model = load_model(tiny_llama, "float32")
    gates = make_gates("exit", len(find_branches(model)), H)
    gates.attach(model)
    masks: list[torch.Tensor] = []

    def fixed(branch: Any, z: torch.Tensor) -> torch.Tensor:
        masks.append(z >= 0.5)
        return masks[-1].float()

    with torch.inference_mode():
        masked_forward(model, ids(), gates, fixed)
    for earlier, later in pairwise(masks):
        assert not bool((later[:, 1:] & ~earlier[:, 1:]).any())


def test_gates_that_do_not_scale_leave_the_full_model_alone(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, "float32")
    gates = make_gates("vector", len(find_branches(model)), H)
    with torch.inference_mode():
        dense = masked_forward(model, ids())
        physical = SkippingModel(model, gates)
        full = physical.forward(ids(), physical.new_cache(2, 40), [0, 0])
    torch.testing.assert_close(full, dense, atol=1e-4, rtol=0)


class TestInsight:
    def test_kinds_of_tokens(self, tiny_llama: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        tokens = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", ".", "7"])
        spaced = tokenizer(" the").input_ids
        assert token_kinds(tokenizer, [*tokens, *spaced])[:4] == (
            "first",
            "template",
            "punctuation",
            "digits",
        )
        assert token_kinds(tokenizer, [5, *spaced])[-1] == "function" or len(spaced) > 1

    def test_it_sees_what_skipping_does(self, make_tiny: Callable[..., Path]) -> None:
        from transformers import AutoTokenizer

        folder = make_tiny("llama")
        model = load_model(folder, "float32")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        gates = make_gates("scalar", len(find_branches(model)), H).requires_grad_(False)
        levels = spread(gates, model)
        rows = [row.tolist() for row in ids()]
        inspections = [inspect_text(model, gates, tokenizer, row, levels) for row in rows]
        physical = SkippingModel(model, gates)
        physical.forward(ids(), physical.new_cache(2, 40), [0, 0], levels)
        kept = torch.stack([each.entered.sum(1) for each in inspections]).sum(0).tolist()
        assert kept == physical.usage.kept
        assert all(float(each.compute[0]) == pytest.approx(1.0) for each in inspections)
        found = summarize(inspections)
        assert len(found["branches"]) == gates.branches and len(found["positions"]) == 8
        assert found["kinds"]["first"] == {
            "tokens": 2,
            "compute": 1.0,
            "kept": [1.0] * gates.branches,
        }
        assert sum(each["tokens"] for each in found["kinds"].values()) == 80


def test_what_calibrates_does_not_train() -> None:
    from compose.stages.gate import unseen

    train = torch.arange(40).view(10, 4)
    assert torch.equal(unseen(train, train[:3]), train[3:])
    assert torch.equal(unseen(train, train[:8]), train), "a text too short to be parted"
