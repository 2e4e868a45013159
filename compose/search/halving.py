"""Successive halving: many chains on a few tokens, few chains on the file's own benchmark.

After a rung a chain is dropped for two reasons only. Its interval lies wholly beyond a bound; or
enough chains that surely meet every bound are better in the aim. A chain whose interval still
reaches the bound is never dropped for the bound, and no other chain is dropped because of it: the
next rung, with four times the tokens, decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from compose.language.schema import Benchmark, Chain, Lossless, Quality, Speed
from compose.search.probes import Probe
from compose.search.target import Target

FACTOR = 4
"""Tokens of the next rung over those of a rung."""

TURN = Speed(prompt_tokens=128, new_tokens=64, min_seconds=0.5, repeats=2)
"""The speed of a cheap rung, at most: two rounds, since a ratio to the baseline needs two. Speed is
timed whatever the aim is, so that a search with another aim finds the probes."""

CHECKED = Lossless(prompts=2, new_tokens=16)
"""How speculation is checked on a cheap rung."""

LEAST_QUESTIONS = 24
"""Questions of a task on a cheap rung, at least."""


@dataclass(frozen=True)
class Rung:
    """One round of measuring."""

    number: int
    """From 1."""
    benchmark: Benchmark
    """The measurements of each chain."""


def cheap_rungs(benchmark: Benchmark, tokens: int, target: Target) -> tuple[Rung, ...]:
    """The rungs before the last one, whose benchmark is the file's own: at least one.

    The first scores `tokens` tokens; each further one has `FACTOR` times as many, as long as the
    file's benchmark has at least twice as many again.
    """
    whole = benchmark.quality.perplexity_tokens
    sizes = [min(tokens, whole)]
    while sizes[-1] * FACTOR * 2 <= whole:
        sizes.append(sizes[-1] * FACTOR)
    return tuple(
        Rung(number, _cheap(benchmark, size, len(sizes) - number + 1, target))
        for number, size in enumerate(sizes, 1)
    )


def _cheap(benchmark: Benchmark, tokens: int, before_last: int, target: Target) -> Benchmark:
    """A benchmark of `tokens` tokens, `before_last` rungs before the file's own."""
    tasks = benchmark.quality.tasks if target.bounds_of("retained") else ()
    limit = benchmark.quality.limit
    quality = Quality(
        perplexity=benchmark.quality.perplexity,
        perplexity_tokens=tokens,
        tasks=tasks,
        limit=min(limit, max(LEAST_QUESTIONS, limit // FACTOR**before_last)),
        batch_size=benchmark.quality.batch_size,
        own_answers=None,
    )
    check = benchmark.lossless
    lossless = check.model_copy(
        update={
            "prompts": min(check.prompts, CHECKED.prompts),
            "new_tokens": min(check.new_tokens, CHECKED.new_tokens),
        }
    )
    update = {"quality": quality, "lossless": lossless, "against": ()}
    return benchmark.model_copy(update={**update, "speed": _turn(benchmark.speed)})


def _turn(speed: Speed) -> Speed:
    """A short turn of the file's first shape."""
    return Speed(
        prompt_tokens=min(speed.prompt_tokens, TURN.prompt_tokens),
        new_tokens=min(speed.new_tokens, TURN.new_tokens),
        min_seconds=min(speed.min_seconds, TURN.min_seconds),
        repeats=TURN.repeats,
        batch_sizes=(1 if 1 in speed.batch_sizes else min(speed.batch_sizes),),
        prompts=speed.prompts,
        prompts_per_category=None if speed.prompts is None else 1,
    )


@dataclass(frozen=True)
class RungOutcome:
    """The outcome of a rung."""

    survivors: tuple[Probe, ...]
    """The best first."""
    dropped: dict[Chain, str]
    """Chain -> why it was dropped."""


def halve(probes: Iterable[Probe], target: Target, keep: int) -> RungOutcome:
    """Drop chains that miss a bound, and chains that `keep` better ones surpass which surely meet
    all.

    Where every chain misses, the `keep` nearest stay: they show what is available.
    """
    measured = list(probes)
    able = [probe for probe in measured if probe.failure is None]
    dropped = {probe.chain: f"failed: {probe.failure}" for probe in measured if probe.failure}
    missed = [probe for probe in able if target.standing(probe) == "missed"]
    ranked = sorted(able, key=lambda probe: (-target.rank(probe), probe.chain))
    if len(missed) == len(able):
        nearest = sorted(ranked, key=target.shortfall)
        dropped |= {probe.chain: target.why_missed(probe) for probe in nearest[keep:]}
        return RungOutcome(tuple(nearest[:keep]), dropped)
    dropped |= {probe.chain: target.why_missed(probe) for probe in missed}
    survivors, sure = [], 0
    for probe in ranked:
        if probe.chain in dropped:
            continue
        if sure >= keep:
            dropped[probe.chain] = f"{keep} better sequences surely meet the limits"
            continue
        survivors.append(probe)
        sure += target.standing(probe) == "met"
    return RungOutcome(tuple(survivors), dropped)


def survivor_count(count: int, finalists: int, *, is_last: bool) -> int:
    """How many chains that surely meet the bound go on from a rung of `count`: one in `FACTOR`,
    at least the finalists; from the last cheap rung these alone."""
    return finalists if is_last else max(finalists, math.ceil(count / FACTOR))
