"""Copies in fewer bits that draft, and drafts made in one call of the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import gateskip
from gateskip.decoding.decoder import Decoder
from gateskip.decoding.draft_length import LEVELS, DraftLengthController, expected_rounds
from gateskip.decoding.draft_models import MAX_DRAFTED, drafted_tokens
from gateskip.decoding.sampling import Sampler
from gateskip.model.inputs import input_squares
from gateskip.quantization import rounding
from gateskip.quantization.draft_copy import (
    COPIES,
    draft_head,
    integer_copy,
    nf4_copy,
    read_text,
)
from gateskip.quantization.offsets import Offset
from gateskip.quantization.packed_linear import PackedLinear
from gateskip.quantization.rounding import GROUP, round_to_grid
from gateskip.runtime.backend import DraftLimit, SampleRequest
from gateskip.runtime.descriptors import TokenHead

ALL = DraftLimit(0.0, [1.0])


@pytest.fixture(scope="module")
def decoder(make_tiny: Callable[..., Path]) -> Decoder:
    return gateskip.load(make_tiny("llama"))


def weights(rows: int = 40, columns: int = 96) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def rounded(weight: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    return PackedLinear.of(round_to_grid(weight, squares)).unpacked()


def test_what_lies_on_a_grid_is_kept() -> None:
    codes = torch.randint(0, 16, (40, 3, GROUP), generator=torch.Generator().manual_seed(1))
    codes[..., 0], codes[..., 1] = 0, 15  # the whole range is used
    weight = (codes * 0.125 - 1.0).flatten(1)
    torch.testing.assert_close(rounded(weight, torch.ones(96)), weight, atol=1e-6, rtol=0)


def test_a_constant_group_survives() -> None:
    weight = torch.full((16, 32), 0.5)
    torch.testing.assert_close(rounded(weight, torch.ones(32)), weight, atol=2e-3, rtol=0)


@pytest.mark.parametrize("offset", ["real", "integer", "none"])
@pytest.mark.parametrize("per_row", [False, True])
def test_rows_are_rounded_alike_however_many_are_taken_at_once(
    per_row: bool, offset: Offset, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, squares = weights(), weights(40 if per_row else 1).square()
    squares = squares if per_row else squares[0]
    whole = round_to_grid(weight, squares, 4, GROUP, offset)
    monkeypatch.setattr(rounding, "AT_ONCE", 7 * 96 + 1)  # seven rows, the last part five
    parts = round_to_grid(weight, squares, 4, GROUP, offset)
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.scale, whole.scale)
    assert torch.equal(parts.weight(), whole.weight())


def test_errors_go_where_inputs_are_small() -> None:
    """With a few large inputs the layer's output is nearer than when all inputs count alike."""
    weight, x = weights(), torch.randn(500, 96, generator=torch.Generator().manual_seed(2))
    x[:, ::16] *= 50
    wanted = F.linear(x, weight)
    errors = [
        float((F.linear(x, rounded(weight, squares)) - wanted).norm())
        for squares in (x.square().mean(0), torch.ones(96))
    ]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("rows", [1, 3, 8, 9])
@pytest.mark.parametrize("n", [16, 40, 7])
def test_tiles_hold_any_number_of_rows(n: int, rows: int) -> None:
    torch.manual_seed(0)
    layer = PackedLinear.of(round_to_grid(weights(n), torch.ones(96)), torch.arange(n).float())
    x = torch.randn(rows, 96)
    with torch.inference_mode():
        wanted = F.linear(x, layer.unpacked(), layer.bias)
        torch.testing.assert_close(layer(x), wanted, atol=1e-4, rtol=1e-5)


