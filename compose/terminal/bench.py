"""`gateskip bench`: from its options to a plan, and from its results to a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from compose.numbers import DASH, PLAIN, bytes_text, three_decimals
from compose.results.parts import Estimate, Measured, Perplexity
from compose.results.schema import CellResult, Results
from compose.table import Table, text_table
from compose.terminal.shown import shown
from compose.terminal.table import rich_table

PROMPTS_CHECKED = 4
"""Prompts on which speculation is compared with plain decoding."""


def benchmark_of(
    *,
    batches: Sequence[int],
    contexts: Sequence[int],
    prompts: str | None,
    limit: int | None,
    new_tokens: int,
    repeats: int,
    min_seconds: float,
    one_process: bool,
    sampling: dict[str, float] | None,
    threads: int | None,
    quality: bool,
    texts: Sequence[str],
    tokens: int,
    tasks: Sequence[str],
    allow_code: bool,
    questions: int,
) -> dict[str, Any]:
    """The options as a pipeline's `benchmark` section. Without `quality` nothing is scored.

    The first context is measured with every batch size, the others with one row.
    """
    speed = {
        "prompt_tokens": contexts[0],
        "contexts": list(contexts[1:]),
        "batch_sizes": list(batches),
        "new_tokens": new_tokens,
        "repeats": repeats,
        "min_seconds": min_seconds,
        "one_process": one_process,
        "sampling": sampling,
        "prompts": prompts,
        "prompts_per_category": limit,
    }
    scored: dict[str, Any] = {"perplexity": None, "tasks": [], "own_answers": None}
    if quality:
        scored = {"perplexity_tokens": tokens, "tasks": list(tasks), "limit": questions}
        scored["allow_code"] = allow_code
        scored |= {"perplexity": list(texts)} if texts else {}
    return {
        "speed": speed,
        "quality": scored,
        "lossless": {"prompts": PROMPTS_CHECKED},
        "threads": threads,
    }


def print_bench(out: Console, results: Results) -> None:
    """Speeds beside those of the first system with their intervals, quality where it was scored,
    and what the machine can do at most."""
    measured = results.measured
    out.print(rich_table(_speed_table(results, measured), "Speed, compared with the first row"))
    if any(q.perplexity or q.tasks for cell in measured if (q := results.quality(cell))):
        out.print(rich_table(_quality_table(results, measured), "Quality, on one text"))
    for cell in measured:
        for line in _remarks(cell):
            out.print(f"{shown(cell.name)}: {shown(line)}", highlight=False, soft_wrap=True)
    roof = results.environment.get("roofline")
    if roof:
        out.print(
            f"Hardware limits of {results.environment.get('threads')} threads:"
            f" {PLAIN.number(roof['memory_gb_per_s'])} GB/s of memory bandwidth,"
            f" {PLAIN.number(roof['gemm_float32_gflop_per_s'])} GFLOP/s in float32,"
            f" {PLAIN.number(roof['gemm_bfloat16_gflop_per_s'])} GFLOP/s in bfloat16",
            highlight=False,
        )


def _speed_table(results: Results, cells: Sequence[CellResult]) -> Table[None]:
    return text_table(
        ("cell", "on", "prefill, tok/s", "x (95 %)", "decode, tok/s", "x (95 %)"),
        [
            (
                cell.name,
                shape,
                _median(numbers.prefill_tokens_per_s),
                _ratio(numbers.prefill_ratio),
                _median(numbers.decode_tokens_per_s),
                _ratio(numbers.decode_ratio),
            )
            for cell in cells
            for shape, numbers in _shapes(results, cell)
        ],
    )


def _shapes(results: Results, cell: CellResult) -> list[tuple[str, Any]]:
    """Each shape that a cell was timed in, in words, and its numbers."""
    speed, settings = cell.speed, (results.benchmark or {}).get("speed", {})
    if speed is None:
        return []
    main, batches = settings.get("prompt_tokens", 0), settings.get("batch_sizes", [1])
    first = 1 if 1 in batches else min(batches)
    categories = speed.by_category or {}
    name = "all prompts" if categories else f"{first} x {main}"
    shapes: list[tuple[str, Any]]
    shapes = [(name, speed)] if speed.decode_tokens_per_s or speed.prefill_tokens_per_s else []
    shapes += [(f"{batch} x {main}", numbers) for batch, numbers in (speed.by_batch or {}).items()]
    shapes += [(f"1 x {context}", numbers) for context, numbers in (speed.by_context or {}).items()]
    return shapes + list(categories.items())


def _median(value: Measured | None) -> str:
    """A median with its quartiles."""
    return "" if value is None else PLAIN.with_ends(value.median, value.quartiles)


def _ratio(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    text = PLAIN.ratio(estimate.value, estimate.ci95, differs=bool(estimate.different))
    if estimate.rounds_ci95 is None:
        return text
    return f"{text}, in these rounds {PLAIN.span(*estimate.rounds_ci95)}"


def _quality_table(results: Results, cells: Sequence[CellResult]) -> Table[None]:
    scored = [results.quality(cell) for cell in cells]
    tasks = sorted({name for record in scored if record for name in record.tasks or {}})
    lines = []
    for cell, quality in zip(cells, scored, strict=True):
        text = (quality.perplexity if quality else None) or Perplexity(dataset="")
        scores = (quality.tasks or {}) if quality else {}
        size = cell.size.disk_bytes if cell.size else None
        lines.append(
            (
                cell.name,
                PLAIN.with_ends(text.value, None),
                _perplexity_ratio(text),
                PLAIN.with_ends(quality.kl_to_baseline if quality else None, None),
                PLAIN.percent(quality.greedy_agreement if quality else None),
                *(PLAIN.percent(scores[name].value if name in scores else None) for name in tasks),
                DASH if size is None else PLAIN.megabytes(size),
            )
        )
    heads = ("cell", "perplexity", "x (95 %)", "KL", "agreement", *tasks, "MB")
    return text_table(heads, lines)


def _perplexity_ratio(text: Perplexity) -> str:
    """Over the first row's, with its interval: to three places, since it is near 1."""
    if text.ratio_to_baseline is None:
        return DASH
    ends = text.ratio_ci95
    within = "" if ends is None else f" ({PLAIN.span(*ends, three_decimals)})"
    return three_decimals(text.ratio_to_baseline) + within


