"""Tables of a report's cells, as values: HTML and Markdown write the same ones.

A number that was not measured is an en dash. A column that no cell has is left out and named.
"""

from __future__ import annotations

from compose.numbers import PAGE, TIMES, milliseconds, three_decimals
from compose.table import Entry, Table
from reports.load import Report, Row
from reports.tables.columns import Column, metric_column, retained_help, table_of
from reports.tables.quality import (
    AGREE_HELP,
    KL_HELP,
    OWN_KL_HELP,
    PREFIX_HELP,
    RANKED_HELP,
    RATIO_HELP,
    ROUNDING_HELP,
    WRITTEN_HELP,
    answers_column,
    own_kl_entry,
    perplexity_entry,
    perplexity_text,
    quality_column,
    seed_count_entry,
    seeds_mean,
    spent_columns,
    task_kept_column,
    task_score_column,
)
from reports.tables.speculation import (
    ACCEPTED_HELP,
    DRAFTED_BY_HELP,
    LOSSLESS_HELP,
    MEAN_HELP,
    PLAIN_HELP,
    accepted_entry,
    check_count_entry,
    diverged_entry,
    drafted_by_entry,
    drafting_entry,
    forced_rates,
    lengths_entry,
    lossless_entry,
    plain_steps_entry,
    position_columns,
    speedup_entry,
    usual_draft_entry,
)
from reports.tables.speed import (
    DECODE_HELP,
    PAIRED_HELP,
    PREFILL_HELP,
    SAVED_HELP,
    arithmetic_entry,
    at_batch,
    at_category,
    at_context,
    cache_entry,
    ratio_of,
    saved_model_entry,
    shape_columns,
    spread_of,
    timed_entry,
)
from reports.tables.verdicts import VERDICT_HELP, verdict_entry, why_entry


def overview(report: Report) -> Table[Row]:
    """Every measured cell with the numbers that decide."""
    return table_of(
        report,
        report.rows,
        [
            Column("Verdict", "", VERDICT_HELP, verdict_entry),
            metric_column(
                "size",
                "Size",
                "MB",
                "Size of the weight files on disk.",
                PAGE.megabytes,
                show_gain=True,
                bar=True,
            ),
            metric_column(
                "decode", "Decode", "tok/s", DECODE_HELP, PAGE.number, show_gain=True, bar=True
            ),
            metric_column(
                "prefill", "Prefill", "tok/s", PREFILL_HELP, PAGE.number, show_gain="short"
            ),
            metric_column("saved", "Saved", "net, %", SAVED_HELP, PAGE.share),
            metric_column(
                "perplexity-ratio", "Perplexity", TIMES + " dense", RATIO_HELP, three_decimals
            ),
            metric_column("kl", "KL", "nats", KL_HELP, PAGE.number),
            metric_column("agreement", "Agree", "%", AGREE_HELP, PAGE.share),
            *(task_score_column(report, task, detail=False) for task in report.tasks),
            metric_column("retained", "Keeps", "%", retained_help(report), PAGE.share, bar="unit"),
            Column(
                "Accepted",
                "%",
                ACCEPTED_HELP + " The number below is the" + MEAN_HELP.lower(),
                accepted_entry,
            ),
            Column("Lossless", "", LOSSLESS_HELP, lossless_entry),
        ],
    )


def verdicts(report: Report) -> Table[Row]:
    """Every cell that was judged, with the sentence that says why."""
    rows = tuple(row for row in report.rows if row.cell.verdict is not None)
    columns = [
        Column("Verdict", "", VERDICT_HELP, verdict_entry),
        Column(
            "Why",
            "",
            "The evidence for the verdict; ranges are 95 % intervals.",
            why_entry,
            align="left",
        ),
    ]
    return table_of(report, rows, columns)


