"""`gateskip tune-draft`: which draft decodes a folder fastest on the user's own prompts.

The candidates are every kind of draft at every calibrated budget. A first round on a few prompts
leaves the better part of them. The best that skips is joined by others that share its budget out
among branches in other ways, calibrated on the prompts and their answers; a second round on all
prompts decides. Plain decoding runs in both, and wins where no draft pays. Verification makes every
candidate give the same text, so only speed is compared.
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
from compose.artifacts.folder import LINEAGE, lineage, write_lineage
from compose.bench.race import Courses, Lap, Progress, contender, courses_of, run_laps, runners_of
from compose.store import read_json, write_json
from gateskip.calibration.settings import ALLOCATIONS
from gateskip.calibration.thresholds import calibrate
from gateskip.checkpoint import META_FILE, load_gates, save_gates
from gateskip.decoding.decoder import Decoder

PLAIN = "plain"
FIRST_PROMPTS, LEFT = 4, 3  # prompts of the first round, and candidates that it leaves
BLOCK, MOST_BLOCKS = 128, 16  # tokens of the user's text that calibrate, and how often


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
    """Time the candidates on `prompts`, and unless told not to, make the best the folder's way.

    Returns `best`, its `speedup` over plain decoding (median over repeats), both rounds' `laps`.

    Raises:
        AssetError: the prompts cannot be had.
    """
    decoder: Decoder = gateskip.load(folder)
    courses = courses_of(decoder, prompts, limit, cache)
    names = candidates(decoder)
    few = _first(courses, FIRST_PROMPTS)
    runners = runners_of(decoder, folder, [PLAIN, *names], courses, new_tokens)
    first = run_laps(runners, few, new_tokens, 1, progress)
    ranked = sorted(names, key=lambda name: -speedup(first, name))
    finalists = {name: runners[name] for name in (PLAIN, *ranked[:LEFT])}
    shared: dict[str, list[float]] = {}  # finalist -> thresholds of its own
    if skipping := [name for name in ranked if decode_of(name)["draft_budget"] < 1][:1]:
        shared = allocated(decoder, folder, courses, skipping[0], new_tokens)
    for name, row in shared.items():
        other = with_thresholds(decoder, decode_of(name)["draft_budget"], row)
        (finalists[name],) = runners_of(
            other, folder, [name.split()[0]], courses, new_tokens
        ).values()
    second = run_laps(finalists, courses, new_tokens, repeats, progress)
    best = max(finalists, key=lambda name: speedup(second, name))
    if write:
        settle(folder, decode_of(best), speedup(second, best), prompts, shared.get(best))
    return {
        "best": best,
        "decode": decode_of(best),
        "speedup": speedup(second, best),
        "first": [lap.to_json() for lap in first],
        "second": [lap.to_json() for lap in second],
        "written": write,
    }


def candidates(decoder: Decoder) -> list[str]:
    """Every draft that this folder can make, as contenders of `gateskip bench`."""
    budgets = [1.0, *sorted((b for b in decoder.grid if b < 1.0), reverse=True)]
    kinds = ["", *(["+int4-head"] if decoder.skipping.engine else [])]
    kinds += ["+int4", "+nf4"] if _has_twin(decoder) else []
    names = []
    for kind in kinds:
        for budget in budgets:
            for extra in ("", "+lookup"):
                itself = budget == 1.0 and kind in ("", "+int4-head")
                if extra or not itself:  # a draft that is the model itself is none
                    names.append(f"draft:{budget:g}{kind}{extra}")
    return names


def allocated(
    decoder: Decoder, folder: Path, courses: Courses, name: str, new_tokens: int
) -> dict[str, list[float]]:
    """Name -> thresholds of a skipping draft's budget, shared out in every way that can be."""
    file = load_gates(folder)
    assert file is not None, "what skips has gates"
    rows = [row for groups in courses.values() for rows in groups for row in rows]
    answered = [[*row, *decoder.generate([row], new_tokens).tokens[0]] for row in rows]
    text = torch.tensor([token for row in answered for token in row])
    count = max(1, min(MOST_BLOCKS, len(text) // BLOCK))
    blocks = text[: count * BLOCK].view(count, -1)
    found = {}
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
        found[f"{name} {allocation}"] = list(row.thresholds)
    return found


def with_thresholds(decoder: Decoder, budget: float, row: Sequence[float]) -> Decoder:
    """The same decoder, except that a budget means these thresholds."""
    other = copy.copy(decoder)
    other.grid, other.paces = {**decoder.grid, budget: list(row)}, {}
    return other


def _has_twin(decoder: Decoder) -> bool:
    try:
        decoder.drafter("nf4")
    except ValueError:
        return False
    return True


def _first(courses: Courses, count: int) -> Courses:
    """The first prompt of up to `count` courses, spread over all of them."""
    step = max(1, math.ceil(len(courses) / count))
    return {name: courses[name][:1] for name in islice(courses, 0, None, step)}


def speedup(laps: Sequence[Lap], name: str) -> float:
    """Tokens a second of a contender over plain decoding's, geometric mean over the courses."""
    plain = {lap.course: lap for lap in laps if lap.contender == PLAIN}
    ratios = [
        statistics.median(lap.decode) / statistics.median(plain[lap.course].decode)
        for lap in laps
        if lap.contender == name
    ]
    return statistics.geometric_mean(ratios)


def decode_of(name: str) -> dict[str, Any]:
    """A contender as the folder's own way of decoding."""
    if name == PLAIN:
        return {"mode": "plain"}
    return contender(name.split()[0]).settings | {"draft_length": "auto"}


def settle(
    folder: Path,
    decode: Mapping[str, Any],
    gained: float,
    prompts: str,
    thresholds: Sequence[float] | None = None,
) -> None:
    """Write `decode` into the folder's settings, and into its lineage where it has one; with them
    the thresholds of its budget, where those were found anew."""
    if thresholds is not None:
        file = load_gates(folder)
        assert file is not None, "what skips has gates"
        file.grid[decode["draft_budget"]] = list(thresholds)
        save_gates(folder, file)
    settings = read_json(folder / META_FILE) or {}
    write_json(folder / META_FILE, {**settings, "decode": decode})
    if (folder / LINEAGE).is_file():
        before = lineage(folder)
        entry = {
            "name": "tune-draft",
            "use": "tune-draft",
            "parameters": {"decode": decode, "speedup": round(gained, 3), "prompts": prompts},
            "input_sha256": before[-1]["output_sha256"],
        }
        write_lineage(folder, entry, before)
