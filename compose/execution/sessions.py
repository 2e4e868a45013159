"""Speed sessions: the rounds of cells whose speed is compared, kept on disk one line a round."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from compose.execution.run_folder import MEASURE_VERSION, RunFolder
from compose.planning.keys import digest
from compose.planning.plan import Cell, Plan
from compose.store import write_text


class Round(NamedTuple):
    """One measurement of every cell of a group, at one batch size."""

    group: int
    """Index in `Session.groups`."""
    batch: int
    """Prompts at once."""
    number: int
    """Which repeat, from 0."""


@dataclass
class Session:
    """Cells measured in interleaved rounds, and the rounds that are complete.

    Only numbers of one session may be compared. The file's first line describes the session; each
    further line is one round with every cell's numbers.
    """

    file: Path
    settings: dict[str, Any]
    """Everything beside the cells on which the numbers depend."""
    members: dict[str, str]
    """Cell name -> cell key."""
    groups: list[list[str]]
    """Names of cells that were held in memory together; the baseline is in each."""
    environment: dict[str, Any]
    command: str
    rounds: dict[Round, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """Round -> cell name -> its numbers."""
    seconds: float = 0.0
    """Wall time of all rounds."""

    @classmethod
    def load(cls, file: Path) -> Session | None:
        """Read a session without a last line that a kill cut short; None where it is not one."""
        lines = [_json_or_none(line) for line in _lines(file)]
        if not lines or lines[0] is None:
            return None
        session = cls(file=file, **lines[0])
        for line in lines[1:]:
            if line is not None:
                each = Round(line["group"], line["batch"], line["round"])
                session.rounds[each] = line["cells"]
                session.seconds += line["seconds"]
        return session

    def create(self) -> None:
        """Write the first line."""
        head = {
            "settings": self.settings,
            "members": self.members,
            "groups": self.groups,
            "environment": self.environment,
            "command": self.command,
        }
        write_text(self.file, json.dumps(head) + "\n")

    def add(self, each: Round, cells: dict[str, dict[str, Any]], seconds: float) -> None:
        """Keep a round: the numbers of its cells by name, and the time that it took."""
        group, batch, number = each
        line = {"group": group, "batch": batch, "round": number, "seconds": round(seconds, 3)}
        with self.file.open("r+b") as file:
            content = file.read()
            file.seek(content.rfind(b"\n") + 1)  # over a line that a kill cut short
            file.write(json.dumps({**line, "cells": cells}).encode() + b"\n")
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        self.rounds[each] = cells
        self.seconds += seconds

    def planned(self) -> list[Round]:
        """Every round of the session, in the order in which they run."""
        batches, repeats = self.settings["speed"]["batch_sizes"], self.settings["speed"]["repeats"]
        return [
            Round(group, batch, number)
            for group in range(len(self.groups))
            for batch in batches
            for number in range(repeats)
        ]

    def complete(self, each: Round) -> bool:
        """Whether a round has the numbers of every cell of its group."""
        return set(self.rounds.get(each, {})) >= set(self.groups[each.group])

    def finished(self) -> bool:
        """Whether every round is complete."""
        return all(map(self.complete, self.planned()))

    def of_cell(self, name: str) -> dict[int, list[dict[str, Any]]]:
        """Batch size -> the cell's numbers, round by round."""
        by_batch: dict[int, list[dict[str, Any]]] = {}
        for each in self.planned():
            numbers = self.rounds.get(each, {}).get(name)
            if numbers is not None:
                by_batch.setdefault(each.batch, []).append(numbers)
        return by_batch


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _json_or_none(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def speed_settings(plan: Plan, environment: Mapping[str, Any]) -> dict[str, Any]:
    """What two speed measurements must share to be comparable, beside the cells."""
    benchmark = plan.pipeline.benchmark
    machine = ("processor", "cores", "threads", "memory_bytes", "accelerator", "versions")
    return {
        "speed": benchmark.speed.model_dump(mode="json"),
        "seed": plan.pipeline.seed,
        "machine": {name: environment.get(name) for name in machine},
        "version": MEASURE_VERSION,
    }


def find_session(run: RunFolder, settings: dict[str, Any], cells: Iterable[Cell]) -> Session | None:
    """The session of these cells with these settings that has the most rounds; else None."""
    keys = {cell.name: cell.key for cell in cells}.items()
    sessions: list[Session] = []
    for file in sorted(run.speed.glob("*.jsonl")):
        session = Session.load(file)
        if session and session.settings == settings and session.members.items() >= keys:
            sessions.append(session)
    return max(
        sessions, key=lambda session: (session.finished(), len(session.rounds)), default=None
    )


def new_session(
    run: RunFolder,
    settings: dict[str, Any],
    cells: Iterable[Cell],
    groups: list[list[str]],
    environment: dict[str, Any],
    command: str,
) -> Session:
    """Begin a session of these cells; it replaces one of the same cells and settings."""
    members = {cell.name: cell.key for cell in cells}
    file = run.speed / f"{digest({'settings': settings, 'members': members})}.jsonl"
    session = Session(file, settings, members, groups, environment, command)
    session.create()
    return session
