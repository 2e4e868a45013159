"""The text of answers: whole characters, stop strings that are held back, bytes of tokens."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from compose.serve.api.text import AnswerText
from compose.serve.api.token_bytes import TokenBytes

WRITTEN = "  Grüße aus München 😀, 日本語 und\n\n    vier Leerzeichen. "


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def pieces_of(tokenizer: Any, tokens: list[int], stops: tuple[str, ...] = (), **how: bool) -> Any:
    """The pieces, the last one by `finish`, and the text."""
    text = AnswerText(tokenizer, stops, strip=how.get("strip", False))
    return [*(text.add(token) for token in tokens), text.finish()], text


def test_pieces_are_whole_characters(tokenizer: Any) -> None:
    tokens = tokenizer(WRITTEN).input_ids
    pieces, _ = pieces_of(tokenizer, tokens)
    assert "".join(pieces) == WRITTEN and len([p for p in pieces if p]) > 20
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "".join(pieces_of(tokenizer, tokens, strip=True)[0]) == WRITTEN.strip()


def test_the_beginning_of_a_stop_string_is_held_back(tokenizer: Any) -> None:
    tokens = [tokenizer(letter).input_ids[0] for letter in "abcabd"]
    pieces, text = pieces_of(tokenizer, tokens, ("abd", "zz"))
    assert pieces == ["", "", "abc", "", "", "", ""] and text.stopped
    assert pieces_of(tokenizer, tokens[:5], ("abd",))[0] == ["", "", "abc", "", "", "ab"]


def test_any_stop_strings_end_any_text(tokenizer: Any) -> None:
    draw = random.Random(0)
    for _ in range(300):
        tokens = [draw.choice(tokenizer("aab ba").input_ids) for _ in range(draw.randrange(30))]
        whole = tokenizer.decode(tokens)
        stops = tuple(
            "".join(draw.choices("ab ", k=draw.randrange(1, 5))) for _ in range(draw.randrange(3))
        )
        ends = [at for stop in stops if (at := whole.find(stop)) >= 0]
        wanted = whole[: min(ends, default=len(whole))]
        for strip in (False, True):
            pieces, text = pieces_of(tokenizer, tokens, stops, strip=strip)
            assert "".join(pieces) == (wanted.strip() if strip else wanted), (whole, stops)
            assert text.stopped == bool(ends)


def test_bytes_of_tokens_are_those_of_the_text(tokenizer: Any) -> None:
    token_bytes = TokenBytes(tokenizer)
    tokens = tokenizer(WRITTEN).input_ids
    assert b"".join(map(token_bytes, tokens)) == WRITTEN.encode()
    end = tokenizer.eos_token_id
    assert (token_bytes(end), token_bytes.shown(end)) == (b"", tokenizer.eos_token)
