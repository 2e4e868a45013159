"""Another model drafts: the text stays that of plain decoding, and its cache follows the text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import first_layers, save_gated

import gateskip
from gateskip.decoding import draft_choice
from gateskip.decoding.decoder import Decoder
from gateskip.decoding.draft_cache import DraftCache
from gateskip.decoding.rows import Row
from gateskip.decoding.sampling import Sampler
from gateskip.kernels import ops

native = pytest.mark.skipif(not ops.has_decoder(), reason="no native engine here")
BACKENDS = [pytest.param("native", marks=native), "gathered"]
PROMPTS = [[5, 2, 0, 3, 17, 40], [9], [33, 8, 33, 8, 61]]
BY_MODEL: dict[str, Any] = {"draft_weights": "model", "lookup": False, "draft_length": 4}


@pytest.fixture(scope="module")
def draft(make_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two of the four layers of `tiny_llama`."""
    return first_layers(make_tiny("llama"), tmp_path_factory.mktemp("draft") / "model", 2)


def written(decoder: Decoder, prompts: list[list[int]], new: int = 24, **given: Any) -> Any:
    return decoder.generate(prompts, new, "speculate", **BY_MODEL | given)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lookup", [False, True])
def test_the_text_is_that_of_plain_decoding(
    tiny_llama: Path, draft: Path, backend: Any, dtype: str, lookup: bool
) -> None:
    decoder = gateskip.load(tiny_llama, dtype, backend, draft_model=draft)
    for prompt in PROMPTS:
        for length in (1, 4, "auto"):
            made = written(decoder, [prompt], lookup=lookup, draft_length=length)
            assert made.tokens == decoder.generate([prompt], 24).tokens
            assert made.stats.draft_weights == "model"
            if length != "auto":
                assert made.stats.drafted > made.stats.looked_up


@native
@pytest.mark.parametrize("target", ["int8", "int4"])
@pytest.mark.parametrize("drafts", [None, "int4"])
def test_packed_models(
    tiny_llama: Path, draft: Path, grid_folder: Callable[..., Path], target: str, drafts: str | None
) -> None:
    folder = draft if drafts is None else grid_folder(draft, drafts, group_size=32)
    decoder = gateskip.load(grid_folder(tiny_llama, target, group_size=32), draft_model=folder)
    accepted = 0
    for prompt in PROMPTS:
        made = written(decoder, [prompt])
        assert made.tokens == decoder.generate([prompt], 24).tokens
        accepted += made.stats.accepted
        assert made.stats.accepted < made.stats.drafted
    assert accepted


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_rows_are_drafted_together(tiny_llama: Path, draft: Path, backend: Any) -> None:
    decoder = gateskip.load(tiny_llama, "float32", backend, draft_model=draft)
    made = written(decoder, PROMPTS, lookup=True)
    assert made.tokens == decoder.generate(PROMPTS, 24).tokens
    assert made.stats.drafted > made.stats.looked_up > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("processors", [False, True])
