"""Packed models drafted for by copies of themselves in fewer bits: the text stays their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gateskip
from compose.artifacts.folder import copy_companions
from compose.bench.quality.lossless import check_lossless
from compose.bench.speed.measure import held_bytes
from compose.stages.registry import STAGES, DataSpec, StageJob
from gateskip.decoding import decoder as decoder_module
from gateskip.decoding import draft_choice
from gateskip.decoding.decoder import Decoder
from gateskip.decoding.draft_choice import PLAIN
from gateskip.decoding.draft_models import candidates, draft_copies
from gateskip.decoding.own_text import fingerprint
from gateskip.kernels import autotune
from gateskip.quantization.dequantize import dense_weight, linear_layers, stored_bits
from gateskip.quantization.draft_copy import COPIES, integer_copy, nf4_copy, read_text
from gateskip.quantization.folders import load_model
from gateskip.quantization.packed_linear import PackedLinear
from gateskip.runtime.skipping import SkippingModel

FORMATS: dict[str, dict[str, Any]] = {
    "int8": {"use": "bnb", "format": "int8"},
    "gptq8": {"use": "gptq", "bits": 8, "group_size": 32},
    "nf4": {"use": "bnb", "format": "nf4"},
    "gptq4": {"use": "gptq", "bits": 4, "group_size": 32, "sym": False},
}
GRIDS: dict[str, dict[str, Any]] = {
    "grid8": {"use": "int8", "compensate": False},
    "grid4": {"use": "int4", "compensate": False},
}
BITS = {"int8": 8, "gptq8": 8, "nf4": 4, "gptq4": 4}
Pack = Callable[[str], Path]


@pytest.fixture(autouse=True)
def our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopwatch beside other work would now and then choose the libraries' layers."""
    monkeypatch.setattr(autotune, "own_are_faster", lambda times: False)


@pytest.fixture(scope="module")
def pack(
    make_tiny: Callable[..., Path],
    make_job: Callable[..., StageJob],
    licence_text: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Pack:
    """`pack("int8")`: the folder of a tiny Llama in that format, made once."""
    source, made = make_tiny("llama"), dict[str, Path]()

    def make(name: str) -> Path:
        if name not in made:
            target = tmp_path_factory.mktemp(name) / "model"
            target.mkdir()
            spec = DataSpec(source=str(licence_text), limit=8, length=64)
            settings = (FORMATS | GRIDS)[name]
            stage = STAGES[settings["use"]].model_validate(settings)
            stage.run(make_job(source, target, calibration=spec))
            copy_companions(source, target)
            made[name] = target
        return made[name]

    return make


def prompts(count: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 512, (9,), generator=generator).tolist() for _ in range(count)]


def by_columns(layer: Any) -> Tensor:
    """What a layer multiplies with, asked of the layer itself: its answers to unit vectors."""
    with torch.no_grad():
        answers = layer(torch.eye(layer.in_features)).float()
    return answers.T if layer.bias is None else (answers - layer.bias).T


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_what_the_layers_multiply_with(pack: Pack, name: str) -> None:
    """As the library's own layers hold them, and once they are packed for our kernels."""
    theirs, ours = load_model(pack(name), "float32"), gateskip.load(pack(name)).skipping.model
    pairs = list(zip(linear_layers(theirs), linear_layers(ours), strict=True))
    assert len(pairs) == 7 * 4
    for own, packed in pairs[:7]:
        assert isinstance(packed, PackedLinear) and not isinstance(own, PackedLinear)
        assert stored_bits(own) == stored_bits(packed) == BITS[name]
        wanted = dense_weight(packed)
        size = float(wanted.abs().max())
        torch.testing.assert_close(dense_weight(own), wanted, atol=1e-3 * size, rtol=0)
        # int8 layers round their inputs, too, and GPTQ's multiply in bfloat16
        torch.testing.assert_close(by_columns(own), wanted, atol=0.02 * size, rtol=0)


COPIED = [("int8", "int4"), ("gptq8", "int4"), ("int8", "nf4")]


