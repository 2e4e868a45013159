"""Decoders share one method, so what holds for one is asked of all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gateskip
from gateskip.budget import calibrate
from gateskip.checkpoint import GateFile, grid_of, load_gates, load_model, save_gates
from gateskip.decode import Decoder, Pace
from gateskip.sampling import accept_greedy
from gateskip.warmstart import warm_start

BUDGETS = (0.8, 0.5)


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma2"])
def folder(
    request: pytest.FixtureRequest,
    make_tiny: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A tiny model with warm-started, calibrated gates."""
    source = make_tiny(request.param)
    target = tmp_path_factory.mktemp("gated") / request.param
    model = load_model(source, "float32")
    blocks = torch.randint(3, 512, (6, 48), generator=torch.Generator().manual_seed(2))
    gates, sensitivity = warm_start(model, blocks)
    grid, kept = grid_of(calibrate(model, gates.requires_grad_(False), blocks, BUDGETS))
    model.save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (target / name).write_bytes((source / name).read_bytes())
    save_gates(target, GateFile(gates, "project", grid, kept, sensitivity))
    return target


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    return gateskip.load(folder)


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    sizes = torch.randint(3, 30, (count,), generator=generator).tolist()
    return [torch.randint(3, 512, (size,), generator=generator).tolist() for size in sizes]


def test_plain_is_transformers_greedy(decoder: Decoder, folder: Path) -> None:
    model = load_model(folder)
    for prompt in prompts(4):
        ids = torch.tensor([prompt])
        theirs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert decoder.generate([prompt], 24).tokens == [theirs[0, len(prompt) :].tolist()]


@pytest.mark.parametrize("length", [1, 3, 8, 16, "auto"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_speculation_is_lossless(decoder: Decoder, length: Any, budget: float) -> None:
    for prompt in prompts(4):
        plain = decoder.generate([prompt], 40)
        own = decoder.generate([prompt], 40, "speculate", draft_budget=budget, draft_length=length)
        assert own.tokens == plain.tokens
        assert own.stats.passes + own.stats.accepted >= 39
        if length != "auto":
            assert own.stats.drafted > 0


def test_a_useless_draft_is_lossless_too(decoder: Decoder) -> None:
    shut = {0.5: [float("inf")] * len(decoder.skipping.branches)}
    useless = Decoder(decoder.skipping, decoder.tokenizer, shut)
    for prompt in prompts(3):
        own = useless.generate([prompt], 32, "speculate", draft_budget=0.5, draft_length=4)
        assert own.tokens == decoder.generate([prompt], 32).tokens
        assert own.stats.acceptance_rate is not None and own.stats.acceptance_rate < 0.5


def test_a_wrong_verifier_is_noticed(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losslessness tests can fail: accepting every draft changes the text."""
    monkeypatch.setattr(
        "gateskip.decode.accept_greedy",
        lambda draft, logits: (len(draft), int(logits[-1].argmax())),
    )
    shut = {0.5: [float("inf")] * len(decoder.skipping.branches)}
    careless = Decoder(decoder.skipping, decoder.tokenizer, shut)
    texts = [
        careless.generate([p], 32, "speculate", draft_budget=0.5, draft_length=4).tokens
        == decoder.generate([p], 32).tokens
        for p in prompts(4)
    ]
    assert not all(texts)


@pytest.mark.parametrize("mode", ["plain", "skip"])
def test_a_batch_gives_each_row_its_own_text(decoder: Decoder, mode: Any) -> None:
    rows = prompts(8)
    together = decoder.generate(rows, 24, mode, budget=0.8).tokens
    assert together == [decoder.generate([row], 24, mode, budget=0.8).tokens[0] for row in rows]


@pytest.mark.parametrize("mode", ["plain", "skip", "speculate"])
def test_an_ending_token_ends_its_row_alone(decoder: Decoder, mode: Any) -> None:
    rows = prompts(3)
    free = decoder.generate(rows, 24, mode, draft_length=3).tokens
    end = free[0][5]
    seen: list[tuple[int, int]] = []
    cut = decoder.generate(
        rows, 24, mode, draft_length=3, eos=[end], on_token=lambda r, t: seen.append((r, t))
    ).tokens
    for row, (whole, short) in enumerate(zip(free, cut, strict=True)):
        expected = whole[: whole.index(end) + 1] if end in whole else whole
        assert short == expected == [token for r, token in seen if r == row]


def test_skipping_really_skips(decoder: Decoder) -> None:
    usage = decoder.skipping.usage
    usage.clear()
    decoder.generate(prompts(1), 24, "skip", budget=0.5)
    saved = decoder.saved(usage, 0.5)
    assert 0.2 < saved.gross < 0.8
    assert saved.model < saved.net < saved.gross


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "at least one token"),
        ({"prompts": [[]]}, "at least one token"),
        ({"prompts": [[5]], "max_new_tokens": 0}, "max_new_tokens"),
        ({"prompts": [[5]], "mode": "speculate", "draft_length": 17}, "draft_length"),
        ({"prompts": [[5]], "mode": "skip", "budget": 0.1}, "lowest is 0.5"),
        ({"prompts": [[5]], "mode": "fast"}, "plain, skip, speculate"),
    ],
)
def test_mistakes_are_named(decoder: Decoder, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder.generate(**arguments)


def test_a_model_without_gates_cannot_skip(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="no gates"):
        gateskip.load(tiny_llama).generate([[5]], 4, "skip")


def test_gates_survive_the_disk(folder: Path, tmp_path: Path) -> None:
    first = load_gates(folder)
    assert first is not None
    save_gates(tmp_path, first)
    second = load_gates(tmp_path)
    assert second is not None and second.grid == first.grid and second.kv_rule == first.kv_rule
    assert torch.equal(second.gates.weight, first.gates.weight)


def test_accept_greedy_counts_the_agreeing_prefix() -> None:
    logits = torch.eye(5)[[1, 2, 3, 4]]  # the target wants 1, 2, 3, then 4
    assert accept_greedy([1, 2, 3], logits) == (3, 4)
    assert accept_greedy([1, 0, 3], logits) == (1, 2)
    assert accept_greedy([], logits[:1]) == (0, 1)


class TestPace:
    """The draft length follows what drafting is measured to cost and to bring."""

    def run(self, draft_s: float, row_s: float, accepts: float, rounds: int = 300) -> list[int]:
        pace, tried, generator = Pace(), [], torch.Generator().manual_seed(0)
        for _ in range(rounds):
            k = pace.draft_length()
            tried.append(k)
            hits = torch.rand(k, generator=generator) < accepts
            accepted = int(hits.long().cumprod(0).sum())
            pace.observe(k, accepted, k * draft_s, 1.0 + k * row_s)
        return tried

    def test_cheap_good_drafts_are_long(self) -> None:
        assert sum(self.run(0.1, 0.02, 0.95)[-50:]) / 50 > 5

    def test_dear_drafts_are_given_up(self) -> None:
        tried = self.run(0.9, 0.3, 0.5)
        assert tried[-50:].count(0) > 40
        assert any(tried[20:]), "speculation is tried again later"

    def test_useless_drafts_are_given_up(self) -> None:
        assert self.run(0.3, 0.02, 0.0)[-50:].count(0) > 40
