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
from gateskip.quantization.folders import load_model
from gateskip.quantization.rounding import round_to_grid
from gateskip.rounding.allocation import EVERY, allocate, measure_costs
from gateskip.rounding.compensate import Rounding
from gateskip.rounding.sensitivity import SEQUENCE, TOKENS, estimate_costs, sequences

BITS = (2, 4, 8)
TWO, FOUR, EIGHT = (Rounding(bits) for bits in BITS)


def options(name: str) -> list[Rounding]:
    return [TWO, FOUR, EIGHT] if name.endswith(("down_proj", "q_proj")) else []


def test_a_cost_is_the_kl_of_that_layer_alone(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, "float32")
    before = copy.deepcopy(model.state_dict())
    ids = probe_ids(tiny_llama)[:, :32]
    costs = measure_costs(model, ids, options)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(name.endswith(("down_proj", "q_proj")) for name in costs)
    for each in costs.values():
        assert each[TWO] > each[FOUR] > each[EIGHT] >= 0
    name = max(costs, key=lambda each: costs[each][TWO])
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
    assert costs[name][TWO] == pytest.approx(kl, rel=1e-3)


def test_an_estimate_is_near_what_is_measured(tiny_llama: Path) -> None:
    """Where errors are small, and within a factor of two where 2 bits make them large."""
    model = load_model(tiny_llama, "float32")
    model.model.norm.weight.requires_grad_(False)
    asking = [name for name, each in model.named_parameters() if each.requires_grad]
    before = copy.deepcopy(model.state_dict())
    ids = torch.randint(3, 512, (32, 64), generator=torch.Generator().manual_seed(1))
    found, measured = estimate_costs(model, ids, options), measure_costs(model, ids, options)
    assert found.keys() == measured.keys() and len(found) == 8
    for how, spread in ((TWO, 2.0), (FOUR, 1.5), (EIGHT, 1.5)):
        for name, each in measured.items():
            assert each[how] / spread < found[name][how] < each[how] * spread
        total, wanted = (sum(each[how] for each in costs.values()) for costs in (found, measured))
        assert total == pytest.approx(wanted, rel=0.3 if how == TWO else 0.12)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [name for name, each in model.named_parameters() if each.requires_grad] == asking
    assert all(each.grad is None for each in model.parameters())
    assert estimate_costs(model, ids, options) == found, "the seed decides"


def test_gradients_are_taken_of_short_sequences_from_all_over_the_text() -> None:
    blocks = torch.arange(40 * 512).view(40, 512)
    found = sequences(blocks)
    assert found.shape == (TOKENS // SEQUENCE, SEQUENCE)
    assert torch.equal(found[0], blocks[0, :SEQUENCE])
    assert found[-1, 0] > blocks[34, 0], "the end of the text is among them"
    assert torch.equal(sequences(blocks[:1, :40]), blocks[:1, :40]), "shorter ones as they are"


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
    with pytest.raises(ValueError, match="smallest choice takes 20 bytes, but only 19 are allowed"):
        allocate({"a": {2: 1.0, 4: 0.1}}, {"a": {2: 20, 4: 40}}, 19)
