"""Phases of skipping and held budgets: in every backend, batch, cut and kind of draft the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gateskip.calibration.budgets import CalibratedBudgets
from gateskip.calibration.fit_shortcuts import fit_shortcuts
from gateskip.calibration.reading import calibrate_prompts, prompt_sensitivity
from gateskip.calibration.thresholds import calibrate
from gateskip.calibration.warm_start import warm_start
from gateskip.checkpoint import grid_of
from gateskip.decoding.decoder import Decoder
from gateskip.decoding.sampling import Sampler
from gateskip.kernels import build
from gateskip.model.compute import kept_share
from gateskip.quantization.folders import load_model
from gateskip.runtime.backend import BACKENDS, BackendName
from gateskip.runtime.budget_control import NARROWEST, block_of
from gateskip.runtime.skipping import SkippingModel

BUDGETS = (0.9, 0.7, 0.5)
NAMES = [name for name in BACKENDS if name != "native" or build.library() is not None]
WAYS: dict[str, dict[str, Any]] = {
    "full prompt": {"prompt": "full"},
    "full answer": {"answer": "full"},
    "held": {"hold": True},
    "held answer": {"prompt": "full", "hold": True},
    "read": {"prompt_budget": 0.5},
    "held, read": {"prompt_budget": 0.6, "hold": True},
}


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(3, 512, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [ids(37, 1), ids(5, 2), ids(18, 3)]


@pytest.fixture(scope="module")
def made(make_tiny: Callable[..., Path]) -> Any:
    """A tiny model, its gates, and thresholds."""
    model = load_model(make_tiny("llama"), "float32")
    blocks = torch.tensor([ids(48, 10 + row) for row in range(6)])
    gates, _ = warm_start(model, blocks)
    gates.shortcuts = fit_shortcuts(model, blocks, 8)
    gates.shortcuts.settle()
    gates.requires_grad_(False)
    grid, _ = grid_of(calibrate(model, gates, blocks, BUDGETS))
    gates.prompt_sensitivity = prompt_sensitivity(model, gates, blocks[:2])
    return model, gates, grid, calibrate_prompts(model, gates, blocks, BUDGETS)


def decoder_of(made: Any, name: BackendName, rule: str = "project") -> Decoder:
    model, gates, grid, prompts = made
    budgets = CalibratedBudgets(grid, prompts=prompts)
    return Decoder(SkippingModel(model, gates, rule, name), None, budgets)


@pytest.fixture(scope="module", params=[name for name in NAMES if name != "reference"])
def decoder(made: Any, request: pytest.FixtureRequest) -> Decoder:
    return decoder_of(made, request.param)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rule", ["project", "copy"])
def test_backends_write_the_same(made: Any, way: str, rule: str) -> None:
    found = []
    for name in NAMES:
        one = decoder_of(made, name, rule)
        written = one.generate(PROMPTS, 14, "skip", 0.5, **WAYS[way])
        found.append((written.tokens, written.usage, one.skipping.usage))
    assert all(each == found[0] for each in found)
    plain = decoder_of(made, "gathered", rule).generate(PROMPTS, 14, "skip", 0.5)
    assert plain.tokens != found[0][0], "it does something"


@pytest.mark.parametrize("way", WAYS)
def test_a_row_is_what_it_is_alone(decoder: Decoder, way: str) -> None:
    together = decoder.generate(PROMPTS, 24, "skip", 0.7, **WAYS[way]).tokens
    alone = [decoder.generate([p], 24, "skip", 0.7, **WAYS[way]).tokens[0] for p in PROMPTS]
    assert together == alone


def test_drawn_tokens_are_the_same_alone(decoder: Decoder) -> None:
    """A row alone is decoded block by block in one call each where the backend can."""
    how: dict[str, Any] = {"sampler": Sampler(temperature=0.9), "seed": 3, "hold": True}
    together = decoder.generate(PROMPTS[:1] * 2, 40, "skip", 0.7, **how).tokens
    alone = decoder.generate(PROMPTS[:1], 40, "skip", 0.7, **how)
    assert together[0] == alone.tokens[0]
    stopped = decoder.generate(PROMPTS[:1], 40, "skip", 0.7, eos=[alone.tokens[0][20]], **how)
    assert stopped.tokens[0] == alone.tokens[0][: len(stopped.tokens[0])]
    assert len(stopped.tokens[0]) <= 21


@pytest.mark.parametrize(
    ("way", "length"), [*zip(WAYS, (1, 5, 16, 7, 4, 6), strict=True), ("held", 3)]
)
def test_drafts_change_nothing(decoder: Decoder, way: str, length: int) -> None:
    """Verified at the budget, whatever is drafted; drafts are rejected, and blocks are crossed."""
    wanted = decoder.generate(PROMPTS, 36, "skip", 0.7, **WAYS[way]).tokens
    how: dict[str, Any] = {"draft_length": length, "verify_budget": 0.7, **WAYS[way]}
    how |= {"draft_weights": "own", "draft_budget": 0.5, "lookup": False}
    found = decoder.generate(PROMPTS, 36, "speculate", **how)
    assert found.tokens == wanted
    assert 0 < found.stats.accepted < found.stats.drafted


def test_compute_of_each_phase(decoder: Decoder) -> None:
    def kept(**settings: Any) -> list[float]:
        used = decoder.generate(PROMPTS, 24, "skip", 0.5, **settings).usage
        return [kept_share(decoder.skipping.model, used[phase]) for phase in ("prompt", "answer")]

    for settings, whole in (
        ({"prompt": "full"}, 0),
        ({"answer": "full"}, 1),
        ({"prompt_budget": 1.0}, 0),
    ):
        shares = kept(**settings)
        assert shares[whole] == pytest.approx(1, abs=1e-12) and shares[1 - whole] < 0.7
    assert max(kept()) < 0.7
    assert kept(prompt_budget=0.9)[0] > kept(prompt_budget=0.5)[0]


def test_what_answers_are_predicted_from_is_computed_as_they_are(decoder: Decoder) -> None:
    """The last token of a prompt: in its pass where answers are at full compute, else in theirs."""
    rows, count = len(PROMPTS), sum(map(len, PROMPTS))
    used = decoder.generate(PROMPTS, 24, "plain", prompt_budget=0.5).usage
    assert used["prompt"].seen == count
    assert min(used["prompt"].kept) >= 2 * rows  # the first and the last
    assert used["answer"].seen == used["answer"].ungated == 23 * rows
    used = decoder.generate(PROMPTS, 24, "skip", 0.7, prompt_budget=0.5).usage
    assert used["prompt"].seen == count - rows
    one = [[5]]  # which is only its last token
    wanted = decoder.generate(one, 12).tokens
    assert decoder.generate(one, 12, prompt_budget=0.5).tokens == wanted


@pytest.mark.parametrize("columns", [64, 7])
def test_tokens_at_full_compute_within_a_prompt(decoder: Decoder, columns: int) -> None:
    """As if these came after the prompt; in one pass, and in several with an end in each."""
    phases, skipping = decoder.phases(1.0, prompt_budget=0.5), decoder.skipping
    lengths = [len(row) for row in PROMPTS]
    full_from = [length - 3 for length in lengths]
    ids_of = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in PROMPTS], True)
    with torch.inference_mode():
        cache, found = skipping.new_cache(3, 64), []
        for first in range(0, max(lengths), columns):
            part = ids_of[:, first : first + columns]
            own = [min(max(n - first, 0), part.shape[1]) for n in lengths]
            full = [place - first for place in full_from]
            found.append(skipping.forward(part, cache, [first] * 3, phases.prompt, own, full))
        together = torch.cat(found, 1)
        for number, (row, place) in enumerate(zip(PROMPTS, full_from, strict=True)):
            cache = skipping.new_cache(1, 64)
            skipping.forward(torch.tensor([row[:place]]), cache, [0], phases.prompt)
            apart = skipping.decode([row[place:]], cache, [0], [place])
            torch.testing.assert_close(together[number, place : len(row)], apart)


def test_no_prompt_budget_without_thresholds(decoder: Decoder, made: Any) -> None:
    bare = Decoder(decoder.skipping, None, made[2])
    with pytest.raises(ValueError, match="no prompt budgets were calibrated: make the gates again"):
        bare.generate(PROMPTS, 4, prompt_budget=0.5)
    with pytest.raises(ValueError, match="contradict each other"):
        decoder.generate(PROMPTS, 4, prompt="full", prompt_budget=0.5)


def test_full_phases_pay_for_no_gate(decoder: Decoder) -> None:
    usage = decoder.skipping.usage
    usage.clear()
    used = decoder.generate(PROMPTS, 24, "skip", 0.5, prompt="full").usage
    assert used["prompt"].ungated == used["prompt"].seen == sum(map(len, PROMPTS)) - 3
    assert decoder.saved(used["prompt"], 0.5).net == 0 == used["answer"].ungated
    assert usage == used["prompt"].plus(used["answer"])
    both, saved = decoder.saved(usage, 0.5), decoder.saved(used["answer"], 0.5)
    assert 0 < both.net < saved.net


def test_phases_that_cannot_be(decoder: Decoder, made: Any) -> None:
    for settings, message in (
        ({"prompt": "full", "answer": "full"}, "skip nothing"),
        ({"prompt": "half"}, "prompt 'half': one of budget, full"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.generate(PROMPTS, 4, "skip", 0.7, **settings)
    one = Decoder(decoder.skipping, None, {0.5: made[2][0.5]})
    with pytest.raises(ValueError, match="at least two calibrated budgets"):
        one.generate(PROMPTS, 4, "skip", 0.5, hold=True)


# -- per-row budget control -------------------------------------------------------------------


def states(decoder: Decoder, text: list[int], cuts: list[int], decode_from: int) -> torch.Tensor:
    """Final states [S, H] of a held text that comes in pieces, decoded from a place on."""
    skipping, limits = decoder.skipping, decoder.phases(0.7, hold=True).text
    cache, found = skipping.new_cache(1, len(text)), []
    for start, end in zip((0, *cuts), (*cuts, len(text)), strict=True):
        piece = text[start:end]
        if start >= decode_from:
            found.append(skipping.decode([piece], cache, [0], [start], limits))
        else:
            found.append(skipping.forward(torch.tensor([piece]), cache, [start], limits)[0])
    return torch.cat(found)


@pytest.mark.parametrize(
    ("cuts", "decode_from"), [([7, 33], 33), ([1, 16, 17, 48], 99), (list(range(1, 60)), 0)]
)
def test_cuts_do_not_matter(decoder: Decoder, cuts: list[int], decode_from: int) -> None:
    text = ids(90, 7)
    whole = states(decoder, text, [], 91)
    pieces = states(decoder, text, cuts, decode_from)
    torch.testing.assert_close(pieces, whole, atol=1e-4, rtol=1e-4)


def test_blocks_are_narrow_at_first() -> None:
    blocks = [block_of(position) for position in range(512)]
    found = sorted(set(blocks))
    assert found[:6] == [(0, 16), (16, 16), (32, 32), (64, 64), (128, 64), (192, 64)]
    assert all(first <= at < first + width for at, (first, width) in enumerate(blocks))


def test_rows_that_start_anywhere(decoder: Decoder) -> None:
    """A batch whose rows change block at different times, and whose cache has not a slot more."""
    skipping, limits = decoder.skipping, decoder.phases(0.7, hold=True).text
    texts = [ids(50, 20), ids(50, 21), ids(50, 22)]
    lengths = [50, 9, 31]
    cache = skipping.new_cache(3, 50)
    first = skipping.forward(torch.tensor(texts), cache, [0] * 3, limits, lengths)
    rest = [text[length:] for text, length in zip(texts, lengths, strict=True)]
    second = skipping.decode(rest[1:], cache, [1, 2], lengths[1:], limits)
    parts = dict(zip((1, 2), second.split([len(own) for own in rest[1:]]), strict=True))
    for row, text in enumerate(texts):
        own = torch.cat((first[row, : lengths[row]], *([parts[row]] if row in parts else [])))
        torch.testing.assert_close(own, states(decoder, text, [], 99), atol=1e-4, rtol=1e-4)


def test_a_held_budget_is_kept(decoder: Decoder, made: Any) -> None:
    """Thresholds that keep too little by themselves; held, the share comes to the budget."""
    grid = {b: [t + 0.25 for t in row] for b, row in made[2].items()}
    off = Decoder(decoder.skipping, None, grid)
    text, kept = torch.tensor([ids(400, 5)]), []
    for hold in (False, True):
        decoder.skipping.usage.clear()
        limits = off.phases(0.7, hold=hold).text
        decoder.skipping.forward(text, decoder.skipping.new_cache(1, 400), [0], limits)
        kept.append(off.kept_of(decoder.skipping.usage))
    assert abs(kept[1] - 0.7) < 0.02 < abs(kept[0] - 0.7)


@pytest.mark.parametrize("offset", [-0.3, 0.25])
def test_a_short_text_comes_to_its_budget(decoder: Decoder, made: Any, offset: float) -> None:
    """Within 96 tokens, though thresholds keep too much, or too little, in each block."""
    grid = {b: [t + offset for t in row] for b, row in made[2].items()}
    off, skipping = Decoder(decoder.skipping, None, grid), decoder.skipping
    limits, kept = off.phases(0.7, hold=True).text, []
    for seed in range(6):
        skipping.usage.clear()
        skipping.forward(torch.tensor([ids(96, seed)]), skipping.new_cache(1, 96), [0], limits)
        kept.append(off.kept_of(skipping.usage))
    assert abs(sum(kept) / len(kept) - 0.7) < 0.02


def test_full_compute_makes_up_for_thresholds_that_keep_too_little(
    decoder: Decoder, made: Any
) -> None:
    """Thresholds at which all tokens skip, whatever budget is asked of them."""
    grid = {b: [t + 9 for t in row] for b, row in made[2].items()}
    off, skipping = Decoder(decoder.skipping, None, grid), decoder.skipping
    skipping.usage.clear()
    limits = off.phases(0.7, hold=True).text
    skipping.forward(torch.tensor([ids(400, 5)]), skipping.new_cache(1, 400), [0], limits)
    assert abs(off.kept_of(skipping.usage) - 0.7) < 0.15


def test_the_past_decides_alone(decoder: Decoder) -> None:
    """Later tokens change nothing, and a rejected past is forgotten."""
    skipping, limits = decoder.skipping, decoder.phases(0.7, hold=True).text
    text, other = ids(3 * NARROWEST, 8), ids(2 * NARROWEST, 9)
    cache = skipping.new_cache(1, 3 * NARROWEST)
    skipping.decode([text[:NARROWEST] + other], cache, [0], [0], limits)
    again = skipping.decode([text[NARROWEST:]], cache, [0], [NARROWEST], limits)
    torch.testing.assert_close(
        again, states(decoder, text, [], 99)[NARROWEST:], atol=1e-4, rtol=1e-4
    )