def quality(report: Report) -> Table[Row]:
    """Perplexity, distance to the dense model, and every task with its interval."""
    measured = tuple(row for row in report.rows if report.results.quality(row.cell) is not None)
    tasks = [(task_score_column(report, t, detail=True), task_kept_column(t)) for t in report.tasks]
    return table_of(
        report,
        measured,
        [
            Column(
                "Perplexity",
                perplexity_text(report),
                "Perplexity on the evaluation text. Lower is better.",
                perplexity_entry,
            ),
            metric_column(
                "perplexity-ratio", "Perplexity", TIMES + " dense", RATIO_HELP, three_decimals
            ),
            metric_column("kl", "KL", "mean", KL_HELP, PAGE.number),
            quality_column("KL", "median", "Median of the KL over tokens.", lambda q: q.kl_median),
            quality_column(
                "KL", "p90", "90th percentile of the KL over tokens.", lambda q: q.kl_p90
            ),
            metric_column("agreement", "Agree", "%", AGREE_HELP, PAGE.share),
            Column("Own answers", "KL", OWN_KL_HELP, own_kl_entry),
            answers_column("Common prefix", "tokens", PREFIX_HELP, lambda a: a.common_prefix),
            quality_column("Rounding", "KL", ROUNDING_HELP, lambda q: q.kl_of_rounding),
            *(column for pair in tasks for column in pair),
            *spent_columns(report),
            metric_column(
                "accuracy",
                "Tasks",
                "mean, %",
                "Mean of the task scores, with the same weight for each task.",
                PAGE.share,
            ),
            metric_column("written", "Written", "keeps, %", WRITTEN_HELP, PAGE.share),
            metric_column("ranked", "Ranked", "keeps, %", RANKED_HELP, PAGE.share),
            metric_column("retained", "Keeps", "%", retained_help(report), PAGE.share),
            Column("Calibrated on", "", SEEN_HELP, seen_entry, align="left"),
        ],
    )


SEEN_HELP = "The text on which the variant's weights, gates or drafts were calibrated or trained."


def seen_entry(report: Report, row: Row) -> Entry:
    """The text that a cell was fitted to."""
    seen = row.cell.fitted_to
    return Entry() if seen is None else Entry(", ".join(seen) or "no text")


def seeds(report: Report) -> Table[Row]:
    """Means over seeds, where a cell was run with several, and half their interval's width."""
    rows = tuple(row for row in report.rows if row.cell.seeds)
    shown = [
        ("saved", "Saved", "net, %", SAVED_HELP, PAGE.share),
        ("perplexity-ratio", "Perplexity", TIMES + " dense", RATIO_HELP, three_decimals),
        ("kl", "KL", "nats", KL_HELP, PAGE.number),
        ("agreement", "Agree", "%", AGREE_HELP, PAGE.share),
        (
            "accuracy",
            "Tasks",
            "mean, %",
            "Mean of the task scores, with the same weight for each task.",
            PAGE.share,
        ),
        ("retained", "Keeps", "%", retained_help(report), PAGE.share),
    ]
    count = Column(
        "Seeds",
        "",
        "Number of seeds with which the variant was made and measured.",
        seed_count_entry,
    )
    columns = [
        Column(head, unit, help, seeds_mean(name, show)) for name, head, unit, help, show in shown
    ]
    return table_of(report, rows, [count, *columns])


def speed(report: Report) -> Table[Row]:
    """Speed with quartiles and paired ratios, other batch sizes and contexts."""
    batches = [
        shape_columns(f"{TIMES}{b}", f"of a batch of {b}, all rows together.", at_batch(b))
        for b in report.batches
    ]
    contexts = [
        shape_columns(f"@{c}", f"after a prompt of {c} tokens.", at_context(c))
        for c in report.contexts
    ]
    categories = [
        shape_columns(c, f"of the prompts of category {c}.", at_category(c))
        for c in report.categories
    ]
    return table_of(
        report,
        report.rows,
        [
            Column("Decode", "tok/s", DECODE_HELP, spread_of("decode_tokens_per_s", PAGE.number)),
            Column("Decode", TIMES + " dense", PAIRED_HELP, ratio_of("decode_ratio")),
            Column(
                "Prefill", "tok/s", PREFILL_HELP, spread_of("prefill_tokens_per_s", PAGE.number)
            ),
            Column("Prefill", TIMES + " dense", PAIRED_HELP, ratio_of("prefill_ratio")),
            Column(
                "First token",
                "ms",
                "Time from the start of prefill to the first new token.",
                spread_of("ttft_s", milliseconds),
            ),
            Column(
                "Repeat",
                "s, shortest",
                "Duration of the shortest timed decoding round, in seconds.",
                timed_entry,
            ),
            *(column for shape in (*batches, *contexts, *categories) for column in shape),
        ],
    )


def memory(report: Report) -> Table[Row]:
    """Bytes on disk and in memory, and compute saved by every way to count it."""
    return table_of(
        report,
        report.rows,
        [
            metric_column(
                "size", "On disk", "MB", "Size of the weight files on disk.", PAGE.megabytes
            ),
            metric_column(
                "resident",
                "In memory",
                "MB",
                "Memory of the tensors of the loaded model. For other engines, the memory of the"
                " whole process.",
                PAGE.megabytes,
            ),
            metric_column(
                "peak", "Peak", "MB", "Peak memory of the variant's process.", PAGE.megabytes
            ),
            Column(
                "KV cache",
                "MB",
                "Memory of the KV cache at the largest batch size and length that were timed.",
                cache_entry,
            ),
            metric_column(
                "saved-gross",
                "Saved",
                "gross, %",
                "Share of compute saved, without subtracting the cost of gates.",
                PAGE.share,
            ),
            metric_column("saved", "Saved", "net, %", SAVED_HELP, PAGE.share),
            Column(
                "Saved",
                "model, %",
                "Net compute saved, as a share of the whole model's compute, including the LM"
                " head.",
                saved_model_entry,
            ),
        ],
    )


