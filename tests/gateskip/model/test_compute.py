"""Multiply-adds are counted against the dense model, whatever made the compressed one cheaper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compose.bench.speed.measure import dense_work
from compose.stages.prune.edit import keep_layers
from gateskip.decoding.decoder import Decoder
from gateskip.gates.kinds import make_gates
from gateskip.gates.learned import ScalarGates
from gateskip.model.compute import (
    Usage,
    Work,
    attended,
    branch_costs,
    kept_share,
    saving,
)
from gateskip.model.families import backbone, find_branches
from gateskip.quantization.folders import load_model
from gateskip.runtime.skipping import SkippingModel

SEEN, CONTEXT = 20, 200


def counted(branches: int, kept: int = SEEN) -> Usage:
    return Usage([kept] * branches, SEEN, CONTEXT)


def test_what_was_cut_off_was_saved(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, "float32")
    dense, layers = Work.of(model), len(backbone(model).layers)
    keep_layers(model, list(range(layers - 1)))
    usage = counted(2 * (layers - 1))
    none: list[bool] = [False] * len(usage.kept)
    found = saving(model, usage, None, "project", none, dense)
    assert found.gross == found.net == pytest.approx(1 / layers)
    assert 0 < found.model < found.net, "the LM head is as large as before"
    assert saving(model, usage, None, "project", none).gross == 0, "of its own work nothing"


def test_cutting_and_skipping_add_up(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, "float32")
    dense, layers = Work.of(model), len(backbone(model).layers)
    keep_layers(model, list(range(layers - 1)))
    branches = 2 * (layers - 1)
    usage, gates = counted(branches, SEEN // 2), ScalarGates(branches, model.config.hidden_size)
    found = saving(model, usage, gates, "project", [True] * branches, dense)
    own = saving(model, usage, gates, "project", [True] * branches)
    assert own.gross == pytest.approx(0.5)
    assert 1 - found.gross == pytest.approx((1 - 1 / layers) * (1 - own.gross))
    assert 1 - found.net == pytest.approx((1 - 1 / layers) * (1 - own.net))


def test_a_smaller_lm_head_counts_in_the_whole_model_alone(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, "float32")
    dense, usage = Work.of(model), counted(len(find_branches(model)))
    wider = Work(dense.branches, 3 * dense.head)
    found = saving(model, usage, None, "project", [False] * len(usage.kept), wider)
    assert found.net == 0
    whole = SEEN * wider.head + dense.of_branches(usage)
    assert found.model == pytest.approx(SEEN * 2 * dense.head / whole)


def test_gates_that_scale_cost_at_full_compute(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, "float32")
    branches = len(find_branches(model))
    gates = make_gates("vector", branches, model.config.hidden_size, scales=True)
    decoder = Decoder(SkippingModel(model, gates), None, {0.5: [0.0] * branches})
    found = decoder.saved(counted(branches), 1.0)
    assert found.gross == 0 and found.net < 0
    decoder.skipping.gated = False
    assert decoder.saved(counted(branches), 1.0).net == 0


def test_the_dense_model_is_counted_without_its_weights(tiny_llama: Path) -> None:
    found = dense_work(tiny_llama)
    assert found == Work.of(load_model(tiny_llama, "float32"))
    assert torch.get_default_device().type == "cpu"


# -- sliding windows ----------------------------------------------------------------------------


def test_slots_that_a_window_attends_to() -> None:
    """Positions 0, 1, 2, 3, ... of a window of 3 see 1, 2, 3, 3, ... slots."""
    assert attended(0, 6, 3) == 1 + 2 + 3 + 3 + 3 + 3
    assert attended(1, 3, 3) == 2 + 3 + 3
    assert attended(7, 2, 3) == 3 + 3
    assert attended(4, 2, None) == 5 + 6
    for start in range(6):
        for count in range(6):
            for window in (1, 3, 8):
                wanted = sum(min(p + 1, window) for p in range(start, start + count))
                assert attended(start, count, window) == wanted


def windowed(make_tiny: Any, family: str) -> tuple[Any, int]:
    model = load_model(make_tiny(family), "float32")
    return model, model.config.sliding_window


@pytest.mark.parametrize("backend", ["gathered", "reference", "native"])
@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gemma2"])
def test_sliding_layers_cost_what_their_window_costs(
    make_tiny: Any, family: str, backend: Any
) -> None:
    """A prompt of 40 tokens and 4 decoded ones, windows of 32, worked by hand."""
    if backend == "native" and family != "mistral":
        pytest.skip("norms after branches")
    model, window = windowed(make_tiny, family)
    assert window == 32
    skipping = SkippingModel(model, backend=backend)
    cache = skipping.new_cache(1, 64)
    with torch.inference_mode():
        skipping.forward(torch.arange(3, 43).unsqueeze(0), cache, [0])
        for slot in range(40, 44):
            skipping.decode([[5]], cache, [0], [slot])
    usage = skipping.usage
    every = 44 * 45 // 2
    cut = 32 * 33 // 2 + 12 * 32
    assert (usage.seen, usage.context, usage.windowed) == (44, every, {32: cut})
    config = model.config
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * 4
    slots = [every if kind == "full_attention" else cut for kind in types]
    assert family == "mistral" or set(slots) == {every, cut}
    heads, kv_heads, head_dim = 4, 2, 16
    linear = 2 * 64 * heads * head_dim + 2 * 64 * kv_heads * head_dim + 3 * 64 * 128
    wanted = sum(44 * linear + 2 * heads * head_dim * each for each in slots)
    assert Work.of(model).of_branches(usage) == pytest.approx(wanted)
    assert kept_share(model, usage) == 1


def test_skipping_attention_saves_what_a_window_costs(make_tiny: Any) -> None:
    """Half of the tokens skip a sliding layer's attention, all enter the rest."""
    model, window = windowed(make_tiny, "gemma3_text")
    costs = branch_costs(model)
    usage = Usage.of(model)
    usage.saw(0, 2 * window)
    usage.kept = [usage.seen] * len(costs)
    sliding = next(i for i, cost in enumerate(costs) if cost.window == window)
    usage.kept[sliding] //= 2
    cost = costs[sliding]
    saved = window * (cost.linear + cost.per_slot * usage.windowed[window] / (2 * window))
    whole = Work.of(model).of_branches(usage)
    found = saving(model, usage, None, "project", [False] * len(costs))
    assert found.gross == pytest.approx(saved / whole)
    assert found.net == pytest.approx((saved - window * cost.kv) / whole)
    assert kept_share(model, usage) == pytest.approx(1 - found.gross)
    assert cost.over(2 * window) == cost.at(usage.windowed[window] / (2 * window))
    usage.clear()
    assert usage.windowed == {window: 0}
    with pytest.raises(ValueError, match="no token"):
        kept_share(model, usage)