def test_a_draft_copy_shares_all_but_its_layers(decoder: Decoder) -> None:
    model = decoder.skipping.model
    blocks = torch.randint(3, 512, (2, 20))
    inputs = read_text(model, blocks)
    for copied in (nf4_copy(model), integer_copy(model, inputs, COPIES["int4"])):
        assert copied.get_input_embeddings().weight is model.get_input_embeddings().weight
        packed = [part for part in copied.modules() if isinstance(part, PackedLinear)]
        assert len(packed) == 7 * len(model.model.layers)
    assert not any(isinstance(part, PackedLinear) for part in model.modules())
    with pytest.raises(ValueError, match="no weight of this model"):
        integer_copy(copied, inputs, COPIES["int4"])


def test_inputs_are_those_of_the_layers(decoder: Decoder) -> None:
    model, blocks = decoder.skipping.model, torch.randint(3, 512, (2, 20))
    seen = []
    down = model.model.layers[1].mlp.down_proj
    hook = down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(blocks)
    hook.remove()
    (found,) = input_squares([down], lambda: model(blocks))
    torch.testing.assert_close(found, seen[0].flatten(0, 1).square().mean(0))


@pytest.mark.parametrize("weights", ["own", "int4", "nf4"])
@pytest.mark.parametrize("exact", [True, False])
def test_a_draft_in_one_call_is_its_steps(decoder: Decoder, weights: str, exact: bool) -> None:
    """The tokens and probabilities of single steps, and none after the draft grows unlikely."""
    drafter = decoder.drafter(weights)  # type: ignore[arg-type]
    assert drafter.engine is not None
    if exact:
        head = draft_head(drafter.model, read_text(drafter.model, torch.randint(3, 512, (2, 20))))
        assert head is not None and decoder.skipping.engine is not None
        drafter.engine.use_draft_head(head, decoder.skipping.engine.head, None)
    else:
        drafter.engine.draft_head = TokenHead(drafter.engine.head)
    prompt, cache = torch.randint(3, 512, (1, 12)), decoder.skipping.new_cache(1, 40)
    decoder.skipping.forward(prompt, cache, [0])
    assert drafter.row_decoder is not None
    drafted = drafter.row_decoder.sample(SampleRequest(9, 6, limit=ALL), (cache, 0, 12), None)
    tokens, chances = drafted.tokens, drafted.probabilities
    last, stepped, seen = 9, [], []
    for slot in range(12, 18):
        hidden = drafter.decode([[last]], cache, [0], [slot])
        logits = (decoder.skipping if exact else drafter).head(hidden)[0]
        last = int(logits.argmax())
        stepped.append(last)
        seen.append(float(logits.softmax(-1)[last]))
    assert tokens == stepped
    assert chances == pytest.approx(seen, abs=0.05 if exact else 1e-4)
    unsure = drafter.row_decoder.sample(
        SampleRequest(9, 6, limit=DraftLimit(0.3, [0.6])), (cache, 0, 12), None
    )
    assert unsure.tokens == stepped[:3]  # 0.6 to the third is less than 0.3


def test_a_head_of_some_tokens_drafts_these(decoder: Decoder) -> None:
    """Each is the one that the model's own head finds the likeliest of them; what is drawn comes
    with probabilities of all tokens."""
    drafter, own = decoder.drafter("int4"), decoder.skipping.engine
    assert own is not None and drafter.engine is not None and drafter.row_decoder is not None
    tokens = torch.arange(4, 512, 3)
    inputs = read_text(drafter.model, torch.randint(3, 512, (2, 20)))
    head = draft_head(drafter.model, inputs, tokens=tokens)
    assert head is not None and head.out_features == len(tokens)
    drafter.engine.use_draft_head(head, own.head, tokens)
    cache = decoder.skipping.new_cache(1, 40)
    decoder.skipping.forward(torch.randint(3, 512, (1, 12)), cache, [0])
    place = (cache, 0, 12)
    drafted = drafter.row_decoder.sample(SampleRequest(9, 6, limit=ALL), place, None)
    last = 9
    for slot, token in zip(range(12, 18), drafted.tokens, strict=True):
        logits = decoder.skipping.head(drafter.decode([[last]], cache, [0], [slot]))[0]
        last = int(tokens[logits[tokens].argmax()])
        assert token == last
    sampler = Sampler(temperature=1.0)
    assert sampler.draws is not None
    request = SampleRequest(9, 2, sampler.draws, [0.3, 0.6], ALL)
    for share in drafter.row_decoder.sample(request, place, None).drawn_from:
        assert isinstance(share, torch.Tensor) and share.shape == (512,)
        assert float(share[tokens].sum()) == pytest.approx(1, abs=1e-5)
        assert float(share.sum()) == pytest.approx(1, abs=1e-5)


