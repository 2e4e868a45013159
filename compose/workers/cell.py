"""Role `cell`: measure a cell, or several in turns, command by command."""

from __future__ import annotations

import ctypes
import gc
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from compose.bench.speed.workloads import TurnText
from compose.errors import StepError
from compose.processes.messages import CellCommand, CellRequest
from compose.units import Progress
from compose.workers.protocol import Channel, answer
from compose.workers.step import seed_everything

if TYPE_CHECKING:
    from compose.bench.cell import CellBench
    from compose.bench.peer_cell import PeerBench


def serve_cell(job: CellRequest, channel: Channel) -> None:
    """Answer the commands of the parent until `quit`, or until the parent closes the pipe."""
    cells = {job["name"]: _Cell(job, channel.progress)}
    for command in channel.receive():
        if command["do"] == "quit":
            return
        if command["do"] == "join":
            cells[command["job"]["name"]] = _Cell(command["job"], channel.progress)
            channel.send(answer(dict))
            continue
        if command["do"] == "drop":
            for each in cells.values():
                each.drop()
            channel.send(answer(return_memory))
            continue
        cell = cells[command.get("cell", job["name"])]
        channel.send(answer(partial(cell.measure, command)))


class _Cell:
    """A cell under measurement; `load` comes before every other command."""

    def __init__(self, job: CellRequest, progress: Progress) -> None:
        self._job, self._progress = job, progress
        self._bench: CellBench | PeerBench | None = None

    def drop(self) -> None:
        """Forget the model; `load` loads it again."""
        self._bench = None

    def measure(self, command: CellCommand) -> dict[str, Any]:
        """What a command measures.

        Raises:
            StepError: the cell was not loaded before.
        """
        if command["do"] == "roofline":
            return measure_roofline(command["threads"])
        if command["do"] == "load":
            seed_everything(self._job["seed"])
            self._bench = open_bench(self._job, self._progress)
            return self._bench.load()
        if self._bench is None:
            raise StepError(f"the cell was asked for {command['do']!r} before it was loaded")
        if command["do"] == "quality":
            return self._bench.quality(Path(command["reference"]))
        if command["do"] == "lossless":
            return self._bench.lossless()
        which = TurnText(
            command["batch"], command["context"], command["category"], command["round"]
        )
        if command["do"] == "warm":
            return self._bench.warm(which, command["threads"])
        return self._bench.speed(which)


def return_memory() -> dict[str, Any]:
    """Give memory that nothing uses back to the system, so that what comes next lies elsewhere."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    return {}


def measure_roofline(threads: int) -> dict[str, float]:
    """What the machine reads and multiplies at most, with so many threads."""
    import torch

    from compose.bench.speed.roofline import roofline

    torch.set_num_threads(threads)
    return roofline()


def open_bench(job: CellRequest, progress: Progress) -> CellBench | PeerBench:
    """What measures the cell; it loads nothing yet."""
    from compose.bench.cell import CellBench
    from compose.bench.job import CellJob

    described = CellJob(
        name=job["name"],
        folder=Path(job["folder"]),
        baseline_folder=Path(job["baseline_folder"]),
        decode=job["decode"],
        benchmark=job["benchmark"],
        seed=job["seed"],
        dtype=job["dtype"],
        backend=cast(Any, job["backend"]),
        baseline_backend=job["baseline_backend"],
        asset_cache=Path(job["asset_cache"]),
        reference=Path(job["reference"]),
        threads=job["threads"],
        learns_from=[(source, limit) for source, limit in job["learns_from"]],
    )
    if job["peer"] is None:
        return CellBench(described, progress)
    from compose.bench.peer_cell import PeerBench

    return PeerBench(described, job["peer"], progress)
