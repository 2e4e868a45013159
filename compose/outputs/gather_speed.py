"""Turns the rounds of a speed session into the timed parts of a cell's result.

Every ratio is taken round by round: a cell's speed over that of another cell in the same round,
when the machine was in the same state for both.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from compose.analysis.intervals import paired_speed_ratio, ratio_of_sums
from compose.analysis.spread import Kind, Spread, spread_in, widened
from compose.bench.speed.workloads import add_counts, add_speculation, mean_compute
from compose.outputs.sessions import Numbers, Session, Shape
from compose.results.parts import Estimate

SPEED_NUMBERS = ("prefill_tokens_per_s", "decode_tokens_per_s", "ttft_s")
SIZES = ("resident_bytes", "peak_bytes", "cache_bytes", "beside_bytes")
RATIOS: dict[str, tuple[Kind, str]] = {
    "decode_ratio": ("decode", "decode_tokens_per_s"),
    "prefill_ratio": ("prefill", "prefill_tokens_per_s"),
}

Pairs = Sequence[tuple[Numbers, Numbers]]
"""The numbers of two cells in the same rounds, in the order of the rounds."""


def timed_parts(
    session: Session, name: str, baseline: str, plain: str | None
) -> dict[str, dict[str, Any]]:
    """Sections of a cell's result: `speed`, and `size`, `compute`, `speculation` where timed.

    Speeds are compared with the cell `baseline`, and speculation also with `plain`, the cell with
    the same weights and plain decoding. Empty where no round has the cell.
    """
    main = session.main(name)
    if not main:
        return {}
    parts: dict[str, dict[str, Any]] = {"speed": _speed(session, name, baseline)}
    every = [numbers for repeats in session.of_cell(name).values() for numbers in repeats]
    size = {field: _largest(every, field) for field in SIZES}
    parts["size"] = {field: value for field, value in size.items() if value}
    saved = [numbers["compute"] for numbers in main if "compute" in numbers]
    if saved:
        parts["compute"] = mean_compute(saved)
    if "speculation" in main[0]:
        rounds = [numbers["speculation"] for numbers in main]
        parts["speculation"] = speculation_of(add_speculation(rounds)) | _by_round(rounds)
        if plain is not None:
            pairs, spread = session.main_paired(name, plain), spread_in(session.environment)
            ratio = _ratio(pairs, "decode", "decode_tokens_per_s", spread)
            parts["speculation"] |= _speedup(session, name, plain, ratio)
    return parts


def speculation_of(counts: dict[str, Any]) -> dict[str, Any]:
    """The fields of `compose.results.parts.Speculation` from counts of timed passes.

    `counts` come from `bench.speed.turns.add_speculation`. A step is a pass of the whole model; it
    is plain where nothing was drafted.
    """
    histogram = counts["draft_length_histogram"]
    lengths = {int(length): int(times) for length, times in histogram.items()}
    steps, drafted, passes = sum(lengths.values()), counts["drafted"], counts["passes"]
    plain = lengths.get(0, 0) / steps if steps else None
    tried = [(reached, accepted) for reached, accepted in counts["positions"] if reached]
    return {
        "draft_weights": counts.get("draft_weights"),
        "draft_length_histogram": dict(sorted(lengths.items())),
        "acceptance_rate": counts["accepted"] / drafted if drafted else None,
        "mean_accepted_tokens": 1 + counts["accepted"] / passes if passes else None,
        "acceptance_by_position": [accepted / reached for reached, accepted in tried],
        "plain_steps": plain,
        "fell_back": None if plain is None else plain > 0.5,
        "looked_up_share": counts["looked_up"] / drafted if drafted else None,
        "draft_s": counts["draft_s"],
        "verify_s": counts["verify_s"],
    }


def _by_round(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts of drafted, accepted and verified tokens in each round, with intervals over rounds."""
    drafted, accepted, passes = (
        [counts[name] for counts in rounds] for name in ("drafted", "accepted", "passes")
    )
    fields: dict[str, Any] = {"drafts_by_round": list(zip(drafted, accepted, passes, strict=True))}
    if rate := ratio_of_sums(accepted, drafted, most=1.0):
        fields["acceptance_rate_ci95"] = rate.ci95
    if gained := ratio_of_sums(accepted, passes):
        fields["mean_accepted_tokens_ci95"] = (1 + gained.low, 1 + gained.high)
    return fields


