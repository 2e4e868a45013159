"""`gateskip bench`: from its options to a plan, and from its results to a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from compose.results.schema import CellResult, Results
from compose.terminal.shown import shown

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
    out.print(_speed_table(results, measured))
    if any(q.perplexity or q.tasks for cell in measured if (q := results.quality(cell))):
        out.print(_quality_table(results, measured))
    for cell in measured:
        for line in _remarks(cell):
            out.print(f"{shown(cell.name)}: {shown(line)}", highlight=False, soft_wrap=True)
    roof = results.environment.get("roofline")
    if roof:
        out.print(
            f"{results.environment.get('threads')} threads read {roof['memory_gb_per_s']:.1f} GB/s"
            f" and multiply {roof['gemm_float32_gflop_per_s']:.0f} GFLOP/s in float32,"
            f" {roof['gemm_bfloat16_gflop_per_s']:.0f} in bfloat16",
            highlight=False,
        )


def _speed_table(results: Results, cells: Sequence[CellResult]) -> Table:
    table = Table(title="Speed, beside the first row", title_justify="left")
    for name in ("cell", "on", "prefill tok/s", "x", "decode tok/s", "quartiles", "x (95 %)"):
        table.add_column(name)
    for cell in cells:
        for shape, numbers in _shapes(results, cell):
            decode, prefill = numbers.decode_tokens_per_s, numbers.prefill_tokens_per_s
            quartiles = decode.quartiles if decode else None
            table.add_row(
                shown(cell.name),
                shown(shape),
                f"{prefill.median:.0f}" if prefill else "",
                _ratio(numbers.prefill_ratio),
                f"{decode.median:.1f}" if decode else "",
                f"{quartiles[0]:.1f} to {quartiles[1]:.1f}" if quartiles else "",
                _ratio(numbers.decode_ratio),
            )
    return table


def _shapes(results: Results, cell: CellResult) -> list[tuple[str, Any]]:
    """Each shape that a cell was timed in, in words, and its numbers."""
    speed, asked = cell.speed, (results.benchmark or {}).get("speed", {})
    if speed is None:
        return []
    main, batches = asked.get("prompt_tokens", 0), asked.get("batch_sizes", [1])
    first = 1 if 1 in batches else min(batches)
    categories = speed.by_category or {}
    name = "all prompts" if categories else f"{first} x {main}"
    shapes: list[tuple[str, Any]]
    shapes = [(name, speed)] if speed.decode_tokens_per_s or speed.prefill_tokens_per_s else []
    shapes += [(f"{batch} x {main}", each) for batch, each in (speed.by_batch or {}).items()]
    shapes += [(f"1 x {context}", each) for context, each in (speed.by_context or {}).items()]
    return shapes + list(categories.items())


def _ratio(estimate: Any) -> str:
    if estimate is None:
        return ""
    interval = f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"
    if estimate.rounds_ci95 is not None:
        low, high = estimate.rounds_ci95
        interval += f", in these rounds {low:.2f} to {high:.2f}"
    return interval if estimate.different else f"{interval}, no difference"


def _quality_table(results: Results, cells: Sequence[CellResult]) -> Table:
    table = Table(title="Quality, on one text", title_justify="left")
    scored = [results.quality(cell) for cell in cells]
    tasks = sorted({name for each in scored if each for name in each.tasks or {}})
    for name in ("cell", "perplexity", "x (95 %)", "KL", "agreement", *map(shown, tasks), "MB"):
        table.add_column(name)
    for cell, quality in zip(cells, scored, strict=True):
        perplexity = quality.perplexity if quality else None
        size = cell.size.disk_bytes if cell.size else None
        scores = (quality.tasks or {}) if quality else {}
        table.add_row(
            shown(cell.name),
            _number(perplexity.value if perplexity else None, ".2f"),
            _with_interval(perplexity),
            _number(quality.kl_to_baseline if quality else None, ".3f"),
            _number(quality.greedy_agreement if quality else None, ".3f"),
            *(_number(scores[name].value if name in scores else None, ".3f") for name in tasks),
            _number(size / 1e6 if size else None, ".0f"),
        )
    return table


def _with_interval(perplexity: Any) -> str:
    ratio = perplexity.ratio_to_baseline if perplexity else None
    interval = perplexity.ratio_ci95 if perplexity else None
    if ratio is None:
        return ""
    return f"{ratio:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _remarks(cell: CellResult) -> list[str]:
    """What stands behind a cell's speed: its arithmetic, memory, drafts, and parts of the time."""
    lines = []
    if cell.peer is not None:
        lines.append(f"{cell.peer.settings} {cell.peer.threads} threads")
    if cell.arithmetic is not None:
        used = cell.arithmetic
        lines.append(
            f"decodes in {used.backend}: {used.weights} x {used.activations},"
            f" sums in {used.accumulation}"
        )
    spoken = cell.speculation
    if spoken is not None and spoken.acceptance_rate is not None:
        fell_back = "; fell back to plain decoding" if spoken.fell_back else ""
        lines.append(f"accepts {spoken.acceptance_rate:.2f} of its drafts{fell_back}")
    speed, size = cell.speed, cell.size
    if speed is not None and speed.time_split:
        parts = (f"{part} {share:.0%}" for part, share in speed.time_split.items())
        lines.append("decoding is " + ", ".join(parts))
    if size is not None and size.cache_bytes and size.beside_bytes is not None:
        lines.append(
            f"memory: {(size.resident_bytes or 0) / 1e6:.0f} MB of weights,"
            f" {size.cache_bytes / 1e6:.0f} MB of cache at most, and"
            f" {size.beside_bytes / 1e6:.0f} MB beside them at its peak"
        )
    if speed is not None and speed.equal_to_baseline is False:
        lines.append("its text is not that of the first row")
    return lines
