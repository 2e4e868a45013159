"""The search: propose, measure by successive halving, pick, and write a pipeline file.

    first rung    batches of proposals on few tokens, until space, `probes` or time is used up
    further rungs what is left, with four times the tokens each
    last rung     the finalists under the file's own benchmark, in one run
    output        the winner and the front, as a pipeline file whose run is the last rung's

Only probes and runs are stored: a search that is started again proposes the same chains, finds
their probes, and goes on with the chains that have none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compose.errors import StepError, UserError
from compose.language.parse import load_pipeline
from compose.language.schema import Chain, Pipeline, Search
from compose.planning.prepare import (
    input_hashes,
    load_plan,
    model_shape,
    refuse_longer,
    require_inputs,
)
from compose.processes.executors import Executor
from compose.results.schema import CellResult, Results
from compose.run.runner import RunResult
from compose.run.state import Board, Settings
from compose.search.halving import Rung, cheap_rungs, halve, survivor_count
from compose.search.output import SHOWN, front, pipeline_of_chains, to_yaml
from compose.search.probe_runner import ProbeRunner
from compose.search.probes import Probe, number, probe_of
from compose.search.propose import Proposer
from compose.search.space import Space, build_space
from compose.search.target import Target
from compose.store import write_text

Fates = dict[Chain, str]
"""Chain -> why it did not come to the last rung."""

Clock = Callable[[], float]


@dataclass(frozen=True)
class SearchResult:
    """How a search ended."""

    target: Target
    winner: CellResult | None
    """The best cell within the bounds; None where no cell is known to meet them."""
    why_none: UserError | None
    """The reason why none is, and the nearest cell."""
    front: tuple[CellResult, ...]
    """The Pareto front, the best in the aim first."""
    last: Results
    """All finalists, measured in full."""
    run: RunResult
    """The run of the file that was written."""
    file: Path
    """The written pipeline file."""
    space: Space
    probed: int
    """Chains that the first rung measured."""
    fates: Fates
    seconds: float
    """Wall time of this command."""

    def to_json(self) -> dict[str, Any]:
        """The outcome for scripts."""
        names = [SHOWN.get(self.target.metric, self.target.metric)]
        names += [bound.metric for bound in self.target.bounds]
        return {
            "search": self.space.pipeline.name,
            "target": self.target.to_json(),
            "winner": None if self.winner is None else self.winner.name,
            "why_none": None if self.why_none is None else self.why_none.message,
            "front": [
                {"cell": cell.name, **{name: number(self.last, name, cell) for name in names}}
                for cell in self.front
            ],
            "chains": len(self.space.candidates),
            "probed": self.probed,
            "finalists": len(self.last.measured) - 1,
            "file": str(self.file),
            "results": str(self.run.folder.results_file),
            "seconds": round(self.seconds, 1),
        }


def search(
    file: Path,
    target: Target,
    settings: Settings,
    executor: Executor,
    board: Board,
    *,
    budget_s: float | None = None,
    clock: Clock = time.monotonic,
) -> SearchResult:
    """Search the space of a pipeline file; writes a pipeline file with the best chains.

    After `budget_s` seconds no further batch is proposed; the chains measured until then go through
    the remaining rungs. The executor is closed.

    Raises:
        UserError: the file, or what it names, cannot be used.
        StepError: no chain could be measured.
    """
    try:
        return _Search(file, target, settings, executor, board, budget_s, clock).run()
    finally:
        executor.close()


class _Search:
    """One search under way."""

    def __init__(
        self,
        file: Path,
        target: Target,
        settings: Settings,
        executor: Executor,
        board: Board,
        budget_s: float | None,
        clock: Clock,
    ) -> None:
        self.target, self.settings, self.board = target, settings, board
        self.clock, self.started = clock, clock()
        self.until = float("inf") if budget_s is None else self.started + budget_s
        self.pipeline = load_pipeline(file)
        _require_measures(self.pipeline, target)
        require_inputs(self.pipeline)
        self.search = self.pipeline.search or Search()
        shape = model_shape(self.pipeline, settings.asset_cache)
        refuse_longer(self.pipeline, shape)
        hashes = input_hashes(self.pipeline, settings.asset_cache)
        self.space = build_space(self.pipeline, shape, hashes)
        self.runner = ProbeRunner(self.space, shape, hashes, settings, executor, board)
        self.rungs = cheap_rungs(self.pipeline.benchmark, self.search.tokens, target)
        self.fates: Fates = {}

    def run(self) -> SearchResult:
        """All rungs, and the file."""
        self.runner.require_ready()
        probes = self._first_rung()
        finalists = self._further_rungs(probes)
        name = f"{self.pipeline.name}-found"
        plan = self.runner.plan_finalists(finalists, name)
        last = self.runner.finish(plan, report=False).results
        winner, why_none = self._pick(last)
        best = front(last, self.target)
        written = self._write(name, last, winner, best, finalists)
        again = self.runner.finish(load_plan(written, self.settings.asset_cache))
        return SearchResult(
            target=self.target,
            winner=winner,
            why_none=why_none,
            front=tuple(best),
            last=last,
            run=again,
            file=written,
            space=self.space,
            probed=len(probes),
            fates=self.fates,
            seconds=self.clock() - self.started,
        )

    # -- rungs ---------------------------------------------------------------------------------

    def _first_rung(self) -> dict[Chain, Probe]:
        """Batches of proposals, each based on the probes of the batches before."""
        proposer = Proposer(
            self.space,
            self.target,
            most=self.search.probes,
            seed=self.pipeline.seed,
            best=self.search.finalists,
        )
        probes: dict[Chain, Probe] = {}
        end = "others were predicted to do better"
        while batch := proposer.propose(probes, self.search.batch):
            if probes and self.clock() >= self.until:
                end = "the time was over"
                break
            seen = f"{len(probes)} of {len(proposer.able)} chains were measured before"
            probes |= self._measure(self.rungs[0], [candidate.chain for candidate in batch], seen)
        failures = [probe.failure for probe in probes.values() if probe.failure]
        if len(failures) == len(probes):
            raise StepError(f"no chain could be measured: {failures[0]}")
        for candidate in proposer.able:
            if candidate.chain not in probes:
                self.fates[candidate.chain] = f"not measured: {end}"
        for chain, bound in proposer.large.items():
            if chain not in probes:
                self.fates[chain] = f"not measured: by its plan it is too large for {bound}"
        return probes

    def _measure(self, rung: Rung, chains: Sequence[Chain], note: str) -> dict[Chain, Probe]:
        """The probes of a batch, with a progress line of its own."""
        tokens = rung.benchmark.quality.perplexity_tokens
        line = self.board.line(f"rung {rung.number} ({tokens} tokens): {len(chains)} chains")
        probes = self.runner.measure(chains, rung)
        best = max(
            (probe for probe in probes.values() if not probe.failure),
            key=lambda probe: (self.target.standing(probe) != "missed", self.target.rank(probe)),
            default=None,
        )
        line.done(note if best is None else f"{note}; {best.name}: {self._shown(best)}")
        return probes

    def _shown(self, probe: Probe) -> str:
        names = dict.fromkeys([self.target.metric, *(bound.metric for bound in self.target.bounds)])
        return ", ".join(probe.shown(name) for name in names)

    def _further_rungs(self, probes: Mapping[Chain, Probe]) -> list[Chain]:
        """The chains of the last rung: those that no rung dropped, and the front beside them."""
        first = len(probes)
        alive = list(probes.values())
        for rung in self.rungs:
            if rung is not self.rungs[0]:
                chains = [probe.chain for probe in alive]
                measured = self._measure(rung, chains, f"{len(chains)} of {first} chains are left")
                alive = [measured[chain] for chain in chains]
            keep = survivor_count(len(alive), self.search.finalists, is_last=rung is self.rungs[-1])
            halved = halve(alive, self.target, keep)
            for chain, why in halved.dropped.items():
                self.fates[chain] = f"rung {rung.number}: {why}"
            alive = list(halved.survivors)
        chosen = [probe.chain for probe in alive]
        for chain in self._beside(probes):
            if len(chosen) >= self.search.finalists:
                break
            if chain not in chosen:
                chosen.append(chain)
                self.fates.pop(chain, None)
        return chosen

    def _beside(self, probes: Mapping[Chain, Probe]) -> list[Chain]:
        """Chains of the first rung beyond the bounds, the nearest first, and then the best of all
        others: they show the effect of a looser bound."""
        able = [probe for probe in probes.values() if not probe.failure]
        able.sort(key=lambda probe: (self.target.shortfall(probe), -self.target.rank(probe)))
        return [probe.chain for probe in able]

    # -- the end -------------------------------------------------------------------------------

    def _pick(self, last: Results) -> tuple[CellResult | None, UserError | None]:
        """The winner, or why there is none, in the words of this command's options."""
        try:
            return self.target.pick(last), None
        except UserError as error:
            fix = error.fix or ""
            for bound in self.target.bounds:
                fix = fix.replace("--" + bound.pick.replace("_", "-"), bound.option)
            return None, UserError(error.message, fix=fix or None)

    def _write(
        self,
        name: str,
        last: Results,
        winner: CellResult | None,
        best: Sequence[CellResult],
        finalists: Sequence[Chain],
    ) -> Path:
        """Write the pipeline file: the winner first, then the front."""
        cells = [*([] if winner is None else [winner]), *best]
        chains = list(dict.fromkeys(cell.chain for cell in cells if cell.chain)) or list(finalists)
        written = pipeline_of_chains(self.space.pipeline, name, chains)
        path = self.runner.folder / f"{name}.yaml"
        remarks = [f"Found by a search for {self.target}."]
        if winner is None:
            remarks.append(
                "No chain is known to meet that: these come nearest, or are on the front."
            )
        else:
            remarks.append(f"Winner: {winner.name}: {self._shown(probe_of(last, winner))}.")
        remarks.append("The chains after it are the front: none of them is surpassed by another.")
        write_text(path, to_yaml(written, path.parent, remarks))
        return path


def _require_measures(pipeline: Pipeline, target: Target) -> None:
    """Refuse a target that the file's benchmark does not measure."""
    quality = pipeline.benchmark.quality
    reads = target.needs_text or (target.bounds_of("retained") and not quality.tasks)
    if reads and not quality.perplexity:
        error = UserError(
            f"the target ({target}) needs a text to score, and the file names none",
            fix="name one under benchmark.quality.perplexity",
        )
        raise pipeline.locate(error, ("benchmark", "quality", "perplexity"))
