"""`model.generate` with our decoding inside gives what it gives without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gateskip
from gateskip.decoding.decoder import Decoder


@pytest.fixture(scope="module")
def decoder(tiny_llama: Path) -> Decoder:
    return gateskip.load(tiny_llama)


def ask(decoder: Decoder, rows: list[list[int]], **asked: Any) -> torch.Tensor:
    """Rows of token ids, padded on the left, through transformers' own `generate`."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    model = decoder.skipping.model
    found: torch.Tensor = model.generate(
        ids, attention_mask=mask, max_new_tokens=16, pad_token_id=0, **asked
    )
    return found


ROWS = [[5, 9, 200, 31], [17, 4], [88, 12, 90]]
HOOKS: dict[str, dict[str, Any]] = {
    "plain": {"mode": "plain"},
    "nf4": {"draft_budget": 1.0, "draft_weights": "nf4", "draft_length": 4},
    "int4": {"draft_budget": 1.0, "draft_weights": "int4"},
    "lookup": {"draft_weights": "own", "draft_length": 4},
}


@pytest.mark.parametrize("kind", HOOKS)
def test_greedy_text_is_the_same(decoder: Decoder, kind: str) -> None:
    ours = gateskip.custom_generate(decoder, **HOOKS[kind])
    settings = {"do_sample": False, "repetition_penalty": 1.3}
    for row in ROWS:
        theirs = ask(decoder, [row], **settings)
        assert torch.equal(ask(decoder, [row], custom_generate=ours, **settings), theirs)
    assert torch.equal(
        ask(decoder, ROWS, custom_generate=ours, **settings), ask(decoder, ROWS, **settings)
    )


def test_the_global_seed_decides_what_is_drawn(decoder: Decoder) -> None:
    ours = gateskip.custom_generate(decoder, **HOOKS["nf4"])

    def text(seed: int) -> list[int]:
        torch.manual_seed(seed)
        found = ask(decoder, ROWS[:1], custom_generate=ours, do_sample=True, top_k=30)
        return found[0].tolist()

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_stopping_criteria_and_streamers_are_heard(decoder: Decoder) -> None:
    class Listener:
        def __init__(self) -> None:
            self.heard: list[int] = []
            self.ended = False

        def put(self, tokens: torch.Tensor) -> None:
            self.heard += tokens.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    def enough(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([ids.shape[1] >= 9])

    listener = Listener()
    found = ask(
        decoder,
        ROWS[:1],
        custom_generate=gateskip.custom_generate(decoder, streamer=listener, **HOOKS["lookup"]),
        stopping_criteria=[enough],
        do_sample=False,
    )
    assert found.shape[1] == 9
    assert listener.heard == found[0].tolist() and listener.ended


def test_beams_are_refused(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match="num_beams"):
        ask(decoder, ROWS[:1], custom_generate=gateskip.custom_generate(decoder), num_beams=2)
