"""What a report says of the run as a whole: stages, peers, gates, curves, noise, environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compose.numbers import DASH, PAGE, TIMES, bytes_text, duration_text
from compose.results.parts import SkippingFigures
from compose.table import Table, text_table
from reports.load import Report


def stages(report: Report) -> Table[None]:
    """Each step that made weights, once: what it ran on, its time, its peak memory, its cells."""
    steps: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in report.rows:
        cell = row.cell
        uses = {step.name: step.use for step in cell.steps or ()}
        seconds = cell.step_seconds or {}
        peaks = cell.step_peak_bytes or {}
        for place, name in enumerate(cell.chain, 1):
            if name not in seconds and name not in peaks:
                continue
            entry = steps.setdefault(cell.chain[:place], {"use": uses.get(name, ""), "cells": 0})
            entry |= {"seconds": seconds.get(name), "peak": peaks.get(name)}
            entry["cells"] += 1
    rows = [
        (
            "+".join(chain),
            step["use"],
            DASH if step["seconds"] is None else duration_text(step["seconds"]),
            DASH if step["peak"] is None else bytes_text(step["peak"]),
            str(step["cells"]),
        )
        for chain, step in steps.items()
    ]
    return text_table(("Chain", "Stage", "Time", "Peak memory", "Variants"), rows)


def peers(report: Report) -> Table[None]:
    """Other engines: how each was run."""
    rows = []
    for row in report.peers:
        peer = row.cell.peer
        assert peer is not None
        versions = ", ".join(f"{name} {version}" for name, version in (peer.versions or {}).items())
        parts = (peer.settings, versions, peer.flags)
        threads = DASH if peer.threads is None else str(peer.threads)
        rows.append((row.cell.name, threads, *(part or DASH for part in parts)))
    return text_table(("Variant", "Threads", "How it is run", "Versions", "Build"), rows)


def curves(report: Report) -> Table[None]:
    """The paper's figures by its own definition, and beside them by ours."""
    shown = [
        (f"{curve.weights}, {curve.kind} tasks", words, figures)
        for curve in report.results.skipping_curves or ()
        for words, figures in (("published", curve.published), ("ours", curve.ours))
        if figures is not None
    ]
    steps = sorted({step for _, _, figures in shown for step in figures.accuracy_at})
    rows = [
        (name, words, _saved_at_90(figures), *(_share_at(figures, step) for step in steps))
        for name, words, figures in shown
    ]
    heads = ("Weights", "Definition", "Saved @90 %", *(f"{step} %" for step in steps))
    return text_table(heads, rows)


def _share_at(figures: SkippingFigures, step: int) -> str:
    return PAGE.percent(figures.accuracy_at[step]) if step in figures.accuracy_at else DASH


def _saved_at_90(figures: SkippingFigures) -> str:
    return (
        "no point keeps 90 %" if figures.saved_at_90 is None else PAGE.percent(figures.saved_at_90)
    )


def noise_floor(report: Report) -> str:
    """What the dense model in another float type changes, in a sentence; empty if not measured."""
    quality = None if report.baseline is None else report.results.quality(report.baseline.cell)
    floor = None if quality is None else quality.noise_floor
    if floor is None:
        return ""
    parts = [
        None if floor.kl is None else f"KL {PAGE.number(floor.kl)}",
        None if floor.ratio is None else f"perplexity {TIMES}{floor.ratio:.4f}",
        None
        if floor.greedy_agreement is None
        else f"agreement {PAGE.percent(floor.greedy_agreement)}",
    ]
    words = ", ".join(part for part in parts if part)
    noise = f"Noise floor: computed in {floor.dtype}, the dense model has {words}."
    return f"{noise} Differences below the noise floor are rounding errors."


def contamination(report: Report) -> list[tuple[str, int, int]]:
    """Scored texts and tasks: rows, and how many share a 13-gram with a training text."""
    baseline = report.results.find(report.results.baseline)
    quality = None if baseline is None else baseline.quality
    shares = None if quality is None else quality.contamination
    return [(name, counts.rows, counts.contaminated) for name, counts in (shares or {}).items()]


def insight(report: Report) -> Table[None]:
    """For every cell that skips: the share of the branches' compute that each kind of token got."""
    rows = [
        (row.cell.name, row.cell.insight) for row in report.rows if row.cell.insight is not None
    ]
    kinds = list(dict.fromkeys(kind for _, record in rows for kind in record.kinds))
    seen = {kind: record.kinds[kind].tokens for _, record in rows for kind in record.kinds}
    heads = [f"{kind}, {PAGE.whole(seen[kind])} tokens" for kind in kinds]
    shares = [
        tuple(PAGE.percent(record.kinds[k].compute) if k in record.kinds else DASH for k in kinds)
        for _, record in rows
    ]
    lines = tuple((name, *texts) for (name, _), texts in zip(rows, shares, strict=True))
    return text_table(("Variant", *heads), lines)


def fingerprints(report: Report) -> list[tuple[str, str]]:
    """Phase -> the fingerprints of code and versions that measured it, most frequent first."""
    phases: dict[str, dict[str, int]] = {}
    for row in report.rows:
        for phase, digits in (row.cell.fingerprint or {}).items():
            seen = phases.setdefault(phase, {})
            seen[digits] = seen.get(digits, 0) + 1
    return [
        (phase, ", ".join(sorted(seen, key=lambda digits: -seen[digits])))
        for phase, seen in phases.items()
    ]


def environment(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and text of what is known of the machine, in reading order; unknown keys last."""
    labels = {
        "processor": "Processor",
        "accelerator": "Accelerator",
        "cores": "Cores",
        "threads": "Threads",
        "memory_bytes": "Memory",
        "cpu_features": "Instructions",
        "load_average": "Load",
        "roofline": "Hardware limits",
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
        return ", ".join(f"{name} {_plain_text('', item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain_text("", item) for item in value)
    return PAGE.number(value) if isinstance(value, float) else str(value)
