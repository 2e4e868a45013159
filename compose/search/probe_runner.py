"""Measures chains on one rung: those that have no probe become a plan, and the plan is run.

It is what `gateskip run` runs: the same steps, cells, speed rounds and records, under
`runs/NAME-search/probes`, with the model folders in the store that all runs share. A search that
was ended goes on inside the batch that was at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from compose.contract import ANYWHERE, Needs, Role
from compose.language.schema import Chain
from compose.outputs.run_folder import RunFolder
from compose.outputs.sessions import speed_settings
from compose.planning.fingerprint import fingerprint
from compose.planning.keys import InputHashes, digest
from compose.planning.plan import Cell, Plan
from compose.processes.executors import Executor
from compose.processes.worker_process import Worker
from compose.results.environment import capture_environment
from compose.run.preflight import require_ready
from compose.run.runner import RunResult, run
from compose.run.state import Board, RunState, RunWorkers, Settings
from compose.search.halving import Rung
from compose.search.probes import Probe, ProbeStore, probe_key, probe_of
from compose.search.space import Space, plan_chains
from compose.stages.base import ModelShape
from compose.store import Store


class Shared:
    """An executor for several runs: a run's end does not close it."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.slots, self.local = executor.slots, executor.local
        self.timed_threads, self.attempts = executor.timed_threads, executor.attempts

    def start(self, role: Role, job: Path, log: Path, needs: Needs = ANYWHERE) -> Worker:
        """Start a worker."""
        return self._executor.start(role, job, log, needs)

    def environment(self, threads: int | None) -> dict[str, Any]:
        """The machine that timed workers run on."""
        return self._executor.environment(threads)

    def free_bytes(self) -> int:
        """Free memory of that machine."""
        return self._executor.free_bytes()

    def close(self) -> None:
        """Does nothing: the creator of the executor closes it."""


class ProbeRunner:
    """Runs plans of a search's chains, and keeps their probes."""

    def __init__(
        self,
        space: Space,
        shape: ModelShape | None,
        hashes: InputHashes,
        settings: Settings,
        executor: Executor,
        board: Board,
    ) -> None:
        self.space, self.board = space, board
        self.settings = replace(settings, room=False)  # chains that do not fit fail, others go on
        self._shape, self._hashes, self._executor = shape, hashes, Shared(executor)
        self.folder = settings.out.absolute() / f"{space.pipeline.name}-search"
        self.store = Store.beside(settings.out.absolute())
        self.probes = ProbeStore(self.store)

    def require_ready(self) -> None:
        """Fetch all that the file's own benchmark of any chain needs, before the first chain.

        Raises:
            UserError: with all that is missing, and a fix for each.
        """
        chains = [candidate.chain for candidate in self.space.candidates]
        plan = self.plan_finalists(chains, f"{self.space.pipeline.name}-found")
        folder = RunFolder.of(plan, self.settings.out)
        workers = RunWorkers(self._executor, folder)
        require_ready(RunState(plan, self.settings, folder, workers, self.board), list(plan.cells))

    def measure(self, chains: Sequence[Chain], rung: Rung) -> dict[Chain, Probe]:
        """The probes of these chains on a rung, and of the plain cells of those that skip or
        speculate, which are measured with them.

        Raises:
            UserError: the source model, or the baseline's data, is not available.
        """
        keys = self._keys(self._plan(chains, rung))
        stored = {chain: self.probes.get(key) for chain, key in keys.items()}
        probes = {chain: probe for chain, probe in stored.items() if probe is not None}
        missing = [chain for chain in keys if chain not in probes]
        return probes | (self._measured(missing, rung) if missing else {})

    def _measured(self, chains: Sequence[Chain], rung: Rung) -> dict[Chain, Probe]:
        """Run a plan of chains that have no probe, and store their probes.

        All batches of a rung share one run folder, so that the baseline, and the plain cells of
        those that draft, are scored once.
        """
        plan = self._plan(chains, rung)
        keys = self._keys(plan)
        name = f"rung{rung.number}-{digest(rung.benchmark.model_dump(mode='json'))}"
        renamed = replace(plan, pipeline=plan.pipeline.model_copy(update={"name": name}))
        settings = replace(
            self.settings, out=self.folder / "probes", store=self.store.root, draw=None
        )
        results = run(renamed, settings, self._executor, self.board).results
        probes = {}
        for cell in _probed(plan):
            measured = results.find(cell.name)
            if measured is None:
                probe = Probe(cell.chain, failure="it was not measured")
            else:
                probe = replace(probe_of(results, measured), chain=cell.chain)
            self.probes.put(keys[cell.chain], probe)
            probes[cell.chain] = probe
        return probes

    def _plan(self, chains: Sequence[Chain], rung: Rung) -> Plan:
        update = {"benchmark": rung.benchmark, "more_seeds": ()}
        pipeline = self.space.pipeline.model_copy(update=update)
        return plan_chains(pipeline, chains, self._shape, self._hashes)

    def _keys(self, plan: Plan) -> dict[Chain, str]:
        """Chain -> the key of its probe."""
        speed = speed_settings(plan, self._environment, fingerprint())
        return {cell.chain: probe_key(plan, cell, speed) for cell in _probed(plan)}

    @cached_property
    def _environment(self) -> dict[str, Any]:
        return capture_environment(self.space.pipeline.benchmark.threads)

    def finish(self, plan: Plan, *, report: bool = True) -> RunResult:
        """Run a plan as `gateskip run` does, in a folder of its own beside the other runs."""
        settings = self.settings if report else replace(self.settings, draw=None)
        return run(plan, settings, self._executor, self.board)

    def plan_finalists(self, chains: Sequence[Chain], name: str) -> Plan:
        """The plan of the last rung: chains under the file's own benchmark."""
        pipeline = self.space.pipeline.model_copy(update={"name": name})
        return plan_chains(pipeline, chains, self._shape, self._hashes)


def _probed(plan: Plan) -> list[Cell]:
    """The cells of a plan that get a probe: all but the baseline, dense and other engines."""
    return [cell for cell in plan.cells[1:] if cell.chain and cell.peer is None]
