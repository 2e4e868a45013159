"""Tables of a report, as values: HTML and Markdown write the same ones.

A number that was not measured is an en dash. A column that no cell has is left out and named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compose.units import bytes_text
from reports.columns import (
    ACCEPTED_HELP,
    AGREE_HELP,
    DECODE_HELP,
    KL_HELP,
    LOSSLESS_HELP,
    MEAN_HELP,
    PREFILL_HELP,
    RATIO_HELP,
    ROUNDING_HELP,
    SAVED_HELP,
    Column,
    Table,
    accepted_entry,
    arithmetic_entry,
    batch_columns,
    diverged_entry,
    drafting_entry,
    lossless_entry,
    metric_column,
    perplexity_entry,
    perplexity_text,
    position_columns,
    retained_help,
    rounding_entry,
    saved_model_entry,
    seed_count_entry,
    seeds_mean,
    speedup_entry,
    spread_of,
    table_of,
    task_kept_column,
    task_score_column,
    usual_draft_entry,
)
from reports.load import Report, Row
from reports.numbers import TIMES, megabytes, millis, number, ratio, share


@dataclass(frozen=True)
class Histogram:
    """How often speculation drafted how many tokens; shares are of the most frequent length."""

    bars: tuple[tuple[int, int, float], ...] = field(default=())


def overview(report: Report) -> Table:
    """Every measured cell with the numbers that decide."""
    return table_of(
        report,
        report.rows,
        [
            metric_column(
                "size", "Size", "MB", "Weight files on disk.", megabytes, show_gain=True, bar=True
            ),
            metric_column(
                "decode", "Decode", "tok/s", DECODE_HELP, number, show_gain=True, bar=True
            ),
            metric_column("prefill", "Prefill", "tok/s", PREFILL_HELP, number, show_gain=True),
            metric_column("saved", "Saved", "net, %", SAVED_HELP, share),
            metric_column("perplexity-ratio", "Perplexity", TIMES + " dense", RATIO_HELP, ratio),
            metric_column("kl", "KL", "nats", KL_HELP, number),
            metric_column("agreement", "Agree", "%", AGREE_HELP, share),
            *(task_score_column(report, task, detail=False) for task in report.tasks),
            metric_column("retained", "Keeps", "%", retained_help(report), share, bar="unit"),
            Column(
                "Accepted", "%", ACCEPTED_HELP + " Below it: " + MEAN_HELP.lower(), accepted_entry
            ),
            Column("Lossless", "", LOSSLESS_HELP, lossless_entry),
        ],
    )


def quality(report: Report) -> Table:
    """Perplexity and every task with its interval."""
    measured = tuple(row for row in report.rows if report.results.quality(row.cell) is not None)
    tasks = [(task_score_column(report, t, detail=True), task_kept_column(t)) for t in report.tasks]
    return table_of(
        report,
        measured,
        [
            Column("Perplexity", perplexity_text(report), "Smaller is better.", perplexity_entry),
            metric_column("perplexity-ratio", "Perplexity", TIMES + " dense", RATIO_HELP, ratio),
            metric_column("kl", "KL", "nats", KL_HELP, number),
            metric_column("agreement", "Agree", "%", AGREE_HELP, share),
            Column("Rounding", "KL", ROUNDING_HELP, rounding_entry),
            *(column for pair in tasks for column in pair),
            metric_column("accuracy", "Tasks", "mean, %", "Unweighted mean of the scores.", share),
            metric_column("retained", "Keeps", "%", retained_help(report), share),
        ],
    )


def seeds(report: Report) -> Table:
    """Means over seeds, where a cell was run with several, and half their interval's width."""
    rows = tuple(row for row in report.rows if row.cell.seeds)
    shown = [
        ("saved", "Saved", "net, %", SAVED_HELP, share),
        ("perplexity-ratio", "Perplexity", TIMES + " dense", RATIO_HELP, ratio),
        ("kl", "KL", "nats", KL_HELP, number),
        ("agreement", "Agree", "%", AGREE_HELP, share),
        ("accuracy", "Tasks", "mean, %", "Unweighted mean of the scores.", share),
        ("retained", "Keeps", "%", retained_help(report), share),
    ]
    count = Column("Seeds", "", "How many the cell was run with.", seed_count_entry)
    columns = [
        Column(head, unit, help, seeds_mean(name, show)) for name, head, unit, help, show in shown
    ]
    return table_of(report, rows, [count, *columns])


