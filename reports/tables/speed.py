"""Columns of speed, memory, compute and arithmetic."""

from __future__ import annotations

from collections.abc import Callable

from compose.numbers import PAGE, TIMES, unless_one
from compose.results.parts import Estimate, Measured, SpeedNumbers
from compose.table import Entry
from reports.load import Report, Row
from reports.tables.columns import Column, Make

DECODE_HELP = (
    "New tokens per second with a batch size of 1, median over the rounds. The number below is"
    " this speed divided by the dense model's speed in the same rounds, with its 95 % interval."
)
PREFILL_HELP = (
    "Prompt tokens per second with a batch size of 1. The number below is this speed divided by"
    " the dense model's speed."
)
SAVED_HELP = (
    "Share of the multiply-adds of the dense model's layers that is pruned or skipped. The cost of"
    " gates, of shortcuts, and of the keys and values of skipping tokens is subtracted."
)
PAIRED_HELP = (
    "Speed divided by the dense model's speed in the same rounds. The number below is the 95 %"
    " interval."
)

Read = Callable[[Row], SpeedNumbers | None]


def at_main(row: Row) -> SpeedNumbers | None:
    """Batch 1 at the main context."""
    return row.cell.speed


def at_batch(batch: int) -> Read:
    """Another batch size."""
    return lambda row: (
        None if row.cell.speed is None else (row.cell.speed.by_batch or {}).get(batch)
    )


def at_context(context: int) -> Read:
    """Another prompt length."""
    return lambda row: (
        None if row.cell.speed is None else (row.cell.speed.by_context or {}).get(context)
    )


def at_category(category: str) -> Read:
    """One category of prompts."""
    return lambda row: (
        None if row.cell.speed is None else (row.cell.speed.by_category or {}).get(category)
    )


def cache_entry(report: Report, row: Row) -> Entry:
    """Bytes of the KV cache, in MB."""
    held = None if row.cell.size is None else row.cell.size.cache_bytes
    return Entry() if held is None else Entry(PAGE.megabytes(held), sort=held)


def spread_of(name: str, show: Callable[[float], str], read: Read = at_main) -> Make:
    """The entry of a speed: its median, and below it the quartiles of the repeats."""

    def make(report: Report, row: Row) -> Entry:
        numbers = read(row)
        measured: Measured | None = None if numbers is None else getattr(numbers, name)
        if measured is None:
            return Entry()
        note = "" if measured.quartiles is None else PAGE.span(*measured.quartiles, show)
        return Entry(show(measured.median), note, measured.median)

    return make


def ratio_of(name: str, read: Read = at_main) -> Make:
    """The entry of a paired ratio to the baseline, or "no difference", with its interval below."""

    def make(report: Report, row: Row) -> Entry:
        numbers = read(row)
        ratio: Estimate | None = None if numbers is None else getattr(numbers, name)
        if ratio is None or row.is_baseline:
            return Entry()
        text = unless_one(PAGE.times(ratio.value), ratio.ci95)
        return Entry(text, PAGE.span(*ratio.ci95, PAGE.near_one), ratio.value)

    return make


def shape_columns(head: str, help: str, read: Read) -> list[Column]:
    """Decode and prefill speed of one shape, each with its ratio to the baseline."""
    return [
        Column(
            f"Decode {head}",
            "tok/s",
            f"Decode {help}",
            spread_of("decode_tokens_per_s", PAGE.number, read),
        ),
        Column(f"Decode {head}", f"{TIMES} dense", PAIRED_HELP, ratio_of("decode_ratio", read)),
        Column(
            f"Prefill {head}",
            "tok/s",
            f"Prefill {help}",
            spread_of("prefill_tokens_per_s", PAGE.number, read),
        ),
    ]


def timed_entry(report: Report, row: Row) -> Entry:
    """How long the shortest timed repeat lasted, and how many there were."""
    lasted = None if row.cell.speed is None else row.cell.speed.repeat_s
    if not lasted:
        return Entry()
    return Entry(PAGE.number(min(lasted)), f"{PAGE.whole(len(lasted))} repeats", min(lasted))


def arithmetic_entry(field: str, *, scoring: bool = False) -> Make:
    """The entry of a field of the cell's arithmetic, of decoding or of scoring."""

    def make(report: Report, row: Row) -> Entry:
        arithmetic = row.cell.scoring_arithmetic if scoring else row.cell.arithmetic
        if arithmetic is None:
            return Entry()
        text = getattr(arithmetic, field)
        return Entry(text, sort=text)

    return make


def saved_model_entry(report: Report, row: Row) -> Entry:
    """Net share of the whole model's multiply-adds saved, the LM head counted."""
    saved = None if row.cell.compute is None else row.cell.compute.saved_model
    return Entry() if saved is None else Entry(PAGE.share(saved), "", saved)
