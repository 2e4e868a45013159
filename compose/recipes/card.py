"""The card of a compressed model: before and after, answers side by side, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from compose.analysis.metrics import METRICS, gain, interval_of, metric_of, task_retained
from compose.analysis.recommend import sentence
from compose.artifacts.folder import has_chat_template
from compose.numbers import PLAIN, metric_text
from compose.recipes.compress import Compressed
from compose.recipes.recipe import gguf_beside, vllm_beside
from compose.results.parts import OwnAnswers
from compose.results.schema import CellResult, Results
from compose.table import Table, text_table

ROWS = ("size", "resident", "decode", "prefill", "perplexity", "kl")
PAIRED = {"decode": "decode-ratio", "prefill": "prefill-ratio"}
"""Metrics whose ratio is measured in pairs: after over before in the same round."""
SHOWN = 3
"""Answers side by side."""


@dataclass(frozen=True)
class SideBySide:
    """One question and two answers."""

    question: str
    before: str
    after: str


@dataclass(frozen=True)
class Card:
    """The parts of the card, for whatever shows them."""

    title: str
    numbers: Table[None]
    sentence: str
    answers: tuple[SideBySide, ...]
    next: tuple[tuple[str, str], ...]
    """Command, and what it does."""


def card_of(done: Compressed) -> Card:
    """The card of a compressed model."""
    results, cell = done.results, done.cell
    return Card(
        f"{results.model}, compressed as {cell.name}, in {done.folder}",
        _numbers(results, cell),
        sentence(results, cell),
        side_by_side(results, cell)[:SHOWN],
        _next(done),
    )


def _numbers(results: Results, cell: CellResult) -> Table[None]:
    """Before, after, and their ratio, of each number that was measured."""
    dense = results.cell(results.baseline)
    lines = []
    for name in ROWS:
        before, after = metric_of(results, name, dense), metric_of(results, name, cell)
        if after is not None:
            shown = [metric_text(name, value) for value in (before, after)]
            lines.append((METRICS[name].title, *shown, _change(results, cell, name)))
    lines += _scores(results, dense, cell)
    return text_table(("", "before", "after", "change"), lines)


def _change(results: Results, cell: CellResult, name: str) -> str:
    """After over before, as tables have it; of the KL, which starts at 0, its interval."""
    ends = interval_of(results, name, cell)
    if name == "kl":
        return "" if ends is None else PLAIN.span(*ends)
    paired = metric_of(results, PAIRED[name], cell) if name in PAIRED else None
    ratio = paired if paired is not None else gain(results, name, cell)
    return "" if ratio is None else PLAIN.times(ratio)


def _scores(
    results: Results, dense: CellResult, cell: CellResult
) -> Iterator[tuple[str, str, str, str]]:
    """The score of each task, with the number of its questions."""
    before = results.tasks(dense)
    for task, score in results.tasks(cell).items():
        values = [before[task].value if task in before else None, score.value]
        ratio = task_retained(results, cell, task)
        change = "" if ratio is None else PLAIN.times(ratio)
        old, new = (PLAIN.percent(value) for value in values)
        yield f"{task}, {score.n} questions", old, new, change


def side_by_side(results: Results, cell: CellResult) -> tuple[SideBySide, ...]:
    """The questions that both were asked, with both answers."""
    before, after = (_answers(results, row) for row in (results.cell(results.baseline), cell))
    if before is None or after is None:
        return ()
    texts = (before.questions or (), before.texts or (), after.texts or ())
    return tuple(SideBySide(*three) for three in zip(*texts, strict=False))


def _answers(results: Results, cell: CellResult) -> OwnAnswers | None:
    quality = results.quality(cell)
    return None if quality is None else quality.own_answers


def _next(done: Compressed) -> tuple[tuple[str, str], ...]:
    """What to do with the folder: commands that work as they stand."""
    folder, run = _word(done.folder), _word(done.run_folder)
    file = _word(done.gguf or gguf_beside(done.folder))
    vllm = _word(done.compressed_tensors or vllm_beside(done.folder))
    export = f"gateskip export {folder} --format"
    return (
        (f"gateskip chat {folder}", "chat with the model")
        if has_chat_template(done.folder)
        else (f'gateskip generate {folder} "Once upon a time"', "continue a text"),
        (f"gateskip serve {folder}", "serve the model over HTTP"),
        (f"gateskip bench {folder}", "measure the speed of the model on this machine"),
        (f"llama-cli -m {file}", "run the model in llama.cpp")
        if done.gguf
        else (f"{export} gguf --to {file}", "write the model for llama.cpp"),
        (f"vllm serve {vllm}", "serve the model with vLLM")
        if done.compressed_tensors
        else (f"{export} compressed-tensors --to {vllm}", "write the model for vLLM"),
        (f"gateskip pick {run} --minimize size", "show the smallest variant of this run"),
        (_word(done.report), "read the report"),
    )


def _word(path: Path) -> str:
    """A path as a shell takes it, from the current folder where it is inside that."""
    inside = path.absolute().is_relative_to(Path.cwd())
    return shlex.quote(str(path.absolute().relative_to(Path.cwd()) if inside else path))
