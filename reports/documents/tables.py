"""The tables of documents, by name: each takes results and options, and gives Markdown lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from compose.analysis.intervals import paired_speed_ratio
from compose.analysis.metrics import half_width, over_seeds
from compose.errors import UserError
from compose.numbers import DASH, PLAIN
from compose.results.parts import Estimate, SpeedNumbers, TaskScore
from compose.results.schema import CellResult, Results
from reports.documents.text import factor, measured, table


def with_text(head: list[str], lines: list[list[str]], cells: Sequence[CellResult]) -> list[str]:
    """The table with a column of the text that each cell was fitted to, where any states it."""
    if all(cell.fitted_to is None for cell in cells):
        return table(head, lines)
    seen = [
        DASH if cell.fitted_to is None else ", ".join(cell.fitted_to) or "no text" for cell in cells
    ]
    whole = [[*line, text] for line, text in zip(lines, seen, strict=True)]
    return table([*head, "calibrated on"], whole)


def chosen(results: Results, cells: str | None) -> list[CellResult]:
    """The named cells in their order, or all that were measured.

    Raises:
        UserError: a cell is unknown, or was not measured.
    """
    if cells is None:
        return list(results.measured)
    named = [results.cell(name) for name in cells.split(",")]
    for cell in named:
        if cell.status != "ok":
            raise UserError(f"cell {cell.name!r} of {results.run} was not measured")
    return named


def speed_at_equal_quality(results: Results, cells: str | None = None) -> list[str]:
    """Quality, size and decode speed in one row: peers and cells, the closest to dense first."""
    rows = sorted(chosen(results, cells), key=lambda cell: _loss(results, cell))
    tasks = _task_names(results, rows, "generative")
    head = ["", "perplexity, x dense", "KL", *tasks, "MB", "decode, tok/s", "x dense"]
    lines = []
    for cell in rows:
        scores = [_task(results, cell, name) for name in tasks]
        speed = cell.speed or SpeedNumbers()
        lines.append(
            [
                f"`{cell.name}`",
                _perplexity(results, cell),
                _kl(results, cell),
                *scores,
                _megabytes(cell),
                measured(speed.decode_tokens_per_s),
                factor(speed.decode_ratio),
            ]
        )
    return with_text(head, lines, rows)


def glance(results: Results, cells: str | None = None) -> list[str]:
    """Quality, size and decode speed in one row, without intervals: for a first look."""
    head = ["", "perplexity, x dense", "KL", "MB", "decode, tok/s", "decode, x dense"]
    lines = []
    rows = sorted(chosen(results, cells), key=lambda cell: _loss(results, cell))
    for cell in rows:
        scored, speed = results.quality(cell), cell.speed or SpeedNumbers()
        text = scored.perplexity if scored else None
        decode, faster = speed.decode_tokens_per_s, speed.decode_ratio
        numbers = [
            text.ratio_to_baseline if text else None,
            scored.kl_to_baseline if scored else None,
            decode.median if decode else None,
            faster.value if faster else None,
        ]
        ratio, kl, rate, times = (DASH if n is None else PLAIN.number(n) for n in numbers)
        if cell.name == results.baseline:
            ratio, kl, times = "1", "0", "1"
        lines.append([f"`{cell.name}`", ratio, kl, _megabytes(cell), rate, times])
    return with_text(head, lines, rows)


def quality(results: Results, cells: str | None = None) -> list[str]:
    """Everything that was scored: text, tasks, answers."""
    rows = chosen(results, cells)
    tasks = _task_names(results, rows, None)
    head = ["", "perplexity, x dense", "KL", "KL, median", "KL, p90", "same token first"]
    head += [*tasks, "KL on own answers", "tokens until answers part"]
    lines = []
    for cell in rows:
        scored = results.quality(cell)
        answers = scored.own_answers if scored else None
        lines.append(
            [
                f"`{cell.name}`",
                _perplexity(results, cell),
                _kl(results, cell),
                PLAIN.with_ends(scored.kl_median if scored else None, None),
                PLAIN.with_ends(scored.kl_p90 if scored else None, None),
                PLAIN.percent(scored.greedy_agreement if scored else None),
                *[_task(results, cell, name) for name in tasks],
                PLAIN.with_ends(answers.kl, answers.kl_ci95) if answers else DASH,
                PLAIN.with_ends(answers.common_prefix, None) if answers else DASH,
            ]
        )
    return table(head, lines)


def speculation(results: Results, cells: str | None = None) -> list[str]:
    """The lossless check, and what the timed rounds drafted, in columns of their own."""
    rows = [cell for cell in chosen(results, cells) if cell.speculates]
    head = ["", "lossless", "timed drafts", "accepted", "tokens a pass", "plain steps", "x plain"]
    lines = []
    for cell in rows:
        timed, check = cell.speculation, cell.lossless_check
        lines.append(
            [
                f"`{cell.name}`",
                DASH
                if check is None
                else f"{'yes' if check.lossless else 'NO'}, {check.prompts} prompts,"
                f" {check.tokens} tokens",
                _lengths(timed.draft_length_histogram if timed else None),
                PLAIN.percent(timed.acceptance_rate, timed.acceptance_rate_ci95) if timed else DASH,
                PLAIN.with_ends(timed.mean_accepted_tokens, timed.mean_accepted_tokens_ci95)
                if timed
                else DASH,
                _plain_steps(cell),
                DASH
                if timed is None or timed.speedup is None
                else f"{PLAIN.with_ends(timed.speedup, timed.speedup_ci95)}",
            ]
        )
    return table(head, lines)


def speed(results: Results, cells: str | None = None) -> list[str]:
    """Prefill, first token, and decoding at every batch size and context."""
    rows = chosen(results, cells)
    batches, contexts = _sizes(rows, "by_batch"), _sizes(rows, "by_context")
    head = ["", "prefill, tok/s", "x dense", "first token, ms", "decode, tok/s", "x dense"]
    head += [f"batch {b}" for b in batches] + [f"context {c}" for c in contexts]
    lines = []
    for cell in rows:
        numbers = cell.speed or SpeedNumbers()
        first = numbers.ttft_s
        others = [_by(cell, "by_batch").get(b) for b in batches]
        others += [_by(cell, "by_context").get(c) for c in contexts]
        lines.append(
            [
                f"`{cell.name}`",
                measured(numbers.prefill_tokens_per_s),
                factor(numbers.prefill_ratio),
                PLAIN.with_ends(first.median, first.quartiles, 1000.0) if first else DASH,
                measured(numbers.decode_tokens_per_s),
                factor(numbers.decode_ratio),
                *[measured(other.decode_tokens_per_s) if other else DASH for other in others],
            ]
        )
    return table(head, lines)


def prompts(results: Results, cells: str | None = None) -> list[str]:
    """How fast prompts of each length are read: over dense, and over the plain cell of the same
    weights, paired by round."""
    rows = chosen(results, cells)
    contexts = _sizes(rows, "by_context")
    shortest = (results.benchmark or {})["speed"]["prompt_tokens"]
    head = [""]
    for context in (shortest, *contexts):
        head += [f"{context} tokens, tok/s", "x dense", "x plain"]
    lines = []
    for cell in rows:
        line = [f"`{cell.name}`"]
        plain = None if cell.plain is None else results.cell(cell.plain)
        for context in (None, *contexts):
            after, base = _after(cell, context), _after(plain, context)
            line.append(measured(after.prefill_tokens_per_s))
            line += [factor(after.prefill_ratio), factor(_prompt_ratio(after, base))]
        lines.append(line)
    return table(head, lines)


def decoding(results: Results, cells: str | None = None) -> list[str]:
    """Decoding of one row, of several, and after longer prompts, each over dense."""
    rows = chosen(results, cells)
    shapes = [("by_batch", n, f"{n} rows") for n in _sizes(rows, "by_batch")]
    shapes += [("by_context", n, f"after {n} tokens") for n in _sizes(rows, "by_context")]
    head = ["", "1 row, tok/s", "x dense"]
    for _, _, what in shapes:
        head += [f"{what}, tok/s", "x dense"]
    lines = []
    for cell in rows:
        numbers = [cell.speed or SpeedNumbers()]
        numbers += [_by(cell, by).get(n) or SpeedNumbers() for by, n, _ in shapes]
        line = [f"`{cell.name}`"]
        for at_shape in numbers:
            line += [measured(at_shape.decode_tokens_per_s), factor(at_shape.decode_ratio)]
        lines.append(line)
    return table(head, lines)


def _megabytes(cell: CellResult) -> str:
    size = cell.size.disk_bytes if cell.size else None
    return DASH if size is None else PLAIN.whole(size / 1e6)


def _sizes(rows: list[CellResult], shapes: str) -> list[int]:
    return sorted({size for cell in rows for size in _by(cell, shapes)})


def _after(cell: CellResult | None, context: int | None) -> SpeedNumbers:
    """A cell's speeds with a prompt of some tokens, or of those of the run."""
    if cell is None or cell.speed is None:
        return SpeedNumbers()
    return cell.speed if context is None else _by(cell, "by_context")[context]