def arithmetic(report: Report) -> Table[Row]:
    """Backend, weights, activations and accumulation of each cell, decoding and scoring."""
    shown = [
        ("Backend", "", "The backend that runs the model.", arithmetic_entry("backend")),
        ("Weights", "", "The format in which weights are stored.", arithmetic_entry("weights")),
        (
            "Activations",
            "decoding",
            "Data type of the activations in decoding.",
            arithmetic_entry("activations"),
        ),
        (
            "Activations",
            "scoring",
            "Data type of the activations in prefill and scoring.",
            arithmetic_entry("activations", scoring=True),
        ),
        (
            "Sums",
            "",
            "The data type in which products are summed.",
            arithmetic_entry("accumulation"),
        ),
        (
            "Chosen by timing",
            "",
            "Choices that were made by timing on this machine.",
            choices_entry,
        ),
    ]
    return table_of(report, report.rows, [Column(*column, align="left") for column in shown])


def choices_entry(report: Report, row: Row) -> Entry:
    """What a stopwatch chose once on this machine for the cell."""
    words = ", ".join(f"{name}: {choice}" for name, choice in (row.cell.choices or {}).items())
    return Entry(words, sort=words) if words else Entry()


def speculation(report: Report) -> Table[Row]:
    """What each speculative cell did in its timed rounds."""
    rows = tuple(row for row in report.rows if row.cell.speculation is not None)
    return table_of(
        report,
        rows,
        [
            Column(
                "Speed-up",
                "over plain",
                "Decode speed divided by the decode speed of the same weights without drafts.",
                speedup_entry,
            ),
            Column("Drafted by", "% of drafts", DRAFTED_BY_HELP, drafted_by_entry),
            Column("Plain steps", "%", PLAIN_HELP, plain_steps_entry),
            metric_column("acceptance", "Accepted", "%", ACCEPTED_HELP, PAGE.share, bar="unit"),
            metric_column("accepted", "Mean", "tokens/pass", MEAN_HELP, PAGE.number),
            Column(
                "Draft length",
                "most often",
                "Most frequent number of tokens in a draft.",
                usual_draft_entry,
            ),
            *position_columns(rows),
            Column(
                "Drafting",
                "% of time",
                "Share of the decoding time spent on drafting; the rest is verification.",
                drafting_entry,
            ),
        ],
    )


def lossless(report: Report) -> Table[Row]:
    """The lossless check of each speculative cell: another measurement, with forced lengths."""
    rows = tuple(row for row in report.rows if row.cell.lossless_check is not None)
    forced = Column(
        "Draft length",
        "forced",
        "Fixed number of tokens in each draft of the check.",
        check_count_entry("forced_draft_length"),
    )
    accepted = Column(
        "Accepted",
        "%, forced",
        "Share of drafted tokens that were accepted in the check, with the fixed draft length.",
        _forced_rate,
    )
    return table_of(
        report,
        rows,
        [
            Column("Lossless", "", LOSSLESS_HELP, diverged_entry),
            Column(
                "Prompts",
                "",
                "Number of prompts on which the answers were compared.",
                check_count_entry("prompts"),
            ),
            Column(
                "Tokens",
                "",
                "Number of new tokens that were compared.",
                check_count_entry("tokens"),
            ),
            Column(
                "Diverged",
                "prompts",
                "Number of prompts whose answers differ.",
                check_count_entry("divergences"),
            ),
            forced,
            Column(
                "Passes",
                "forced",
                "Number of passes for each draft length.",
                lengths_entry("forced_draft_length_histogram"),
            ),
            Column(
                "Passes",
                "own lengths",
                "Number of passes for each draft length.",
                lengths_entry("own_draft_length_histogram"),
            ),
            accepted,
            *position_columns(rows, forced_rates),
        ],
    )


def _forced_rate(report: Report, row: Row) -> Entry:
    check = row.cell.lossless_check
    if check is None or check.acceptance_rate is None:
        return Entry()
    ends = check.acceptance_rate_ci95
    return Entry(
        PAGE.share(check.acceptance_rate),
        PAGE.span(*ends, PAGE.share) if ends else "",
        check.acceptance_rate,
    )
