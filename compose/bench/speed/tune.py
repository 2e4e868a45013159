"""`gateskip tune-draft`: finds the draft that decodes a folder fastest on the user's own prompts.

The candidates are every kind of draft at every calibrated budget. A first round on a few prompts
selects the fastest. Further candidates are made of the best draft that skips: other allocations of
its budget over branches, calibrated on the prompts and their answers. A second round on all prompts
decides. Plain decoding runs in both rounds, and wins where no draft is faster. Verification makes
every candidate give the same text, so only speed is compared.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import gateskip
from compose.analysis.intervals import exp_t_interval
from compose.artifacts.folder import LINEAGE, lineage, write_lineage
from compose.bench.speed.measurement import Measurement, measure, runners_of
from compose.bench.speed.systems import parse_system
from compose.bench.speed.workloads import Workloads, prompts_by_category
from compose.results.record import Estimate
from compose.store import read_json, write_json
from compose.units import Progress
from gateskip.calibration.settings import ALLOCATIONS
from gateskip.calibration.thresholds import calibrate
from gateskip.checkpoint import META_FILE, load_gates, save_gates
from gateskip.decoding.decoder import Decoder
from gateskip.decoding.draft_models import draft_copies

PLAIN = "plain"
FIRST_PROMPTS, FINALISTS = 4, 3  # prompts of the first round, and drafts that go on to the second
BLOCK, MAX_BLOCKS = 128, 16  # of the user's text, for calibration


def tune(
    folder: Path,
    prompts: str,
    limit: int | None = None,
    new_tokens: int = 64,
    repeats: int = 3,
    write: bool = True,
    progress: Progress | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Time the candidates on `prompts`; with `write`, the best becomes the folder's setting.

    Returns `best`, its `speedup` over plain decoding with an interval from pairs of the repeats
    (`speedup_ci95`, None with one repeat), and the measurements of the `first` and the `second`
    round. Where the interval includes 1, no draft is shown to be faster, and plain is best.

    Raises:
        AssetError: the prompts are not available.
    """
    decoder: Decoder = gateskip.load(folder)
    workloads = prompts_by_category(decoder.tokenizer, prompts, limit, cache)
    names = candidates(decoder)
    few = _first(workloads, FIRST_PROMPTS)
    runners = runners_of(decoder, [PLAIN, *names])
    first = measure(runners, few, new_tokens, 1, progress)
    ranked = sorted(names, key=lambda name: -speedup(first, name))
    finalists = {name: runners[name] for name in (PLAIN, *ranked[:FINALISTS])}
    own_thresholds: dict[str, list[float]] = {}  # of finalists with another allocation
    if skipping := [name for name in ranked if decode_of(name)["draft_budget"] < 1][:1]:
        own_thresholds = allocated(decoder, folder, workloads, skipping[0], new_tokens)
    for name, row in own_thresholds.items():
        other = with_thresholds(decoder, decode_of(name)["draft_budget"], row)
        (finalists[name],) = runners_of(other, [name.split()[0]]).values()
    second = measure(finalists, workloads, new_tokens, repeats, progress)
    best = max(finalists, key=lambda name: speedup(second, name))
    interval = speedup_interval(second, best)
    if interval is not None and interval.low <= 1:
        best, interval = PLAIN, None
    if write:
        write_decode(
            folder, decode_of(best), speedup(second, best), prompts, own_thresholds.get(best)
        )
    return {
        "best": best,
        "decode": decode_of(best),
        "speedup": speedup(second, best),
        "speedup_ci95": None if interval is None else interval.ci95,
        "first": [entry.to_json() for entry in first],
        "second": [entry.to_json() for entry in second],
        "written": write,
    }


def candidates(decoder: Decoder) -> list[str]:
    """Every draft that this folder supports, as systems of `gateskip bench`."""
    budgets = [1.0, *sorted((b for b in decoder.grid if b < 1.0), reverse=True)]
    kinds = ["", *(["+int4-head"] if decoder.skipping.engine else [])]
    kinds += [f"+{name}" for name in draft_copies(decoder.skipping)]
    names = []
    for kind in kinds:
        for budget in budgets:
            for extra in ("", "+lookup"):
                itself = budget == 1.0 and kind in ("", "+int4-head")
                if extra or not itself:  # the model itself is not a draft
                    names.append(f"draft:{budget:g}{kind}{extra}")
    learned = ["draft:1+learned", "draft:1+learned+lookup"]  # it skips nothing
    return names if decoder.network is None else [*learned, *names]