def _speedup(session: Session, name: str, plain: str, ratio: Estimate | None) -> dict[str, Any]:
    if ratio is not None:
        return {"speedup": ratio.value, "speedup_ci95": ratio.ci95}
    speed, other = (_median(session.main(cell), "decode_tokens_per_s") for cell in (name, plain))
    return {"speedup": speed / other} if speed and other else {}


def _speed(session: Session, name: str, baseline: str) -> dict[str, Any]:
    """The main shape, and the others by batch, context or category."""
    related, spread = name != baseline, spread_in(session.environment)
    by_shape = {
        shape: _numbers(repeats, session.paired(name, baseline).get(shape, []), related, spread)
        for shape, repeats in session.of_cell(name).items()
    }
    main, pairs = session.main_shape, session.main_paired(name, baseline)
    speed: dict[str, Any] = {}
    if main is None or main.batch == 1:
        speed = _numbers(session.main(name), pairs, related, spread)
    if main is not None and main.batch == 1:
        del by_shape[main]
    texts = [repeat["digest"] == base["digest"] for repeat, base in pairs if repeat.get("digest")]
    for field in ("threads", "affinity"):
        if (most := _largest(session.main(name), field)) is not None:
            speed[field] = most
    if related and texts:
        speed["equal_to_baseline"] = all(texts)
    for shape, numbers in by_shape.items():
        section, key = _place(shape)
        speed.setdefault(section, {})[key] = numbers
    return speed


def _place(shape: Shape) -> tuple[str, int | str]:
    """The field and the key at which the result keeps the numbers of a shape."""
    if shape.category:
        return "by_category", shape.category
    return ("by_batch", shape.batch) if shape.batch != 1 else ("by_context", shape.context)


def _numbers(
    repeats: Sequence[Numbers], pairs: Pairs, related: bool, spread: Spread | None
) -> dict[str, Any]:
    """The fields of `compose.results.parts.SpeedNumbers` from the repeats of one shape."""
    numbers: dict[str, Any] = {}
    for name in SPEED_NUMBERS:
        values = [repeat[name] for repeat in repeats if repeat.get(name) is not None]
        if values:
            numbers[name] = measured(values)
    lasted = [repeat["decode_s"] for repeat in repeats if repeat.get("decode_s") is not None]
    if lasted:
        numbers["repeat_s"] = lasted
    if spent := [repeat["spent"] for repeat in repeats if "spent" in repeat]:
        numbers["time_split"] = _time_split(add_counts(spent), sum(lasted))
    if related:
        ratios = {field: _ratio(pairs, *what, spread) for field, what in RATIOS.items()}
        numbers |= {field: ratio for field, ratio in ratios.items() if ratio is not None}
    return numbers


def measured(values: Sequence[float]) -> dict[str, Any]:
    """The fields of `compose.results.parts.Measured`: median, quartiles and the repeats."""
    fields: dict[str, Any] = {"median": statistics.median(values), "repeats": list(values)}
    if len(values) > 1:
        first, _, third = statistics.quantiles(values, n=4, method="inclusive")
        fields["quartiles"] = (first, third)
    return fields


def _ratio(pairs: Pairs, kind: Kind, name: str, spread: Spread | None) -> Estimate | None:
    """Ratio of its speed to the other cell's, where both have at least two rounds in common."""
    both = [(row[name], base[name]) for row, base in pairs if row.get(name) and base.get(name)]
    if len(both) < 2:
        return None
    speeds, base = zip(*both, strict=True)
    ratio = paired_speed_ratio(speeds, base)
    return None if ratio is None else widened(ratio, kind, spread)


def _time_split(spent: dict[str, float], decode_s: float) -> dict[str, float]:
    """Shares of the decoding time: by part of the native work, and of the Python around it."""
    if not decode_s:
        return {}
    shares = {part: seconds / decode_s for part, seconds in spent.items()}
    return shares | {"python": 1 - sum(shares.values())}


def _median(repeats: Sequence[Numbers], name: str) -> float | None:
    values = [repeat[name] for repeat in repeats if repeat.get(name) is not None]
    return statistics.median(values) if values else None


def _largest(repeats: Sequence[Numbers], name: str) -> Any:
    return max((repeat[name] for repeat in repeats if repeat.get(name) is not None), default=None)