def speed(report: Report) -> Table:
    """Speed with its spread, other batch sizes, and memory."""
    return table_of(
        report,
        report.rows,
        [
            Column("Decode", "tok/s", DECODE_HELP, spread_of("decode_tokens_per_s", number)),
            Column("Prefill", "tok/s", PREFILL_HELP, spread_of("prefill_tokens_per_s", number)),
            Column("First token", "ms", "From prompt to first token.", spread_of("ttft_s", millis)),
            *(c for batch in report.batches for c in batch_columns(batch)),
            metric_column("resident", "In memory", "MB", "The loaded model.", megabytes),
            metric_column("peak", "Peak", "MB", "Most memory of the cell's process.", megabytes),
            metric_column(
                "saved-gross", "Saved", "gross, %", "Gates left out of the count.", share
            ),
            metric_column("saved", "Saved", "net, %", SAVED_HELP, share),
            Column("Saved", "model, %", "Net, the LM head counted too.", saved_model_entry),
        ],
    )


def arithmetic(report: Report) -> Table:
    """Backend, weights, activations and accumulation of each cell, decoding and scoring."""
    return table_of(
        report,
        report.rows,
        [
            Column("Backend", "", "What runs the model.", arithmetic_entry("backend")),
            Column("Weights", "", "How weights are stored.", arithmetic_entry("weights")),
            Column(
                "Activations",
                "decoding",
                "What weights are multiplied with in decoding.",
                arithmetic_entry("activations"),
            ),
            Column(
                "Activations",
                "scoring",
                "What weights are multiplied with in prompts and scoring.",
                arithmetic_entry("activations", scoring=True),
            ),
            Column(
                "Sums",
                "",
                "The type in which products are summed.",
                arithmetic_entry("accumulation"),
            ),
        ],
    )


def contamination(report: Report) -> list[tuple[str, int, int]]:
    """Scored texts and tasks: rows, and how many share a 13-gram with a training text."""
    baseline = report.results.find(report.results.baseline)
    quality = None if baseline is None else baseline.quality
    shares = None if quality is None else quality.contamination
    return [(name, each.rows, each.contaminated) for name, each in (shares or {}).items()]


def insight(report: Report) -> list[tuple[Row, list[tuple[str, int, float]]]]:
    """For every cell that skips: kinds of tokens, how many were seen, their share of compute."""
    return [
        (row, [(kind, use.tokens, use.compute) for kind, use in row.cell.insight.kinds.items()])
        for row in report.rows
        if row.cell.insight is not None
    ]


def speculation(report: Report) -> Table:
    """What each speculative cell did."""
    rows = tuple(row for row in report.rows if row.cell.speculates)
    return table_of(
        report,
        rows,
        [
            metric_column("acceptance", "Accepted", "%", ACCEPTED_HELP, share, bar="unit"),
            metric_column("accepted", "Mean", "tokens/pass", MEAN_HELP, number),
            Column(
                "Speed-up", "over plain", "Over the same weights, decoded plainly.", speedup_entry
            ),
            Column(
                "Draft length", "most often", "Tokens drafted before a check.", usual_draft_entry
            ),
            Column(
                "Drafting",
                "% of time",
                "Where decoding's time goes; the rest verifies.",
                drafting_entry,
            ),
            *position_columns(rows),
            Column("Lossless", "", LOSSLESS_HELP, diverged_entry),
        ],
    )


def histogram(row: Row) -> Histogram:
    """The draft lengths of a speculative cell, shortest first, without gaps."""
    lengths = row.cell.speculation.draft_length_histogram if row.cell.speculation else None
    if not lengths or not any(lengths.values()):
        return Histogram()
    most = max(lengths.values())
    rounds = [(n, lengths.get(n, 0)) for n in range(min(lengths), max(lengths) + 1)]
    return Histogram(tuple((n, times, times / most) for n, times in rounds))


def environment(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and text of what is known of the machine, in reading order; unknown keys last."""
    labels = {
        "processor": "Processor",
        "accelerator": "Accelerator",
        "cores": "Cores",
        "threads": "Threads",
        "memory_bytes": "Memory",
        "cpu_features": "Instructions",
        "platform": "Platform",
        "python": "Python",
        "git_commit": "Commit",
        "date": "Date",
        "versions": "Libraries",
    }
    order = [*(key for key in labels if key in values), *(k for k in values if k not in labels)]
    return [(labels.get(key, key), _plain_text(key, values[key])) for key in order]


def _plain_text(key: str, value: Any) -> str:
    if key == "memory_bytes" and isinstance(value, int | float):
        return bytes_text(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)
