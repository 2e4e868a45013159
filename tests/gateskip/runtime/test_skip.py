"""Physical skipping equals the masked reference, for every architecture, KV rule and cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gateskip.gates.learned import ScalarGates
from gateskip.gates.shortcuts import Shortcuts
from gateskip.model.families import (
    FAMILIES,
    UnsupportedModel,
    embed,
    final_norm,
    find_branches,
    head,
)
from gateskip.model.gating import NEVER_SKIP
from gateskip.model.reference import masked_forward
from gateskip.quantization.folders import load_model
from gateskip.runtime.skipping import SkippingModel

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, make_tiny: Callable[..., Path]) -> Any:
    return load_model(make_tiny(request.param), "float32")


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 512, (rows, length), generator=torch.Generator().manual_seed(seed))


def half_open(model: Any, rank: int = 6) -> tuple[ScalarGates, list[float]]:
    """Gates, with shortcuts of a rank, and thresholds that skip about half of everything."""
    torch.manual_seed(1)
    branches = len(find_branches(model))
    gates = ScalarGates(branches, model.config.hidden_size).requires_grad_(False)
    gates.weight.mul_(10)
    if rank:
        gates.shortcuts = Shortcuts(branches, model.config.hidden_size, rank)
        for part in gates.shortcuts.requires_grad_(False).parameters():
            part.normal_(std=0.05)
        gates.shortcuts.settle()
    return gates, [NEVER_SKIP] + [5.0] * (branches - 1)


def reference(model: Any, ids: torch.Tensor, rule: str, rank: int = 6) -> torch.Tensor:
    gates, levels = half_open(model, rank)
    with torch.inference_mode():
        return masked_forward(
            model, ids, gates, lambda b, z: (z >= levels[b.index]).float(), kv_rule=rule
        )


def test_dense_pass_is_the_models_own(model: Any) -> None:
    ids = tokens(2, 50)
    with torch.inference_mode():
        expected = model(ids).logits
        torch.testing.assert_close(
            head(model, masked_forward(model, ids)), expected, atol=TOLERANCE, rtol=0
        )
        physical = SkippingModel(model)
        hidden = physical.forward(ids, physical.new_cache(2, 50), [0, 0])
        torch.testing.assert_close(physical.head(hidden), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("rule", ["project", "copy"])
@pytest.mark.parametrize("rank", [0, 6])
def test_prefill_equals_masked(model: Any, rule: str, rank: int) -> None:
    ids, (gates, levels) = tokens(2, 50), half_open(model, rank)
    physical = SkippingModel(model, gates, rule)
    hidden = physical.forward(ids, physical.new_cache(2, 50), [0, 0], levels)
    torch.testing.assert_close(hidden, reference(model, ids, rule, rank), atol=TOLERANCE, rtol=0)
    shares = physical.usage.shares()
    assert shares[0] == 1.0 and any(0.1 < share < 0.9 for share in shares[1:])


@pytest.mark.parametrize("rule", ["project", "copy"])
@pytest.mark.parametrize("cuts", [(17, 50), (1, 2, 3, 40, 50), tuple(range(1, 51))])
def test_chunks_skip_what_one_piece_skips(model: Any, rule: str, cuts: tuple[int, ...]) -> None:
    ids, (gates, levels) = tokens(1, 50), half_open(model)
    whole = SkippingModel(model, gates, rule)
    whole.forward(ids, whole.new_cache(1, 50), [0], levels)
    pieces = SkippingModel(model, gates, rule)
    cache, parts = pieces.new_cache(1, 50), []
    for start, end in zip((0, *cuts), cuts, strict=False):
        parts.append(pieces.forward(ids[:, start:end], cache, [start], levels))
    torch.testing.assert_close(
        torch.cat(parts, 1), reference(model, ids, rule), atol=TOLERANCE, rtol=0
    )
    assert pieces.usage.kept == whole.usage.kept
    assert (pieces.usage.seen, pieces.usage.context) == (50, 50 * 51 // 2)


@pytest.mark.parametrize("rule", ["project", "copy"])
def test_a_padded_batch_changes_no_row(model: Any, rule: str) -> None:
    lengths = [40, 7, 23]
    ids, (gates, levels) = tokens(3, 40), half_open(model)
    batched = SkippingModel(model, gates, rule)
    cache = batched.new_cache(3, 60)
    prefill = batched.forward(ids, cache, [0] * 3, levels, lengths)
    following = tokens(3, 1, seed=5)
    step = batched.forward(following, cache, lengths, levels)
    kept = [0] * len(batched.branches)
    for row, length in enumerate(lengths):
        alone = SkippingModel(model, gates, rule)
        own = alone.new_cache(1, 60)
        first = alone.forward(ids[row : row + 1, :length], own, [0], levels)
        second = alone.forward(following[row : row + 1], own, [length], levels)
        torch.testing.assert_close(prefill[row, :length], first[0], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(step[row], second[0], atol=TOLERANCE, rtol=0)
        kept = [a + b for a, b in zip(kept, alone.usage.kept, strict=True)]
    assert batched.usage.kept == kept


def test_skipping_everything_leaves_the_embedding(model: Any) -> None:
    gates, _ = half_open(model, 0)
    physical = SkippingModel(model, gates)
    ids = tokens(1, 9)
    closed = [float("inf")] * len(physical.branches)
    hidden = physical.forward(ids, physical.new_cache(1, 9), [0], closed)
    with torch.inference_mode():
        bare = final_norm(model)(embed(model, ids))
    torch.testing.assert_close(hidden[:, 1:], bare[:, 1:])
    assert physical.usage.kept == [1] * len(physical.branches), "the first token is an anchor"


def test_a_skipped_branch_is_not_entered(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, "float32")
    gates, _ = half_open(model)
    physical = SkippingModel(model, gates, "copy")
    closed = [NEVER_SKIP] + [float("inf")] * (len(physical.branches) - 1)

    def refuse(*_: Any) -> None:
        raise AssertionError("a skipped branch was computed")

    for branch in physical.branches[1:]:
        for part in branch.module.children():
            part.register_forward_pre_hook(refuse)
    cache = physical.new_cache(1, 12)
    physical.forward(tokens(1, 9)[:, 1:], cache, [1], closed)
    physical.forward(tokens(1, 1), cache, [9], closed)


def test_cache_refuses_more_than_the_model_has_positions(model: Any) -> None:
    with pytest.raises(ValueError, match="512 positions"):
        SkippingModel(model).new_cache(1, 513)


def test_unknown_architecture_is_refused_by_name(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, "float32")
    model.config.model_type = "mamba"
    with pytest.raises(UnsupportedModel, match=r"'mamba'.*llama"):
        find_branches(model)
