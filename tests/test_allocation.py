"""Bits by need: what is measured of a layer, and how bytes are shared out."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compose.artifacts.folder import probe_ids
from gateskip.quantization.allocation import EVERY, allocate, measure_costs
from gateskip.quantization.compensate import Rounding
from gateskip.quantization.folders import load_model
from gateskip.quantization.rounding import round_to_grid

BITS = (2, 4, 8)


def options(name: str) -> list[Rounding]:
    return [Rounding(bits) for bits in BITS] if name.endswith(("down_proj", "q_proj")) else []


def test_a_cost_is_the_kl_of_that_layer_alone(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, "float32")
    before = copy.deepcopy(model.state_dict())
    ids = probe_ids(tiny_llama)[:, :32]
    costs = measure_costs(model, ids, options)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(name.endswith(("down_proj", "q_proj")) for name in costs)
    for each in costs.values():
        assert each[2] > each[4] > each[8] >= 0
    name = max(costs, key=lambda each: costs[each][2])
    with torch.no_grad():
        dense = model(ids).logits.log_softmax(-1)
        inputs = []
        layer = model.get_submodule(name)
        hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        model(ids)
        hook.remove()
        squares = inputs[0].flatten(0, -2).square().mean(0)
        layer.weight.copy_(round_to_grid(layer.weight, squares, 2).weight())
        found = model(ids).logits.log_softmax(-1)
    each = (dense.exp() * (dense - found)).sum(-1)[:, EVERY - 1 :: EVERY]
    kl = float(each.mean())
    assert costs[name][2] == pytest.approx(kl, rel=1e-3)


@given(
    st.lists(st.tuples(st.floats(0.1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    st.floats(0, 1),
)
def test_bytes_are_never_exceeded_and_well_spent(
    layers: list[tuple[float, int]], share: float
) -> None:
    """Costs that halve with every bit: at most one step from the best of all choices."""
    costs = {str(i): {b: need * 2.0**-b for b in BITS} for i, (need, _) in enumerate(layers)}
    sizes = {str(i): {b: b * size for b in BITS} for i, (_, size) in enumerate(layers)}
    least, most = (sum(bound(s.values()) for s in sizes.values()) for bound in (min, max))
    limit = int(least + share * (most - least))
    chosen = allocate(costs, sizes, limit)
    assert sum(sizes[n][b] for n, b in chosen.items()) <= limit

    def total(bits: tuple[int, ...]) -> float:
        return sum(costs[n][b] for n, b in zip(costs, bits, strict=True))

    fitting = [
        bits
        for bits in itertools.product(BITS, repeat=len(layers))
        if sum(sizes[n][b] for n, b in zip(sizes, bits, strict=True)) <= limit
    ]
    step = max(costs[n][2] - costs[n][8] for n in costs)
    assert total(tuple(chosen.values())) <= min(map(total, fitting)) + step


def test_a_size_below_the_smallest_is_refused() -> None:
    with pytest.raises(ValueError, match="smallest choice takes 20 bytes, and 19 are allowed"):
        allocate({"a": {2: 1.0, 4: 0.1}}, {"a": {2: 20, 4: 40}}, 19)