def _prompt_ratio(numbers: SpeedNumbers, base: SpeedNumbers) -> Estimate | None:
    """How much faster prompts are read than by another cell in the same rounds."""
    if numbers.prefill_tokens_per_s is None or base.prefill_tokens_per_s is None:
        return None
    return paired_speed_ratio(
        numbers.prefill_tokens_per_s.repeats, base.prefill_tokens_per_s.repeats
    )


def skipping(results: Results, cells: str | None = None) -> list[str]:
    """Compute that is saved beside what it costs."""
    rows = [c for c in chosen(results, cells) if c.name == results.baseline or c.compute]
    tasks = _task_names(results, rows, None)
    head = ["", "saved, net", "gross", "whole model", "perplexity, x dense", "KL", *tasks]
    lines = []
    for cell in rows:
        saved = cell.compute
        lines.append(
            [
                f"`{cell.name}`",
                PLAIN.percent(saved.saved_net if saved else None),
                PLAIN.percent(saved.saved_gross if saved else None),
                PLAIN.percent(saved.saved_model if saved else None),
                _perplexity(results, cell),
                _kl(results, cell),
                *[_task(results, cell, name) for name in tasks],
                factor(cell.speed.decode_ratio if cell.speed else None),
            ]
        )
    return table([*head, "decode, x dense"], lines)