def test_the_tokens_that_copies_draft() -> None:
    blocks = torch.tensor([[70000, 5, 70000]])
    assert drafted_tokens(blocks, MAX_DRAFTED) is None
    some = drafted_tokens(blocks, 80000)
    assert some is not None and some.tolist() == [*range(MAX_DRAFTED - 1), 70000]


def test_acceptance_is_learned_by_chance() -> None:
    controller = DraftLengthController()
    for _ in range(200):
        controller.learn([0.95, 0.15, 0.95], 1)
    assert controller.expected(0.99) > 0.95 and controller.expected(0.11) < 0.05
    assert controller.expected(0.55) == DraftLengthController().expected(0.55), (
        "nothing was seen there"
    )


def test_what_drafts_bring_by_hand() -> None:
    """Half of the tokens are sure (0.9), half are not (0.4); a draft goes on above 0.5."""
    shares, rates = [0.5, 0.5], [0.4, 0.9]
    one, two = expected_rounds(shares, rates, 0.5, 2)[1:]
    assert one == pytest.approx((1 + 0.65, 1))
    level = round(0.9 * LEVELS) / LEVELS
    assert two == pytest.approx((1.65 + 0.5 * level * 0.65, 1.5))
    assert expected_rounds(shares, rates, 0.95, 3)[3] == pytest.approx((1.65, 1)), "none goes on"


def test_drafts_that_are_always_accepted_go_on() -> None:
    assert expected_rounds([1.0], [1.0], 0.9, 4) == [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4)]


def test_expectations_agree_with_drafts_that_are_drawn() -> None:
    generator, bins = torch.Generator().manual_seed(0), [0.3, 0.3, 0.4]
    rates, least, longest = [0.5, 0.8, 0.97], 0.6, 4
    tokens = drafted = 0
    for _ in range(20_000):
        likely, count, stands = 1.0, 0, True
        while count < longest:
            which = int(torch.multinomial(torch.tensor(bins), 1, generator=generator))
            count, likely = count + 1, likely * rates[which]
            stands = stands and float(torch.rand((), generator=generator)) < rates[which]
            tokens += stands
            if likely <= least:
                break
        drafted += count
    wanted = (1 + tokens / 20_000, drafted / 20_000)
    assert expected_rounds(bins, rates, least, longest)[longest] == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize(("sure", "longer"), [(0.98, True), (0.55, False)])
def test_sure_drafts_are_longer_at_equal_acceptance(sure: float, longer: bool) -> None:
    """Eight of ten are accepted: all sure ones and few others, or all alike."""
    generator, lengths = torch.Generator().manual_seed(0), []
    controller = DraftLengthController()
    for _ in range(400):
        k = controller.draft_length()
        lengths.append(k)
        draws = torch.rand(k, 2, generator=generator)
        chances = [0.95 if a < 0.8 else 0.15 for a in draws[:, 0].tolist()]
        taken = [
            b < (sure if chance > 0.5 else 0.8 - 0.2 * (sure > 0.9))
            for chance, b in zip(chances, draws[:, 1].tolist(), strict=True)
        ]
        accepted = taken.index(False) if False in taken else k
        controller.learn(chances, accepted)
        controller.observe(k, [accepted] if k else [], 0.35 * k, 1 + 0.1 * k)
    assert (sum(lengths[-100:]) / 100 > 2) == longer
