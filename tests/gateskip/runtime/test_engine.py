"""The native engine gives what torch gives, skips what torch skips, and each row stands alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gateskip
from gateskip.decoding.sampling import Sampler
from gateskip.gates.kinds import make_gates
from gateskip.gates.shortcuts import Shortcuts
from gateskip.kernels import ops
from gateskip.model.families import FAMILIES, UnsupportedModel, backbone, find_branches
from gateskip.model.gating import NEVER_SKIP
from gateskip.quantization.folders import load_model
from gateskip.quantization.packed_linear import PackedLinear
from gateskip.runtime.backend import DraftLimit, SampleRequest
from gateskip.runtime.engine import Engine
from gateskip.runtime.skipping import SkippingModel

pytestmark = [
    pytest.mark.skipif(
        not ops.has_decoder(),
        reason="no native engine here",
    ),
    pytest.mark.usefixtures("no_gradients"),
]


ODD: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 24, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 24, "num_key_value_heads": 1, "final_logit_softcapping": 5.0},
    "smollm3": {"use_sliding_window": True, "sliding_window": 24},
    "olmo2": {"num_key_value_heads": 1},
    "phi3": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 64,
            "short_factor": [1.0, 1.0, 1.5, 2.0],
            "long_factor": [1.0, 2.0, 4.0, 8.0],
        }
    },
    # Heads of 24: their rows are no whole tiles of a fused weight
    "gpt_neox": {"hidden_size": 96, "use_parallel_residual": False, "hidden_act": "gelu_fast"},
}
"""Settings that a family's other models have."""

ALL = DraftLimit(0.0, [1.0])


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 512, (rows, length), generator=torch.Generator().manual_seed(seed))


def loaded(folder: Path, dtype: str = "float32") -> Any:
    """A tiny model whose norms have weights of all sizes, and whose biases are not zero."""
    model, generator = load_model(folder, dtype), torch.Generator().manual_seed(7)
    for part in model.parameters():
        if part.ndim == 1:
            part.add_(0.2 * torch.randn(part.shape, generator=generator))
    return model