def _remarks(cell: CellResult) -> list[str]:
    """What stands behind a cell's speed: its arithmetic, memory, drafts, and parts of the time."""
    lines = []
    if cell.peer is not None:
        lines.append(f"{cell.peer.settings} {cell.peer.threads} threads")
    if cell.arithmetic is not None:
        used = cell.arithmetic
        lines.append(
            f"decodes in backend {used.backend}: weights {used.weights},"
            f" activations {used.activations},"
            f" sums in {used.accumulation}"
        )
    spoken = cell.speculation
    if spoken is not None and spoken.acceptance_rate is not None:
        fell_back = "; fell back to plain decoding" if spoken.fell_back else ""
        lines.append(
            f"{PLAIN.percent(spoken.acceptance_rate)} of drafted tokens are accepted{fell_back}"
        )
    speed, size = cell.speed, cell.size
    if speed is not None and speed.time_split:
        parts = (f"{part} {PLAIN.percent(share)}" for part, share in speed.time_split.items())
        lines.append("decoding time: " + ", ".join(parts))
    if size is not None and size.cache_bytes and size.beside_bytes is not None:
        lines.append(
            f"memory: {bytes_text(size.resident_bytes or 0)} for weights,"
            f" at most {bytes_text(size.cache_bytes)} for the KV cache, and"
            f" {bytes_text(size.beside_bytes)} for everything else at the peak"
        )
    if speed is not None and speed.equal_to_baseline is False:
        lines.append("its text differs from the text of the first row")
    return lines