@pytest.mark.parametrize(("name", "weights"), COPIED)
def test_a_copy_has_fewer_bits_and_the_same_rest(pack: Pack, name: str, weights: str) -> None:
    model = gateskip.load(pack(name)).skipping.model
    if weights == "nf4":
        copied = nf4_copy(model)
    else:
        copied = integer_copy(model, read_text(model, torch.tensor(prompts())), COPIES[weights])
    before, after = linear_layers(model), linear_layers(copied)
    assert {stored_bits(layer) for layer in after} == {4}
    assert {stored_bits(layer) for layer in before} == {8}, "the model stays what it was"
    assert copied.get_input_embeddings().weight is model.get_input_embeddings().weight
    for own, layer in zip(before, after, strict=True):
        wanted, found = dense_weight(own), dense_weight(layer)
        assert 0 < (found - wanted).norm() < 0.12 * wanted.norm()


def test_layers_that_a_copy_would_not_make_smaller_are_shared(pack: Pack) -> None:
    """Half of the layers have 4 bits already."""
    model = gateskip.load(pack("gptq8")).skipping.model
    small = nf4_copy(model)
    for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        model.set_submodule(f"model.layers.1.{name}", small.get_submodule(f"model.layers.1.{name}"))
    mixed = linear_layers(model)
    copied = linear_layers(nf4_copy(model))
    for own, layer in zip(mixed, copied, strict=True):
        assert stored_bits(layer) == 4
        assert (layer.codes is own.codes) == (stored_bits(own) == 4)


@pytest.mark.parametrize("name", ["nf4", "gptq4"])
def test_no_copy_of_four_bits_in_four_bits(pack: Pack, name: str) -> None:
    decoder = gateskip.load(pack(name))
    for weights in ("int4", "nf4"):
        with pytest.raises(ValueError, match="no weight of this model"):
            decoder.drafter(weights)  # type: ignore[arg-type]
    assert "int4" not in draft_copies(decoder.skipping)


def test_values_in_more_bits_make_no_draft_of_equal_bits(pack: Pack) -> None:
    """A copy in 4 bits of a grid in 4 bits would make its value projections smaller alone."""
    decoder = gateskip.load(pack("grid4"))
    assert {stored_bits(layer) for layer in linear_layers(decoder.skipping.model)} == {4, 8}
    assert "int4" not in draft_copies(decoder.skipping)
    assert {"int3", "int2"} <= set(draft_copies(decoder.skipping))


DRAFTS = [
    *(("grid8", each) for each in ("int4", "int3")),
    ("grid4", "int3"),
    *(("int8", each) for each in ("int4", "int3", "nf4", "int4-head")),
    *(("gptq8", each) for each in ("int4", "int2")),
    *((name, each) for name in ("nf4", "gptq4") for each in ("int3", "int2", "int4-head")),
]


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("length", [3, "auto"])
@pytest.mark.parametrize(("name", "weights"), DRAFTS)
def test_drafts_change_no_token(
    pack: Pack, name: str, weights: Any, length: Any, rounded: bool
) -> None:
    """In a batch, one by one, and with look-up; activations in float32 or rounded to 8 bits."""
    decoder = gateskip.load(pack(name), "float32", backend="native", rounded=rounded)
    rows = [*prompts(), [5, 6, 7, 8, 9] * 5]
    plain = decoder.generate(rows, 24).tokens
    settings: Any = {"draft_budget": 1.0, "draft_weights": weights, "draft_length": length}
    for lookup in (False, True):
        own = decoder.generate(rows, 24, "speculate", lookup=lookup, **settings)
        assert own.tokens == plain
        assert own.stats.draft_weights == weights
        if length == 3:
            assert own.stats.drafted > own.stats.accepted > 0 or own.stats.acceptance_rate == 1
    alone = [decoder.generate([row], 24, "speculate", **settings).tokens[0] for row in rows]
    assert alone == plain


@pytest.mark.parametrize(("name", "weights"), [("int8", "int4"), ("gptq4", "int2")])
def test_the_check_of_a_run_finds_them_lossless(pack: Pack, name: str, weights: str) -> None:
    decoder = gateskip.load(pack(name))
    settings = {"draft_budget": 1.0, "draft_weights": weights, "draft_length": "auto"}
    found = check_lossless(decoder, {**settings, "target": "gated"}, prompts(), 24)
    assert found["lossless"] and found["acceptance_rate"] > 0
    assert found["forced_draft_length_histogram"].get(3, 0) > 10