def pair(model: Any, rule: str, rank: int = 6) -> tuple[SkippingModel, SkippingModel, list[float]]:
    """The same gated model in torch and in the engine, with thresholds that skip about half."""
    branches = len(find_branches(model))
    torch.manual_seed(1)
    gates = make_gates("scalar", branches, model.config.hidden_size).requires_grad_(False)
    gates.weight.mul_(10)  # type: ignore[operator]
    if rank:
        ranks = [rank // 2, rank] * (branches // 2)  # attention, MLP
        gates.shortcuts = Shortcuts(branches, model.config.hidden_size, ranks)
        for part in gates.shortcuts.requires_grad_(False).parameters():
            part.normal_(std=0.05)
        gates.shortcuts.settle()
    plain = SkippingModel(model, gates, rule)
    fast = SkippingModel(model, gates, rule, "native", rounded=False)
    return plain, fast, [NEVER_SKIP] + [5.0] * (branches - 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", ["project", "copy"])
@pytest.mark.parametrize(("skips", "rank"), [(False, 0), (True, 0), (True, 6)])
def test_a_batch_decodes_as_in_torch(
    make_tiny: Callable[..., Path], family: str, rule: str, skips: bool, rank: int
) -> None:
    plain, fast, some = pair(loaded(make_tiny(family)), rule, rank)
    levels = some if skips else None
    lengths, ids = [40, 7, 23], tokens(3, 40)
    caches = plain.new_cache(3, 64), fast.new_cache(3, 64)
    for model, cache in zip((plain, fast), caches, strict=True):
        model.forward(ids, cache, [0] * 3, levels, lengths)
    for step in range(15):
        starts, following = [length + step for length in lengths], tokens(3, 1, step)
        ids, rows = following.tolist(), range(3)
        wanted = plain.decode(ids, caches[0], rows, starts, levels)
        found = fast.decode(ids, caches[1], rows, starts, levels)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(fast.head(found), plain.head(wanted), atol=1e-4, rtol=1e-4)
    assert fast.usage == plain.usage


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(
    make_tiny: Callable[..., Path], family: str, odd: bool
) -> None:
    """A prompt in pieces, then tokens one by one and together, in texts longer than windows."""
    model = loaded(make_tiny(family, **(ODD.get(family, {}) if odd else {})))
    fast = SkippingModel(model, None, "project", "native")
    ids, cache = tokens(2, 90), fast.new_cache(2, 96)
    states = [fast.forward(ids[:, a:b], cache, [a, a]) for a, b in ((0, 50), (50, 57))]
    for a, b in ((57, 58), (58, 66), (66, 90)):
        found = fast.decode(ids[:, a:b].tolist(), cache, [0, 1], [a, a])
        states.append(found.unflatten(0, (2, -1)))
    wanted = model(ids).logits
    torch.testing.assert_close(fast.head(torch.cat(states, 1)), wanted, atol=2e-4, rtol=1e-4)


@pytest.fixture
def after_a_prompt(
    make_tiny: Callable[..., Path], family: str, dtype: str, skips: bool
) -> tuple[SkippingModel, list[float] | None, Any, Any]:
    """A model in the engine, thresholds if it skips, and two caches of the same 40 tokens."""
    _, fast, some = pair(loaded(make_tiny(family, **ODD.get(family, {})), dtype), "project")
    together, alone = fast.new_cache(1, 64), fast.new_cache(1, 64)
    for cache in (together, alone):
        fast.forward(tokens(1, 40), cache, [0])
    return fast, some if skips else None, together, alone


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("skips", [False, True])
def test_a_draft_is_its_steps(after_a_prompt: Any) -> None:
    """Its tokens, and how likely each is, are what decoding one by one says."""
    fast, levels, together, alone = after_a_prompt
    assert fast.row_decoder is not None
    drafted = fast.row_decoder.sample(SampleRequest(7, 8, limit=ALL), (together, 0, 40), levels)
    assert drafted.drawn_from == drafted.tokens
    token, both = 7, zip(drafted.tokens, drafted.probabilities, strict=True)
    for place, (found, chance) in enumerate(both):
        states = fast.decode([[token]], alone, [0], [40 + place], levels)
        shares = fast.head(states)[0].softmax(-1)
        token = int(shares.argmax())
        assert found == token and chance == pytest.approx(float(shares[token]), rel=1e-4)
    assert len(drafted.tokens) == 8


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "skips"), [("float32", False), ("bfloat16", True)])
def test_a_drawn_draft_is_its_steps(after_a_prompt: Any) -> None:
    """Its tokens, and what each was drawn from, are what a sampler does one by one."""
    fast, levels, together, alone = after_a_prompt
    sampler, uniform = Sampler(temperature=0.8, top_p=0.9), [0.1, 0.95, 0.5, 0.7, 0.02]
    assert fast.row_decoder is not None and sampler.draws is not None
    request = SampleRequest(7, 5, sampler.draws, uniform, ALL)
    drafted = fast.row_decoder.sample(request, (together, 0, 40), levels)
    token, shares = 7, drafted.drawn_from
    for place, (found, chance) in enumerate(
        zip(drafted.tokens, drafted.probabilities, strict=True)
    ):
        logits = fast.head(fast.decode([[token]], alone, [0], [40 + place], levels))[0]
        wanted = sampler.distribution(logits, [])
        torch.testing.assert_close(shares[place], wanted, atol=1e-5, rtol=1e-3)
        token = fast.row_decoder.draw(logits, sampler.draws, uniform[place])
        assert found == token and chance == pytest.approx(float(shares[place][found]))
    assert len(drafted.tokens) == 5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("skips", [False, True])
def test_the_argmax_tokens_are_those_of_the_logits(after_a_prompt: Any) -> None:
    """Of one row and of many, what is left in the cache, and who entered: as step by step."""
    fast, levels, together, alone = after_a_prompt
    for begin, count in ((40, 1), (41, 5), (46, 17)):
        ids = tokens(1, count, seed=begin).tolist()
        before = fast.usage.copy()
        found, states = fast.argmax(ids, together, [0], [begin], levels)
        in_one_call, before = fast.usage.since(before), fast.usage.copy()
        wanted = fast.decode(ids, alone, [0], [begin], levels)
        assert found == [fast.head(wanted).argmax(-1).tolist()] and torch.equal(states, wanted)
        assert fast.usage.since(before) == in_one_call
    for keys, own in zip(together.keys, alone.keys, strict=True):
        assert torch.equal(keys, own)