def written(results: Results, cells: str | None = None) -> list[str]:
    """What is kept of tasks that a model writes, what was saved on their very text, and prompts."""
    rows = chosen(results, cells)
    tasks = _task_names(results, rows, "generative")
    head = ["", *[word for name in tasks for word in (f"{name}, kept", "saved")]]
    head += ["mean kept", "ranked tasks, mean kept", "KL on own answers", "prompts, x dense"]
    lines = []
    for cell in rows:
        if cell.name == results.baseline:
            continue
        scored, scores = results.quality(cell), _tasks(results, cell)
        answers = scored.own_answers if scored else None
        lines.append(
            [
                f"`{cell.name}`",
                *[word for name in tasks for word in _kept_and_saved(cell, scores.get(name))],
                _share(scored.written_retained if scored else None),
                _share(scored.ranked_retained if scored else None),
                PLAIN.with_ends(answers.kl, answers.kl_ci95) if answers else DASH,
                factor(cell.speed.prefill_ratio if cell.speed else None),
                factor(cell.speed.decode_ratio if cell.speed else None),
            ]
        )
    return table([*head, "decode, x dense"], lines)


def verdicts(results: Results, cells: str | None = None) -> list[str]:
    """Whether each cell is worth shipping, and why."""
    rows = [cell for cell in chosen(results, cells) if cell.verdict is not None]
    judged = [(cell, cell.verdict) for cell in rows if cell.verdict is not None]
    return table(
        ["", "verdict", "because"],
        [[f"`{cell.name}`", verdict.verdict, verdict.why] for cell, verdict in judged],
    )


def peers(results: Results, cells: str | None = None) -> list[str]:
    """How each other engine was run."""
    lines = []
    for cell in chosen(results, cells):
        if cell.peer is not None:
            versions = ", ".join(f"{n} {v}" for n, v in (cell.peer.versions or {}).items())
            lines.append([f"`{cell.name}`", versions or DASH, cell.peer.settings or DASH])
    return table(["", "versions", "how it is run"], lines)