def allocated(
    decoder: Decoder, folder: Path, workloads: Workloads, name: str, new_tokens: int
) -> dict[str, list[float]]:
    """Name -> thresholds of a skipping draft's budget under every possible allocation."""
    file = load_gates(folder)
    assert file is not None, "a folder that skips has gates"
    rows = [row for groups in workloads.values() for rows in groups for row in rows]
    answered = [[*row, *decoder.generate([row], new_tokens).tokens[0]] for row in rows]
    text = torch.tensor([token for row in answered for token in row])
    count = max(1, min(MAX_BLOCKS, len(text) // BLOCK))
    blocks = text[: count * BLOCK].view(count, -1)
    thresholds = {}
    for allocation in ALLOCATIONS:
        if allocation == "sensitivity" and file.sensitivity is None:
            continue
        (row,) = calibrate(
            decoder.skipping.model,
            file.gates,
            blocks,
            [decode_of(name)["draft_budget"]],
            allocation,
            file.kv_rule,
            file.sensitivity,
        )
        thresholds[f"{name} {allocation}"] = list(row.thresholds)
    return thresholds


def with_thresholds(decoder: Decoder, budget: float, row: Sequence[float]) -> Decoder:
    """The same decoder with other thresholds for a budget."""
    other = copy.copy(decoder)
    other.grid = {**decoder.grid, budget: list(row)}
    other.forget_draft_costs()
    return other


def _first(workloads: Workloads, count: int) -> Workloads:
    """The first prompt of up to `count` workloads, spread over all of them."""
    step = max(1, math.ceil(len(workloads) / count))
    return {name: workloads[name][:1] for name in islice(workloads, 0, None, step)}


def speedup(measurements: Sequence[Measurement], name: str) -> float:
    """Tokens a second over plain decoding's: the geometric mean over repeats and workloads."""
    return math.exp(statistics.mean(_log_ratios(measurements, name)))


def speedup_interval(measurements: Sequence[Measurement], name: str) -> Estimate | None:
    """The same with a 95 % interval from the repeats; None for plain, or with fewer than two
    repeats."""
    logs = _log_ratios(measurements, name)
    return None if name == PLAIN or len(logs) < 2 else exp_t_interval(logs)


def _log_ratios(measurements: Sequence[Measurement], name: str) -> list[float]:
    """For each repeat the log of the ratio to plain decoding, mean over the workloads."""
    plain = {entry.workload: entry.decode for entry in measurements if entry.system == PLAIN}
    ratios = [
        [
            math.log(rate / base)
            for rate, base in zip(entry.decode, plain[entry.workload], strict=True)
        ]
        for entry in measurements
        if entry.system == name
    ]
    return [statistics.mean(repeat) for repeat in zip(*ratios, strict=True)]


def decode_of(name: str) -> dict[str, Any]:
    """A system as decode settings of a folder."""
    if name == PLAIN:
        return {"mode": "plain"}
    return parse_system(name.split()[0]).settings | {"draft_length": "auto"}


def write_decode(
    folder: Path,
    decode: Mapping[str, Any],
    gain: float,
    prompts: str,
    thresholds: Sequence[float] | None = None,
) -> None:
    """Write `decode` into the folder's settings, and into its lineage where it has one. Also write
    the thresholds of its budget where they were calibrated again."""
    if thresholds is not None:
        file = load_gates(folder)
        assert file is not None, "a folder that skips has gates"
        file.grid[decode["draft_budget"]] = list(thresholds)
        save_gates(folder, file)
    settings = read_json(folder / META_FILE) or {}
    write_json(folder / META_FILE, {**settings, "decode": decode})
    if (folder / LINEAGE).is_file():
        before = lineage(folder)
        entry = {
            "name": "tune-draft",
            "use": "tune-draft",
            "parameters": {"decode": decode, "speedup": round(gain, 3), "prompts": prompts},
            "input_sha256": before[-1]["output_sha256"],
        }
        write_lineage(folder, entry, before)