def test_the_argmax_tokens_of_more_rows_than_a_pass_takes(
    make_tiny: Callable[..., Path],
) -> None:
    """Rows of several texts, unequally many of each."""
    _, fast, levels = pair(loaded(make_tiny("llama")), "project")
    together, alone = fast.new_cache(5, 64), fast.new_cache(5, 64)
    for cache in (together, alone):
        fast.forward(tokens(5, 8), cache, [0] * 5)
    ids = [tokens(1, 11 + 3 * row, seed=row)[0].tolist() for row in range(5)]
    rows, starts = [3, 0, 4, 1, 2], [8, 5, 8, 7, 8]
    found, _ = fast.argmax(ids, together, rows, starts, levels)
    logits = fast.head(fast.decode(ids, alone, rows, starts, levels))
    wanted = [part.argmax(-1).tolist() for part in logits.split([len(own) for own in ids])]
    assert found == wanted and sum(map(len, found)) == 85


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("skips", [False, True])
def test_a_continuation_is_its_steps(after_a_prompt: Any) -> None:
    """Greedy tokens of one call, what it leaves in the cache, and who entered: as one by one."""
    fast, levels, together, alone = after_a_prompt
    before, found = fast.usage.copy(), []
    request = SampleRequest(7, 9, on_token=lambda x: found.append(x) or x < 0)
    fast.sample(request, (together, 0, 40), levels)
    in_one_call, before = fast.usage.since(before), fast.usage.copy()
    wanted = [7]
    for place in range(9):
        states = fast.decode([[wanted[-1]]], alone, [0], [40 + place], levels)
        wanted.append(int(fast.head(states)[0].argmax()))
    assert found == wanted[1:] and in_one_call == fast.usage.since(before)
    assert torch.equal(*(fast.decode([[5]], each, [0], [49]) for each in (together, alone)))


