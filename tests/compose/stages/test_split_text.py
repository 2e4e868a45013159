"""Text of several sources, and text whose prompts the untouched model answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoTokenizer

from compose.assets import load_texts
from compose.assets.quotes import quoted
from compose.assets.sums import LENGTHS, ROWS
from compose.errors import PipelineError
from compose.language.parse import load_pipeline
from compose.outputs.run_folder import learns_from
from compose.planning.prepare import load_plan
from compose.stages.registry import DataSpec, StageJob
from compose.stages.text.split_text import interleaved, split_blocks
from gateskip.decoding import self_generate
from gateskip.decoding.self_generate import opening

Blocks = Callable[..., torch.Tensor]


@pytest.fixture
def blocks(tiny_llama: Path, make_job: Callable[..., StageJob], tmp_path: Path) -> Blocks:
    """`blocks(spec, count)`: the training text of a job on a tiny model."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)

    def make(spec: DataSpec, count: int) -> torch.Tensor:
        job = make_job(tiny_llama, tmp_path / "made", train=spec)
        return split_blocks(job, "train", tokenizer, limit=count)

    return make


def words(folder: Path, name: str, count: int) -> str:
    """A text file of one word over and over."""
    file = folder / f"{name}.txt"
    file.write_text("\n\n".join([name] * count))
    return str(file)


def test_each_source_gives_its_share_from_the_start(
    blocks: Blocks, tiny_llama: Path, tmp_path: Path
) -> None:
    one, other = words(tmp_path, "aa", 400), words(tmp_path, "zz", 400)
    made = blocks(DataSpec(mix={one: 3, other: 1}, limit=400, length=16), 24)
    assert made.shape == (24, 16)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    first = ["a" in tokenizer.decode(row) for row in made.tolist()]
    assert sum(first) == 18 and sum(first[:8]) == 6


def test_a_short_source_is_repeated(blocks: Blocks, tmp_path: Path) -> None:
    one, short = words(tmp_path, "aa", 400), words(tmp_path, "zz", 20)
    made = blocks(DataSpec(mix={one: 1, short: 1}, limit=400, length=16), 20)
    assert len(made) == 20
    assert len(made.unique(dim=0)) < 20


def test_blocks_of_several_sources_keep_their_order() -> None:
    first, second = torch.arange(4).view(4, 1), torch.arange(10, 12).view(2, 1)
    assert interleaved([first, second]).flatten().tolist() == [0, 10, 1, 2, 11, 3]


def test_what_the_model_writes_can_be_mixed_in(blocks: Blocks, tiny_llama: Path) -> None:
    spec = DataSpec(mix={"sums": 1, "self-written": 1}, limit=40, length=48)
    made = blocks(spec, 8)
    first = opening(AutoTokenizer.from_pretrained(tiny_llama))
    assert sum(row[: len(first)] == first for row in made.tolist()) == 4