def seeds(results: Results, cells: str | None = None) -> list[str]:
    """Means over seeds, with the ends of their interval by Student's t: what differs between fits,
    not between questions."""
    shown = (("kept", "retained", 100.0), ("perplexity, x dense", "perplexity-ratio", 1.0))
    head = ["", "seeds", *(f"{text}, %" if by == 100 else text for text, _, by in shown), "KL"]
    lines = []
    for cell in chosen(results, cells):
        if cell.seeds is None:
            continue
        line = [f"`{cell.name}`", str(1 + len(cell.seeds))]
        for _, name, by in (*shown, ("KL", "kl", 1.0)):
            line.append(_over_seeds(over_seeds(results, name, cell), by))
        lines.append(line)
    return table(head, lines)


def _over_seeds(values: Sequence[float], by: float) -> str:
    if len(values) < 2:
        return DASH
    mean, half = fmean(values), half_width(values)
    return PLAIN.with_ends(mean, (mean - half, mean + half), by)


TABLES: Mapping[str, Callable[..., list[str]]] = {
    "decoding": decoding,
    "glance": glance,
    "peers": peers,
    "prompts": prompts,
    "quality": quality,
    "seeds": seeds,
    "skipping": skipping,
    "speculation": speculation,
    "speed": speed,
    "speed-at-equal-quality": speed_at_equal_quality,
    "verdicts": verdicts,
    "written": written,
}
"""Name in a marker -> the table. Each takes `cells=A,B,…`; all measured cells without it."""


def _loss(results: Results, cell: CellResult) -> tuple[float, float]:
    """Order of rows: perplexity over dense, then the faster first; cells without scores last."""
    scored = results.quality(cell)
    text = scored.perplexity if scored else None
    ratio = text.ratio_to_baseline if text else None
    if ratio is None:
        ratio = 1.0 if cell.name == results.baseline else float("inf")
    decode = cell.speed.decode_tokens_per_s if cell.speed else None
    return round(ratio, 3), -(decode.median if decode else 0.0)


def _perplexity(results: Results, cell: CellResult) -> str:
    if cell.name == results.baseline:
        return "1"
    scored = results.quality(cell)
    text = scored.perplexity if scored else None
    return DASH if text is None else PLAIN.with_ends(text.ratio_to_baseline, text.ratio_ci95)


def _kl(results: Results, cell: CellResult) -> str:
    if cell.name == results.baseline:
        return "0"
    scored = results.quality(cell)
    return DASH if scored is None else PLAIN.with_ends(scored.kl_to_baseline, scored.kl_ci95)


def _tasks(results: Results, cell: CellResult) -> dict[str, TaskScore]:
    scored = results.quality(cell)
    return (scored.tasks or {}) if scored else {}


def _task_names(results: Results, rows: list[CellResult], kind: str | None) -> list[str]:
    names = {
        name: None
        for cell in rows
        for name, score in _tasks(results, cell).items()
        if kind is None or score.kind == kind
    }
    return list(names)


def _task(results: Results, cell: CellResult, name: str) -> str:
    score = _tasks(results, cell).get(name)
    return DASH if score is None else PLAIN.with_ends(score.value, score.ci95, 100.0)


def _kept_and_saved(cell: CellResult, score: TaskScore | None) -> tuple[str, str]:
    """Of a task: its score over the dense model's, and multiply-adds saved, net: on its text, or
    where nothing skips, by what was cut from every token's way."""
    if score is None:
        return DASH, DASH
    cut = (cell.compute.saved_net if cell.compute else None) or None
    saved = score.compute.saved_net if score.compute else cut
    return PLAIN.percent(score.retained, score.retained_ci95), PLAIN.percent(saved)


def _share(value: Estimate | None) -> str:
    return DASH if value is None else PLAIN.percent(value.value, value.ci95)


def _by(cell: CellResult, shapes: str) -> dict[int, SpeedNumbers]:
    return (getattr(cell.speed, shapes) or {}) if cell.speed else {}


def _lengths(histogram: dict[int, int] | None) -> str:
    """Draft lengths of the timed passes: `0: 27, 3: 1`."""
    return ", ".join(f"{k}: {n}" for k, n in sorted((histogram or {}).items())) or DASH


def _plain_steps(cell: CellResult) -> str:
    timed = cell.speculation
    if timed is None or timed.plain_steps is None:
        return DASH
    fell = ": fell back to plain decoding" if timed.fell_back else ""
    return f"{PLAIN.percent(timed.plain_steps)}{fell}"