def test_a_continuation_ends_where_it_is_told_to(make_tiny: Callable[..., Path]) -> None:
    """By an answer or by an exception, which comes through; the next call goes on."""
    fast = SkippingModel(loaded(make_tiny("llama")), None, "project", "native")
    cache, found = fast.new_cache(1, 64), list[int]()
    fast.forward(tokens(1, 40), cache, [0])

    def third(token: int) -> bool:
        found.append(token)
        if len(found) == 5:
            raise KeyboardInterrupt
        return len(found) == 3

    fast.sample(SampleRequest(7, 9, on_token=third), (cache, 0, 40), None)
    assert len(found) == 3
    with pytest.raises(KeyboardInterrupt):
        fast.sample(SampleRequest(found[-1], 9, on_token=third), (cache, 0, 43), None)
    assert len(found) == 5 and fast.usage.ungated == 40 + 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_are_the_same_bits_together_and_alone(
    make_tiny: Callable[..., Path], family: str, threads: int
) -> None:
    """A verify pass, and a batch, give what decoding one by one gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _, fast, levels = pair(loaded(make_tiny(family)), "project")
        ids = tokens(1, 30)
        together, alone = fast.new_cache(1, 64), fast.new_cache(1, 64)
        for cache in (together, alone):
            fast.forward(ids[:, :20], cache, [0], levels)
        verified = fast.decode(ids[:, 20:].tolist(), together, [0], [20])
        steps = [fast.decode(ids[:, i : i + 1].tolist(), alone, [0], [i]) for i in range(20, 30)]
        assert torch.equal(verified, torch.cat(steps))
        assert torch.equal(fast.head(verified)[3:4], fast.head(steps[3]))
    finally:
        torch.set_num_threads(before)


FORMS = ["codes", "shifted", "book", "bytes", "shifted bytes"]


@pytest.mark.parametrize(
    ("family", "form"),
    [
        *(("llama", form) for form in FORMS),
        *((family, "shifted") for family in FAMILIES if family != "llama"),
    ],
)
@pytest.mark.parametrize("rounded", [False, True])
def test_packed_weights(
    make_tiny: Callable[..., Path], family: str, form: str, rounded: bool
) -> None:
    """Exact without rounding, and within the error of 8 bits with it."""
    model = loaded(make_tiny(family))
    generator = torch.Generator().manual_seed(0)
    for layer in backbone(model).layers:
        for part in layer.children():
            for name, linear in list(part.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    setattr(part, name, packed(linear, form, generator))
    plain, fast = SkippingModel(model), SkippingModel(model, None, "project", "native", rounded)
    caches = plain.new_cache(1, 40), fast.new_cache(1, 40)
    for each, cache in zip((plain, fast), caches, strict=True):
        each.forward(tokens(1, 20), cache, [0])
    following = tokens(1, 12, 5).tolist()
    wanted = plain.decode(following, caches[0], [0], [20])
    found = fast.decode(following, caches[1], [0], [20])
    error = float((found - wanted).norm() / wanted.norm())
    assert error < (0.06 if rounded else 1e-5)
    logits = fast.head(found), plain.head(found)
    assert float((logits[0] - logits[1]).norm() / logits[1].norm()) < (0.06 if rounded else 1e-5)
    assert torch.equal(fast.decode([following[0][:1]], caches[1], [0], [20]), found[:1])


@pytest.mark.parametrize("family", FAMILIES)
def test_folders_of_integers_run(
    make_tiny: Callable[..., Path], grid_folder: Callable[..., Path], family: str
) -> None:
    """As the stage `int8` writes them, the embedding among it: near the dense model."""
    some = (
        {"embedding": None} if family == "gpt_neox" else {}
    )  # whose file calls its head otherwise
    folder, ids = grid_folder(make_tiny(family), "int8", **some), tokens(1, 40)
    decoder = gateskip.load(folder, backend="native")
    cache = decoder.skipping.new_cache(1, 40)
    decoder.skipping.forward(ids[:, :20], cache, [0])
    found = decoder.skipping.head(decoder.skipping.decode(ids[:, 20:].tolist(), cache, [0], [20]))
    wanted = load_model(make_tiny(family), "float32")(ids).logits[0, 20:]
    assert float((found - wanted).norm() / wanted.norm()) < 0.1


def packed(linear: torch.nn.Linear, form: str, generator: torch.Generator) -> PackedLinear:
    """Random weights of 4 or 8 bits, of a layer's shape and about its size."""
    n, k = linear.weight.shape
    bits = 8 if form.endswith("bytes") else 4
    codes = torch.randint(1, 2**bits, (n, k), generator=generator)
    scale = torch.rand(n, k // 32, generator=generator) + 0.5
    scale = scale * linear.weight.std() / 5 / 2 ** (bits - 4)
    shift = torch.randn(n, k // 32, generator=generator) * linear.weight.std() / 5
    book = torch.linspace(-5, 5, 16) if form == "book" else None
    offset = shift if "shifted" in form else None
    return PackedLinear(codes, scale, offset, book, linear.bias, bits)


def test_what_it_cannot_run_stays_in_torch(make_tiny: Callable[..., Path]) -> None:
    odd = make_tiny("llama", hidden_act="relu")
    with pytest.raises(UnsupportedModel, match="the activation relu has no native kernel"):
        Engine(load_model(odd, "float32"), None)
    llama = load_model(make_tiny("llama"), "float32")
    gates = make_gates("vector", len(find_branches(llama)), 64)
    with pytest.raises(UnsupportedModel, match="scalar gates"):
        Engine(llama, gates)
    with pytest.raises(UnsupportedModel, match="float16"):
        Engine(load_model(make_tiny("llama"), "float16"), None)
    with pytest.warns(UserWarning, match="decodes in torch, slower: the activation relu"):
        decoder = gateskip.load(odd)
    assert decoder.backend == "gathered" and "relu" in str(decoder.fallback)
    assert gateskip.load(make_tiny("llama")).backend == "native"
    with pytest.raises(UnsupportedModel, match="relu"):
        gateskip.load(odd, backend="native")
    for name in ("gathered", "reference"):
        assert gateskip.load(make_tiny("llama"), backend=name).backend == name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("skips", [False, True])
def test_bfloat16_weights_and_cache(
    make_tiny: Callable[..., Path], family: str, skips: bool
) -> None:
    """Nearer to float32 than torch's own bfloat16 is, and each row the same bits beside others."""
    exact, _, some = pair(loaded(make_tiny(family)), "project")
    rough, fast, _ = pair(loaded(make_tiny(family), "bfloat16"), "project")
    whole = [NEVER_SKIP if i % 3 else math.inf for i in range(len(some))]  # without near ties
    levels, ids, following = whole if skips else None, tokens(1, 30), tokens(1, 12, 1)
    found = []
    for each in (exact, rough, fast):
        cache = each.new_cache(1, 64)
        each.forward(ids, cache, [0])
        found.append(each.decode(following.tolist(), cache, [0], [30], levels).float())
    size = found[0].norm()
    assert float((found[2] - found[0]).norm() / size) < 0.05
    assert (found[2] - found[0]).norm() <= 1.1 * (found[1] - found[0]).norm()
    alone = fast.new_cache(1, 64)
    fast.forward(ids, alone, [0])
    ids = following[0].tolist()
    steps = [fast.decode([[ids[i]]], alone, [0], [30 + i], levels) for i in range(12)]
    assert torch.equal(found[2], torch.cat(steps))
    assert torch.equal(fast.head(found[2])[3:4], fast.head(steps[3]))
