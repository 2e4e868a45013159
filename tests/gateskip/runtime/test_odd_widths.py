"""Widths that no vector divides: native decoding is torch's, or is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gateskip
from gateskip.checkpoint import GateFile, save_gates
from gateskip.gates.kinds import make_gates
from gateskip.gates.shortcuts import Shortcuts
from gateskip.kernels import ops
from gateskip.kernels.abi import MAX_ROWS
from gateskip.model.families import UnsupportedModel
from gateskip.model.gating import NEVER_SKIP
from gateskip.quantization.folders import load_model
from gateskip.quantization.packed_linear import PackedLinear
from gateskip.runtime.engine import Engine

pytestmark = [
    pytest.mark.skipif(not ops.has_decoder(), reason="no native engine here"),
    pytest.mark.usefixtures("no_gradients"),
]

LAYERS = 3
SOME, WHOLE = 0.8, 0.6
SHAPES: dict[str, dict[str, Any]] = {
    "inner 1531": {"intermediate_size": 1531},
    "inner 1382": {"intermediate_size": 1382},
    "inner 12": {"intermediate_size": 12},
    "inner 8": {"intermediate_size": 8},
    "hidden 72": {"hidden_size": 72, "intermediate_size": 100},
    "hidden 40, heads of 24": {"hidden_size": 40, "head_dim": 24, "intermediate_size": 37},
    "heads of 8": {"head_dim": 8, "intermediate_size": 131},
}


@pytest.fixture(scope="module")
def gated(make_tiny: Callable[..., Path]) -> Callable[[dict[str, Any]], Path]:
    """A tiny Llama of some shape, with gates and shortcuts: at budget SOME its gates decide, at
    WHOLE every token skips the same branches."""

    def make(shape: dict[str, Any]) -> Path:
        folder = make_tiny("llama", num_hidden_layers=LAYERS, **shape)
        torch.manual_seed(1)
        hidden = load_model(folder, "float32").config.hidden_size
        gates = make_gates("scalar", 2 * LAYERS, hidden).requires_grad_(False)
        gates.weight.mul_(10)  # type: ignore[operator]
        gates.shortcuts = Shortcuts(2 * LAYERS, hidden, 6)
        for part in gates.shortcuts.requires_grad_(False).parameters():
            part.normal_(std=0.05)
        gates.shortcuts.settle()
        whole = [math.inf if i % 3 == 2 else NEVER_SKIP for i in range(2 * LAYERS)]
        some = [NEVER_SKIP] + [5.0] * (2 * LAYERS - 1)
        save_gates(folder, GateFile(gates, "project", {SOME: some, WHOLE: whole}))
        return folder

    return make


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 512, (n,), generator=generator).tolist() for n in (9, 17, 5, 12, 7)]


@pytest.mark.parametrize("name", SHAPES)
def test_native_tokens_are_torchs(gated: Callable[..., Path], name: str) -> None:
    """In float32: plain, skipping and speculating, one row and five."""
    folder = gated(SHAPES[name])
    native, torchs = (
        gateskip.load(folder, "float32", backend=each) for each in ("native", "gathered")
    )
    assert native.skipping.engine is not None and torchs.skipping.engine is None
    for rows in (prompts()[:1], prompts()):
        plain = torchs.generate(rows, 12).tokens
        assert native.generate(rows, 12).tokens == plain
        skipped = torchs.generate(rows, 12, "skip", SOME).tokens
        assert native.generate(rows, 12, "skip", SOME).tokens == skipped
        settings = {
            "draft_budget": SOME,
            "draft_length": 4,
            "draft_weights": "own",
            "lookup": False,
        }
        assert native.generate(rows, 12, "speculate", **settings).tokens == plain


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("mode", ["plain", "skip"])
def test_native_bfloat16_tokens_are_torchs_but_for_ties(
    gated: Callable[..., Path], name: str, mode: str
) -> None:
    """torch rounds to bfloat16 after every operator, the engine between branches does not: where
    they differ first, both tokens' logits must be as near as torch's own error."""
    folder = gated(SHAPES[name])
    native, torchs = (
        gateskip.load(folder, "bfloat16", backend=each) for each in ("native", "gathered")
    )
    exact = gateskip.load(folder, "float32", backend="gathered")
    exact.skipping.model.load_state_dict(load_model(folder, "bfloat16").state_dict())
    settings: Any = (12, mode, WHOLE)
    alone = [native.generate([row], *settings).tokens[0] for row in prompts()]
    found = native.generate(prompts(), *settings).tokens
    wanted = torchs.generate(prompts(), *settings).tokens
    assert found == alone
    drafted = native.generate(
        prompts(), 12, "speculate", draft_budget=WHOLE, draft_length=4, draft_weights="own"
    )
    assert mode == "skip" or drafted.tokens == found
    levels = None if mode == "plain" else exact.thresholds(WHOLE)
    for prompt, mine, theirs in zip(prompts(), found, wanted, strict=True):
        place = next((i for i in range(12) if mine[i] != theirs[i]), None)
        if place is None:
            continue
        ids = torch.tensor([prompt + mine[:place]])
        logits = []
        for each in (exact, torchs):
            model = each.skipping
            states = model.forward(ids, model.new_cache(1, 40), [0], levels)
            logits.append(model.head(states)[0, -1].float())
        noise = (logits[0] - logits[1]).abs().max()
        assert (logits[0][mine[place]] - logits[0][theirs[place]]).abs() <= 2 * noise
        assert noise < 0.2 * logits[0].std()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("inner", [1531, 12])
def test_states_are_near_torchs(make_tiny: Callable[..., Path], inner: int, dtype: str) -> None:
    """A wrong tail moves the states of every later layer."""
    folder = make_tiny("llama", intermediate_size=inner)
    native, torchs = (gateskip.load(folder, dtype, backend=each) for each in ("native", "gathered"))
    exact = gateskip.load(folder, "float32", backend="gathered")
    found = []
    for each in (native, torchs, exact):
        cache = each.skipping.new_cache(1, 40)
        each.skipping.forward(torch.arange(3, 23).unsqueeze(0), cache, [0])
        steps = [each.skipping.decode([[7]], cache, [0], [s]) for s in range(20, 26)]
        found.append(torch.cat(steps).float())
    error, own = ((x - found[2]).norm() / found[2].norm() for x in found[:2])
    assert error <= max(1.1 * float(own), 1e-4)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"hidden_size": 60, "head_dim": 16}, "hidden_size 60 is not a multiple of 8"),
        ({"head_dim": 12}, "head_dim 12 is not a multiple of 8"),
    ],
)
def test_other_widths_are_refused_by_name(
    make_tiny: Callable[..., Path], shape: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        Engine(load_model(make_tiny("llama", **shape), "float32"), None)


def test_weights_that_cannot_be_packed_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="40 inputs in 1 groups cannot be packed"):
        PackedLinear(torch.zeros(8, 40), torch.ones(8, 1), None, None, None)


@pytest.mark.parametrize("weights", ["int4", "int4-head", "nf4"])
def test_draft_copies_of_odd_widths(make_tiny: Callable[..., Path], weights: str) -> None:
    """What has no whole groups stays as it is, and drafts are verified as ever."""
    decoder = gateskip.load(make_tiny("llama", intermediate_size=131, hidden_size=64))
    prompt = [list(range(3, 20))]
    drafted = decoder.generate(
        prompt, 12, "speculate", draft_budget=1.0, draft_weights=weights, draft_length=4
    )
    assert drafted.tokens == decoder.generate(prompt, 12).tokens and drafted.stats.drafted


def test_a_head_without_whole_groups_ranks_drafts_itself(make_tiny: Callable[..., Path]) -> None:
    decoder = gateskip.load(make_tiny("llama", hidden_size=72))
    drafter = decoder.drafter("int4-head")
    assert drafter.engine is not None and drafter.engine.draft_head.rerank is None
    prompt = [list(range(3, 20))]
    settings = {"draft_budget": 1.0, "draft_weights": "int4-head"}
    drafted = decoder.generate(prompt, 12, "speculate", draft_length=4, **settings)
    assert drafted.tokens == decoder.generate(prompt, 12).tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [6, 25, MAX_ROWS - 1, MAX_ROWS + 1, 3 * MAX_ROWS - 5])
def test_any_number_of_rows_has_the_bits_of_one(
    make_tiny: Callable[..., Path], rows: int, dtype: str
) -> None:
    skipping = gateskip.load(make_tiny("llama", intermediate_size=131), dtype).skipping
    engine = skipping.engine
    assert engine is not None
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 64, generator=generator)
    together, alone = skipping.new_cache(rows, 16), skipping.new_cache(rows, 16)
    slots = [4 + row % 9 for row in range(rows)]
    found = engine.step(hidden, together, range(rows), slots, None)
    logits = engine.logits(found)
    assert engine.entered.tolist() == [rows] * len(engine.entered)
    for row in (0, 5, rows // 2, rows - 1):
        one = engine.step(hidden[row : row + 1], alone, [row], slots[row : row + 1], None)
        assert torch.equal(one[0], found[row])
        assert torch.equal(engine.logits(one)[0], logits[row])