def test_a_wrong_verifier_of_a_packed_model_is_noticed(
    pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = gateskip.load(pack("nf4"), "float32")
    settings: Any = {"draft_weights": "int2", "draft_length": 4, "lookup": False}
    plain = decoder.generate(prompts(), 32).tokens
    monkeypatch.setattr(
        "gateskip.decoding.speculation.accept_or_resample",
        lambda draft, drawn, wanted, generator: (len(draft), list(wanted)[-1]),
    )
    assert decoder.generate(prompts(), 32, "speculate", **settings).tokens != plain


# -- the fastest draft ------------------------------------------------------------------------

AUTO: dict[str, Any] = {"draft_budget": 1.0, "draft_weights": "auto"}


def answers(monkeypatch: pytest.MonkeyPatch, found: dict[str, float]) -> None:
    """Measurements come out as `found`, times as fast as plain decoding by name."""
    monkeypatch.setattr(draft_choice, "speeds", lambda decoder, names, budget: found)


@pytest.fixture
def dense(tiny_llama: Path) -> Decoder:
    return gateskip.load(tiny_llama)


def test_the_fastest_draft_is_measured_once_and_remembered(
    dense: Decoder, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = dense.generate(prompts(), 12).tokens
    own = dense.generate(prompts(), 12, "speculate", lookup=False, **AUTO)
    assert own.tokens == plain
    ((question, found),) = (
        each for each in autotune.choices().items() if each[0].startswith("times as fast")
    )
    assert set(found) == {PLAIN, *candidates(dense.skipping)} and min(found.values()) > 0
    assert autotune.made()[question] == found, "it is in the record of the run"
    chosen, pays = dense.fastest_draft()
    assert own.stats.draft_weights == (chosen if pays else "none")
    drafting = {chosen} if pays else set()
    assert set(dense._drafters) == {"own", *drafting}, "others are dropped"

    def again(*_: object) -> dict[str, float]:
        raise AssertionError("it was measured before")

    monkeypatch.setattr(draft_choice, "speeds", again)
    assert gateskip.load(tiny_llama).fastest_draft() == (chosen, pays)


@pytest.mark.parametrize("lookup", [False, True])
def test_where_no_draft_is_faster_nothing_is_drafted(
    dense: Decoder, monkeypatch: pytest.MonkeyPatch, lookup: bool
) -> None:
    answers(monkeypatch, {PLAIN: 1.0, "int4": 1.02, "int3": 0.9})
    rows = [[5, 6, 7, 8, 9] * 5]
    own = dense.generate(rows, 24, "speculate", lookup=lookup, **AUTO)
    assert own.tokens == dense.generate(rows, 24).tokens
    assert own.stats.draft_weights == "none" and own.stats.drafted == own.stats.looked_up
    assert lookup or own.stats.draft_lengths == {0: 23}
    assert set(dense._drafters) == {"own"}, "no copy is made"
    forced = dense.generate(rows, 24, "speculate", draft_length=3, **AUTO)
    assert forced.stats.draft_weights == "int4" and forced.stats.drafted > 0


def test_the_models_own_text_is_stored_and_read_again(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = gateskip.load(tiny_llama).drafter("int4")
    (file,) = autotune.stored_beside("x").parent.glob("own-text-*")

    def codes(drafter: SkippingModel) -> list[torch.Tensor]:
        return [part.codes for part in drafter.model.modules() if isinstance(part, PackedLinear)]

    def write(*_: object) -> torch.Tensor:
        raise AssertionError("the text is stored")

    with monkeypatch.context() as patch:
        patch.setattr(decoder_module, "write", write)
        again = gateskip.load(tiny_llama).drafter("int4")
    assert all(map(torch.equal, codes(first), codes(again))) and codes(first)
    file.write_bytes(file.read_bytes()[:-8])
    damaged = gateskip.load(tiny_llama).drafter("int4")
    assert all(map(torch.equal, codes(first), codes(damaged)))


def test_a_choice_for_other_threads_leaves_no_copy_behind(
    dense: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, {PLAIN: 1.0, "int4": 1.5, "int3": 1.2})
    dense.prepare_drafts()
    assert set(dense._drafters) == {"own", "int4"}
    dense.forget_draft_costs()
    answers(monkeypatch, {PLAIN: 1.0, "int4": 1.2, "int3": 1.5})
    monkeypatch.setattr(draft_choice.autotune, "choice", lambda question, measure: measure())
    dense.prepare_drafts()
    assert set(dense._drafters) == {"own", "int3"}


def test_another_process_for_a_while_does_not_choose(
    dense: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """int4 is the fastest; a process beside it slows all ways in half of the turns, and the int4
    copy alone in one turn of each prompt."""
    true = {PLAIN: 50.0, "int4": 90.0, "int3": 75.0}
    turns = count()

    def disturbed(decoder: Decoder, ids: list[int], *_: object) -> dict[str, float]:
        turn = next(turns)
        slow = 0.3 if turn // 3 % 2 else 1.0
        own = 0.5 if turn % draft_choice.TURNS else 1.0
        return {name: rate * slow * (own if name == "int4" else 1.0) for name, rate in true.items()}

    monkeypatch.setattr(draft_choice, "_turn", disturbed)
    found = draft_choice.speeds(dense, ["int4", "int3"], 1.0)
    assert found[PLAIN] == 1.0 and draft_choice.best(found) == ("int4", True)


def test_of_two_that_are_equal_the_likelier_is_taken_every_time(
    dense: Decoder, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that was stored comes back in another order."""
    answers(monkeypatch, {PLAIN: 1.0, "int3": 1.2, "int4": 1.2})
    assert candidates(dense.skipping) == ["int4", "int3"]
    for _ in range(2):
        assert gateskip.load(tiny_llama).fastest_draft() == ("int4", True)


def test_what_is_held_counts_what_drafts(pack: Pack) -> None:
    """A copy lies beside the model, and so does the head that ranks its tokens."""
    decoder = gateskip.load(pack("grid8"))
    plain = held_bytes(decoder.tensors())
    decoder.prepare_drafts("int4")
    copied = held_bytes(decoder.tensors())
    packed = decoder.drafter("int4").model.modules()
    codes = sum(part.codes.nbytes for part in packed if isinstance(part, PackedLinear))
    assert plain + codes / 2 < copied < 2 * plain
    decoder.prepare_drafts("int4")
    assert held_bytes(decoder.tensors()) == copied
    assert len(decoder.models()) == 2
    with pytest.raises(ValueError, match="no draft network"):
        decoder.prepare_drafts("learned")


def test_a_draft_that_is_the_model_itself_is_none(dense: Decoder) -> None:
    own = dense.generate(prompts(), 12, "speculate", draft_weights="own", lookup=False)
    assert own.stats.draft_weights == "none" and not own.stats.drafted
    assert own.tokens == dense.generate(prompts(), 12).tokens


def test_choices_differ_with_the_weights_and_the_thresholds(
    dense: Decoder, make_tiny: Callable[..., Path]
) -> None:
    model, other = dense.skipping.model, load_model(make_tiny("llama", seed=1), "float32")
    same = copy.deepcopy(model)
    assert fingerprint(model, None) == fingerprint(same, None)
    known = {fingerprint(model, None), fingerprint(other, None), fingerprint(model, [0.5] * 8)}
    assert len(known) == 3


def test_what_must_not_hang_on_a_stopwatch_takes_the_likeliest_draft(dense: Decoder) -> None:
    with autotune.by_capability():
        assert dense.fastest_draft() == ("int4", True)
    assert not any(each.startswith("times as fast") for each in autotune.choices())


def test_without_kernels_there_is_nothing_to_choose(tiny_llama: Path) -> None:
    decoder = gateskip.load(tiny_llama, backend="gathered")
    assert candidates(decoder.skipping) == [] and decoder.fastest_draft() == (None, False)
    own = decoder.generate(prompts(), 8, "speculate", lookup=False, **AUTO)
    assert own.tokens == decoder.generate(prompts(), 8).tokens and not own.stats.drafted


def test_a_real_model_in_8_bits_is_drafted_for_in_4(
    smollm2: Path, make_job: Callable[..., StageJob], tmp_path: Path
) -> None:
    target = tmp_path / "int8"
    target.mkdir()
    STAGES["bnb"].model_validate(FORMATS["int8"]).run(make_job(smollm2, target, dtype="bfloat16"))
    copy_companions(smollm2, target)
    decoder = gateskip.load(target)
    texts = ["The capital of France is", "Water boils at", "def add(a, b):"]
    rows = [decoder.tokenizer(text).input_ids for text in texts]
    settings: Any = {"draft_weights": "int4", "draft_length": 3, "lookup": False}
    plain = [decoder.generate([row], 32).tokens[0] for row in rows]
    made = [decoder.generate([row], 32, "speculate", **settings) for row in rows]
    assert [each.tokens[0] for each in made] == plain
    drafted = sum(each.stats.drafted for each in made)
    assert sum(each.stats.accepted for each in made) > 0.6 * drafted