def test_a_model_that_drafts_for_itself_is_always_right(
    tiny_llama: Path, backend: Any, processors: bool
) -> None:
    """Its cache has exactly the text: a token missing or left over would change a draft. With a
    penalty, rounds are not one native call."""
    decoder = gateskip.load(tiny_llama, "float32", backend, draft_model=tiny_llama)
    sampler = Sampler(repetition_penalty=1.1) if processors else Sampler()
    for prompt in PROMPTS:
        for lookup in (False, True):
            plain = decoder.generate([prompt], 40, sampler=sampler).tokens
            made = written(decoder, [prompt], 40, lookup=lookup, sampler=sampler)
            assert made.tokens == plain
            rejected = made.stats.drafted - made.stats.accepted
            assert rejected <= made.stats.looked_up - (made.stats.looked_up > 0)
            if not lookup:
                assert made.stats.acceptance_rate == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_cache_has_what_the_draft_model_itself_would_have(
    tiny_llama: Path, draft: Path, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After rejections, look-ups and plain steps the draft model's keys are those of the text."""
    caches, rows = list[DraftCache](), list[Row]()
    made_by, begun = DraftCache.__init__, Row.__init__

    def keep_cache(self: DraftCache, *args: Any) -> None:
        made_by(self, *args)
        caches.append(self)

    def keep_row(self: Row, *args: Any) -> None:
        begun(self, *args)
        rows.append(self)

    monkeypatch.setattr(DraftCache, "__init__", keep_cache)
    monkeypatch.setattr(Row, "__init__", keep_row)
    decoder = gateskip.load(tiny_llama, "float32", backend, draft_model=draft)
    made = written(decoder, [PROMPTS[2]], 40, lookup=True)
    assert made.stats.looked_up and made.stats.accepted < made.stats.drafted
    (own,), (row,) = caches, rows
    own.catch_up(row)
    fresh = own.model.new_cache(1, 80)
    ids = torch.tensor([row.text[:-1]])
    own.model.forward(ids, fresh, [0])
    for kept, alone in zip(own.cache.keys, fresh.keys, strict=True):  # type: ignore[attr-defined]
        count = len(row.text) - 1
        torch.testing.assert_close(kept[:, :, :count], alone[:, :, :count], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_ends_inside_a_draft(tiny_llama: Path, draft: Path, backend: Any) -> None:
    decoder = gateskip.load(tiny_llama, "float32", backend, draft_model=tiny_llama)
    plain = decoder.generate([PROMPTS[0]], 24).tokens[0]
    for new in range(1, 9):
        assert written(decoder, [PROMPTS[0]], new).tokens[0] == plain[:new]
    for place in range(1, 8):
        end = plain.index(plain[place])
        made = written(decoder, [PROMPTS[0]], eos=[plain[place]])
        assert made.tokens[0] == plain[: end + 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_held_budgets_are_drafted_for(
    tiny_llama: Path, draft: Path, backend: Any, tmp_path: Path
) -> None:
    gated = save_gated(tiny_llama, tmp_path / "gated", (0.5, 0.6, 0.7, 0.8))
    decoder = gateskip.load(gated, "float32", backend, draft_model=draft)
    budget = 0.6
    for hold in (False, True):
        skip = {"budget": budget, "hold": hold}
        plain = decoder.generate([PROMPTS[0]], 24, "skip", **skip).tokens  # type: ignore[arg-type]
        made = written(decoder, [PROMPTS[0]], verify_budget=budget, hold=hold)
        assert made.tokens == plain and made.stats.drafted


def test_a_text_that_does_not_fit_the_draft_model_is_refused(
    tiny_llama: Path, draft: Path, tmp_path: Path
) -> None:
    short = shutil.copytree(draft, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 48}))
    decoder = gateskip.load(tiny_llama, draft_model=short)
    assert written(decoder, [[5, 2]], 20).tokens == decoder.generate([[5, 2]], 20).tokens
    with pytest.raises(ValueError, match="the draft model: 66 tokens do not fit"):
        written(decoder, [[5, 2]], 48)


def test_another_tokenizer_is_refused(
    tiny_llama: Path, draft: Path, make_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    other = shutil.copytree(draft, tmp_path / "other")
    file = other / "tokenizer.json"
    text = json.loads(file.read_text())
    names = sorted(text["model"]["vocab"], key=text["model"]["vocab"].get)
    first, second = names[100], names[101]
    text["model"]["vocab"] |= {first: 101, second: 100}
    file.write_text(json.dumps(text))
    with pytest.raises(ValueError, match=r"another tokenizer: .* is token 10"):
        gateskip.load(tiny_llama, draft_model=other)
    smaller = make_tiny("llama", vocab_size=384)
    with pytest.raises(ValueError, match=r"another tokenizer: .* no token"):
        gateskip.load(tiny_llama, draft_model=smaller)
    padded = shutil.copytree(smaller, tmp_path / "padded")
    for part in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / part, padded / part)
    with pytest.raises(ValueError, match=r"has 384 embeddings and the model 512"):
        gateskip.load(tiny_llama, draft_model=padded)


def test_a_draft_without_its_model_is_refused(tiny_llama: Path) -> None:
    decoder = gateskip.load(tiny_llama)
    with pytest.raises(ValueError, match="no draft model was loaded"):
        written(decoder, PROMPTS)


def test_a_loaded_draft_model_drafts_unless_told_otherwise(tiny_llama: Path, draft: Path) -> None:
    decoder = gateskip.load(tiny_llama, draft_model=draft)
    given: dict[str, Any] = {"draft_length": 3}
    made = decoder.generate(PROMPTS, 16, "speculate", **given)
    assert made.stats.draft_weights == "model"
    made = decoder.generate(PROMPTS, 16, "speculate", draft_weights="nf4", **given)
    assert made.stats.draft_weights == "nf4"


@native
def test_auto_weighs_it_too(tiny_llama: Path, draft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = gateskip.load(tiny_llama, draft_model=draft)
    asked: list[list[str]] = []

    def measured(question: str, time: Any) -> dict[str, float]:
        names = list(time.args[1])
        asked.append(names)
        return dict.fromkeys(names, 1.5) | {"plain": 1.0, "model": 2.0}

    monkeypatch.setattr(draft_choice.autotune, "choice", measured)
    made = decoder.generate(PROMPTS, 16, "speculate", draft_weights="auto", draft_length=3)
    assert made.stats.draft_weights == "model"
    assert asked[0][0] == "model" and "int4" in asked[0]
