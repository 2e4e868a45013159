"""Times drafts of one folder against each other in one process, for `gateskip tune-draft`.

Each repeat runs every system on every batch of every workload once. Cells of a run, and systems of
`gateskip bench`, have separate processes: see `compose.run.speed`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compose.bench.generate import stop_token_ids
from compose.bench.speed.systems import System, parse_system
from compose.bench.speed.workloads import Rows, Workloads
from compose.errors import UserError
from compose.units import Progress
from gateskip.decoding.decoder import Decoder


@dataclass(frozen=True)
class Run:
    """The continuations of one batch of prompts, and the time they took."""

    tokens: Rows
    prompt_tokens: int
    prefill_s: float
    decoded: int
    """New tokens without the first one of each row, which comes from prefill."""
    decode_s: float
    drafted: int = 0
    accepted: int = 0


class Runner:
    """The decoder under a system's settings: prompts as token ids in, greedy continuations out."""

    def __init__(self, decoder: Decoder, system: System) -> None:
        self.decoder, self.system = decoder, system
        self.stop_tokens = stop_token_ids(decoder)

    def __call__(self, rows: Rows, new_tokens: int) -> Run:
        """Continue `rows` by up to `new_tokens` each."""
        settings = self.system.settings
        generation = self.decoder.generate(rows, new_tokens, eos=self.stop_tokens, **settings)
        stats = generation.stats
        return Run(
            tokens=generation.tokens,
            prompt_tokens=stats.prompt_tokens,
            prefill_s=stats.prefill_s,
            decoded=stats.new_tokens - len(rows),
            decode_s=stats.decode_s,
            drafted=stats.drafted,
            accepted=stats.accepted,
        )


@dataclass
class Measurement:
    """Repeats of one system on one workload."""

    system: str
    workload: str
    """The category of the prompts."""
    prefill: list[float] = field(default_factory=list)
    """Prompt tokens a second, one for each repeat."""
    decode: list[float] = field(default_factory=list)
    """New tokens a second after the first of each row."""
    acceptance: float | None = None
    equal: bool = True
    """Whether its tokens were those of the first system."""

    def add(self, runs: Sequence[Run], equal: bool) -> None:
        """Add one repeat: the runs of the workload's batches."""
        self.equal &= equal
        self.prefill.append(_rate(runs, "prompt_tokens", "prefill_s"))
        self.decode.append(_rate(runs, "decoded", "decode_s"))
        drafted = sum(run.drafted for run in runs)
        self.acceptance = sum(run.accepted for run in runs) / drafted if drafted else None

    def to_json(self) -> dict[str, Any]:
        """Medians and extremes, and the repeats themselves."""
        return {
            "system": self.system,
            "workload": self.workload,
            "prefill_tokens_per_s": _summary(self.prefill),
            "decode_tokens_per_s": _summary(self.decode),
            "acceptance_rate": self.acceptance,
            "equal_to_first": self.equal,
        }


def runners_of(decoder: Decoder, names: Sequence[str]) -> dict[str, Runner]:
    """Name of a system -> the function that runs it.

    Raises UserError for an unknown system, or one that the folder cannot run.
    """
    systems = [parse_system(name) for name in names]
    for system in systems:
        budget = system.settings.get("budget", system.settings.get("draft_budget", 1.0))
        try:
            decoder.thresholds(budget)
            decoder.prepare_drafts(system.settings.get("draft_weights", "own"))
        except ValueError as error:
            reason = f"system {system.name}: {error}"
            raise UserError(reason, fix="choose another system") from error
    return {system.name: Runner(decoder, system) for system in systems}


def measure(
    runners: Mapping[str, Runner],
    workloads: Workloads,
    new_tokens: int,
    repeats: int,
    progress: Progress | None = None,
) -> list[Measurement]:
    """Each repeat runs every system on every batch of every workload once, in a rotating order.

    Systems alternate on each batch, since drift of the machine lasts for seconds. Tokens are
    compared with those of the first system.
    """
    measurements = {
        (name, workload): Measurement(name, workload) for name in runners for workload in workloads
    }
    done, total = 0, repeats * sum(map(len, workloads.values()))
    for run in runners.values():  # everything built on first use exists before the timing starts
        run(next(iter(workloads.values()))[0], new_tokens)
    names = list(runners)
    for _ in range(repeats):
        for workload, groups in workloads.items():
            runs: dict[str, list[Run]] = {name: [] for name in names}
            for rows in groups:
                offset = done % len(names)
                for name in (*names[offset:], *names[:offset]):
                    runs[name].append(runners[name](rows, new_tokens))
                done += 1
                if progress is not None:
                    progress(done, total, workload)
            first = [run.tokens for run in runs[names[0]]]
            for name, series in runs.items():
                measurements[name, workload].add(series, first == [run.tokens for run in series])
    return list(measurements.values())


def _rate(runs: Sequence[Run], tokens: str, seconds: str) -> float:
    spent: float = sum(getattr(run, seconds) for run in runs)
    return float(sum(getattr(run, tokens) for run in runs) / max(spent, 1e-9))


def _summary(values: Sequence[float]) -> dict[str, Any]:
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "repeats": list(values),
    }