def test_the_same_text_is_written_once_for_all_stages(
    tiny_llama: Path,
    make_tiny: Callable[..., Path],
    make_job: Callable[..., StageJob],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[int] = []

    def write(decoder: Any, count: int, *rest: Any) -> torch.Tensor:
        written.append(count)
        return self_generate.go_on(decoder, torch.tensor([[1]] * count), *rest)

    monkeypatch.setattr(self_generate, "write", write)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    spec = DataSpec(source="self-written", limit=4, length=24)

    def text(source: Path, step: str, seed: int = 0) -> torch.Tensor:
        target = tmp_path / step / "model"
        job = make_job(source, target, train=spec, seed=seed, asset_cache=tmp_path / "cache")
        return split_blocks(job, "train", tokenizer)

    first = text(tiny_llama, "one")
    assert torch.equal(text(tiny_llama, "two"), first) and written == [4]
    assert not torch.equal(text(tiny_llama, "two", seed=1), first)
    assert not torch.equal(text(make_tiny("llama", seed=1), "three"), first)
    assert written == [4, 4, 4]


def test_prompts_are_followed_by_answers(blocks: Blocks, tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "asked.jsonl"
    rows = [{"prompt": f"question {n}", "response": "given"} for n in range(6)]
    file.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    spec = DataSpec(source=str(file), answered=(str(file),), limit=6, length=32)
    made = blocks(spec, 100)
    text = tokenizer.decode(made.flatten().tolist())
    assert "given" not in text
    assert text.count("question") >= 4
    assert torch.equal(made, blocks(spec, 100))


def test_two_files_of_one_name_are_answered_each(
    blocks: Blocks, tiny_llama: Path, tmp_path: Path
) -> None:
    files = []
    for letter in ("a", "z"):
        (tmp_path / letter).mkdir()
        file = tmp_path / letter / "asked.jsonl"
        file.write_text("\n".join(json.dumps({"prompt": letter * 9}) for _ in range(12)))
        files.append(str(file))
    mix = dict.fromkeys(files, 1)
    made = blocks(DataSpec(mix=mix, answered=tuple(files), limit=12, length=32), 4)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    text = tokenizer.decode(made.flatten().tolist())
    assert "a" * 9 in text and "z" * 9 in text


def test_other_text_is_continued_after_a_quarter(blocks: Blocks, tmp_path: Path) -> None:
    file = words(tmp_path, "aa", 400)
    given = blocks(DataSpec(source=file, limit=400, length=32), 4)
    own = blocks(DataSpec(source=file, answered=(file,), limit=400, length=32), 4)
    assert torch.equal(own[:, :8], given[:, :8])
    assert not torch.equal(own[:, 8:], given[:, 8:])


def test_names_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValidationError, match="source and mix name the text twice"):
        DataSpec(source="sums", mix={"sums": 1})
    with pytest.raises(ValidationError, match="answered: prompts is no source of this text"):
        DataSpec(source="sums", answered=("prompts",))
    with pytest.raises(ValidationError, match="greater than 0"):
        DataSpec(mix={"sums": 0})


FILE = """\
schema: 1
name: mixed
model: {{source: smollm2-135m-instruct}}
data:
  train:
    mix: {{{first}: 2, sums: 1, self-written: 1}}
    answered: [sums]
stages:
  gates: {{use: gate, steps: 4}}
pipelines:
  gated: [gates]
"""


def test_a_file_names_them_and_they_are_part_of_the_keys(tmp_path: Path) -> None:
    words(tmp_path, "mine", 3)
    file = tmp_path / "p.yaml"
    keys = set()
    for first in ("training-text", "./mine.txt"):
        file.write_text(FILE.format(first=first))
        plan = load_plan(file, tmp_path)
        keys.add(plan.steps[-1].key)
        assert ("sums", 2000) in learns_from(plan)
        assert not any(source == "self-written" for source, _ in learns_from(plan))
    file.write_text(FILE.format(first="training-text").replace("answered: [sums]", "answered: []"))
    keys.add(load_plan(file, tmp_path).steps[-1].key)
    assert len(keys) == 3


def test_a_text_that_does_not_exist_is_refused_at_its_line(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(FILE.format(first="traning-text"))
    with pytest.raises(Exception, match="neither a short name nor a file") as caught:
        load_plan(file, tmp_path)
    assert "p.yaml:6" in str(caught.value)
    file.write_text(FILE.format(first="./none.txt"))
    with pytest.raises(PipelineError, match="there is no file"):
        load_pipeline(file)


def test_quotes_are_what_the_passage_says() -> None:
    told = [f"The {n} ship left the old harbour at dawn. It came home with {n} men." for n in "abc"]
    texts = [" ".join([each] * 6) for each in told]
    rows = quoted(texts)
    assert rows == quoted(texts) and len(rows) == 3
    for row, text in zip(rows, texts, strict=True):
        passage, quotes = row.split("\n\n")
        assert passage in text and passage.endswith(".")
        assert all(quote.rpartition(": ")[2] in passage for quote in quotes.splitlines())
    assert 'After "The a ship left the" it says: old harbour at dawn.' in rows[0]
    assert "Found: The b ship left the old harbour at dawn." in rows[1]
    assert "____" in rows[2]


def test_sums_are_right_and_always_the_same() -> None:
    rows = load_texts("sums").rows
    assert len(rows) == ROWS
    assert rows == load_texts("sums").rows
    checked = 0
    for row in rows[:50]:
        for a, sign, b, result in re.findall(r"(\d+) ?([-+*/]) ?(\d+) ?= ?(\d+)", row):
            left, right = int(a), int(b)
            results = {"+": left + right, "-": left - right, "*": left * right}
            results["/"] = left // right if right else 0
            assert results[sign] == int(result)
            checked += 1
    assert checked > 10 * LENGTHS[0]
    scored = re.compile(r"\d+ [-+*/] \d+ = -?\d+\n\n")
    assert not any(scored.search(row) for row in rows), "the scored task's form"
