"""A model's own text is reproducible, begins as it should, and stages can learn from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import gateskip
from compose.assets import SELF_WRITTEN, load_texts
from compose.errors import AssetError
from compose.stages.registry import DataSpec, StageJob
from compose.stages.text.split_text import split_blocks
from gateskip.decoding.self_generate import TOGETHER, opening, write


def test_rows_begin_alike_and_differ(make_tiny: Callable[..., Path]) -> None:
    decoder = gateskip.load(make_tiny("llama"))
    first = opening(decoder.tokenizer)
    rows = write(decoder, TOGETHER + 2, len(first) + 12)
    assert rows.shape == (TOGETHER + 2, len(first) + 12)
    assert all(row[: len(first)] == first for row in rows.tolist())
    assert len({tuple(row) for row in rows.tolist()}) > TOGETHER // 2
    assert torch.equal(rows, write(decoder, TOGETHER + 2, len(first) + 12))
    assert not torch.equal(rows, write(decoder, TOGETHER + 2, len(first) + 12, seed=1))
    with pytest.raises(ValueError, match="opening"):
        write(decoder, 1, len(first))


def test_a_chat_model_begins_as_its_user(make_tiny: Callable[..., Path]) -> None:
    tokenizer = gateskip.load(make_tiny("llama")).tokenizer
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "xyz"}], tokenize=False)
    assert tokenizer.decode(opening(tokenizer)) == chat.partition("xyz")[0]
    tokenizer.chat_template = None
    assert opening(tokenizer) == [tokenizer.bos_token_id]


def test_stages_read_it_like_any_text(
    make_tiny: Callable[..., Path], make_job: Callable[..., StageJob], tmp_path: Path
) -> None:
    folder = make_tiny("llama")
    spec = DataSpec(source=SELF_WRITTEN, limit=6, length=40)
    notes: list[str] = []
    job = make_job(
        folder,
        tmp_path / "target",
        train=spec,
        calibration=spec,
        progress=lambda done, total, note: notes.append(note),
    )
    tokenizer = gateskip.load(folder).tokenizer
    train = split_blocks(job, "train", tokenizer)
    assert train.shape == (6, 40) and notes
    notes.clear()
    assert torch.equal(train, split_blocks(job, "train", tokenizer)) and not notes  # kept
    assert not torch.equal(train, split_blocks(job, "calibration", tokenizer))
    assert split_blocks(job, "train", tokenizer, 32, 4).shape == (4, 32)
    with pytest.raises(AssetError, match="written by the model"):
        load_texts(SELF_WRITTEN)
